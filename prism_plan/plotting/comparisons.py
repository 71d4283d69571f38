"""The figure of a comparison: bars of shares and destinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.plotting.bars import value_bars
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
            remote = key == "remote_share"
            value_bars(
                axes,
                [row.get(key) for row in rows],
                worst=[row.get("worst_server_share") if remote else None for row in rows],
                colour=colour,
                share=key != "destinations",
                missing="no placement" if remote else "not known",
            )
            axes.set_yticks(range(len(rows)), labels=[], parse_math=False)
            axes.set_title(label)
        every[0].set_yticks(range(len(rows)), labels=names, fontsize=PANEL_PT, parse_math=False)
        _comparison_legend(figure, every[0], rows, any(broken))
        draw_title(figure, title or "Placements compared")
        lay_out(figure)
    return figure


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
