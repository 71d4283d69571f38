"""Starts commands as forks of a process that has loaded their libraries.

Loading PyTorch and transformers takes seconds of CPU for each server of each test of the runtime,
and loading numpy, numba and pandas half a second for each of a thousand short commands. A fork runs
the same command line in a process (and a session) of its own, and starts its own children as
always. Tests that are about the start of a command, or its environment, use the real one.

Run as a module this is that process: it takes requests on the socket of its descriptor 0, and of
those who connect to the socket that it is told. The processes of pytest-xdist share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from tests.limits import HANG_S

Program = Literal["prism-plan", "prism-runtime"]
ROOT = Path(__file__).resolve().parents[1]
#: What each fork has loaded.
PRELOADED: dict[Program, tuple[str, ...]] = {
    "prism-plan": (
        "numpy", "numba", "pandas", "pyarrow.parquet", "pydantic", "rich.table", "scipy.optimize",
        "prism_plan.cli.main", "prism_plan.evaluate.comparison", "prism_plan.solvers.run",
        "prism_plan.simulate.sampling", "prism_plan.io.trace_reader", "prism_plan.io.placement",
        "prism_plan.evaluate.kernel_compilation",
    ),
    "prism-runtime": (
        "torch", "transformers", "transformers.models.mixtral.modeling_mixtral",
        "transformers.models.deepseek_v2.modeling_deepseek_v2", "runtime_adapter.server",
        "runtime_adapter.driver", "runtime_adapter.moe.placed_model", "runtime_adapter.cli.serve",
        "runtime_adapter.spans.model_work", "runtime_adapter.cli.main",
    ),
}  # fmt: skip
#: The variable with the folder of the sockets of shared processes.
SHARED = "PRISM_PLAN_WARM_PROCESSES"
POLL_S = 0.02
_MAX_BYTES = 1 << 16


class WarmProcess:
    """A fork, with what tests use of ``subprocess.Popen``."""

    def __init__(self, source: Source, pid: int, stdin: IO[bytes] | None) -> None:
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


class Source:
    """The process that forks, as tests talk to it: a shared one, or one of their own."""

    def __init__(self, program: Program, shared: Path | None = None) -> None:
        path = os.environ.get(SHARED, "")
        self._lock = threading.Lock()
        if shared is None and path:
            self._socket = _connected(Path(path) / program)
            return
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [] if shared is None else [str(shared / program)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_processes", program, *words],
            cwd=ROOT, env=environment, stdin=there,
        )  # fmt: skip
        there.close()
        self._socket = here

    def close(self) -> None:
        """End a process that :func:`share_sources` has started."""
        self._socket.close()
        self._process.wait(HANG_S)

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request; returns the answer."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer: dict[str, Any] = json.loads(self._socket.recv(_MAX_BYTES))
        return answer


def _connected(path: Path) -> socket.socket:
    """A connection to a process that forks; waits until it listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            connection.connect(str(path))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
        else:
            return connection


def share_sources(folder: Path) -> list[Source]:
    """Start the processes that fork for all processes of pytest-xdist, until they are closed."""
    os.environ.pop(SHARED, None)
    sources = [Source(program, folder) for program in PRELOADED]
    os.environ[SHARED] = str(folder)
    return sources


@functools.cache
def _source(program: Program) -> Source:
    return Source(program)


def start_warm(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: bool, output: IO[bytes],
    errors: IO[bytes] | None = None, program: Program = "prism-runtime",
) -> WarmProcess:  # fmt: skip
    """Run a program with these words in a fork.

    Its output goes to ``output``, and so do errors if they are not to go to ``errors``; with
    ``stdin`` it reads what is written there.
    """
    source = _source(program)
    read, write = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), -1)
    try:
        request = {"words": list(words), "cwd": str(cwd), "env": dict(env)}
        descriptors = [read, output.fileno(), (errors or output).fileno()]
        pid = source.ask(request, descriptors)["pid"]
    finally:
        os.close(read)
    return WarmProcess(source, pid, os.fdopen(write, "wb") if stdin else None)


def run_warm(
    words: Sequence[str], *, cwd: Path | None = None, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run ``prism-plan`` in a fork; returns its exit code, output and errors."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start_warm(
            words, cwd=cwd or Path.cwd(), env=os.environ, stdin=False, output=output,
            errors=errors, program="prism-plan",
        )  # fmt: skip
        code = process.wait(timeout_s)
        said = []
        for stream in (output, errors):
            stream.seek(0)
            said.append(stream.read().decode("utf-8", "backslashreplace"))
    return subprocess.CompletedProcess(list(words), code, *said)


# ------------------------------------------------------------------------ the process that forks


def _run(
    program: str, words: Sequence[str], cwd: str, env: Mapping[str, str], descriptors: list[int]
) -> None:
    """Become the command, in a process that has just been forked."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    for descriptor in descriptors:
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [program, *words]
    main = sys.modules["__main__"]
    main.__spec__ = None  # children of multiprocessing load it again otherwise
    with contextlib.suppress(AttributeError):
        del main.__file__
    if program == "prism-plan":
        from prism_plan.cli.main import run

        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    from runtime_adapter import PROGRAM
    from runtime_adapter.cli.main import cli, run_and_exit

    run_and_exit(cli, PROGRAM)


def compile_kernels_once() -> None:
    """Compile what commands compile; of several processes that do so at once the first one does.

    The others wait, and load its code.
    """
    from prism_plan.evaluate.kernel_compilation import compile_kernels

    with open(Path(tempfile.gettempdir()) / f"prism-plan-kernels-{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile_kernels()


def main() -> None:
    """Fork for each request until the tests have ended."""
    import importlib

    program = sys.argv[1]
    own = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    listener = None
    for name in PRELOADED[program]:  # type: ignore[index]
        importlib.import_module(name)
    if program == "prism-plan":
        compile_kernels_once()
    if sys.argv[2:]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(sys.argv[2])
        listener.listen()
    gc.freeze()  # forks share what there is as long as nobody writes to it
    connections = [own]
    codes: dict[int, int] = {}
    while True:
        waiting = [*connections, *([listener] if listener is not None else [])]
        ready = select.select(waiting, [], [], 0.1)[0]
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        for connection in ready:
            if connection is listener:
                connections.append(listener.accept()[0])
            elif not _answer(program, connection, waiting, codes):  # type: ignore[arg-type]
                if connection is own:
                    return
                connections.remove(connection)
                connection.close()


def _answer(
    program: Program, connection: socket.socket, inherited: Sequence[socket.socket],
    codes: Mapping[int, int],
) -> bool:  # fmt: skip
    """Take one request; gives whether the other side is still there.

    A fork closes the sockets that it has ``inherited``.
    """
    try:
        raw, descriptors, _, _ = socket.recv_fds(connection, _MAX_BYTES, 4)
    except ConnectionError:
        return False
    if not raw:
        return False
    request = json.loads(raw)
    if "poll" in request:
        answer: dict[str, Any] = {"code": codes.get(request["poll"])}
    else:
        pid = os.fork()
        if not pid:
            for one in inherited:
                one.close()
            try:
                _run(program, request["words"], request["cwd"], request["env"], descriptors)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(70)
        answer = {"pid": pid}
        for descriptor in descriptors:
            os.close(descriptor)
    with contextlib.suppress(ConnectionError):
        connection.send(json.dumps(answer).encode())
    return True


if __name__ == "__main__":
    main()
