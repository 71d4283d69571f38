"""The panel of an execution table: which server executes which layer for whose requests."""

from __future__ import annotations

import colorsys
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import executed_elsewhere, spans
from prism_plan.placement import Placement
from prism_plan.plotting.figure_parts import is_narrow, legend_patch, max_characters, shorten
from prism_plan.plotting.panels import tick_positions
from prism_plan.plotting.solver_styles import text_colour_on
from prism_plan.plotting.style import COLOURS, NO_DATA, TICK_PT
from prism_plan.printable_text import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

#: Servers that have a colour and a name; further ones, those that execute least, share a grey.
MAX_NAMED_SERVERS = 72
#: Height of a home server's row, and of all rows together, in inches.
ROW_IN, MIN_ROWS_IN, MAX_ROWS_IN = 0.17, 0.8, 11.0
#: Title, numbers of layers and their name, in inches.
AROUND_IN = 0.9
LEGEND_ROW_IN = 0.178
#: Points of the names of servers inside of spans.
SPAN_PT = 7


class ExecutionPanel(NamedTuple):
    """A drawn panel, for :func:`fit_names`."""

    axes: Axes
    placement: Placement
    colours: tuple[str, ...]


def execution_panel_in(placement: Placement) -> float:
    """Height of the panel in inches, with its title and the numbers of layers."""
    rows = min(max(ROW_IN * placement.num_servers, MIN_ROWS_IN), MAX_ROWS_IN)
    return rows + AROUND_IN


def draw_execution(figure: Figure, place: SubplotSpec, placement: Placement) -> ExecutionPanel:
    """Draw which server executes which layer for the requests of each home server.

    The image is the execution table, int [N, L] by home server and MoE layer; each server that
    executes layers has a colour, which the legend beside the panel names. Servers beyond
    :data:`MAX_NAMED_SERVERS`, those that execute least, share a grey.
    """
    from matplotlib.colors import ListedColormap

    table, layers = placement.execution_table, placement.model.moe_layers
    colours, named = _colours(table)
    axes = figure.add_subplot(place)
    axes.imshow(
        table,
        cmap=ListedColormap(list(colours)),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    # lines between spans, for readers who do not see the colours too, and between rows
    ends = [(span.first - 0.5, n) for n, row in enumerate(table) for span in spans(row)[1:]]
    if ends:
        x, n = np.array(ends).T
        axes.vlines(x, n - 0.5, n + 0.5, color="white", linewidth=1.5, capstyle="butt")
    between = np.arange(1, len(table)) - 0.5
    width = 1.0 if len(table) <= 64 else 0.3
    axes.hlines(between, -0.5, len(layers) - 0.5, color="white", linewidth=width, capstyle="butt")
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(table) - 0.5, -0.5)
    ticks = tick_positions(len(layers), max(max_characters(figure, 32), 4))
    axes.set_xticks(ticks, labels=[str(layers[i]) for i in ticks])
    axes.set_xlabel("decoder layer (MoE layers)")
    _name_rows(figure, axes, placement, range(len(table)))
    axes.tick_params(length=0)
    axes.set_ylabel("home server")
    for side in axes.spines.values():
        side.set_visible(False)
    elsewhere = executed_elsewhere(table)
    axes.set_title(
        f"layers of {int(elsewhere.any(axis=1).sum()):,} of "
        f"{quantity(len(table), 'home server')} execute elsewhere, {elsewhere.mean():.0%} of all"
    )
    heights: Any = place.get_gridspec().get_height_ratios()
    height_in = figure.get_figheight() * heights[-1] / sum(heights)
    _draw_legend(figure, axes, placement, named, colours, height_in)
    return ExecutionPanel(axes, placement, colours)


