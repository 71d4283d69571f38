"""The boundary of every program: errors become one line on standard error and an exit code.

::

    done                                                   0
    bad input, wrong usage, a file that cannot be written  2
    infeasible                                             3
    a limit or the end of memory, with no result           4
    another server, a port or the store failed             5    (runtime)
    an internal error                                     70
    interrupted                                          130

The first ones are those of :mod:`prism_plan.errors`; any other exception is an internal error
(:mod:`prism_plan.cli.internal_errors`). Where a message names a parameter of the command, its
option is printed instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

import click

from prism_plan.cli.internal_errors import (
    OWN_PACKAGES,
    error_location,
    report_internal_error,
    single_line_messages,
    write_log_line,
)
from prism_plan.cli.options_dataclass import option_names, running_context
from prism_plan.errors import LimitReached, OutputError, PrismError
from prism_plan.jit import before_first_compilation, code_is_kept

INTERRUPTED_EXIT_CODE = 130
#: Modules of the extras, and which extra of a program brings them.
EXTRA_MODULES = frozenset({"accelerate", "safetensors", "torch", "transformers"})


def run_command(
    command: click.Command,
    name: str,
    *,
    program: str,
    arguments: Sequence[str] | None = None,
    interrupted: str = "interrupted",
    extra: str = "hf",
) -> int:
    """Run a command and return its exit code; every error is one line on standard error.

    ``name`` is what usage messages call the command, ``program`` what begins each line.
    ``interrupted`` is the message on Ctrl-C and SIGTERM, ``extra`` the extra to install where one
    of :data:`EXTRA_MODULES` is missing.
    """
    signal.signal(signal.SIGTERM, _terminate)
    _prepare_streams()
    _announce_compilation(program)
    args = list(sys.argv[1:] if arguments is None else arguments)
    names: dict[str, str] = {}
    with single_line_messages(program):
        try:
            return _invoke(command, name, args, names)
        except BaseException as error:
            return _exit_code(error, name, names, program, interrupted, extra)


def _prepare_streams() -> None:
    for stream_name in ("stdout", "stderr"):
        stream = getattr(sys, stream_name)
        if stream is None:  # closed by the caller; messages are lost, data must not be
            mode = os.O_RDONLY if stream_name == "stdout" else os.O_WRONLY
            setattr(sys, stream_name, open(os.open(os.devnull, mode), "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # an encoding that lacks a character is no error
            stream.reconfigure(errors="backslashreplace")


def _announce_compilation(program: str) -> None:
    """Say on a terminal why the first run on a machine takes longer."""
    if sys.stderr.isatty():
        before_first_compilation(
            lambda: write_log_line(
                program,
                "compiling for this machine: about 3 seconds, the simulator 10, latency 25, "
                + ("once" if code_is_kept() else "in every run: set NUMBA_CACHE_DIR to a folder"),
            )
        )


def _invoke(command: click.Command, name: str, arguments: list[str], names: dict[str, str]) -> int:
    """Run the command; its exit code is what it returns, if that is a number.

    ``names`` is filled with what a user calls the parameters of the command that ran.
    """
    try:
        # not command.main(): on Ctrl-C and on a closed pipe it prints and exits in its own way
        with command.make_context(name, arguments) as context:
            try:
                result = command.invoke(context)
            finally:
                names |= option_names(running_context(context))
    finally:
        sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _exit_code(
    error: BaseException,
    name: str,
    names: Mapping[str, str],
    program: str,
    interrupted: str,
    extra: str,
) -> int:
    """Print what went wrong in one line; gives the exit code."""
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case SystemExit():
            raise error
        case PrismError():
            code, message = error.exit_code, error.line(names)
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)  # which is the help
            return 2
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else name
            found = " ".join(error.format_message().split()).rstrip(".")
            code, message = 2, f"{found}; see {path} --help"
        case click.ClickException():
            code, message = 2, error.format_message()
        case KeyboardInterrupt() | click.Abort():
            code, message = INTERRUPTED_EXIT_CODE, interrupted
        case BrokenPipeError() if _stdout_reader_closed():
            _discard_stdout()  # as head and less do: no error
            return 0
        case _ if (short := _out_of_memory(error)) is not None:
            code, message = LimitReached.exit_code, short
        case ModuleNotFoundError() if (error.name or "").split(".")[0] in EXTRA_MODULES:
            code, message = 2, f"{error}; install the extra: pip install 'prism-plan[{extra}]'"
        case OSError() if error.errno is not None and not isinstance(error, BrokenPipeError):
            _discard_stdout()
            place = _error_place(error)
            reason = (error.strerror or str(error)).lower()
            if place == "standard output" and error.errno == errno.EBADF:
                reason = "is closed"
            code, message = OutputError.exit_code, f"{place}: {reason}"
        case _:
            return report_internal_error(program, error)
    write_log_line(program, message)
    return code


def _out_of_memory(error: BaseException) -> str | None:
    """The message where memory is exhausted: of this process or of a GPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:  # the latter is PyTorch's
        return "out of memory; use a smaller trace or cluster, or a larger machine"
    return None


def _error_place(error: OSError) -> str:
    """The file, or other object, that an error of the operating system is about."""
    if error.filename is not None:
        return (
            os.fsdecode(error.filename)
            if isinstance(error.filename, bytes)
            else str(error.filename)
        )
    own = error_location(error)
    printing = any(f"{package}.cli." in own for package in OWN_PACKAGES)
    return "standard output" if printing else f"the operating system, {own}"


def _stdout_reader_closed() -> bool:
    """Whether the pipe that broke is standard output, whose reader has closed its end."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _discard_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt
