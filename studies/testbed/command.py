"""The command line of the testbed: runs one command on every server and collects its output."""

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

from prism_plan.cli.error_boundary import run_command
from prism_plan.cli.internal_errors import write_log_line
from prism_plan.errors import OutputError
from studies.testbed.testbed import Testbed, check_command

#: Begins each line on standard error.
PROGRAM = "testbed"
#: Signals that end the testbed, which it passes on to its servers.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

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
    help="Passed to the servers as PRISM_RTT_MS, which add it themselves.",
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
    help="How long others may continue after a server has failed, or all after a signal.",
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
    name_list = None if names is None else names.split(",")
    if servers is None:
        servers = 3 if name_list is None else len(name_list)
    check_command(command)
    folder = None if logs is None else _folder(logs)
    with _SignalCatcher() as signals, contextlib.ExitStack() as stack:
        testbed = Testbed(servers, mbps, names=name_list, rtt_ms=rtt_ms, burst_kb=burst_kb)
        copiers: list[threading.Thread] = []
        # entered first, so done last: output is complete once the processes have ended
        stack.callback(_join, copiers)
        stack.enter_context(testbed)
        running = []
        for index in range(servers):
            if signals.signum:
                break
            with _outputs(folder, testbed.names[index]) as outputs:
                process = testbed.run(index, command, stdin=subprocess.DEVNULL, **outputs)
            running.append(process)
            copiers += _copy_output(process, testbed.names[index], signals)
        return _wait_for_servers(testbed, running, signals, grace_s)


def main() -> int:
    """Run the command line and return its exit code; every error is one line on standard error."""
    return run_command(cli, "testbed", program=PROGRAM)


class _SignalCatcher:
    """Records signals instead of being interrupted by them, so that a removal is completed."""

    def __init__(self) -> None:
        self.signum = 0
        self.count = 0
        self.reader_gone = threading.Event()
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _SignalCatcher:
        for signum in END_SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue  # under nohup
            self._before[signum] = signal.signal(signum, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self.count += 1


def _wait_for_servers(
    testbed: Testbed,
    running: list[subprocess.Popen[bytes]],
    signals: _SignalCatcher,
    grace_s: float,
) -> int:
    """Wait for the servers; returns the exit code of the testbed."""
    code = 0
    while not testbed.wait(0.05) and not signals.signum and not signals.reader_gone.is_set():
        if code := _first_failure(testbed, running):
            break
    if signals.signum:
        testbed.signal(signal.Signals(signals.signum))
        code = 128 + signals.signum
    elif signals.reader_gone.is_set():
        testbed.signal(signal.SIGTERM)
        code = 128 + signal.SIGPIPE
    code = code or _first_failure(testbed, running)
    if not _wait_for_end(testbed, signals, grace_s):
        testbed.signal(signal.SIGTERM)
        _wait_for_end(testbed, signals, KILL_AFTER_S)  # the testbed kills what is left
    return code


def _wait_for_end(testbed: Testbed, signals: _SignalCatcher, timeout_s: float) -> bool:
    """Wait until the servers have ended, the time is over, or another signal comes."""
    deadline = time.monotonic() + timeout_s
    count = signals.count
    while not testbed.wait(0.05):
        if time.monotonic() >= deadline or signals.count > count:
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
    """The files or pipes to which a server's output goes."""
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


def _copy_output(
    process: subprocess.Popen[bytes], name: str, signals: _SignalCatcher
) -> Iterator[threading.Thread]:
    """Start threads that copy a server's output, each line behind its name."""
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        if source is not None:
            arguments = (source, target.buffer, f"{name}: ".encode(), signals)
            copier = threading.Thread(target=_copy_lines, args=arguments, daemon=True)
            copier.start()
            yield copier


def _copy_lines(
    source: IO[bytes], target: IO[bytes], prefix: bytes, signals: _SignalCatcher
) -> None:
    with source:
        while line := source.readline(65_536):
            if signals.reader_gone.is_set():
                continue  # read on, so that no server blocks on a full pipe while it is ended
            try:
                # one write for a line, so that lines of several servers do not mix
                target.write(prefix + line.rstrip(b"\n") + b"\n")
                target.flush()
            except (OSError, ValueError):
                signals.reader_gone.set()


def _join(copiers: list[threading.Thread]) -> None:
    for copier in copiers:
        copier.join(KILL_AFTER_S)
