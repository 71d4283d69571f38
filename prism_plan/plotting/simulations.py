"""Figures of simulation reports: latency over requests, over time, by layer and by run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.plotting.bars import bar_axes, label_at, value_bars
from prism_plan.plotting.parts import draw_legend, draw_title, fit, lay_out, look
from prism_plan.plotting.scales import log_axis, spans_much
from prism_plan.plotting.style import DPI, PANEL_PT, WIDTH_IN, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Run = Mapping[str, Any]

#: Beyond so many runs a figure would be unreadable.
MAX_RUNS = 40
#: What the paper reports for a layer with remote experts, times one without (DESIGN section 9).
PAPER_LAYER_LATENCY = 8.30

#: Statistics of a run, their bars from the top and their colours.
_BARS = (("mean", "#0072B2"), ("p95", "#56B4E9"), ("p99", "#B9B9B9"))
#: How a review of the placement is marked, by its decision.
_REVIEWS = {
    "move": ("D", "experts moved"),
    "stay": ("|", "review: stayed"),
    "busy": ("x", "review: still loading"),
}


def simulation_cdf(report: Mapping[str, Any]) -> Figure:
    """Share of requests that took at most so long, one line a run, with its mean marked.

    ``report`` holds the values of a simulation report (see `prism_plan.simulation_file`). A line
    has the 101 quantiles in seconds as x and 0 to 1 as y; x is logarithmic where it spans much.

    Raises
    ------
    InputError
        No request finished in any run, or there are more than :data:`MAX_RUNS`.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    runs = _finished(report)
    shares = np.linspace(0, 1, 101)
    with settings():
        figure = _figure(max(6.4, 0.25 * len(runs) + 1.5))
        axes = figure.subplots()
        handles = []
        for i, (_, run) in runs.items():
            quantiles = np.array(run["latency_quantiles_s"], np.float64)
            mean = run["latency_s"]["mean"]
            style = look(i)
            handles += axes.plot(quantiles, shares, **style, markevery=[])
            at = float(np.interp(mean, quantiles, shares))
            axes.plot([mean], [at], **style | _MARK)
            handles[-1] = Line2D([], [], **style)
        labels = [label for label, _ in runs.values()]
        handles.append(Line2D([], [], color="#555555", marker="o", linestyle="none", **_EDGE))
        draw_legend(figure, handles, [*labels, "markers: mean"], beside=len(labels) > 4)
        every = [value for _, run in runs.values() for value in run["latency_quantiles_s"]]
        axes.set_xlabel("latency of a request, arrival to last token (s)")
        if spans_much(every):
            log_axis(axes, "x", min(every) / 1.08, max(every) * 1.08)
            axes.set_xlabel(f"{axes.get_xlabel()}, logarithmic")
        else:
            axes.set_xlim(0, max(every) * 1.04 or 1.0)
        axes.set_ylim(-0.01, 1.02)
        axes.set_yticks(np.linspace(0, 1, 11))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("requests that took no longer")
        _grid(axes)
        draw_title(figure, "Latency of requests", *_facts(report, runs))
        lay_out(figure)
    return figure


def simulation_timeline(report: Mapping[str, Any]) -> Figure:
    """Mean latency of the requests by their time of arrival, one line a run.

    A line stands at the middles of the bins, with a gap (NaN) where no request arrived or
    finished. A vertical line in the colour of the run marks a move of experts, dashed where runs
    moved at the same time. Below, each run with reviews has a row that marks them all.

    Raises
    ------
    InputError
        See :func:`simulation_cdf`.
    """
    runs = _finished(report)
    reviewed = [i for i, (_, run) in runs.items() if run["migrations"]]
    below = 0.2 * len(reviewed) + 0.25
    end = max(max(len(r["timeline"]["arrivals"]), 1) * r["timeline"]["bin_s"] for r in _runs(runs))
    with settings():
        figure = _figure(max(5.8 + (below if reviewed else 0.0), 0.25 * len(runs) + 2.0))
        if reviewed:
            axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[5.0, below])
        else:
            axes, strip = figure.subplots(), None
        handles: list[Any] = []
        values = []
        for i, (_, run) in runs.items():
            line = run["timeline"]
            latency = np.array(line["mean_latency_s"], np.float64)
            middle = (np.arange(len(latency)) + 0.5) * line["bin_s"]
            handles += axes.plot(middle, latency, **look(i))
            values += latency[np.isfinite(latency)].tolist()
        labels = [label for label, _ in runs.values()]
        _mark_moves(axes, runs)
        if strip is not None:
            marks = _mark_reviews(strip, runs, reviewed)
            handles += marks
            labels += [_REVIEWS[mark.get_label()][1] for mark in marks]
        lowest = strip if strip is not None else axes
        lowest.set_xlabel("time of arrival (s)")
        axes.set_xlim(0, end)
        axes.set_ylabel("mean latency of the requests that arrived (s)")
        _latency_axis(axes, values)
        draw_legend(figure, handles, labels, beside=len(labels) > 4)
        _grid(axes)
        draw_title(figure, "Latency by time of arrival", *_facts(report, runs))
        lay_out(figure)
    return figure


