"""Messages on standard error, internal errors among them: one printable line each.

An internal error is an exception that no code expects: an assertion that fails, or a library that
fails in an unknown way. Its line asks for a report. The traceback is printed only where the
environment variable ``PRISM_PLAN_TRACEBACK`` is set to something other than ``0``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prism_plan.errors import PrismError
from prism_plan.printable_text import printable, printable_lines

#: Exit code of an internal error.
INTERNAL_ERROR_EXIT_CODE = 70
#: Set to anything but 0 to see tracebacks of internal errors.
TRACEBACK_VARIABLE = "PRISM_PLAN_TRACEBACK"
#: Our packages, whose frames are named in messages; the boundary is part of every traceback.
OWN_PACKAGES = ("prism_plan", "runtime_adapter")
_BOUNDARY = "prism_plan.cli.error_boundary"
#: Messages of exceptions are cut to so many characters.
_MAX_MESSAGE = 300


#: Writes lines in the place of :func:`write_log_line`, where a program has a log of its own.
_line_writer: Callable[[str], None] | None = None


def write_lines_with(writer: Callable[[str], None] | None) -> None:
    """Give all lines to a program's own log from now on, or (``None``) no longer."""
    global _line_writer
    _line_writer = writer


def write_log_line(program: str, message: str) -> None:
    """Write one line to standard error; where that is closed, it is lost."""
    if _line_writer is not None:
        _line_writer(message)
        return
    line = printable(" ".join(message.split()))
    # ValueError: the stream was closed; AttributeError: there is none
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{program}: {line}\n")
        sys.stderr.flush()


def report_internal_error(program: str, error: BaseException) -> int:
    """Print an internal error on standard error; gives the exit code."""
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(printable_lines("".join(traceback.format_exception(error))))
    write_log_line(program, internal_error_line(error))
    return INTERNAL_ERROR_EXIT_CODE


def internal_error_line(error: BaseException) -> str:
    """An unforeseen exception in one line: its type, message and place, and our version."""
    from prism_plan import __version__

    try:
        message = " ".join(str(error).split())
    except Exception:  # a library's exception may fail to show itself
        message = ""
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]}…"
    what = type(error).__name__ + (f": {message}" if message else "")
    return printable(
        f"internal error: {what} [{error_location(error)}, prism-plan {__version__}]; please "
        "report this line with the command and its files "
        f"({TRACEBACK_VARIABLE}=1 shows the traceback)"
    )


def error_location(error: BaseException) -> str:
    """Where an exception was raised, as ``module:line``; of a library's, who called it too."""
    places = [
        (frame.f_globals.get("__name__", "?"), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    places += _worker_process_frames(error)
    if not places:
        return "raised nowhere"
    own = [
        place
        for place in places
        if str(place[0]).split(".")[0] in OWN_PACKAGES and place[0] != _BOUNDARY
    ]
    text = "{}:{}".format(*places[-1])
    if own and own[-1] != places[-1]:
        text += ", called from {}:{}".format(*own[-1])
    return text


def _worker_process_frames(error: BaseException) -> list[tuple[str, int]]:
    """Frames of an exception that came from a worker process, which joblib attaches as text."""
    if type(error.__cause__).__name__ not in ("_RemoteTraceback", "RemoteTraceback"):
        return []
    found = re.findall(r'File "([^"]+)", line (\d+)', str(error.__cause__))
    return [(_module_of(path), int(line)) for path, line in found]


def _module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    at = next((at for at, part in enumerate(parts) if part in OWN_PACKAGES), len(parts) - 1)
    return ".".join(parts[at:])


@contextlib.contextmanager
def single_line_messages(program: str) -> Iterator[None]:
    """In the block, warnings, log records and errors of threads are one printable line each.

    By default they come with paths, source lines, tracebacks and unprintable text of files.
    """
    last_resort = logging.lastResort
    formatter = None if last_resort is None else last_resort.formatter
    excepthook = threading.excepthook
    threading.excepthook = partial(_report_thread_error, program)
    if last_resort is not None:
        last_resort.setFormatter(_SingleLineFormatter())
    with _single_line_warnings(program):
        try:
            yield
        finally:
            threading.excepthook = excepthook
            if last_resort is not None:
                last_resort.setFormatter(formatter)


@contextlib.contextmanager
def _single_line_warnings(program: str) -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        write_log_line(program, f"warning: {category.__name__}: {message}")

    shown = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown


class _SingleLineFormatter(logging.Formatter):
    """Log records as one printable line, without the traceback that may be attached."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(" ".join(record.getMessage().split()))


def _report_thread_error(program: str, args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        report_internal_error(program, args.exc_value)


def run_process(program: str, function: Callable[..., None], *arguments: Any) -> None:
    """Run a function as the whole work of a child process: errors are one line and exit code."""
    with single_line_messages(program):
        try:
            function(*arguments)
        except PrismError as error:
            write_log_line(program, str(error))
            raise SystemExit(error.exit_code) from None
        except Exception as error:
            raise SystemExit(report_internal_error(program, error)) from None
