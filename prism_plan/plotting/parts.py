"""Parts that figures share: colours, legends, titles and names that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prism_plan.plotting.style import LINE_COLOURS, LINE_STYLES, MARKERS, NO_DATA, TITLE_PT
from prism_plan.text import printable

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


def look(index: int) -> dict[str, Any]:
    """Colour, style and marker of a line; the first 147 differ."""
    again = index // len(LINE_COLOURS)
    return {
        "color": LINE_COLOURS[index % len(LINE_COLOURS)],
        "linestyle": LINE_STYLES[again % len(LINE_STYLES)],
        "marker": MARKERS[(index + again) % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def patch(colour: Any) -> Any:
    """A square for a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#555555", linewidth=0.8)


def draw_legend(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], *, beside: bool = False
) -> None:
    """Draw a legend below the panels, in rows, or ``beside`` them, in one column."""
    longest = max(len(fit(label, 40)) for label in labels)
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(labels))],
        loc="outside right center" if beside else "outside lower center",
        ncols=1 if beside else min(len(labels), max(150 // (longest + 8), 1)),
        frameon=False,
        fontsize=9,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # "$" and "_" in the name of a task are only letters
        text.set_text(fit(label, 40))


def draw_title(figure: Figure, what: str, *facts: str) -> None:
    """The title of the figure: what it shows, then what it was made from."""
    text = "  ·  ".join([what, *(fit(fact, 60) for fact in facts if fact)])
    figure.suptitle(fit(text, 150), fontsize=TITLE_PT, parse_math=False)


def lay_out(figure: Figure) -> None:
    """Place everything once and for all; laying out anew would move it at every drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def fit(name: str, most: int) -> str:
    """One printable line of at most ``most`` (at least 8) characters; the middle is cut.

    Every text of a file that stands in a figure passes here: a control character has no glyph and
    is not allowed in SVG.
    """
    name, most = printable(" ".join(name.split())), max(most, 8)
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