def layer_latency(report: Mapping[str, Any]) -> Figure:
    """Mean latency of a decode step's layer by the share of its experts that are remote.

    A line has remote experts / top-k as x and, as y, the mean latency over that without remote
    expert (or with the fewest that occur). A dotted line marks what the paper reports at most.

    Raises
    ------
    InputError
        No run has decode steps, or there are more than :data:`MAX_RUNS` runs.
    """
    from matplotlib.ticker import PercentFormatter

    runs = _labelled(report, lambda run: any(row["mean"] for row in run["layer_latency_s"]))
    if not runs:
        raise InputError(
            "no run with decode steps",
            source="simulation",
            expected="the latency of layers by remote experts",
        )
    with settings():
        figure = _figure(max(6.0, 0.25 * len(runs) + 1.5))
        axes = figure.subplots()
        handles: list[Any] = []
        labels = []
        values = [PAPER_LAYER_LATENCY]
        for i, (label, run) in runs.items():
            rows = [row for row in run["layer_latency_s"] if row["mean"]]
            fewest = rows[0]
            top_k = max(len(run["layer_latency_s"]) - 1, 1)
            share = [row["remote_experts"] / top_k for row in rows]
            times = [row["mean"] / fewest["mean"] for row in rows]
            handles += axes.plot(share, times, **look(i))
            values += times
            least = fewest["remote_experts"]
            labels.append(f"{fit(label, 24)} (from {least} remote)" if least else label)
        handles.append(
            axes.axhline(PAPER_LAYER_LATENCY, color="#555555", linestyle=":", linewidth=1.4)
        )
        labels.append(f"the paper's testbed: {PAPER_LAYER_LATENCY:.2f}×")
        draw_legend(figure, handles, labels, beside=len(labels) > 5)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("remote share of the experts that a token calls in a layer")
        axes.set_ylabel(
            "mean latency of a layer in a decode step,\ntimes that with all experts local"
        )
        _latency_axis(axes, values)
        _grid(axes)
        draw_title(figure, "Latency of a layer by remote share", *_facts(report, runs))
        lay_out(figure)
    return figure


def simulation_bars(report: Mapping[str, Any]) -> Figure:
    """Mean, p95 and p99 latency of each run, and its remote and waiting share, as bars.

    Raises
    ------
    InputError
        See :func:`simulation_cdf`.
    """
    runs = _finished(report)
    labels = [label for label, _ in runs.values()]
    with settings():
        figure = _figure(0.62 * len(runs) + 2.0)
        latency, remote, waiting = figure.subplots(1, 3, width_ratios=[1.5, 1.0, 1.0])
        handles = _latency_bars(latency, _runs(runs))
        latency.set_title("latency of requests (s)")
        for axes, key, title, colour in (
            (remote, "remote_share", "remote share of calls", "#0072B2"),
            (waiting, "waiting_share", "waiting share of (token, layer) steps", "#00795A"),
        ):
            value_bars(axes, [run[key] for run in _runs(runs)], colour=colour)
            axes.set_title(title)
            axes.set_yticks(range(len(runs)), labels=[])
        latency.set_yticks(range(len(runs)), labels=labels, fontsize=PANEL_PT, parse_math=False)
        draw_legend(figure, handles, [f"{name} latency" for name, _ in _BARS])
        draw_title(figure, "Runs compared", *_facts(report, runs))
        lay_out(figure)
    return figure


# ------------------------------------------------------------------------------------------ parts

