"""The store of a run in this process: its methods, and clients without sockets."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from prism_plan.errors import InputError, PrismError
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_entries import LogEntry, read_entry
from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.control.store.messages import error_fields, pack, unpack
from runtime_adapter.control.store.methods import StoreMethods

ADDRESS = StoreAddress("memory", 1)


class MemoryStore:
    """A store that can be away, and restarted; ``run`` is what its run is started with."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run
        self.begun = False
        self.away = False
        self.methods = StoreMethods()
        self._changed = threading.Condition()
        self.past: list[LogEntry] = []  # of the epochs before
        self.restart()

    def restart(self) -> None:
        """Begin a new epoch, of which a driver starts the run at once."""
        with self._changed:
            self.past += self.entries()
            self.methods = StoreMethods(on_append=self._changed.notify_all)
            self.methods.start_run({"run": {**self.run, "begun": self.begun}}, "driver 0")
            self._changed.notify_all()

    def tick(self) -> None:
        """Let the store look for lost members."""
        with self._changed:
            self.methods.tick()
            self.begun = self.begun or self.methods.status({}, "")["begun_s"] is not None

    def call(self, method: str, client: str = "status", body: bytes = b"", **fields: Any) -> Any:
        """The result of a request."""
        with self._changed:
            return self.methods.call(method, fields, client, body)[0]

    def entries(self) -> list[LogEntry]:
        """The valid entries of this epoch."""
        found: list[LogEntry] = []
        after = -1
        while answer := self.call("read", epoch=self.methods.epoch, after=after, wait_s=0):
            if not answer["entries"]:
                break
            for after, text in answer["entries"]:
                with contextlib.suppress(InputError):
                    found.append(read_entry(after, text.encode()))
        return found

    def inject(self, text: str) -> None:
        """Put an entry into the log that the store would refuse."""
        with self._changed:
            run = self.methods._current
            assert run is not None
            run.log.append(text)
            run.state.number += 1
            self._changed.notify_all()

    def exchange(self, frame: bytes, client: str, wait_s: float) -> tuple[dict[str, Any], bytes]:
        """The answer to a request, as the service gives it."""
        head, body = unpack(frame, "a request")
        deadline = time.monotonic() + wait_s
        with self._changed:
            methods = self.methods
            try:
                while True:
                    if self.away or methods is not self.methods:
                        raise ConnectionError("the store is away")
                    result, answer_body = methods.call(str(head["method"]), head, client, body)
                    if head["method"] != "read" or result is not None:
                        break
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        result = methods.nothing_to_read(head)
                        break
                    self._changed.wait(min(left_s, 0.1))
                fields = {"result": result}
            except PrismError as error:
                fields, answer_body = error_fields(error), b""
            envelope = {"id": head["id"], "epoch": methods.epoch, "has_run": methods.has_run}
        return unpack(pack({**envelope, **fields}, answer_body), "an answer")


class MemoryClient(StoreClient):
    """A client whose requests are calls."""

    def __init__(self, store: MemoryStore, name: str) -> None:
        super().__init__(ADDRESS, name)
        self._store = store

    def _exchange(self, frame: bytes, left_s: float, wait_s: float) -> tuple[dict[str, Any], bytes]:
        with contextlib.suppress(AttributeError):  # a closed client is noticed by its caller
            if self._closed.is_set():
                raise ConnectionError("closed")
        return self._store.exchange(frame, self.name, wait_s)


def memory_log(store: MemoryStore, writer: str) -> EventLog:
    """A client of the log in a memory store."""
    log = EventLog(ADDRESS, writer)
    log.client = MemoryClient(store, writer)
    return log
