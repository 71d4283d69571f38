"""Grids of panels of layers × experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from prism_plan.model_spec import ModelShape
from prism_plan.plotting.figure_options import FigureOptions
from prism_plan.plotting.figure_parts import new_figure
from prism_plan.plotting.style import WIDTH_IN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec


class LayerPanels(NamedTuple):
    """A figure with a grid of panels of layers × experts, and the columns of that grid.

    ``below`` is the place of a panel of the whole width below the grid, where one was asked for.
    """

    figure: Figure
    panels: list[Axes]
    cols: int
    below: SubplotSpec | None


def layer_panels(
    count: int,
    model: ModelShape,
    options: FigureOptions,
    *,
    last_right: bool = False,
    below_in: float = 0.0,
) -> LayerPanels:
    """A figure with a grid of ``count`` panels of layers × experts.

    With ``last_right`` the last panel stands at the right end of its row, where a colour bar of
    its own leaves no gap between columns. ``below_in`` is the height of what stands below the
    grid; 0 is nothing.
    """
    wanted = count if count <= 3 else 2 if count == 4 else 3 if count <= 9 else 4
    cols = min(wanted, 4 if model.num_experts <= 64 else 3 if model.num_experts <= 128 else 2)
    cols = min(cols, max(round(4 * options.width_in() / WIDTH_IN), 1))
    rows = math.ceil(count / cols)
    per_layer, least, most = (0.16, 2.0, 5.0) if rows == 1 else (0.09, 1.3, 3.2)
    panel = min(max(per_layer * model.num_layers, least), most)
    height = rows * (panel + 0.35)
    figure = new_figure(height + below_in + 1.2, options)
    below = None
    if below_in:
        halves = figure.add_gridspec(2, 1, height_ratios=[height, below_in])
        below = halves[1]
        grid = halves[0].subgridspec(rows, cols).subplots(squeeze=False).ravel().tolist()
    else:
        grid = figure.subplots(rows, cols, squeeze=False).ravel().tolist()
    used = [*range(count - 1), rows * cols - 1 if last_right else count - 1]
    for place, axes in enumerate(grid):
        if place not in used:
            axes.remove()
            continue
        expert_axis(axes, model, named=place + cols not in used)
        layer_axis(axes, model, named=place % cols == 0 or place - 1 not in used)
    return LayerPanels(figure, [grid[place] for place in used], cols, below)


def expert_axis(axes: Axes, model: ModelShape, *, named: bool = True) -> None:
    """Ticks at experts, with their ids unless the panel below has them."""
    ticks = tick_positions(model.num_experts, 9)
    axes.set_xticks(ticks, labels=[str(e) for e in ticks] if named else [])
    axes.set_xlabel("expert" if named else "")


def layer_axis(axes: Axes, model: ModelShape, *, named: bool = True) -> None:
    """Ticks at decoder indices, with their numbers unless the panel to the left has them."""
    ticks = tick_positions(model.num_layers, 9)
    axes.set_yticks(ticks, labels=[str(model.moe_layers[i]) for i in ticks] if named else [])
    axes.set_ylabel("decoder layer" if named else "")


def tick_positions(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count`` from zero, a round step apart."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if count <= s * most)
    return list(range(0, count, step))