_EDGE: dict[str, Any] = {"markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.8}
_MARK: dict[str, Any] = {**_EDGE, "linestyle": "none", "zorder": 4}


def _figure(height_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")


def _grid(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _latency_axis(axes: Axes, values: Sequence[float]) -> None:
    """A y axis from zero, or a logarithmic one where the values span much."""
    if spans_much(values):
        log_axis(axes, "y", min(values) / 1.15, max(values) * 1.15)
        axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic")
    else:
        axes.set_ylim(0, max(values, default=0.0) * 1.08 or 1.0)


def _runs(runs: Mapping[int, tuple[str, Run]]) -> list[Run]:
    return [run for _, run in runs.values()]


def _finished(report: Mapping[str, Any]) -> dict[int, tuple[str, Run]]:
    """The runs of which a request finished, with their labels; the key chooses the look."""
    runs = _labelled(report, lambda run: bool(run["latency_quantiles_s"]))
    if not runs:
        raise InputError(
            "no run in which a request finished",
            source="simulation",
            expected="latencies to draw",
            remedy="simulate longer",
        )
    return runs


def _labelled(report: Mapping[str, Any], wanted: Any) -> dict[int, tuple[str, Run]]:
    """The ``wanted`` runs by their place in the report, each with a label of its own.

    A run has the same look in every figure of a report, whether or not others are left out.
    """
    if len(report["runs"]) > MAX_RUNS:
        raise InputError(
            f"{len(report['runs'])} runs",
            source="simulation",
            expected=f"at most {MAX_RUNS} in a figure",
            remedy="simulate fewer placements at a time",
        )
    labels: list[str] = []
    for run in report["runs"]:
        label = run["placement"].removesuffix(".json")
        if run["solver"] and run["solver"] not in label:
            label = f"{fit(label, 20)} ({run['solver']})"
        labels.append(fit(label, 32))
    seen = Counter[str]()
    for i, label in enumerate(labels):
        seen[label] += 1
        labels[i] = f"{label} #{seen[label]}" if seen[label] > 1 else label
    both = zip(labels, report["runs"], strict=True)
    return {i: (label, run) for i, (label, run) in enumerate(both) if wanted(run)}


def _facts(report: Mapping[str, Any], runs: Mapping[int, Any]) -> list[str]:
    """What a report was made from, for the title."""
    left_out = len(report["runs"]) - len(runs)
    return [
        fit(report["trace"]["name"], 28)
        + " (drawn tokens)" * (report["trace"]["kind"] == "counts"),
        fit(report["cluster"]["name"], 28),
        f"route {report['route']}",
        f"migrate {report['migrate']}" if report["migrate"] != "never" else "",
        "interrupted" if report["partial"] else "",
        f"{left_out} of {len(report['runs'])} runs left out: nothing to show" if left_out else "",
    ]


def _mark_moves(axes: Axes, runs: Mapping[int, tuple[str, Run]]) -> None:
    """A vertical line for every move; the lines of runs that moved together share the dashes."""
    moves: dict[float, list[int]] = {}
    for i, (_, run) in runs.items():
        for review in run["migrations"]:
            if review["decision"] == "move":
                moves.setdefault(review["at_s"], []).append(i)
    for at_s, together in moves.items():
        for k, i in enumerate(together):
            dashes = (-4.0 * k, (4.0, 4.0 * (len(together) - 1)))
            axes.axvline(
                at_s,
                color=look(i)["color"],
                linestyle=dashes if len(together) > 1 else "-",
                linewidth=1.2,
                zorder=1,
            )


def _mark_reviews(
    axes: Axes, runs: Mapping[int, tuple[str, Run]], reviewed: Sequence[int]
) -> list[Any]:
    """A row of marks for each reviewed run; gives one mark of each kind for the legend."""
    from matplotlib.lines import Line2D

    seen = set()
    for row, i in enumerate(reviewed):
        label, run = runs[i]
        for decision, (marker, _) in _REVIEWS.items():
            at_s = [r["at_s"] for r in run["migrations"] if r["decision"] == decision]
            if not at_s:
                continue
            seen.add(decision)
            axes.plot(
                at_s,
                [row] * len(at_s),
                color=look(i)["color"],
                marker=marker,
                markersize=6,
                linestyle="none",
                label=f"{decision} {label}",
            )
    names = [runs[i][0] for i in reviewed]
    axes.set_yticks(range(len(reviewed)), labels=names, parse_math=False)
    axes.set_ylim(len(reviewed) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return [
        Line2D([], [], color="#555555", marker=marker, linestyle="none", label=decision)
        for decision, (marker, _) in _REVIEWS.items()
        if decision in seen
    ]


def _latency_bars(axes: Axes, runs: Sequence[Run]) -> list[Any]:
    """Bars of the statistics of each run, side by side; gives one of each for the legend."""
    height = 0.84 / len(_BARS)
    limit = max(run["latency_s"][name] for run in runs for name, _ in _BARS) * 1.14 or 1.0
    drawn = []
    for k, (name, colour) in enumerate(_BARS):
        values = [run["latency_s"][name] for run in runs]
        places = [i + (k - 1) * height for i in range(len(runs))]
        drawn.append(axes.barh(places, values, height=height * 0.92, color=colour, zorder=2))
        for value, place in zip(values, places, strict=True):
            label_at(axes, value, place, _three(value), 4, "left", "black").set_fontsize(8)
    bar_axes(axes, len(runs), limit)
    return drawn


def _three(value: float) -> str:
    """A number with three digits."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"
