"""Figures of traces, placements and comparisons; the only module that imports matplotlib.

Every function builds a :class:`matplotlib.figure.Figure` of its own, without pyplot, so nothing
is shown, kept open or left changed. :func:`save` writes one as PNG, SVG or PDF, with the same
bytes for the same figure. Figures are 1500 pixels wide.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, did_you_mean
from prism_plan.files import atomic_path
from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from prism_plan.solvers.entropy import layer_entropy
from prism_plan.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What is written for each extension: the metadata that would tell the time is left out.
METADATA: Mapping[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
#: Beyond so many servers a placement is drawn without a panel for each.
MAX_SERVER_PANELS = 12
#: Beyond so many tasks a figure would be unreadable.
MAX_TASKS = 60

_DPI = 100
_WIDTH_IN = 15.0
_TITLE_PT, _PANEL_PT, _TICK_PT = 13, 10, 8
#: Colours of Okabe and Ito and one of Tol, told apart by colour-blind readers.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"),
    "#882255",
)
_LINE_COLOURS = (*_COLOURS[:6], "#000000")
_LINE_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NO_DATA = "#BBBBBB"
_MISSING = "#D55E00"
_SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "font.size": _PANEL_PT,
    "axes.titlesize": _PANEL_PT,
    "axes.labelsize": 9,
    "xtick.labelsize": _TICK_PT,
    "ytick.labelsize": _TICK_PT,
    "image.interpolation": "nearest",
    "savefig.bbox": None,
    "savefig.transparent": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prism-plan",
    "text.usetex": False,
}


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """The same look and bytes whatever the reader's matplotlib configuration says."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def check_extension(path: str | os.PathLike[str]) -> str:
    """The kind of figure that the extension of ``path`` asks for: "png", "svg" or "pdf".

    Raises
    ------
    InputError
        Another extension.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise InputError(
            f"extension {Path(path).suffix!r}",
            source=path,
            expected=".png, .svg or .pdf",
            remedy="give the file one of these extensions",
        )
    return kind


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, SVG or PDF, which the extension of ``path`` says.

    Raises
    ------
    InputError
        Another extension.
    OutputError
        The file cannot be written; an earlier one at ``path`` is left as it was.
    """
    kind = check_extension(path)
    with atomic_path(path) as temporary, _settings():
        figure.savefig(temporary, format=kind, dpi=_DPI, metadata=dict(METADATA[kind]))


# ----------------------------------------------------------------------------------------- traces


