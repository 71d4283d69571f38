"""Parts that figures share: their size, colours, legends, titles and names that fit."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.plotting.figure_options import FigureOptions
from prism_plan.plotting.style import (
    LINE_COLOURS,
    LINE_STYLES,
    MARKERS,
    NO_DATA,
    TITLE_PT,
    WIDTH_IN,
)
from prism_plan.printable_text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def colour_map(name: str, levels: int = 256, under: str | None = None) -> Any:
    """A copy of a colour map of matplotlib; NaN is grey."""
    from matplotlib import colormaps

    colours = colormaps[name].resampled(levels)
    if levels == 1 or name == "YlGnBu":  # its first colours are too near to white
        from matplotlib.colors import ListedColormap

        colours = ListedColormap(colormaps[name](np.linspace(0.15, 0.95, levels)))
    return colours.with_extremes(bad=NO_DATA, under=under)


def line_style(index: int) -> dict[str, Any]:
    """Colour, style and marker of a line; the first 147 differ."""
    again = index // len(LINE_COLOURS)
    return {
        "color": LINE_COLOURS[index % len(LINE_COLOURS)],
        "linestyle": LINE_STYLES[again % len(LINE_STYLES)],
        "marker": MARKERS[(index + again) % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def legend_patch(colour: Any) -> Any:
    """A square for a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#555555", linewidth=0.8)


def new_figure(height_in: float, options: FigureOptions) -> Figure:
    """A figure as large as ``options`` say, or as its content needs.

    Raises
    ------
    InputError
        So many pixels would take too much memory.
    """
    from matplotlib.figure import Figure

    size = options.figure_size(height_in)
    return Figure(figsize=size, dpi=options.dpi, layout="constrained")


def max_characters(figure: Figure, characters: int) -> int:
    """How many characters fit where ``characters`` fit in a figure of the default width."""
    return int(characters * figure.get_figwidth() / WIDTH_IN)


def is_narrow(figure: Figure) -> bool:
    """Whether the figure is so narrow that panels and legend are stacked in one column."""
    return bool(figure.get_figwidth() < 0.6 * WIDTH_IN)


def draw_legend(
    figure: Figure,
    handles: Sequence[Any],
    labels: Sequence[str],
    *,
    beside: bool = False,
    title: str = "",
) -> None:
    """Draw a legend below the panels, in rows, or ``beside`` them, in one column."""
    most = min(40, max(max_characters(figure, 80), 16))
    longest = max(len(shorten(label, most)) for label in labels)
    beside = beside and not is_narrow(figure)
    columns = max(max_characters(figure, 150) // (longest + 8), 1)
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(labels))],
        loc="outside right center" if beside else "outside lower center",
        ncols=1 if beside else min(len(labels), columns),
        frameon=False,
        fontsize=9,
        title=title or None,
        title_fontsize=9,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # "$" and "_" in the name of a task are only letters
        text.set_text(shorten(label, most))


def finish_figure(
    figure: Figure, options: FigureOptions, what: str, facts: Iterable[str] = ()
) -> None:
    """Write the title (``what`` the figure shows and ``facts``), then fix the layout.

    The layout is computed once: computing it at every drawing would move the panels.

    Raises
    ------
    InputError
        The figure is too small for what stands in it.
    """
    if options.title is None:
        _draw_title(figure, [what, *(shorten(fact, 60) for fact in facts if fact)], "  ·  ")
    elif options.title.strip():
        _draw_title(figure, options.title.split(), " ")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "constrained_layout not applied")
            figure.draw_without_rendering()
    except UserWarning as warning:
        wide, high = figure.get_size_inches()
        raise InputError(
            f"{wide:g} × {high:g} inches",
            parameter="size_in" if options.size_in else "",
            expected="room for the panels beside their names, legend and title",
            remedy="give a larger ``size_in`` or draw less at a time",
        ) from warning
    figure.set_layout_engine("none")


def round_positions(figure: Figure) -> None:
    """Round where panels stand, in a figure that :func:`finish_figure` has finished.

    Grids inside of grids come out of the solver of the layout with last bits that differ from one
    drawing to the next, and so would the bytes of files.
    """
    for axes in figure.axes:
        left, bottom, width, height = (round(part, 9) for part in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))


def _draw_title(figure: Figure, parts: Sequence[str], between: str) -> None:
    """A title of at most three lines, broken between its parts."""
    most = max(max_characters(figure, 150), 20)
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(between) + len(part) <= most:
            lines[-1] += between + part
        else:
            lines += textwrap.wrap(shorten(part, 3 * most), most)
    if len(lines) > 3:
        lines = [*lines[:2], shorten(f"{lines[2]} …", most)]
    figure.suptitle(
        "\n".join(shorten(line, most) for line in lines), fontsize=TITLE_PT, parse_math=False
    )


def shorten(name: str, most: int) -> str:
    """One printable line of at most ``most`` (at least 8) characters; the middle is cut.

    Every text of a file that stands in a figure passes here: a control character has no glyph and
    is not allowed in SVG.
    """
    name, most = printable(" ".join(name.split())), max(most, 8)
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"


def quantity_text(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
