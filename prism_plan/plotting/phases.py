"""Where the phases of a workload begin, marked on axes over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.plotting.figure_parts import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Phase = Mapping[str, Any]

_COLOUR = "#444444"
#: Beyond so many phases a name has no room: they are only marked.
_MAX_NAMES = 40


def mark_phases(panels: Sequence[Axes], phases: Sequence[Phase], end_s: float, most: int) -> Any:
    """Mark where phases begin in all panels and name them above the first.

    Parameters
    ----------
    panels
        Axes over time in seconds, from 0 to ``end_s``, from the top.
    phases
        Those of the runs of a simulation report; equal ones of several runs are marked once.
    end_s
        Where the axis ends.
    most
        Characters that fit above the axes.

    Returns
    -------
    Any
        A line for the legend; ``None`` where there is only one phase, which needs no mark.
    """
    from matplotlib.lines import Line2D

    descriptions: dict[tuple[float, float], str] = {}
    numbers: dict[tuple[float, float], int] = {}
    for phase in phases:
        key = (phase["at_s"], phase["everywhere_at_s"])
        descriptions.setdefault(key, _describe(phase))
        numbers.setdefault(key, phase["number"])
    if len(descriptions) < 2:
        return None
    begins = sorted(descriptions)
    for begin in begins:
        if numbers[begin] == 1:
            continue
        at_s, everywhere_at_s = begin
        for axes in panels:
            if everywhere_at_s > at_s:
                axes.axvspan(
                    at_s, everywhere_at_s, color=_COLOUR, alpha=0.12, linewidth=0, zorder=0
                )
            axes.axvline(at_s, color=_COLOUR, linestyle=(0, (5, 3)), linewidth=1.1, zorder=1.5)
    if len(begins) <= _MAX_NAMES:
        ends = [at_s for at_s, _ in begins[1:]] + [end_s]
        for begin, until_s in zip(begins, ends, strict=True):
            here = int(most * (until_s - begin[0]) / end_s) if begin[0] < end_s else 0
            name = _shortened_name(numbers[begin], descriptions[begin], here - 1)
            if name:
                _write_above(panels[0], begin[0], name)
    return Line2D([], [], color=_COLOUR, linestyle=(0, (5, 3)), linewidth=1.1)


def _describe(phase: Phase) -> str:
    """The tasks and the arrival interval that a phase changes."""
    parts = [
        f"{server} {' + '.join(shares)}" for server, shares in phase["tasks"].items() if shares
    ]
    if phase["arrival_interval_s"] is not None:
        parts.append(f"a request every {phase['arrival_interval_s']:g} s")
    return ", ".join(parts)


def _shortened_name(number: int, what: str, most: int) -> str:
    """The name of a phase in at most so many characters, or nothing where not even its number fits.

    The tasks follow the number where more than a few letters of them fit.
    """
    for name, least in (
        (f"phase {number}: {what}" if what else "", 20),
        (f"phase {number}", 0),
        (f"{number}", 0),
    ):
        if name and (len(name) <= most or 0 < least <= most):
            return shorten(name, most) if least else name
    return ""


def _write_above(axes: Axes, at_s: float, text: str) -> None:
    axes.annotate(
        text,
        (at_s, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(2, 3),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=8,
        color=_COLOUR,
        parse_math=False,
        annotation_clip=False,
    )
