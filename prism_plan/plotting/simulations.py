"""Figures of simulation reports: latency over requests, over time, by layer and by run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.plotting.bars import bar_axes, bar_panels, label_at, name_bars, value_bars
from prism_plan.plotting.figure_options import DEFAULT_FIGURE, FigureOptions
from prism_plan.plotting.figure_parts import (
    draw_legend,
    finish_figure,
    is_narrow,
    legend_patch,
    max_characters,
    new_figure,
    shorten,
)
from prism_plan.plotting.losses import mark_losses
from prism_plan.plotting.phases import mark_phases
from prism_plan.plotting.scales import log_axis, needs_log_scale
from prism_plan.plotting.solver_styles import SolverStyle, lighten, solver_styles
from prism_plan.plotting.style import matplotlib_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Run = Mapping[str, Any]

#: Beyond so many runs a figure would be unreadable.
MAX_RUNS = 40
#: The paper's time of a layer with remote experts over one without (docs/design.md, section 9).
PAPER_LAYER_LATENCY = 8.30

#: With more moves than this, at different times, their lines would hide the latencies.
MAX_MOVE_LINES = 60

#: Statistics of a run, their bars from the top and how much white is in the colour of the run.
_BARS = (("mean", 0.0), ("p95", 0.45), ("p99", 0.75))
#: How a review of the placement is marked, by its decision.
_REVIEWS = {
    "move": ("D", "experts moved"),
    "stay": ("|", "review: stayed"),
    "busy": ("x", "review: still loading"),
}


def simulation_cdf(report: Mapping[str, Any], *, options: FigureOptions = DEFAULT_FIGURE) -> Figure:
    """Share of requests that took at most so long, one line a run, with its mean marked.

    ``report`` holds the values of a simulation report (see `prism_plan.io.simulation`). A line
    has the 101 quantiles in seconds as x and 0 to 1 as y; x is logarithmic where it spans much.

    Raises
    ------
    InputError
        No request finished in any run, there are more than :data:`MAX_RUNS`, or the figure is too
        small or too large.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    runs = _finished(report)
    shares = np.linspace(0, 1, 101)
    with matplotlib_settings():
        figure = new_figure(max(6.4, 0.25 * len(runs) + 1.5), options)
        axes = figure.subplots()
        handles = []
        for shown in runs:
            quantiles = np.array(shown.run["latency_quantiles_s"], np.float64)
            mean = shown.run["latency_s"]["mean"]
            style = shown.style.line()
            handles += axes.plot(quantiles, shares, **style, markevery=[])
            at = float(np.interp(mean, quantiles, shares))
            axes.plot([mean], [at], **style | _MARK)
            handles[-1] = Line2D([], [], **style)
        labels = [shown.label for shown in runs]
        handles.append(Line2D([], [], color="#555555", marker="o", linestyle="none", **_EDGE))
        draw_legend(figure, handles, [*labels, "markers: mean"], beside=len(labels) > 4)
        every = [value for shown in runs for value in shown.run["latency_quantiles_s"]]
        axes.set_xlabel("latency of a request, arrival to last token (s)")
        if needs_log_scale(every):
            log_axis(axes, "x", min(every) / 1.08, max(every) * 1.08)
            axes.set_xlabel(f"{axes.get_xlabel()}, logarithmic")
        else:
            axes.set_xlim(0, max(every) * 1.04 or 1.0)
        axes.set_ylim(-0.01, 1.02)
        axes.set_yticks(np.linspace(0, 1, 11))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("requests that took no longer")
        _grid(axes)
        finish_figure(figure, options, "Latency of requests", _facts(report, runs))
    return figure


