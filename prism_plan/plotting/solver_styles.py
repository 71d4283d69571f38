"""One look a solver, the same in every figure: its colour, line, marker and hatching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: The colour of each solver and baseline. Any two differ for readers who see all colours and for
#: colour-blind readers; tests/plotting/test_solver_styles.py measures by how much.
SOLVER_COLOURS: Mapping[str, str] = {
    "uniform": "#B0B0B0",
    "redundance": "#56B4E9",
    "smartmoe": "#882255",
    "eplb": "#E69F00",
    "layer-partition": "#009E73",
    "prism": "#0072B2",
    "ilp": "#000080",
    "exact": "#D55E00",
    "pipeline": "#5C3A00",
    "latency": "#8833EE",
    "offload": "#000000",
}
#: Colours of what is not in the table, in the order in which it appears.
OTHER_COLOURS = ("#EE0055", "#00DD99", "#666688", "#88CC66")
#: A solver whose layers execute elsewhere is named so; it has the colour of the solver.
PATHS = "+paths"

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_LINE_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 3)))
_HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


@dataclass(frozen=True)
class SolverStyle:
    """How the results of one placement are drawn."""

    colour: str
    line_style: Any = "-"
    marker: str = "o"
    hatch: str = ""

    def line(self) -> dict[str, Any]:
        """The arguments of a line."""
        return {
            "color": self.colour,
            "linestyle": self.line_style,
            "marker": self.marker,
            "markersize": 4.5,
            "linewidth": 1.6,
        }

    def bar(self) -> dict[str, Any]:
        """The arguments of a bar."""
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0}


def solver_styles(placements: Iterable[tuple[str, str]]) -> list[SolverStyle]:
    """The look of each placement, given as its name and the solver that planned it ("" unknown).

    Placements by one solver share its colour and differ in line, marker and hatching: the first 40
    of one colour are all different lines. Solvers that are not in :data:`SOLVER_COLOURS` take
    colours from :data:`OTHER_COLOURS` in the order in which they appear.
    """
    others: dict[str, str] = {}
    seen: Counter[str] = Counter()
    styles = []
    for name, solver in placements:
        known = solver_of_placement(name, solver)
        colour = SOLVER_COLOURS.get(known) or others.setdefault(
            known, OTHER_COLOURS[len(others) % len(OTHER_COLOURS)]
        )
        nth = seen[colour]
        seen[colour] += 1
        first = list(SOLVER_COLOURS.values()).index(colour) if known in SOLVER_COLOURS else 0
        styles.append(
            SolverStyle(
                colour=colour,
                line_style=_LINE_STYLES[nth % len(_LINE_STYLES)],
                marker=_MARKERS[(first + nth) % len(_MARKERS)],
                hatch=_HATCHES[nth % len(_HATCHES)],
            )
        )
    return styles


def solver_of_placement(name: str, solver: str = "") -> str:
    """The solver whose colour a placement has; where it is unknown, what its name says."""
    known = solver or name.rpartition("/")[2].removesuffix(".json")
    return known.removesuffix(PATHS)


def lighten(colour: str, share: float) -> str:
    """The colour with so much white in it, 0 to 1."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)


def text_colour_on(colour: str) -> str:
    """Black or white, whichever is read better on the colour."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    )
    # Contrast as WCAG defines it: equal against black and white at a luminance of 0.179.
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"
