"""Horizontal bars with their values written at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def value_bars(
    axes: Axes,
    values: Sequence[float | None],
    *,
    colour: str,
    worst: Sequence[float | None] | None = None,
    share: bool = True,
    missing: str = "not known",
) -> None:
    """Bars from the top in the order given, and markers at ``worst``; ``missing`` where None."""
    from matplotlib.ticker import PercentFormatter

    known = {i: float(value) for i, value in enumerate(values) if value is not None}
    others = enumerate(worst or [])
    most = {i: float(value) for i, value in others if value is not None and i in known}
    limit = max([*known.values(), *most.values()], default=0.0) * 1.08 or 1.0
    axes.barh(list(known), list(known.values()), color=colour, height=0.66, zorder=2)
    if most:
        axes.plot(
            list(most.values()),
            list(most),
            linestyle="none",
            marker="D",
            markersize=6,
            color="#E69F00",
            markeredgecolor="black",
            markeredgewidth=0.8,
            zorder=4,
        )
    for i in range(len(values)):
        if i not in known:
            label_at(axes, 0.0, i, missing, 5, "left", "#555555")
            continue
        text = f"{known[i]:.1%}" if share else f"{known[i]:.3g}"
        if known[i] > 0.2 * limit:
            label = label_at(axes, known[i], i, text, -9, "right", "white")
        else:
            label = label_at(axes, max(known[i], most.get(i, 0.0)), i, text, 8, "left", "black")
        # The reference line never strikes a number through.
        ground = colour if known[i] > 0.2 * limit else "white"
        label.set_bbox({"facecolor": ground, "edgecolor": "none", "pad": 1.0})
    if share:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    bar_axes(axes, len(values), limit)


def bar_axes(axes: Axes, count: int, limit: float) -> None:
    """The axes of ``count`` bars, the first at the top, up to ``limit``."""
    axes.set_xlim(0, limit)
    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def label_at(
    axes: Axes, x: float, y: float, text: str, shift_pt: float, side: str, colour: str
) -> Any:
    """A number beside a point, ``shift_pt`` to its right, that ends or begins there."""
    return axes.annotate(
        text,
        (x, y),
        xytext=(shift_pt, 0),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=9,
        color=colour,
        zorder=5,
    )
