"""Times for which servers are away, marked on axes over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.plotting.figure_parts import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Loss = Mapping[str, Any]

_COLOUR = "#b03a2e"


def mark_losses(
    panels: Sequence[Axes], losses: Sequence[Loss], end_s: float, most: int
) -> tuple[Any, str] | None:
    """Shade the time from each loss to the return, and draw a line at the notice.

    Parameters
    ----------
    panels
        Axes over time in seconds, from 0 to ``end_s``.
    losses
        Those of the runs of a simulation report; equal ones of several runs are marked once.
    end_s
        Where the axis ends.
    most
        Characters of the label at most.

    Returns
    -------
    tuple or None
        A patch for the legend and its label; ``None`` without losses.
    """
    from matplotlib.patches import Patch

    seen = {(loss["server"], loss["at_s"]): loss for loss in losses}
    if not seen:
        return None
    for loss in seen.values():
        until_s = end_s if loss["return_s"] is None else min(loss["return_s"], end_s)
        for axes in panels:
            axes.axvspan(loss["at_s"], until_s, color=_COLOUR, alpha=0.1, linewidth=0, zorder=0)
            if loss["noticed_s"] is not None:
                axes.axvline(
                    loss["noticed_s"],
                    color=_COLOUR,
                    linestyle=(0, (1, 2)),
                    linewidth=1.1,
                    zorder=1.5,
                )
    names = ", ".join(dict.fromkeys(loss["server"] for loss in seen.values()))
    patch = Patch(facecolor=_COLOUR, alpha=0.1, edgecolor="none")
    return patch, shorten(f"away: {names} (dotted: noticed)", most)
