"""The figure of a comparison: bars of shares, destinations and latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.plotting.bars import bar_panels, name_bars, value_bars
from prism_plan.plotting.figure_options import DEFAULT_FIGURE, FigureOptions
from prism_plan.plotting.figure_parts import (
    draw_legend,
    finish_figure,
    max_characters,
    new_figure,
    shorten,
)
from prism_plan.plotting.solver_styles import solver_styles
from prism_plan.plotting.style import matplotlib_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (
    ("remote_share", "remote share of calls"),
    ("waiting_share", "waiting share of (token, layer) steps"),
    ("destinations", "destinations: remote servers per step"),
    ("latency_mean_s", "mean latency of a request in seconds"),
)


def comparison(
    rows: Sequence[Mapping[str, Any]], title: str = "", *, options: FigureOptions = DEFAULT_FIGURE
) -> Figure:
    """Shares, destinations and latencies of several placements, as horizontal bars.

    ``rows`` are those of ``prism-plan compare --json``, drawn from the top in the order given:
    ``name``, ``remote_share``, ``worst_server_share``, ``waiting_share`` (shares from 0 to 1),
    ``destinations`` (servers) and ``latency_mean_s``; a value that is missing or ``None`` is not
    known. A bar has the colour of the row's ``solver``, or of the solver that its name says. A
    panel of which nothing is known is left out. A thin line marks the remote share of the row named
    ``exact``. ``title`` says what was compared.

    Raises
    ------
    InputError
        There are no rows, or one has no name; or the figure is too small or too large.
    """
    if not rows or not all(row.get("name") for row in rows):
        raise InputError(
            "no rows" if not rows else "a row without a name",
            expected="rows of a comparison, each with a name",
        )
    panels = [
        (key, label)
        for key, label in _PANELS
        if key == "remote_share" or any(row.get(key) is not None for row in rows)
    ]
    styles = solver_styles((str(row["name"]), _solver(row)) for row in rows)
    with matplotlib_settings():
        figure = new_figure(0.42 * len(rows) + 2.0, options)
        every = bar_panels(figure, len(panels))
        broken = [bool(row.get("violations")) for row in rows]
        most = min(36, max(max_characters(figure, 36), 16))
        names = [
            shorten(str(row["name"]), most) + " *" * bad
            for row, bad in zip(rows, broken, strict=True)
        ]
        for axes, (key, label) in zip(every, panels, strict=True):
            remote = key == "remote_share"
            value_bars(
                axes,
                [row.get(key) for row in rows],
                worst=[row.get("worst_server_share") if remote else None for row in rows],
                styles=styles,
                share=key.endswith("_share"),
                missing="no placement" if remote else "not known",
            )
            axes.set_title(label)
        name_bars(figure, every, names)
        _comparison_legend(figure, every[0], rows, any(broken))
        finish_figure(figure, options, title or "Placements compared")
    return figure


def _solver(row: Mapping[str, Any]) -> str:
    """The solver of a row, or "" where the file does not say."""
    solver = row.get("solver")
    return solver if isinstance(solver, str) else ""


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