def fit_names(figure: Figure, panel: ExecutionPanel) -> None:
    """Write the server's name into each span that has room for it, and thin names of rows.

    To be called when the layout of the figure is final, for that decides what has room.
    """
    axes, placement = panel.axes, panel.placement
    box = axes.get_window_extent()
    rows, layers = placement.execution_table.shape
    pixels = figure.dpi / 72  # of a point
    step = math.ceil(1.25 * TICK_PT * pixels * rows / box.height)
    _name_rows(figure, axes, placement, range(0, rows, step))
    if 1.15 * SPAN_PT * pixels > box.height / rows:
        return
    names = [shorten(name, 24) for name in placement.servers]
    widths = {name: _width_pt(name) * pixels for name in set(names)}
    for n, row in enumerate(placement.execution_table):
        for first, last, server in spans(row):
            name = names[server]
            if widths[name] + 6 * pixels > (last - first + 1) * box.width / layers:
                continue
            axes.text(
                (first + last) / 2, n, name, ha="center", va="center_baseline", fontsize=SPAN_PT,
                color=text_colour_on(panel.colours[server]), parse_math=False,
            )  # fmt: skip


def _name_rows(figure: Figure, axes: Axes, placement: Placement, homes: range) -> None:
    names = [shorten(placement.servers[n], max_characters(figure, 24)) for n in homes]
    axes.set_yticks(list(homes), labels=names, parse_math=False)


def _width_pt(text: str) -> float:
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=SPAN_PT, usetex=False).get_extents().width)


def _draw_legend(
    figure: Figure,
    axes: Axes,
    placement: Placement,
    named: list[int],
    colours: tuple[str, ...],
    height_in: float,
) -> None:
    from matplotlib.transforms import ScaledTranslation

    names = [shorten(placement.servers[m], min(max_characters(figure, 80), 32)) for m in named]
    patches = [legend_patch(colours[m]) for m in named]
    others = len(np.unique(placement.execution_table)) - len(named)
    if others:
        names.append(quantity(others, "other server"))
        patches.append(legend_patch(NO_DATA))
    narrow = is_narrow(figure)
    rows = max(int((height_in - 0.3) / LEGEND_ROW_IN), 1)
    columns = math.ceil(len(names) / rows)
    if narrow:
        columns = max(max_characters(figure, 150) // (max(map(len, names)) + 8), 1)
    below_numbers = ScaledTranslation(0, -0.45, figure.dpi_scale_trans)
    legend = axes.legend(
        patches,
        [str(i) for i in range(len(names))],
        loc="upper center" if narrow else "center left",
        bbox_to_anchor=(0.5, 0) if narrow else (1.01, 0.5),
        bbox_transform=axes.transAxes + below_numbers if narrow else axes.transAxes,
        ncols=columns,
        title="where layers execute",
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        borderaxespad=0,
        labelspacing=0.3,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)  # "$" and "_" in a name are only letters
        text.set_text(name)


def _colours(table: npt.NDArray[np.int32]) -> tuple[tuple[str, ...], list[int]]:
    """The colour of each server, and the servers that have one of their own."""
    cells = np.bincount(table.ravel(), minlength=len(table))
    # stable: of servers that execute equally many layers the first have a colour
    most = np.argsort(-cells, kind="stable")[:MAX_NAMED_SERVERS]
    named = sorted(int(m) for m in most if cells[m])
    few = len(table) <= MAX_NAMED_SERVERS  # then a server has the same colour in every figure
    palette = _different_colours(len(table) if few else len(named))
    colours = [NO_DATA] * len(table)
    for number, m in enumerate(named):
        colours[m] = palette[m if few else number]
    return tuple(colours), named


def _different_colours(count: int) -> list[str]:
    """The colours of the style, then those that differ most from all before them and from grey."""
    found = [_rgb(colour) for colour in (NO_DATA, *COLOURS)]
    candidates = [
        tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue / 24, lightness, saturation))
        for lightness in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
        for saturation in (0.5, 0.8)
        for hue in range(24)
    ]
    nearest = [min(_distance(one, other) for other in found) for one in candidates]
    while len(found) <= count:
        new = candidates[nearest.index(max(nearest))]
        found.append(new)
        nearest = [
            min(old, _distance(one, new)) for old, one in zip(nearest, candidates, strict=True)
        ]
    return ["#{:02X}{:02X}{:02X}".format(*colour) for colour in found[1 : count + 1]]


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Squared distance of two colours as they are seen, by the approximation "redmean"."""
    red, green, blue = (a - b for a, b in zip(one, other, strict=True))
    mean = (one[0] + other[0]) / 2
    return (2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2
