"""A solver has one colour in every figure, which colour-blind readers tell from the others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from prism_plan import plotting
from prism_plan.placement import OFFLOAD
from prism_plan.plotting import OTHER_COLOURS, SOLVER_COLOURS, solver_styles
from prism_plan.plotting.solver_styles import lighten, text_colour_on
from prism_plan.solvers import SOLVER_NAMES
from tests.evaluate.simulation_reports import make_report, make_run, make_sweep

#: What of linear red, green and blue each kind of reader sees, at its strongest (Machado, Oliveira
#: and Fernandes, 2009).
VISIONS = {
    "all colours": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
SOLVERS = [*SOLVER_NAMES, OFFLOAD]
NAMES = [*SOLVERS, "pipeline", "latency", "layer-partition+paths", "mine"]


def linear(colour: str) -> np.ndarray:
    """Linear red, green and blue of a colour."""
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(colour: str, vision: str) -> np.ndarray:
    """CIE L*a*b* of a colour as such a reader sees it; 2.3 apart is just noticeable."""
    seen = np.clip(np.asarray(VISIONS[vision]) @ linear(colour), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.asarray(to_xyz) @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_solver_has_a_colour() -> None:
    """All solvers, the baseline and those that are planned stand in the table."""
    assert set(SOLVER_COLOURS) == {*SOLVERS, "pipeline", "latency"}


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_are_told_apart(vision: str) -> None:
    """Any two colours are at least six times a noticeable difference apart, whoever looks."""
    colours = [*SOLVER_COLOURS.values(), *OTHER_COLOURS]
    for one, other in itertools.combinations(colours, 2):
        distance = np.linalg.norm(lab(one, vision) - lab(other, vision))
        assert distance > 6 * 2.3, f"{one} and {other}"


def test_text_on_a_bar_can_be_read() -> None:
    """Black or white on a colour has a contrast of at least 4.5 : 1 (WCAG AA)."""
    for colour in [*SOLVER_COLOURS.values(), *OTHER_COLOURS]:
        light = float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) + 0.05
        contrast = 1.05 / light if text_colour_on(colour) == "white" else light / 0.05
        assert contrast >= 4.5, colour


def colour_of(name: str) -> str:
    """The colour that the artist of a placement of :data:`NAMES` has to have."""
    return SOLVER_COLOURS.get(name.removesuffix("+paths"), OTHER_COLOURS[0])


def line_colours(figure: Figure) -> list[str]:
    """Colours of the lines of the first panel that have more than one point."""
    lines = figure.axes[0].get_lines()
    return [to_hex(line.get_color()).upper() for line in lines if len(line.get_xdata()) > 1]


def bar_colours(figure: Figure) -> list[list[str]]:
    """Colours of the bars of each panel, from the top."""
    found = []
    for axes in figure.axes:
        bars = [bar for c in axes.containers if isinstance(c, BarContainer) for bar in c]
        bars.sort(key=lambda bar: bar.get_y())
        found.append([to_hex(bar.get_facecolor()).upper() for bar in bars])
    return found


REPORT = make_report([make_run(name, name) for name in NAMES])
LINES: dict[str, Callable[[], Figure]] = {
    "cdf": lambda: plotting.simulation_cdf(REPORT),
    "timeline": lambda: plotting.simulation_timeline(REPORT),
    "layer-latency": lambda: plotting.layer_latency(REPORT),
    "sweep": lambda: plotting.sweep_figure(make_sweep([4], [100, 500], solvers=NAMES, seeds=1)),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_have_the_colour_of_their_solver(kind: str) -> None:
    """In every figure with a line a placement the colour is that of the table."""
    assert line_colours(LINES[kind]()) == [colour_of(name) for name in NAMES]


def test_bars_have_the_colour_of_their_solver() -> None:
    """In all panels of a comparison and of bars of runs, p95 and p99 in lighter tints."""
    keys = ("remote_share", "waiting_share", "destinations")
    rows = [{"name": name} | dict.fromkeys(keys, 0.5) for name in NAMES]
    expected = [colour_of(name) for name in NAMES]
    assert bar_colours(plotting.comparison(rows)) == [expected] * 3
    latency, *shares = bar_colours(plotting.simulation_bars(REPORT))
    assert shares == [expected] * 2
    assert latency[::3] == expected
    assert latency[1::3] == [lighten(colour, 0.45) for colour in expected]


def test_bars_of_the_study_have_the_colour_of_their_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure of the study on shaped lines, from the committed measurements."""
    from studies import shaped

    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: drawn.append(figure))
    values = json.loads((Path(shaped.__file__).parent / "shaped.json").read_text())
    found = shaped.by_round_trip(values)
    shaped.draw(found, Path("unused.png"))
    for axes, solvers in zip(drawn[0].axes, found.values(), strict=True):
        colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
        expected = [SOLVER_COLOURS[solver] for solver, rows in solvers.items() for _ in rows]
        assert colours == expected


def test_a_subset_of_a_sweep_keeps_its_colours() -> None:
    """Solvers that are not in the table have the same colours whichever of them are drawn."""
    rows = make_sweep([4], [100, 500], solvers=["one", "two", "exact"], seeds=1)
    figure = plotting.sweep_figure(rows, solvers=["exact", "two"])
    assert line_colours(figure) == [SOLVER_COLOURS["exact"], OTHER_COLOURS[1]]


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("exact", ""),
        ("exact.json", ""),
        ("out/exact.json", ""),
        ("mine.json", "exact"),
        ("prism.json", "exact"),
        ("exact+paths", ""),
        ("a.json", "exact+paths"),
    ],
)
def test_the_solver_counts_and_else_the_name(name: str, solver: str) -> None:
    """A placement has the colour of its solver; where none is told, of what its name says."""
    assert solver_styles([(name, solver)])[0].colour == SOLVER_COLOURS["exact"]


def test_placements_of_one_solver_differ() -> None:
    """Forty placements of one solver, or of none known, share colours and no look of a line."""
    for placements in ([("p.json", "prism")] * 40, [(f"p{i}.json", "") for i in range(40)]):
        styles = solver_styles(placements)
        looks = {(style.colour, str(style.line_style), style.marker) for style in styles}
        assert len(looks) == 40
    first, second, paths = solver_styles([("a", "prism"), ("b", "prism"), ("c", "prism+paths")])
    assert first.colour == second.colour == paths.colour == SOLVER_COLOURS["prism"]
    assert len({first.hatch, second.hatch, paths.hatch}) == 3
    assert not first.hatch


def test_others_take_their_colours_in_order() -> None:
    """Placements of unknown solvers have the colours of the reserve in order of appearance."""
    styles = solver_styles([("b", ""), ("exact", ""), ("a", ""), ("b", ""), ("c", "")])
    colours = [style.colour for style in styles]
    first, second, third = OTHER_COLOURS[:3]
    assert colours == [first, SOLVER_COLOURS["exact"], second, first, third]
