"""The figure of a comparison: bars of shares and destinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.plotting.parts import draw_legend, draw_title, fit, lay_out
from prism_plan.plotting.style import DPI, PANEL_PT, WIDTH_IN, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    with settings():
        figure = Figure(figsize=(WIDTH_IN, 0.42 * len(rows) + 2.0), dpi=DPI, layout="constrained")
        # The first panel also has a marker and a line, so it gets more room.
        ratios = [1.35] + [1.0] * (len(panels) - 1)
        every = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
        broken = [bool(row.get("violations")) for row in rows]
        names = [
            fit(str(row["name"]), 36) + " *" * bad for row, bad in zip(rows, broken, strict=True)
        ]
        for axes, (key, label, colour) in zip(every, panels, strict=True):
            worst = "worst_server_share" if key == "remote_share" else ""
            _bars(axes, rows, key, worst, colour)
            axes.set_yticks(range(len(rows)), labels=[], parse_math=False)
            axes.set_title(label)
        every[0].set_yticks(range(len(rows)), labels=names, fontsize=PANEL_PT, parse_math=False)
        _comparison_legend(figure, every[0], rows, any(broken))
        draw_title(figure, title or "Placements compared")
        lay_out(figure)
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
        draw_legend(figure, handles, labels)