def simulation_timeline(
    report: Mapping[str, Any], *, options: FigureOptions = DEFAULT_FIGURE
) -> Figure:
    """Mean latency of the requests by their time of arrival, one line a run.

    A line stands at the middles of the bins, with a gap (NaN) where no request arrived or
    finished. Dashed grey lines mark where phases of the workload begin, and a grey band reaches
    until each has begun at every server. A vertical line in the colour of the run marks a move of
    experts, dashed where runs moved at the same time; beyond :data:`MAX_MOVE_LINES` moves these
    lines are left out. Below, each run with reviews has a row that marks them all.

    Raises
    ------
    InputError
        See :func:`simulation_cdf`.
    """
    runs = _finished(report)
    reviewed = [shown for shown in runs if shown.run["migrations"]]
    below = 0.2 * len(reviewed) + 0.25
    lines = [shown.run["timeline"] for shown in runs]
    end_s = max(max(len(line["arrivals"]), 1) * line["bin_s"] for line in lines)
    with matplotlib_settings():
        height = max(5.8 + (below if reviewed else 0.0), 0.25 * len(runs) + 2.0)
        figure = new_figure(height, options)
        if reviewed:
            # A row of marks keeps its height where the figure is low.
            above = max(figure.get_figheight() - below - 1.6, 1.0)
            axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[above, below])
        else:
            axes, strip = figure.subplots(), None
        handles: list[Any] = []
        values = []
        for shown, line in zip(runs, lines, strict=True):
            latency = np.array(line["mean_latency_s"], np.float64)
            middle = (np.arange(len(latency)) + 0.5) * line["bin_s"]
            handles += axes.plot(middle, latency, **shown.style.line())
            values += latency[np.isfinite(latency)].tolist()
        labels = [shown.label for shown in runs]
        _mark_moves(axes, runs)
        if strip is not None:
            marks = _mark_reviews(strip, reviewed, max_characters(figure, 32))
            handles += marks
            labels += [_REVIEWS[mark.get_label()][1] for mark in marks]
        lowest = strip if strip is not None else axes
        lowest.set_xlabel("time of arrival (s)")
        axes.set_xlim(0, end_s)
        axes.set_ylabel("mean latency (s)")
        _latency_axis(axes, values)
        beside = len(labels) > 4 and not is_narrow(figure)
        phases = [phase for shown in runs for phase in shown.run.get("phases", ())]
        phase_mark = mark_phases(
            [axes, *([] if strip is None else [strip])],
            phases,
            end_s,
            max_characters(figure, 120 if beside else 160),
        )
        if phase_mark is not None:
            handles.append(phase_mark)
            labels.append("phase begins")
        losses = [loss for shown in runs for loss in shown.run.get("losses", {}).get("servers", ())]
        loss_mark = mark_losses(
            [axes, *([] if strip is None else [strip])], losses, end_s, max_characters(figure, 60)
        )
        if loss_mark is not None:
            handles.append(loss_mark[0])
            labels.append(loss_mark[1])
        draw_legend(figure, handles, labels, beside=beside)
        _grid(axes)
        finish_figure(figure, options, "Latency by time of arrival", _facts(report, runs))
    return figure


def layer_latency(
    report: Mapping[str, Any], *, paper: bool = False, options: FigureOptions = DEFAULT_FIGURE
) -> Figure:
    """Mean latency of a decode step's layer by the share of its experts that are remote.

    A line has remote experts / top-k as x and, as y, the mean latency over that without remote
    expert (or with the fewest that occur). With ``paper`` a dotted line marks what the paper
    reports at most for its own testbed and system.

    Raises
    ------
    InputError
        No run has decode steps, there are more than :data:`MAX_RUNS` runs, or the figure is too
        small or too large.
    """
    from matplotlib.ticker import PercentFormatter

    runs = _labelled(report, lambda run: any(row["mean"] for row in run["layer_latency_s"]))
    if not runs:
        raise InputError(
            "no run with decode steps",
            expected="the latency of layers by remote experts",
        )
    with matplotlib_settings():
        figure = new_figure(max(6.0, 0.25 * len(runs) + 1.5), options)
        axes = figure.subplots()
        handles: list[Any] = []
        labels = []
        values = [1.0]
        for shown in runs:
            rows = [row for row in shown.run["layer_latency_s"] if row["mean"]]
            fewest = rows[0]
            top_k = max(len(shown.run["layer_latency_s"]) - 1, 1)
            share = [row["remote_experts"] / top_k for row in rows]
            times = [row["mean"] / fewest["mean"] for row in rows]
            handles += axes.plot(share, times, **shown.style.line())
            values += times
            least = fewest["remote_experts"]
            label = f"{shorten(shown.label, 24)} (from {least} remote)" if least else shown.label
            labels.append(label)
        if paper:
            handles.append(
                axes.axhline(PAPER_LAYER_LATENCY, color="#555555", linestyle=":", linewidth=1.4)
            )
            labels.append(f"the paper's testbed: {PAPER_LAYER_LATENCY:.2f}×")
            values.append(PAPER_LAYER_LATENCY)
        draw_legend(figure, handles, labels, beside=len(labels) > 5)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("remote share of the experts that a token calls in a layer")
        axes.set_ylabel(
            "mean latency of a layer in a decode step,\ntimes that with all experts local"
        )
        _latency_axis(axes, values)
        _grid(axes)
        finish_figure(figure, options, "Latency of a layer by remote share", _facts(report, runs))
    return figure


