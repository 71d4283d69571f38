"""Tables: columns of one unit each, as text for people, CSV, Markdown or LaTeX.

In a terminal a table is never wider than the window: columns that matter least are left out, and a
message says which. No number is ever split over two lines.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from prism_plan.cli.console import log_info
from prism_plan.printable_text import printable

#: Values of ``--format``.
FORMATS = ("table", "csv", "markdown", "latex")
format_option = click.option(
    "--format",
    "table_format",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Of the printed tables; csv has unrounded numbers.",
)
MISSING = "–"
#: Blank characters between two columns.
GAP = 3
_SIZES = (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    heading : str
        For people.
    key : str
        For CSV files; ends with the unit of ``values`` where they have one.
    values : tuple
        One a row, in base units (seconds, bytes, shares of 1); ``None`` where there is none.
    cells : tuple of str
        The same for people: all cells of a column have one unit and as many decimals.
    is_text : bool
        Text, aligned left; numbers are aligned right.
    rank : int
        0: always shown. In a narrow terminal columns of the highest rank are left out first.
    """

    heading: str
    key: str
    values: tuple[Any, ...]
    cells: tuple[str, ...]
    is_text: bool = False
    rank: int = 0

    @property
    def width(self) -> int:
        """Characters of the widest cell."""
        from rich.cells import cell_len

        return max(map(cell_len, (self.heading, *self.cells)))


def _column(
    heading: str, key: str, values: Sequence[Any], cell: Callable[[Any], str], **more: Any
) -> Column:
    cells = tuple(MISSING if value is None else cell(value) for value in values)
    return Column(heading, key, tuple(values), cells, **more)


def text_column(heading: str, key: str, values: Sequence[str | None], *, rank: int = 0) -> Column:
    """Names and other texts."""
    shown = [None if value is None else printable(value) for value in values]
    return _column(printable(heading), key, shown, str, is_text=True, rank=rank)


def count_column(heading: str, key: str, values: Sequence[int | None], *, rank: int = 0) -> Column:
    """Whole numbers, thousands separated by commas."""
    return _column(heading, key, values, lambda value: f"{value:,}", rank=rank)


def number_column(
    heading: str, key: str, values: Sequence[float | None], *, digits: int = 3, rank: int = 0
) -> Column:
    """Numbers without a unit."""
    return _column(heading, key, values, lambda value: f"{value:,.{digits}f}", rank=rank)


def share_column(
    heading: str, key: str, values: Sequence[float | None], *, digits: int = 2, rank: int = 0
) -> Column:
    """Shares of 1, shown in percent."""
    return _column(heading, key, values, lambda value: f"{100 * value:.{digits}f} %", rank=rank)


def speed_column(
    heading: str, key: str, values: Sequence[float | None], *, rank: int = 0
) -> Column:
    """Numbers a second; all with one decimal where the largest is below 1000."""
    largest = max((value for value in values if value is not None), default=0.0)
    return number_column(heading, key, values, digits=1 if largest < 1000 else 0, rank=rank)


def excess_column(
    heading: str, key: str, values: Sequence[float | None], *, rank: int = 0
) -> Column:
    """By which share of the best value each value lies above it; "best" where that is none."""

    def cell(value: float) -> str:
        return "best" if value == 0 else f"+{100 * value:.1f} %"

    return _column(heading, key, values, cell, rank=rank)


def duration_column(
    heading: str, key: str, values: Sequence[float | None], *, rank: int = 0
) -> Column:
    """Seconds; all in milliseconds where the longest is shorter than a tenth of a second."""
    longest = max((value for value in values if value is not None), default=0.0)
    if 0 < longest < 0.1:
        return _column(heading, key, values, _scaled(1e-3, "ms", 2), rank=rank)
    return _column(heading, key, values, _scaled(1.0, "s", 3 if longest < 1000 else 0), rank=rank)


