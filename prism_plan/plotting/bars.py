"""Horizontal bars with their values written at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.plotting.figure_parts import is_narrow
from prism_plan.plotting.solver_styles import SolverStyle, text_colour_on
from prism_plan.plotting.style import PANEL_PT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bar_panels(figure: Figure, count: int) -> list[Axes]:
    """Panels of bars side by side, or below each other where the figure is narrow."""
    # The first panel also has markers and a line, or three bars a row, so it gets more room.
    ratios = [1.35] + [1.0] * (count - 1)
    if is_narrow(figure):
        return figure.subplots(count, 1, squeeze=False)[:, 0].tolist()  # type: ignore[no-any-return]
    grid = figure.subplots(1, count, squeeze=False, width_ratios=ratios)
    return grid[0].tolist()  # type: ignore[no-any-return]


def name_bars(figure: Figure, every: Sequence[Axes], names: Sequence[str]) -> None:
    """Write the names beside the first panel, or beside each where they stand below each other."""
    for axes in every:
        labels = names if axes is every[0] or is_narrow(figure) else []
        axes.set_yticks(range(len(names)), labels=labels, fontsize=PANEL_PT, parse_math=False)


def value_bars(
    axes: Axes,
    values: Sequence[float | None],
    *,
    styles: Sequence[SolverStyle],
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
    for i, value in known.items():
        axes.barh([i], [value], **styles[i].bar(), height=0.66, zorder=2)
    if most:
        axes.plot(
            list(most.values()),
            list(most),
            linestyle="none",
            marker="D",
            markersize=6,
            color="white",
            markeredgecolor="black",
            markeredgewidth=1.2,
            clip_on=False,
            zorder=4,
        )
    for i in range(len(values)):
        if i not in known:
            label_at(axes, 0.0, i, missing, 5, "left", "#555555")
            continue
        text = f"{known[i]:.1%}" if share else f"{known[i]:.3g}"
        inside = known[i] > 0.2 * limit
        if inside:
            ink = text_colour_on(styles[i].colour)
            label = label_at(axes, known[i], i, text, -9, "right", ink)
        else:
            label = label_at(axes, max(known[i], most.get(i, 0.0)), i, text, 8, "left", "black")
        # Neither hatching nor the reference line strikes a number through.
        ground = styles[i].colour if inside else "white"
        pad = 2.0 if styles[i].hatch else 0.0
        label.set_bbox({"facecolor": ground, "edgecolor": "none", "pad": pad})
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
    """Write a number ``shift_pt`` to the right of a point, aligned to end or begin there."""
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
