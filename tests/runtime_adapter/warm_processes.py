"""Starts the runtime's commands as forks of a process that has loaded PyTorch and transformers.

Loading them takes seconds of CPU for each server of each test. A fork runs the same command line as
``python -m runtime_adapter``, in a process (and a session) of its own, and starts its own children
as always. Tests that are about the command itself, or about its start, use the real one.

Run as a module this is that process: it takes requests on the socket of its descriptor 0.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
#: What each fork has loaded.
PRELOADED = (
    "torch", "transformers", "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.deepseek_v2.modeling_deepseek_v2", "runtime_adapter.server",
    "runtime_adapter.driver", "runtime_adapter.moe.placed_model", "runtime_adapter.cli.serve",
    "runtime_adapter.spans.model_work", "runtime_adapter.cli.main",
)  # fmt: skip
POLL_S = 0.02
_MAX_BYTES = 1 << 16


class WarmProcess:
    """A fork, with what tests use of ``subprocess.Popen``."""

    def __init__(self, source: _Source, pid: int, stdin: IO[bytes] | None) -> None:
        self._source = source
        self.pid = pid
        self.stdin = stdin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._source.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(POLL_S)
        return code

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class _Source:
    """The process that forks, as tests talk to it."""

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime_adapter.warm_processes"],
            cwd=ROOT, env=environment, stdin=there,
        )  # fmt: skip
        there.close()
        self._socket = here
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request; returns the answer."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer: dict[str, Any] = json.loads(self._socket.recv(_MAX_BYTES))
        return answer


@functools.cache
def _source() -> _Source:
    return _Source()


def start_warm(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: bool, output: IO[bytes]
) -> WarmProcess:
    """Run ``python -m runtime_adapter`` with these words in a fork.

    Its output, and errors, go to ``output``; with ``stdin`` it reads what is written there.
    """
    source = _source()
    read, write = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), -1)
    try:
        request = {"words": list(words), "cwd": str(cwd), "env": dict(env)}
        pid = source.ask(request, [read, output.fileno()])["pid"]
    finally:
        os.close(read)
    return WarmProcess(source, pid, os.fdopen(write, "wb") if stdin else None)


# ------------------------------------------------------------------------ the process that forks


def _run(words: Sequence[str], cwd: str, env: Mapping[str, str], descriptors: list[int]) -> None:
    """Become the command, in a process that has just been forked."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    read, output = descriptors
    for descriptor, place in ((read, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, place)
    for descriptor in descriptors:
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["runtime_adapter", *words]
    main = sys.modules["__main__"]
    main.__spec__ = None  # children of multiprocessing load it again otherwise
    with contextlib.suppress(AttributeError):
        del main.__file__
    from runtime_adapter import PROGRAM
    from runtime_adapter.cli.main import cli, run_and_exit

    run_and_exit(cli, PROGRAM)


def main() -> None:
    """Fork for each request until the tests have ended."""
    import importlib

    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for name in PRELOADED:
        importlib.import_module(name)
    codes: dict[int, int] = {}
    while True:
        select.select([connection], [], [], 0.1)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        try:
            raw, descriptors, _, _ = socket.recv_fds(connection, _MAX_BYTES, 4, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        if not raw:
            return
        request = json.loads(raw)
        if "poll" in request:
            answer: dict[str, Any] = {"code": codes.get(request["poll"])}
        else:
            pid = os.fork()
            if not pid:
                connection.close()
                try:
                    _run(request["words"], request["cwd"], request["env"], descriptors)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(70)
            answer = {"pid": pid}
            for descriptor in descriptors:
                os.close(descriptor)
        connection.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
