"""The command line of the testbed: one command on every server, its output, its end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click

from prism_plan.cli.boundary import run_command
from prism_plan.cli.internal_errors import write_log_line
from prism_plan.errors import OutputError
from studies.testbed.testbed import Testbed, check_command

#: What begins each line on standard error.
PROGRAM = "testbed"
#: Signals that end the testbed; its servers are sent the same one.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: A server that ignores SIGTERM is killed after this.
KILL_AFTER_S = 5.0


@click.command("testbed", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--servers", type=int, help="How many.  [default: 3, or as many as --names]")
@click.option("--names", metavar="A,B,C", help="Their names.  [default: server-0,...]")
@click.option("--mbps", type=float, default=500.0, show_default=True, help="Rate of every line.")
@click.option(
    "--rtt-ms",
    type=float,
    default=0.0,
    show_default=True,
    help="Told to the servers as PRISM_RTT_MS, which add it themselves.",
)
@click.option(
    "--burst-kb",
    type=float,
    default=64.0,
    show_default=True,
    help="What may pass unshaped after a pause.",
)
@click.option("--logs", metavar="DIR", help="Output to DIR/NAME.out and DIR/NAME.err instead.")
@click.option(
    "--grace-s",
    type=float,
    default=10.0,
    show_default=True,
    help="How long others may go on after a server has failed, or all after a signal.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def cli(
    servers: int | None,
    names: str | None,
    mbps: float,
    rtt_ms: float,
    burst_kb: float,
    logs: str | None,
    grace_s: float,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND once on each of several servers that are joined by shaped links.

    Each server is a network namespace of this machine; its uplink and its downlink pass a token
    bucket. {index}, {name} and {address} in the command's words are replaced. In the environment
    are PRISM_SERVER_INDEX, PRISM_SERVER_NAME, PRISM_SERVERS, PRISM_NAMES, PRISM_INTERFACE,
    PRISM_ADDRESS, PRISM_ADDRESSES and PRISM_RTT_MS. Everything is removed at the end. Needs root
    and iproute2.

    Exit code: that of the first server that fails, 128 + the signal if one ended it; 2 if there is
    no testbed, 70 an internal error (please report its line).
    """
    given = None if names is None else names.split(",")
    if servers is None:
        servers = 3 if given is None else len(given)
    check_command(command)
    folder = None if logs is None else _folder(logs)
    with _Endings() as endings, contextlib.ExitStack() as stack:
        testbed = Testbed(servers, mbps, names=given, rtt_ms=rtt_ms, burst_kb=burst_kb)
        pumps: list[threading.Thread] = []
        # what is removed last is entered first: output is complete once its writers are gone
        stack.callback(_drain, pumps)
        stack.enter_context(testbed)
        running = []
        for index in range(servers):
            if endings.signum:
                break
            with _outputs(folder, testbed.names[index]) as outputs:
                process = testbed.run(index, command, stdin=subprocess.DEVNULL, **outputs)
            running.append(process)
            pumps += _pumps(process, testbed.names[index], endings)
        return _watch(testbed, running, endings, grace_s)


def main() -> int:
    """Run the command line and return its exit code; every error is one line on standard error."""
    return run_command(cli, "testbed", program=PROGRAM)


class _Endings:
    """Notes signals instead of being interrupted by them, so that a removal is never cut short."""

    def __init__(self) -> None:
        self.signum = 0
        self.count = 0
        self.reader_gone = threading.Event()
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Endings:
        for signum in ENDINGS:
            if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue  # under nohup
            self._before[signum] = signal.signal(signum, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self.count += 1


def _watch(
    testbed: Testbed, running: list[subprocess.Popen[bytes]], endings: _Endings, grace_s: float
) -> int:
    """Wait for the servers; the exit code of the testbed."""
    code = 0
    while not testbed.wait(0.05) and not endings.signum and not endings.reader_gone.is_set():
        if code := _first_failure(testbed, running):
            break
    if endings.signum:
        testbed.signal(signal.Signals(endings.signum))
        code = 128 + endings.signum
    elif endings.reader_gone.is_set():
        testbed.signal(signal.SIGTERM)
        code = 128 + signal.SIGPIPE
    code = code or _first_failure(testbed, running)
    if not _patient(testbed, endings, grace_s):
        testbed.signal(signal.SIGTERM)
        _patient(testbed, endings, KILL_AFTER_S)  # the testbed kills what is left
    return code


def _patient(testbed: Testbed, endings: _Endings, timeout_s: float) -> bool:
    """Wait until the servers have ended; one more signal ends the wait too."""
    end = time.monotonic() + timeout_s
    count = endings.count
    while not testbed.wait(0.05):
        if time.monotonic() >= end or endings.count > count:
            return False
    return True


def _first_failure(testbed: Testbed, running: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of a server that has failed, which is named on standard error; else 0."""
    for name, process in zip(testbed.names, running, strict=False):
        if code := process.poll():
            cause = f"exit code {code}" if code > 0 else f"signal {-code}"
            write_log_line(PROGRAM, f"{name} ended with {cause}")
            return code if code > 0 else 128 - code
    return 0


@contextlib.contextmanager
def _outputs(folder: Path | None, name: str) -> Iterator[dict[str, Any]]:
    """Where a server's output goes."""
    if folder is None:
        yield {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return
    try:
        with open(folder / f"{name}.out", "wb") as out, open(folder / f"{name}.err", "wb") as err:
            yield {"stdout": out, "stderr": err}
    except OSError as error:
        raise OutputError(f"{error.filename}: {(error.strerror or str(error)).lower()}") from error


def _folder(logs: str) -> Path:
    folder = Path(logs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--logs {logs}: {(error.strerror or str(error)).lower()}") from error
    return folder


def _pumps(
    process: subprocess.Popen[bytes], name: str, endings: _Endings
) -> Iterator[threading.Thread]:
    """Start threads that copy a server's output, each line behind its name."""
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        if source is not None:
            arguments = (source, target.buffer, f"{name}: ".encode(), endings)
            pump = threading.Thread(target=_pump, args=arguments, daemon=True)
            pump.start()
            yield pump


def _pump(source: IO[bytes], target: IO[bytes], prefix: bytes, endings: _Endings) -> None:
    with source:
        while line := source.readline(65_536):
            if endings.reader_gone.is_set():
                continue  # read on, so that no server waits for a full pipe while it is ended
            try:
                # one write for a line, so that lines of several servers do not mix
                target.write(prefix + line.rstrip(b"\n") + b"\n")
                target.flush()
            except (OSError, ValueError):
                endings.reader_gone.set()


def _drain(pumps: list[threading.Thread]) -> None:
    for pump in pumps:
        pump.join(KILL_AFTER_S)
