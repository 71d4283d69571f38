"""Stores in this process: methods alone with a clock that stands still, and whole services."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runtime_adapter.control.log_entries import LogEntry, write_entry
from runtime_adapter.control.store.client import StoreAddress
from runtime_adapter.control.store.methods import StoreMethods
from runtime_adapter.control.store.service import StoreService
from runtime_adapter.transport.listener import listen
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret
from tests.limits import HANG_S

NAMES = ("a", "b", "c")
TIMEOUT_S = 5.0


def run_of(names: Sequence[str] = NAMES, **changes: Any) -> dict[str, Any]:
    """A run of servers with a GPU each, and twelve (layer, expert) pairs."""
    return {
        "facts": {"model": "tiny"}, "servers": list(names), "timeout_s": TIMEOUT_S,
        "bounds": [len(names), 12], "gpus": [1] * len(names), "movable": True, "scheduler": None,
        **changes,
    }  # fmt: skip


class ManualStore:
    """The store's methods under a clock that only :meth:`pass_s` moves."""

    def __init__(self, names: Sequence[str] = NAMES, *, epoch: str = "e") -> None:
        self.now_s = 0.0
        self._numbers = itertools.count()
        epochs = (f"{epoch}{i}" for i in itertools.count())
        self.store = StoreMethods(lambda: self.now_s, new_epoch=lambda: next(epochs))
        self.names = names

    def call(self, method: str, client: str = "driver 0", body: bytes = b"", **fields: Any) -> Any:
        """The result of a request."""
        return self.store.call(method, fields, client, body)[0]

    def start(self, **changes: Any) -> Any:
        """Start the run."""
        return self.call("start_run", run=run_of(self.names, **changes))

    def join(self, server: int, after: int = 0, port: int = 0, **changes: Any) -> int:
        """Let a server join that holds one expert."""
        fields = {
            "server": server, "host": "10.0.0.1", "port": port or 1000 + server, "after": after,
            "held": [[server, server, 0]], "token": f"join {next(self._numbers)}", **changes,
        }  # fmt: skip
        return int(self.call("join", f"worker {server}", **fields))

    def start_with_all(self) -> None:
        """Start the run, and let all servers join."""
        self.start()
        for server in range(len(self.names)):
            self.join(server)

    def append(self, entry: LogEntry, client: str = "worker 0") -> int:
        """Append an entry."""
        text = write_entry(entry, client)
        return int(self.call("append", client, entry=text, epoch=self.store.epoch))

    def hear(self, server: int, kind: str, incarnation: int = 1, **info: Any) -> Any:
        """Let one heartbeat come."""
        return self.call("heartbeat", server=server, incarnation=incarnation, kind=kind, info=info)

    def pass_s(
        self,
        seconds: float,
        heard: Sequence[int] = (),
        suspects: Mapping[int, Sequence[int]] | None = None,
        incarnation: int = 1,
    ) -> None:
        """Let time pass, in which workers and drivers of some servers are heard."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.25
            for server in heard:
                self.hear(server, "worker", incarnation)
                self.hear(server, "driver", suspects=list((suspects or {}).get(server, ())))
            self.store.tick()

    def states(self) -> list[str]:
        """The states of all members."""
        return [member["state"] for member in self.call("members")]

    def entries(self, after: int = -1) -> list[dict[str, Any]]:
        """The entries after a number, as JSON."""
        answer = self.call("read", epoch=self.store.epoch, after=after, wait_s=0)
        return [json.loads(text) for _, text in answer["entries"]] if answer else []


@contextlib.contextmanager
def serving(
    listener: socket.socket, *, secret: RunSecret = NO_SECRET, keep: bool = False,
    reports: list[str] | None = None,
) -> Iterator[StoreAddress]:  # fmt: skip
    """A service in a thread of this process, at a socket that goes on listening afterwards."""
    lines = reports if reports is not None else []
    tasks: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
    started = threading.Event()

    async def serve() -> None:
        service = StoreService(listener, secret, keep=keep, report=lines.append)
        task = asyncio.current_task()
        assert task is not None
        tasks.append((asyncio.get_running_loop(), task))
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await service.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(HANG_S)
    loop, task = tasks[0]
    try:
        yield StoreAddress("127.0.0.1", listener.getsockname()[1], secret)
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join(HANG_S)
        assert not thread.is_alive()


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """A socket at a free port, as the supervisor binds it."""
    with listen("127.0.0.1", 0) as listener:
        yield listener


def wait_until(condition: Callable[[], Any], subject: str = "a condition") -> Any:
    """Wait until something is true; only what hangs lets this fail."""
    deadline = time.monotonic() + HANG_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{subject} did not come"
        time.sleep(0.01)
    return found
