"""The figure of a sweep: mean latency by one condition, a panel for each of the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError, did_you_mean
from prism_plan.plotting.figure_options import DEFAULT_FIGURE, FigureOptions
from prism_plan.plotting.figure_parts import (
    draw_legend,
    finish_figure,
    max_characters,
    new_figure,
    shorten,
)
from prism_plan.plotting.scales import log_axis, needs_log_scale, set_axis, thin_out
from prism_plan.plotting.solver_styles import SolverStyle, solver_styles
from prism_plan.plotting.style import matplotlib_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Row = Mapping[str, Any]

#: Beyond so many panels, or so many lines in one, a figure would be unreadable.
MAX_PANELS = 24
MAX_SOLVERS = 21

#: Conditions of a run, in order of preference as x axis: its label, and how a value is written.
_KEYS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "bandwidth_mbps": ("bandwidth of a server (Mbit/s)", lambda v: f"{v:g} Mbit/s"),
    "gpus": ("GPUs", lambda v: f"{v:g} GPU" + "s" * (v != 1)),
    "servers": ("servers", lambda v: f"{v:g} server" + "s" * (v != 1)),
    "arrival_interval_s": ("mean time between requests (s)", lambda v: f"a request every {v:g} s"),
    "memory_fraction": ("usable part of GPU memory", lambda v: f"{v:.4g} of memory"),
}
_FROM_FILE = {
    "bandwidth_mbps": "bandwidth as in the cluster file",
    "arrival_interval_s": "requests as in the cluster file",
    "memory_fraction": "memory as in the cluster file",
}
_PANEL_ORDER = ("gpus", "bandwidth_mbps", "arrival_interval_s", "memory_fraction", "servers")


def sweep_figure(
    rows: Sequence[Row],
    *,
    x: str | None = None,
    panels: str | None = None,
    solvers: Sequence[str] | None = None,
    name: str = "",
    options: FigureOptions = DEFAULT_FIGURE,
) -> Figure:
    """Draw mean latency by a condition ``x``, a line for each solver, in panels.

    Conditions are ``bandwidth_mbps``, ``gpus``, ``servers``, ``arrival_interval_s`` and
    ``memory_fraction``. ``rows`` are those of a sweep table (see `prism_plan.io.sweep`); those
    that failed or have no latency are left out, and the title says how many. A line is the mean
    over seeds, a band their least and most.

    By default x is the bandwidth, or the GPUs if one bandwidth was swept; where intervals,
    memory or servers were swept too, it is the condition of the most values. Each combination
    of values of the other swept conditions has a panel: those of ``panels`` side by side, the
    rest below each other. Where x is one of ``gpus`` and ``servers``, the other has panels only
    if ``panels`` names it. ``solvers`` are those to draw, by default all; ``name`` stands in
    the title.

    Raises
    ------
    InputError
        An unknown key or solver, nothing to draw, or too much; or the figure is too small or too
        large.
    """
    for option, key in (("x", x), ("panels", panels)):
        if key is not None and key not in _KEYS:
            raise InputError(
                f"unknown key {key!r}{did_you_mean(key, _KEYS)}",
                parameter=option,
                expected=f"one of {', '.join(_KEYS)}",
            )
    if x is not None and x == panels:
        raise InputError(f"{x!r}, as ``x``", parameter="panels", expected="another key")
    chosen = _chosen(rows, solvers)
    drawn = [row for row in chosen if row["status"] == "ok" and row["latency_mean_s"] is not None]
    if not drawn:
        raise InputError(
            f"none of {len(chosen)} runs has a latency",
            expected="runs whose status is ok",
        )
    x = x or _default_x(drawn)
    if any(row[x] is None for row in drawn):
        raise InputError(
            f"runs without a value of {x}",
            expected="a number in every run",
            remedy="choose another key for ``x``",
        )
    columns, others = _panel_keys(drawn, x, panels)
    every = list(dict.fromkeys(row["solver"] for row in rows))
    styles = dict(zip(every, solver_styles((solver, solver) for solver in every), strict=True))
    with matplotlib_settings():
        figure = _draw(drawn, x, columns, others, styles, options)
        seeds = len({row["seed"] for row in drawn})
        varied = [key for key in _PANEL_ORDER if key not in (x, columns, "servers")]
        fixed = [
            key for key in varied if len(_values(drawn, key)) == 1 and drawn[0][key] is not None
        ]
        left_out = len(chosen) - len(drawn)
        facts = [
            shorten(name, 40),
            *(_condition_text(key, drawn[0][key]) for key in fixed),
            f"mean of {seeds} seeds, band: least to most" if seeds > 1 else "",
            f"{left_out} of {len(chosen)} runs left out: failed" if left_out else "",
        ]
        finish_figure(figure, options, f"Mean latency by {_KEYS[x][0].partition(' (')[0]}", facts)
    return figure


def _chosen(rows: Sequence[Row], solvers: Sequence[str] | None) -> list[Row]:
    """The rows of the solvers to draw, in the order asked for."""
    known = list(dict.fromkeys(row["solver"] for row in rows))
    for solver in solvers or ():
        if solver not in known:
            raise InputError(
                f"no solver {solver!r}{did_you_mean(solver, known)}",
                expected=f"solvers of {', '.join(known)}",
            )
    wanted = list(dict.fromkeys(solvers or known))
    if len(wanted) > MAX_SOLVERS:
        raise InputError(
            f"{len(wanted)} solvers",
            expected=f"at most {MAX_SOLVERS} in a figure",
            remedy="choose some by ``solvers``",
        )
    return [row for solver in wanted for row in rows if row["solver"] == solver]


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a condition, ascending, None first."""
    found = {row[key] for row in rows}
    return [None] * (None in found) + sorted(value for value in found if value is not None)


