"""Output: messages and progress to standard error, data to standard output.

All that the commands print passes here and is made printable (:mod:`prism_plan.printable_text`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.internal_errors import write_log_line
from prism_plan.io.file_writing import write_bytes
from prism_plan.printable_text import printable, printable_json

if TYPE_CHECKING:
    from prism_plan.trace import Trace

#: What begins each message.
PROGRAM = "prism-plan"
#: Traces of more rows than this are read with a progress bar.
PROGRESS_BAR_MIN_ROWS = 200_000


def log_info(message: str) -> None:
    """Write a message to standard error."""
    write_log_line(PROGRAM, message)


def print_line(text: str, *, err: bool = False) -> None:
    """Print a line of a result on standard output (or error)."""
    click.echo(printable(text), err=err)


def print_json(values: Any) -> None:
    """Print values as JSON on standard output."""
    import json

    text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)
    click.echo(printable_json(text))


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if that is a terminal; call it with (label, done)."""
    if not sys.stderr.isatty():
        yield lambda label, done, total=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total)

        def update(label: str, done: int, total: int | None = None) -> None:
            bar.update(task, description=printable(label), completed=done, total=total)

        yield update


def load_trace(path: str, *, keep_tokens: bool = False) -> Trace:
    """Read a trace; a bar shows the progress of a long one.

    ``keep_tokens`` is for commands that go over its tokens again.
    """
    from prism_plan.io.trace_reader import read_trace

    with contextlib.ExitStack() as stack:
        bars: list[Callable[[str, int], None]] = []

        def report_progress(done: int, total: int) -> None:
            if total > PROGRESS_BAR_MIN_ROWS and not bars:
                bars.append(stack.enter_context(progress(total, "tokens")))
            for show in bars:
                show(f"reading {Path(path).name}", done)

        return read_trace(path, report_progress, keep_tokens=keep_tokens)


def write_output(output: str, data: bytes) -> None:
    """Write ``data`` to the file ``output``, or to standard output for ``-``.

    In a file names stay as they are. What goes to standard output is JSON or a table of numbers.
    """
    if output == "-":
        stream = sys.stdout.buffer
        stream.write(printable_json(data.decode("utf-8")).encode("utf-8"))
        stream.flush()
    else:
        write_bytes(output, data)


def percent(share: float | None, digits: int = 2) -> str:
    """A share as text in percent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"