def heatmap(trace: Trace, tasks: Sequence[str] | None = None) -> Figure:
    """How often each task calls each expert, one panel per task (paper, Fig. 2).

    The image of a panel is float [L, E]: share of the layer's calls over the uniform share 1/E,
    so 1 is uniform; NaN (grey) in layers without calls. ``tasks`` chooses and orders the panels;
    ``None`` is all of them.

    Raises
    ------
    InputError
        A task that the trace does not have, no task, or more than :data:`MAX_TASKS`.
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

    with _settings():
        figure, panels, cols = _panels(len(chosen), model)
        norm = FuncNorm((forward, inverse), vmin=0.0, vmax=top)
        for axes, task, image in zip(panels, chosen, ratio, strict=True):
            drawn = axes.imshow(
                image, cmap=_colour_map("RdBu_r"), norm=norm, aspect="auto", interpolation="nearest"
            )
            axes.set_title(_fit(trace.tasks[task], 160 // cols), parse_math=False)
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
            _legend(figure, [_patch(_NO_DATA)], ["layer without calls"])
        _title(figure, "How often each task calls each expert", *_names(trace))
        _lay_out(figure)
    return figure


def entropy(trace: Trace) -> Figure:
    """Entropy in bits of expert usage by layer, one line per task (paper, Fig. 3).

    A line is [L] over decoder indices, with a gap (NaN) at a layer without calls; a dashed line
    marks the most that is possible, log2 E.

    Raises
    ------
    InputError
        The trace has no task, or more than :data:`MAX_TASKS`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    chosen = _chosen(trace, None)
    counts = trace.counts.astype(np.float64)
    bits = np.where(counts.sum(axis=2) > 0, layer_entropy(counts) / math.log(2), np.nan)
    most = math.log2(trace.model.num_experts)
    layers = trace.model.moe_layers
    with _settings():
        height = max(6.0, 0.25 * len(chosen) + 1.5)
        figure = Figure(figsize=(_WIDTH_IN, height), dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        lines = [
            axes.plot(
                layers,
                bits[task],
                color=_LINE_COLOURS[i % len(_LINE_COLOURS)],
                linestyle=_LINE_STYLES[i // len(_LINE_COLOURS) % len(_LINE_STYLES)],
                marker=_MARKERS[(i + i // len(_LINE_COLOURS)) % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.6,
                label=trace.tasks[task],
            )[0]
            for i, task in enumerate(chosen)
        ]
        lines.append(axes.axhline(most, color="#555555", linestyle="--", linewidth=1.2))
        names = [trace.tasks[task] for task in chosen]
        labels = [*names, f"maximum, log2 {trace.model.num_experts} = {most:.4g}"]
        _legend(figure, lines, labels, beside=len(labels) > 5)
        low = float(np.nanmin(bits)) if np.isfinite(bits).any() else 0.0
        margin = max(0.06 * (most - low), 0.02)
        axes.set_ylim(low - margin, most + margin)
        axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("entropy of expert usage (bits)")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        _title(figure, "Entropy of expert usage by layer and task", *_names(trace))
        _lay_out(figure)
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


# ------------------------------------------------------------------------------------- placements


def placement_map(placement: Placement) -> Figure:
    """Which GPU of each server holds which expert, and how many servers hold it.

    The image of a server is int [L, E]: 0 not held, 1 + g held by its GPU g, 1 + (its GPUs) held
    by several of them. The last panel is int [L, E], servers that hold the expert. Beyond
    :data:`MAX_SERVER_PANELS` servers that panel is the first, and bars [N] with the number of
    experts of each server take the place of the others.
    """
    model, plan = placement.model, placement.plan
    local = placement.local
    many = placement.num_servers > MAX_SERVER_PANELS
    share = "" if plan.remote_share is None else f"remote share {plan.remote_share:.1%}"
    inputs = [f"{kind} {file.name}" for kind, file in placement.inputs.items() if file.name]
    facts = (model.name, *inputs, share)
    with _settings():
        if many:
            figure = _many_servers(model, placement.servers, local)
            facts += (f"{placement.num_servers} servers, too many for a panel each",)
        else:
            figure, panels, cols = _panels(placement.num_servers + 1, model, last_right=True)
            _server_panels(figure, panels[:-1], cols, placement)
            _copies_panel(figure, panels[-1], local.sum(axis=0))
        _title(figure, f"Placement by {plan.solver}", *facts)
        _lay_out(figure)
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
        held = f"{np.count_nonzero(copies):,} experts on {_count(len(on_gpu), 'GPU')}"
        name = _fit(placement.servers[n], 170 // cols - len(held))
        axes.set_title(f"{name}: {held}", parse_math=False)
    labels = ["not held", *(f"GPU {g}" for g in range(most))]
    shades = ["white", *colours]
    if doubled:
        labels.append("several GPUs of the server")
        shades.append("black")
    _legend(figure, [_patch(shade) for shade in shades], labels)


def _copies_panel(figure: Figure, axes: Axes, copies: npt.NDArray[np.int64]) -> None:
    """Draw the number of servers that hold each expert, [L, E]; none at all stands out."""
    most = max(int(copies.max()), 1)
    drawn = axes.imshow(
        copies,
        cmap=_colour_map("YlGnBu", most if most <= 12 else 256, under=_MISSING),
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
    axes.set_title(text, color=_MISSING if missing else "black")


def _many_servers(
    model: ModelShape, servers: Sequence[str], local: npt.NDArray[np.bool_]
) -> Figure:
    from matplotlib.figure import Figure

    height = min(max(0.12 * model.num_layers, 2.0), 5.0)
    figure = Figure(figsize=(_WIDTH_IN, height + 4.2), dpi=_DPI, layout="constrained")
    copies, bars = figure.subplots(2, 1, height_ratios=[height, 2.6])
    _expert_axis(copies, model)
    _layer_axis(copies, model)
    _copies_panel(figure, copies, local.sum(axis=0))
    bars.bar(range(len(servers)), local.sum(axis=(1, 2)), color=_COLOURS[0], width=0.8)
    step = math.ceil(len(servers) / 80)
    shown = range(0, len(servers), step)
    labels = [_fit(servers[n], 24) for n in shown]
    bars.set_xticks(list(shown), labels=labels, rotation=90, parse_math=False)
    bars.set_xlim(-0.7, len(servers) - 0.3)
    bars.set_ylabel("experts held")
    bars.set_title(f"experts on each server, of {model.num_pairs:,} in the model")
    bars.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    bars.set_axisbelow(True)
    return figure


def _gpu_colours(count: int) -> list[Any]:
    """One colour for each of ``count`` GPUs."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    return [_colour_map("viridis")(0.1 + 0.9 * i / (count - 1)) for i in range(count)]


# ------------------------------------------------------------------------------------ comparisons


def comparison(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Remote share, waiting share and destinations of several placements, as horizontal bars.

    ``rows`` are those of ``prism-plan compare --json``, drawn from the top in the order given:
    ``name``, ``remote_share``, ``worst_server_share``, ``waiting_share`` (shares from 0 to 1) and
    ``destinations`` (servers); a value that is missing or ``None`` is not known. A panel of which
    nothing is known is left out. A thin line marks the remote share of the row named ``exact``.

    Raises
    ------
    InputError
        There are no rows, or one has no name.
    """
    from matplotlib.figure import Figure

    if not rows or not all(row.get("name") for row in rows):
        raise InputError(
            "no rows" if not rows else "a row without a name",
            source="comparison",
            expected="the rows of prism-plan compare --json",
        )
    panels = [
        (key, label, colour)
        for key, label, colour in (
            ("remote_share", "remote share of calls", "#0072B2"),
            ("waiting_share", "waiting share of (token, layer) steps", "#00795A"),
            ("destinations", "destinations: remote servers per step", "#7A4A8C"),
        )
        if key == "remote_share" or any(row.get(key) is not None for row in rows)
    ]
    with _settings():
        figure = Figure(figsize=(_WIDTH_IN, 0.42 * len(rows) + 2.0), dpi=_DPI, layout="constrained")
        # The first panel also has a marker and a line, so it gets more room.
        ratios = [1.35] + [1.0] * (len(panels) - 1)
        every = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
        broken = [bool(row.get("violations")) for row in rows]
        names = [
            _fit(str(row["name"]), 36) + " *" * bad for row, bad in zip(rows, broken, strict=True)
        ]
        for axes, (key, label, colour) in zip(every, panels, strict=True):
            worst = "worst_server_share" if key == "remote_share" else ""
            _bars(axes, rows, key, worst, colour)
            axes.set_yticks(range(len(rows)), labels=[], parse_math=False)
            axes.set_title(label)
        every[0].set_yticks(range(len(rows)), labels=names, fontsize=_PANEL_PT, parse_math=False)
        _comparison_legend(figure, every[0], rows, any(broken))
        _title(figure, title or "Placements compared")
        _lay_out(figure)
    return figure


def _bars(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, worst_key: str, colour: str
) -> None:
    """Bars of one quantity, its value at the end of each, and markers of ``worst_key``."""
    from matplotlib.ticker import PercentFormatter

    share = key != "destinations"
    values = {i: float(row[key]) for i, row in enumerate(rows) if row.get(key) is not None}
    worst = {i: float(rows[i][worst_key]) for i in values if rows[i].get(worst_key) is not None}
    limit = max([*values.values(), *worst.values()], default=0.0) * 1.08 or 1.0
    axes.barh(list(values), list(values.values()), color=colour, height=0.66, zorder=2)
    if worst:
        axes.plot(
            list(worst.values()),
            list(worst),
            linestyle="none",
            marker="D",
            markersize=6,
            color="#E69F00",
            markeredgecolor="black",
            markeredgewidth=0.8,
            zorder=4,
        )
    for i in range(len(rows)):
        if i not in values:
            text = "no placement" if key == "remote_share" else "not known"
            _at(axes, 0.0, i, text, 5, "left", "#555555")
            continue
        text = f"{values[i]:.1%}" if share else f"{values[i]:.3g}"
        if values[i] > 0.2 * limit:
            label = _at(axes, values[i], i, text, -9, "right", "white")
        else:
            label = _at(axes, max(values[i], worst.get(i, 0.0)), i, text, 8, "left", "black")
        # The reference line never strikes a number through.
        ground = colour if values[i] > 0.2 * limit else "white"
        label.set_bbox({"facecolor": ground, "edgecolor": "none", "pad": 1.0})
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if share:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _at(axes: Axes, x: float, y: float, text: str, shift_pt: float, side: str, colour: str) -> Any:
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


def _comparison_legend(
    figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]], broken: bool
) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    labels: list[str] = []
    if any(line.get_marker() == "D" for line in axes.get_lines()):
        handles.append(axes.get_lines()[0])
        labels.append("remote share of the worst server")
    exact = next((row["remote_share"] for row in rows if row["name"] == "exact"), None)
    if exact is not None:
        handles.append(axes.axvline(exact, color="black", linewidth=0.9, zorder=3))
        labels.append("remote share of exact")
    if broken:
        handles.append(Line2D([], [], linestyle="none"))
        labels.append("* breaks constraints of the cluster")
    if handles:
        _legend(figure, handles, labels)


# ------------------------------------------------------------------------------------------ parts


def _panels(
    count: int, model: ModelShape, *, last_right: bool = False
) -> tuple[Figure, list[Axes], int]:
    """A figure with a grid of ``count`` panels of layers × experts, and its columns.

    With ``last_right`` the last panel stands at the right end of its row, where a colour bar of
    its own leaves no gap between columns.
    """
    from matplotlib.figure import Figure

    wanted = count if count <= 3 else 2 if count == 4 else 3 if count <= 9 else 4
    cols = min(wanted, 4 if model.num_experts <= 64 else 3 if model.num_experts <= 128 else 2)
    rows = math.ceil(count / cols)
    per_layer, least, most = (0.16, 2.0, 5.0) if rows == 1 else (0.09, 1.3, 3.2)
    panel = min(max(per_layer * model.num_layers, least), most)
    size = (_WIDTH_IN, rows * (panel + 0.35) + 1.2)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, cols, squeeze=False).ravel().tolist()
    used = [*range(count - 1), rows * cols - 1 if last_right else count - 1]
    for place, axes in enumerate(grid):
        if place not in used:
            axes.remove()
            continue
        _expert_axis(axes, model, named=place + cols not in used)
        _layer_axis(axes, model, named=place % cols == 0 or place - 1 not in used)
    return figure, [grid[place] for place in used], cols


def _expert_axis(axes: Axes, model: ModelShape, *, named: bool = True) -> None:
    ticks = _spread(model.num_experts, 9)
    axes.set_xticks(ticks, labels=[str(e) for e in ticks] if named else [])
    axes.set_xlabel("expert" if named else "")


def _layer_axis(axes: Axes, model: ModelShape, *, named: bool = True) -> None:
    ticks = _spread(model.num_layers, 9)
    axes.set_yticks(ticks, labels=[str(model.moe_layers[i]) for i in ticks] if named else [])
    axes.set_ylabel("decoder layer" if named else "")


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count`` from zero, a round step apart."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if count <= s * most)
    return list(range(0, count, step))


def _colour_map(name: str, levels: int = 256, under: str | None = None) -> Any:
    """A copy of a colour map of matplotlib; NaN is grey."""
    from matplotlib import colormaps

    colours = colormaps[name].resampled(levels)
    if levels == 1 or name == "YlGnBu":  # its first colours are too near to white
        from matplotlib.colors import ListedColormap

        colours = ListedColormap(colormaps[name](np.linspace(0.15, 0.95, levels)))
    return colours.with_extremes(bad=_NO_DATA, under=under)


def _patch(colour: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#555555", linewidth=0.8)


def _legend(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], *, beside: bool = False
) -> None:
    """Draw a legend below the panels, in rows, or ``beside`` them, in one column."""
    longest = max(len(_fit(label, 40)) for label in labels)
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(labels))],
        loc="outside right upper" if beside else "outside lower center",
        ncols=1 if beside else min(len(labels), max(150 // (longest + 8), 1)),
        frameon=False,
        fontsize=9,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # "$" and "_" in the name of a task are only letters
        text.set_text(_fit(label, 40))


def _title(figure: Figure, what: str, *facts: str) -> None:
    text = "  ·  ".join([what, *(_fit(fact, 60) for fact in facts if fact)])
    figure.suptitle(_fit(text, 150), fontsize=_TITLE_PT, parse_math=False)


def _lay_out(figure: Figure) -> None:
    """Place everything once and for all; laying out anew would move it at every drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _fit(name: str, most: int) -> str:
    """One line of at most ``most`` (at least 8) characters; the middle of a longer one is cut."""
    name, most = " ".join(name.split()), max(most, 8)
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