def simulation_bars(
    report: Mapping[str, Any], *, options: FigureOptions = DEFAULT_FIGURE
) -> Figure:
    """Mean, p95 and p99 latency of each run, and its remote and waiting share, as bars.

    Raises
    ------
    InputError
        See :func:`simulation_cdf`.
    """
    runs = _finished(report)
    with matplotlib_settings():
        figure = new_figure(0.62 * len(runs) + 2.0, options)
        every = bar_panels(figure, 3)
        latency, remote, waiting = every
        _latency_bars(latency, runs)
        latency.set_title("latency of requests (s)")
        for axes, key, title in (
            (remote, "remote_share", "remote share of calls"),
            (waiting, "waiting_share", "waiting share of (token, layer) steps"),
        ):
            value_bars(
                axes, [shown.run[key] for shown in runs], styles=[shown.style for shown in runs]
            )
            axes.set_title(title)
        most = max(max_characters(figure, 36), 16)
        name_bars(figure, every, [shorten(shown.label, most) for shown in runs])
        patches = [legend_patch(lighten("#000000", white)) for _, white in _BARS]
        draw_legend(figure, patches, [f"{name} latency" for name, _ in _BARS])
        finish_figure(figure, options, "Runs compared", _facts(report, runs))
    return figure


# ------------------------------------------------------------------------------------------ parts

