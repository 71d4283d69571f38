"""The processes of a cluster: how they are started, found and hit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from runtime_adapter.control.move_command import request_move
from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret

ROOT = Path(__file__).resolve().parents[2]
#: How often files of answers are looked at.
ANSWERS_INTERVAL_S = 0.02


def runtime_command() -> list[str]:
    """The words that start the installed program."""
    program = Path(sys.executable).with_name("prism-runtime")
    return [str(program)] if program.exists() else [sys.executable, "-m", "runtime_adapter"]


def environment() -> dict[str, str]:
    """Of all processes: one thread each, and a traceback of all threads where one is aborted."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip


class Places(Protocol):
    """Where the processes of a cluster run: on this machine's loopback, or in a testbed."""

    #: The address of the store.
    store: tuple[str, int]
    #: Options of a server, for its interface.
    options: list[str]

    def popen(self, place: str, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as the leader of a process group where a server, or "store", runs."""

    def status(self) -> dict[str, Any] | None:
        """What ``prism-runtime status`` says; None if the store does not answer."""

    def move(self, placement: Any, path: Path) -> tuple[int, str]:
        """Move the run to a placement, as JSON values and as a file; returns code and text."""

    def close(self) -> None:
        """Nothing more is asked."""


class Loopback:
    """All processes on this machine's loopback interface; they may have a secret."""

    def __init__(self, secret: RunSecret = NO_SECRET) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.store: tuple[str, int] = probe.getsockname()
        self.options: list[str] = []
        self._address = StoreAddress(self.store[0], self.store[1], secret)
        self._client = StoreClient(self._address, "status")

    def popen(self, place: str, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as the leader of a process group."""
        process: subprocess.Popen[bytes] = subprocess.Popen(
            words, env=environment(), start_new_session=True, **options
        )
        return process

    def status(self) -> dict[str, Any] | None:
        """What the store knows; None if it does not answer soon."""
        from prism_plan.errors import PrismError

        try:
            return self._client.status(1.0)
        except PrismError:
            return None

    def move(self, placement: Any, path: Path) -> tuple[int, str]:
        """Ask as the command does, without its start; a failure has the code that it would have."""
        from prism_plan.errors import PrismError

        try:
            return request_move(self._address, placement, 10.0)
        except PrismError as error:
            return error.exit_code, str(error)

    def close(self) -> None:
        """Close the connections to the store."""
        self._client.close()


class ServerProcess:
    """One launch of ``serve``: takes requests and gives answers, until it has ended.

    Answers are read from the file that it writes, from ``offset`` on. ``on_answer`` and ``on_end``
    are called in a thread of its own: for each answer, and when there are no more and the process
    has ended.
    """

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        answers: Path,
        offset: int,
        on_answer: Callable[[ServerProcess, dict[str, Any]], None],
        on_end: Callable[[ServerProcess], None],
    ) -> None:
        self.name = name
        self.process = process
        self.offset = offset
        self.ended = False
        self._answers = answers
        self._on_answer = on_answer
        self._on_end = on_end
        self._reader = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        """Begin to read answers."""
        self._reader.start()

    @property
    def pid(self) -> int:
        """The driver's."""
        return self.process.pid

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request; it is lost where the process is gone."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def finish(self) -> None:
        """There are no more requests."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _read(self) -> None:
        has_ended = False
        while not has_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ANSWERS_INTERVAL_S)
                has_ended = True
            for line in self._new_lines():
                self._on_answer(self, json.loads(line))
        self._on_end(self)

    def _new_lines(self) -> list[bytes]:
        """Complete lines of the file that were not read yet."""
        if not self._answers.exists():
            return []
        with open(self._answers, "rb") as stream:
            stream.seek(self.offset)
            lines = stream.read().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        self.offset += sum(map(len, complete))
        return complete


# ------------------------------------------------------------------------------- finding processes


def _spawned(pid: int) -> list[psutil.Process]:
    """The children that a process has spawned with multiprocessing, oldest first."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
    return sorted(found, key=lambda child: child.create_time())


def worker_of(driver: int) -> list[psutil.Process]:
    """The worker of a server; none while there is none."""
    return _spawned(driver)[-1:]


def store_children(supervisor: int) -> dict[str, list[psutil.Process]]:
    """The service, which has the listening socket, and the scheduler of a store."""
    found: dict[str, list[psutil.Process]] = {"service": [], "scheduler": []}
    for child in _spawned(supervisor):
        with contextlib.suppress(psutil.Error):
            sockets = child.net_connections(kind="tcp")
            listens = any(one.status == psutil.CONN_LISTEN for one in sockets)
            found["service" if listens else "scheduler"].append(child)
    return found


def own_store(driver: int) -> int | None:
    """The supervisor that a first server has started itself."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(driver).children():
            with contextlib.suppress(psutil.Error):
                if "--with-parent" in child.cmdline():
                    return int(child.pid)
    return None


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, so far as they are there."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> int:
    """Send a signal to processes; returns how many got it."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
            count += 1
    return count


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, or waits for its parent to notice that."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
