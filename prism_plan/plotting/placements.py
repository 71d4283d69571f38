"""The figure of a placement: which GPU of which server holds which expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement
from prism_plan.plotting.execution_panel import draw_execution, execution_panel_in, fit_names
from prism_plan.plotting.figure_options import DEFAULT_FIGURE, FigureOptions
from prism_plan.plotting.figure_parts import (
    colour_map,
    draw_legend,
    finish_figure,
    legend_patch,
    max_characters,
    new_figure,
    quantity_text,
    round_positions,
    shorten,
)
from prism_plan.plotting.panels import expert_axis, layer_axis, layer_panels
from prism_plan.plotting.style import COLOURS, MISSING, matplotlib_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

#: Beyond so many servers a placement is drawn without a panel for each.
MAX_SERVER_PANELS = 12


def placement_map(placement: Placement, *, options: FigureOptions = DEFAULT_FIGURE) -> Figure:
    """Which GPU of each server holds which expert, and how many servers hold it.

    The image of a server is int [L, E]: 0 not held, 1 + g held by its GPU g, 1 + (its GPUs) held
    by several of them. The last of these panels is int [L, E], servers that hold the expert. Beyond
    :data:`MAX_SERVER_PANELS` servers that panel is the first, and bars [N] with the number of
    experts of each server take the place of the others.

    Where the placement has an execution table a panel below shows it
    (:func:`prism_plan.plotting.execution_panel.draw_execution`).

    Raises
    ------
    InputError
        The figure is too small or too large.
    """
    model, plan = placement.model, placement.plan
    local = placement.local
    many = placement.num_servers > MAX_SERVER_PANELS
    share = "" if plan.remote_share is None else f"remote share {plan.remote_share:.1%}"
    inputs = [f"{kind} {file.name}" for kind, file in placement.inputs.items() if file.name]
    facts = (model.name, *inputs, share)
    below_in = 0.0 if placement.execution is None else execution_panel_in(placement)
    with matplotlib_settings():
        if many:
            figure, below = _many_servers(model, placement.servers, local, options, below_in)
            facts += (f"{placement.num_servers} servers, too many for a panel each",)
        else:
            count = placement.num_servers + 1
            figure, panels, cols, below = layer_panels(
                count, model, options, last_right=True, below_in=below_in
            )
            _server_panels(figure, panels[:-1], cols, placement)
            _copies_panel(figure, panels[-1], local.sum(axis=0), cols)
        drawn = None if below is None else draw_execution(figure, below, placement)
        finish_figure(figure, options, f"Placement by {shorten(plan.solver, 40)}", facts)
        if drawn is not None:
            round_positions(figure)
            fit_names(figure, drawn)
    return figure


def _server_panels(figure: Figure, panels: Sequence[Axes], cols: int, placement: Placement) -> None:
    from matplotlib.colors import ListedColormap

    most = max(len(placement.gpus_of(n)) for n in range(placement.num_servers))
    colours = _gpu_colours(most)
    doubled = False
    for n, axes in enumerate(panels):
        on_gpu = placement.on_gpu[placement.gpus_of(n)]  # [g, L, E]
        copies = on_gpu.sum(axis=0)
        first = on_gpu.argmax(axis=0) if len(on_gpu) else np.zeros_like(copies)
        image = np.where(copies == 0, 0, np.where(copies == 1, 1 + first, 1 + len(on_gpu)))
        shades = ["white", *colours[: len(on_gpu)], "black"]
        doubled |= bool((copies > 1).any())
        axes.imshow(
            image,
            cmap=ListedColormap(shades),
            vmin=-0.5,
            vmax=len(shades) - 0.5,
            aspect="auto",
            interpolation="nearest",
        )
        held = f"{np.count_nonzero(copies):,} experts on {quantity_text(len(on_gpu), 'GPU')}"
        name = shorten(placement.servers[n], max_characters(figure, 170) // cols - len(held))
        axes.set_title(f"{name}: {held}", parse_math=False)
    labels = ["not held", *(f"GPU {g}" for g in range(most))]
    shades = ["white", *colours]
    if doubled:
        labels.append("several GPUs of the server")
        shades.append("black")
    # with two legends in the figure each says what it is for
    what = "" if placement.execution is None else "where the server holds the expert"
    draw_legend(figure, [legend_patch(shade) for shade in shades], labels, title=what)


def _copies_panel(figure: Figure, axes: Axes, copies: npt.NDArray[np.int64], cols: int) -> None:
    """Draw the number of servers that hold each expert, [L, E]; none at all stands out."""
    most = max(int(copies.max()), 1)
    drawn = axes.imshow(
        copies,
        cmap=colour_map("YlGnBu", most if most <= 12 else 256, under=MISSING),
        vmin=0.5,
        vmax=most + 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    missing = int((copies == 0).sum())
    bar = figure.colorbar(drawn, ax=axes, extend="min" if missing else "neither", pad=0.015)
    step = math.ceil(most / 6)
    bar.set_ticks(list(range(1, most + 1, step)), minor=False)
    bar.ax.tick_params(length=0)
    bar.set_label("servers that hold it")
    text = f"copies over servers: mean {copies.mean():.2f}, most {int(copies.max())}"
    if missing:
        text += f"; {missing:,} experts held nowhere"
    if len(text) > max_characters(figure, 170) // cols:
        text = text.replace("; ", ";\n")
    axes.set_title(text, color=MISSING if missing else "black")


def _many_servers(
    model: ModelShape,
    servers: Sequence[str],
    local: npt.NDArray[np.bool_],
    options: FigureOptions,
    below_in: float,
) -> tuple[Figure, SubplotSpec | None]:
    """A figure of the copies and of the experts of each server, and the place below these."""
    height = min(max(0.12 * model.num_layers, 2.0), 5.0)
    figure = new_figure(height + 4.2 + below_in, options)
    below = None
    if below_in:
        rows = figure.add_gridspec(2, 1, height_ratios=[height + 3.0, below_in])
        below = rows[1]
        inner = rows[0].subgridspec(2, 1, height_ratios=[height, 2.6])
        copies, bars = (figure.add_subplot(inner[row]) for row in range(2))
    else:
        copies, bars = figure.subplots(2, 1, height_ratios=[height, 2.6])
    expert_axis(copies, model)
    layer_axis(copies, model)
    _copies_panel(figure, copies, local.sum(axis=0), 1)
    bars.bar(range(len(servers)), local.sum(axis=(1, 2)), color=COLOURS[0], width=0.8)
    step = math.ceil(len(servers) / max(max_characters(figure, 80), 1))
    shown = range(0, len(servers), step)
    labels = [shorten(servers[n], 24) for n in shown]
    bars.set_xticks(list(shown), labels=labels, rotation=90, parse_math=False)
    bars.set_xlim(-0.7, len(servers) - 0.3)
    bars.set_ylabel("experts held")
    bars.set_title(f"experts on each server, of {model.num_pairs:,} in the model")
    bars.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    bars.set_axisbelow(True)
    return figure, below


def _gpu_colours(count: int) -> list[Any]:
    """One colour for each of ``count`` GPUs."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colour_map("viridis")(0.1 + 0.9 * i / (count - 1)) for i in range(count)]