_EDGE: dict[str, Any] = {"markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.8}
_MARK: dict[str, Any] = {**_EDGE, "linestyle": "none", "zorder": 4}


@dataclass(frozen=True, eq=False)
class _DrawnRun:
    """A run with its label and style, which are the same in every figure of a report."""

    label: str
    style: SolverStyle
    run: Run


def _grid(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _latency_axis(axes: Axes, values: Sequence[float]) -> None:
    """A y axis from zero, or a logarithmic one where the values span much."""
    if needs_log_scale(values):
        log_axis(axes, "y", min(values) / 1.15, max(values) * 1.15)
        axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic")
    else:
        axes.set_ylim(0, max(values, default=0.0) * 1.08 or 1.0)


def _finished(report: Mapping[str, Any]) -> list[_DrawnRun]:
    """The runs of which a request finished."""
    runs = _labelled(report, lambda run: bool(run["latency_quantiles_s"]))
    if not runs:
        raise InputError(
            "no run in which a request finished",
            expected="latencies to draw",
            remedy="simulate longer",
        )
    return runs


def _labelled(report: Mapping[str, Any], wanted: Callable[[Run], bool]) -> list[_DrawnRun]:
    """The ``wanted`` runs, each with a label and a look of its own, whether or not others are."""
    if len(report["runs"]) > MAX_RUNS:
        raise InputError(
            f"{len(report['runs'])} runs",
            expected=f"at most {MAX_RUNS} in a figure",
            remedy="simulate fewer placements at a time",
        )
    labels: list[str] = []
    for run in report["runs"]:
        label = run["placement"].removesuffix(".json")
        if run["solver"] and run["solver"] not in label:
            label = f"{shorten(label, 20)} ({run['solver']})"
        labels.append(shorten(label, 32))
    seen = Counter[str]()
    for i, label in enumerate(labels):
        seen[label] += 1
        labels[i] = f"{label} #{seen[label]}" if seen[label] > 1 else label
    styles = solver_styles((run["placement"], run["solver"]) for run in report["runs"])
    every = zip(labels, styles, report["runs"], strict=True)
    return [_DrawnRun(label, style, run) for label, style, run in every if wanted(run)]


def _facts(report: Mapping[str, Any], runs: Sequence[_DrawnRun]) -> list[str]:
    """What a report was made from, for the title."""
    left_out = len(report["runs"]) - len(runs)
    return [
        shorten(report["trace"]["name"], 28)
        + " (drawn tokens)" * (report["trace"]["kind"] == "counts"),
        shorten(report["cluster"]["name"], 28),
        f"route {report['route']}",
        f"migrate {report['migrate']}" if report["migrate"] != "never" else "",
        "interrupted" if report["partial"] else "",
        f"{left_out} of {len(report['runs'])} runs left out: nothing to show" if left_out else "",
    ]


def _mark_moves(axes: Axes, runs: Sequence[_DrawnRun]) -> None:
    """A vertical line for every move; the lines of runs that moved together share the dashes."""
    moves: dict[float, list[str]] = {}
    for shown in runs:
        for review in shown.run["migrations"]:
            if review["decision"] == "move":
                moves.setdefault(review["at_s"], []).append(shown.style.colour)
    if len(moves) > MAX_MOVE_LINES:
        return
    for at_s, together in moves.items():
        for k, colour in enumerate(together):
            dashes = (-4.0 * k, (4.0, 4.0 * (len(together) - 1)))
            axes.axvline(
                at_s,
                color=colour,
                linestyle=dashes if len(together) > 1 else "-",
                linewidth=1.2,
                alpha=0.6,
                zorder=1,
            )


def _mark_reviews(axes: Axes, reviewed: Sequence[_DrawnRun], most: int) -> list[Any]:
    """A row of marks for each reviewed run; gives one mark of each kind for the legend."""
    from matplotlib.lines import Line2D

    seen = set()
    many = max(len(shown.run["migrations"]) for shown in reviewed) > 2 * MAX_MOVE_LINES
    for row, shown in enumerate(reviewed):
        for decision, (marker, _) in _REVIEWS.items():
            at_s = [r["at_s"] for r in shown.run["migrations"] if r["decision"] == decision]
            if not at_s:
                continue
            seen.add(decision)
            axes.plot(
                at_s,
                [row] * len(at_s),
                color=shown.style.colour,
                marker=marker,
                markersize=3 if many else 6,
                linestyle="none",
                label=f"{decision} {shown.label}",
            )
    names = [shorten(shown.label, most) for shown in reviewed]
    axes.set_yticks(range(len(reviewed)), labels=names, parse_math=False)
    axes.set_ylim(len(reviewed) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return [
        Line2D([], [], color="#555555", marker=marker, linestyle="none", label=decision)
        for decision, (marker, _) in _REVIEWS.items()
        if decision in seen
    ]


def _latency_bars(axes: Axes, runs: Sequence[_DrawnRun]) -> None:
    """Bars of the statistics of each run, one below the other."""
    height = 0.84 / len(_BARS)
    limit = max(shown.run["latency_s"][name] for shown in runs for name, _ in _BARS) * 1.14 or 1.0
    for k, (name, white) in enumerate(_BARS):
        values = [shown.run["latency_s"][name] for shown in runs]
        places = [i + (k - 1) * height for i in range(len(runs))]
        axes.barh(
            places,
            values,
            height=height * 0.92,
            color=[lighten(shown.style.colour, white) for shown in runs],
            hatch=[shown.style.hatch for shown in runs],
            edgecolor="white",
            linewidth=0,
            zorder=2,
        )
        for value, place in zip(values, places, strict=True):
            label_at(axes, value, place, _three_digits(value), 4, "left", "black").set_fontsize(8)
    bar_axes(axes, len(runs), limit)


def _three_digits(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"
