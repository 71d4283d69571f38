"""Figures of traces: heat map and entropy of expert usage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, did_you_mean
from prism_plan.plotting.figure_options import DEFAULT_FIGURE, FigureOptions
from prism_plan.plotting.figure_parts import (
    colour_map,
    draw_legend,
    finish_figure,
    legend_patch,
    line_style,
    max_characters,
    new_figure,
    shorten,
)
from prism_plan.plotting.panels import layer_panels
from prism_plan.plotting.style import NO_DATA, matplotlib_settings
from prism_plan.solvers.entropy import layer_entropy
from prism_plan.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Beyond so many tasks a figure would be unreadable.
MAX_TASKS = 60


def heatmap(
    trace: Trace, tasks: Sequence[str] | None = None, *, options: FigureOptions = DEFAULT_FIGURE
) -> Figure:
    """How often each task calls each expert, one panel per task (paper, Fig. 2).

    The image of a panel is float [L, E]: share of the layer's calls over the uniform share 1/E,
    so 1 is uniform; NaN (grey) in layers without calls. ``tasks`` chooses and orders the panels;
    ``None`` is all of them.

    Raises
    ------
    InputError
        A task that the trace does not have, no task, or more than :data:`MAX_TASKS`; or the figure
        is too small or too large.
    """
    from matplotlib.colors import FuncNorm

    chosen = _chosen(trace, tasks)
    model = trace.model
    ratio = _relative_share(trace.counts[chosen].astype(np.float64))
    known = ratio[np.isfinite(ratio)]
    high = float(np.quantile(known, 0.995)) if known.size else 2.0
    top = float(2 ** math.ceil(math.log2(min(max(high, 2.0), 16.0))))

    def forward(x: Any) -> Any:
        x = np.ma.filled(x, np.nan)  # layers without calls
        return np.where(x < 1, x - 1, np.log(np.maximum(x, 1)) / math.log(top))

    def inverse(y: Any) -> Any:
        return np.where(y < 0, y + 1, np.exp(np.maximum(y, 0) * math.log(top)))

    with matplotlib_settings():
        figure, panels, cols, _ = layer_panels(len(chosen), model, options)
        norm = FuncNorm((forward, inverse), vmin=0.0, vmax=top)
        for axes, task, image in zip(panels, chosen, ratio, strict=True):
            drawn = axes.imshow(
                image, cmap=colour_map("RdBu_r"), norm=norm, aspect="auto", interpolation="nearest"
            )
            axes.set_title(
                shorten(trace.tasks[task], max_characters(figure, 160) // cols),
                parse_math=False,
            )
        extend = "max" if known.size and known.max() > top else "neither"
        bar = figure.colorbar(
            drawn, ax=panels, extend=extend, fraction=0.03, pad=0.01, aspect=30, shrink=0.9
        )
        ticks = [0.0, 0.5, *(2.0**i for i in range(round(math.log2(top)) + 1))]
        labels = [f"{tick:g}×" for tick in ticks]
        bar.set_ticks(ticks, labels=labels, minor=False)
        bar.set_ticks([], minor=True)
        bar.set_label(f"calls of the expert,\ntimes the uniform share 1/{model.num_experts}")
        if not np.isfinite(ratio).all():
            draw_legend(figure, [legend_patch(NO_DATA)], ["layer without calls"])
        finish_figure(figure, options, "How often each task calls each expert", _names(trace))
    return figure


def entropy(trace: Trace, *, options: FigureOptions = DEFAULT_FIGURE) -> Figure:
    """Entropy in bits of expert usage by layer, one line per task (paper, Fig. 3).

    A line is [L] over decoder indices, with a gap (NaN) at a layer without calls; a dashed line
    marks the most that is possible, log2 E.

    Raises
    ------
    InputError
        The trace has no task, or more than :data:`MAX_TASKS`; or the figure is too small or too
        large.
    """
    from matplotlib.ticker import MaxNLocator

    chosen = _chosen(trace, None)
    counts = trace.counts.astype(np.float64)
    bits = np.where(counts.sum(axis=2) > 0, layer_entropy(counts) / math.log(2), np.nan)
    most = math.log2(trace.model.num_experts)
    layers = trace.model.moe_layers
    with matplotlib_settings():
        height = max(6.0, 0.25 * len(chosen) + 1.5)
        figure = new_figure(height, options)
        axes = figure.subplots()
        lines = [
            axes.plot(
                layers,
                bits[task],
                **line_style(i),
                label=trace.tasks[task],
            )[0]
            for i, task in enumerate(chosen)
        ]
        lines.append(axes.axhline(most, color="#555555", linestyle="--", linewidth=1.2))
        names = [trace.tasks[task] for task in chosen]
        labels = [*names, f"maximum, log2 {trace.model.num_experts} = {most:.4g}"]
        draw_legend(figure, lines, labels, beside=len(labels) > 5)
        low = float(np.nanmin(bits)) if np.isfinite(bits).any() else 0.0
        margin = max(0.06 * (most - low), 0.02)
        axes.set_ylim(low - margin, most + margin)
        axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=max(max_characters(figure, 20), 2), integer=True, min_n_ticks=1)
        )
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("entropy of expert usage (bits)")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        finish_figure(figure, options, "Entropy of expert usage by layer and task", _names(trace))
    return figure


def _relative_share(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of the layer's calls times E, [..., L, E]; NaN in layers without calls."""
    total = counts.sum(axis=-1, keepdims=True)
    nothing = np.full_like(counts, np.nan)
    np.divide(counts * counts.shape[-1], total, out=nothing, where=total > 0)
    return nothing


def _chosen(trace: Trace, tasks: Sequence[str] | None) -> list[int]:
    """Indices of the tasks to draw."""
    names = trace.tasks if tasks is None else tuple(tasks)
    source = trace.name or "trace"
    for name in names:
        if name not in trace.tasks:
            raise InputError(
                f"no task {name!r}{did_you_mean(name, trace.tasks)}",
                source=source,
                expected=f"tasks of {', '.join(trace.tasks)}",
            )
    if not 0 < len(names) <= MAX_TASKS:
        raise InputError(
            f"{len(names)} tasks",
            source=source,
            expected=f"1 to {MAX_TASKS} tasks in a figure",
            remedy="name the tasks to draw" if names else "",
        )
    return [trace.tasks.index(name) for name in names]


def _names(trace: Trace) -> tuple[str, str]:
    return trace.model.name, f"trace {trace.name}" if trace.name else ""