def size_column(heading: str, key: str, values: Sequence[float | None], *, rank: int = 0) -> Column:
    """Bytes; all in the decimal unit that suits the largest."""
    largest = max((abs(value) for value in values if value is not None), default=0)
    unit, factor = [pair for pair in _SIZES if pair[1] <= max(largest, 1)][-1]
    return _column(heading, key, values, _scaled(factor, unit, 0 if unit == "B" else 2), rank=rank)


def _scaled(factor: float, unit: str, digits: int) -> Callable[[float], str]:
    least = 10.0**-digits

    def cell(value: float) -> str:
        if value == 0:
            return f"0 {unit}"
        scaled = value / factor
        if 0 < abs(scaled) < least / 2:  # rounded to zero it would read as nothing at all
            return f"{'<' if scaled > 0 else '>-'}{least:.{digits}f} {unit}"
        return f"{scaled:,.{digits}f} {unit}"

    return cell


def print_table(
    columns: Sequence[Column], *, title: str = "", form: str = "table", err: bool = False
) -> None:
    """Print columns on standard output, or standard error with ``err``, in one of :data:`FORMATS`.

    ``csv`` has keys and unrounded values and no title; the other formats have headings and cells.
    On a terminal, ``table`` leaves out columns that do not fit and logs which.
    """
    title = printable(title)
    if form == "csv":
        click.echo(_csv(columns), nl=False, err=err)
    elif form == "markdown":
        click.echo(_markdown(columns, title), nl=False, err=err)
    elif form == "latex":
        click.echo(_latex(columns, title), nl=False, err=err)
    else:
        _print_text(columns, title, err)


def _rows(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in columns), strict=True))


# ------------------------------------------------------------------------------------- for people


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into ``width`` characters; those of the highest rank leave first."""
    shown = list(columns)
    while _total(shown) > width and any(column.rank for column in shown):
        last = max(shown, key=lambda column: column.rank)  # the first of the highest rank
        shown.remove(last)
    return shown


def _total(columns: Sequence[Column]) -> int:
    return 1 + sum(column.width for column in columns) + GAP * (len(columns) - 1) + 1


def _print_text(columns: Sequence[Column], title: str, err: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    stream = sys.stderr if err else sys.stdout
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    shown = fitting(columns, console.width) if stream.isatty() else list(columns)
    console.width = max(_total(shown), 1)  # a narrower terminal breaks lines, not numbers
    if title:  # not rich's own title, which wraps at the width of the table
        console.print(title, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        justify = "left" if column.is_text else "right"
        table.add_column(column.heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in _rows(shown):
        table.add_row(*row)
    console.print(table)
    missing = [column.heading for column in columns if column not in shown]
    if missing:
        log_info(f"left out for width: {', '.join(missing)}; --format csv has all columns")


# ------------------------------------------------------------------------------------ for machines


def _csv(columns: Sequence[Column]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(column.key for column in columns)
    writer.writerows(zip(*(column.values for column in columns), strict=True))
    return stream.getvalue()


def _markdown(columns: Sequence[Column], title: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

    text = f"{title}\n\n" if title else ""
    text += line([column.heading for column in columns])
    text += "|" + "|".join(" --- " if column.is_text else " ---: " for column in columns) + "|\n"
    return text + "".join(line(row) for row in _rows(columns)) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "–": "--", "→": r"$\to$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def _latex(columns: Sequence[Column], title: str) -> str:
    """A ``tabular`` with the rules of the package booktabs."""

    def plain(text: str) -> str:
        return "".join(_LATEX.get(character, character) for character in text)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(plain, cells)) + " \\\\\n"

    text = f"% {title}\n" if title else ""
    text += f"\\begin{{tabular}}{{{''.join('l' if c.is_text else 'r' for c in columns)}}}\n"
    text += "\\toprule\n" + line([column.heading for column in columns]) + "\\midrule\n"
    text += "".join(line(row) for row in _rows(columns))
    return text + "\\bottomrule\n\\end{tabular}\n"