def _varies(rows: Sequence[Row], key: str) -> bool:
    """Whether a condition was swept by itself; servers mostly follow from the GPUs."""
    if key == "servers":
        return len({(row["gpus"], row["servers"]) for row in rows}) > len(_values(rows, "gpus"))
    return len(_values(rows, key)) > 1


def _default_x(rows: Sequence[Row]) -> str:
    if not any(_varies(rows, key) for key in ("arrival_interval_s", "memory_fraction", "servers")):
        return "bandwidth_mbps" if _varies(rows, "bandwidth_mbps") else "gpus"
    full = [key for key in _KEYS if None not in _values(rows, key)]
    return max(full, key=lambda key: _varies(rows, key) * len(_values(rows, key)))


def _panel_keys(rows: Sequence[Row], x: str, panels: str | None) -> tuple[str, list[str]]:
    """The condition of the columns of panels, or "", and those of the rows of panels."""
    swept = [key for key in _PANEL_ORDER if key != x and _varies(rows, key)]
    if x in ("gpus", "servers"):  # one of the two follows from the other
        swept = [key for key in swept if key not in ("gpus", "servers") or key == panels]
    columns = panels or (swept[0] if swept else "")
    return columns, [key for key in swept if key != columns]


def _condition_text(key: str, value: float | None) -> str:
    return _FROM_FILE[key] if value is None else _KEYS[key][1](value)


def _draw(
    rows: Sequence[Row],
    x: str,
    columns: str,
    others: Sequence[str],
    styles: Mapping[str, SolverStyle],
    options: FigureOptions,
) -> Figure:
    """Panels of lines with one legend."""
    across = _values(rows, columns) if columns else [None]
    down = list(itertools.product(*(_values(rows, key) for key in others)))
    wide = len(across)
    if not others and wide > 4:  # one row of many panels becomes several rows
        wide = math.ceil(wide / math.ceil(wide / 4))
    places = [(value, rest) for rest in down for value in across]
    if len(places) > MAX_PANELS or wide > 6:
        raise InputError(
            f"{len(places)} panels" if len(places) > MAX_PANELS else f"{wide} panels in a row",
            expected=f"at most {MAX_PANELS}, 6 in a row",
            remedy="choose other keys for ``x`` and ``panels``, or leave rows out of the table",
        )
    tall = math.ceil(len(places) / wide)
    height = 5.6 if tall == 1 else 3.0 * tall + 1.2
    figure = new_figure(height, options)
    grid = figure.subplots(tall, wide, squeeze=False, sharey=True).ravel().tolist()
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    handles: dict[str, Any] = {}
    for place, axes in enumerate(grid):
        if place >= len(places):
            axes.remove()
            continue
        value, rest = places[place]
        here = [
            row
            for row in rows
            if (not columns or row[columns] == value) and tuple(row[k] for k in others) == rest
        ]
        for solver in solvers:
            lines = _line(axes, [r for r in here if r["solver"] == solver], x, styles[solver])
            if lines:
                handles.setdefault(solver, lines[0])
        said = [_condition_text(columns, value)] if columns else []
        said += [_condition_text(key, part) for key, part in zip(others, rest, strict=True)]
        axes.set_title(shorten(", ".join(said), max_characters(figure, 190) // wide))
        label = _KEYS[x][0] + ", logarithmic" * _draw_x_axis(
            axes, rows, x, max_characters(figure, 36) // wide
        )
        axes.set_xlabel(label if place + wide >= len(places) else "")
        axes.set_ylabel("mean latency (s)" if place % wide == 0 else "")
    _scale(grid[0], rows)
    drawn = [solver for solver in solvers if solver in handles]
    draw_legend(figure, [handles[solver] for solver in drawn], drawn, beside=len(drawn) > 8)
    return figure


def _line(axes: Axes, rows: Sequence[Row], x: str, look: SolverStyle) -> list[Any]:
    """The mean over seeds by x, and a band from their least to their most."""
    at = _values(rows, x)
    if not at:
        return []
    means = [[row["latency_mean_s"] for row in rows if row[x] == value] for value in at]
    style = look.line()
    if any(len(values) > 1 for values in means):
        low, high = [min(values) for values in means], [max(values) for values in means]
        axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0)
    line: list[Any] = axes.plot(at, [math.fsum(v) / len(v) for v in means], **style)
    return line


def _draw_x_axis(axes: Axes, rows: Sequence[Row], x: str, ticks: int) -> bool:
    """Draw the x axis with ticks at the swept values; gives whether it is logarithmic."""
    at = _values(rows, x)
    log = needs_log_scale(at, *[4.0] if x in ("gpus", "servers") else [])  # they grow by doubling
    set_axis(axes, "x", thin_out(at, max(ticks, 3), log=log), log=log)
    if log:
        axes.set_xlim(at[0] / (at[-1] / at[0]) ** 0.04, at[-1] * (at[-1] / at[0]) ** 0.04)
    else:
        margin = 0.04 * (at[-1] - at[0]) or 0.5
        axes.set_xlim(at[0] - margin, at[-1] + margin)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return log


def _scale(axes: Axes, rows: Sequence[Row]) -> None:
    """Set the y axis, which all panels share."""
    latency = [row["latency_mean_s"] for row in rows]
    if needs_log_scale(latency):
        log_axis(axes, "y", min(latency) / 1.15, max(latency) * 1.15)
        axes.set_ylabel("mean latency (s), logarithmic")
    else:
        axes.set_ylim(0, max(latency) * 1.08 or 1.0)
