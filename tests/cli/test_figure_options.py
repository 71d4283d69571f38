"""Title, size and resolution of every figure, and what its files hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from matplotlib.figure import Figure

from prism_plan import plotting
from prism_plan.errors import InputError
from prism_plan.io.placement import write_placement
from prism_plan.io.sweep import write_sweep
from prism_plan.io.trace_writer import write_trace
from prism_plan.plotting import FigureOptions
from tests.evaluate.simulation_reports import make_report, make_run, make_sweep
from tests.plotting.test_plotting import (
    ROWS,
    check_readable,
    make_model,
    make_placement,
    make_trace,
    title,
)
from tests.profiling.synthetic import synthetic_trace

Run = Callable[..., CompletedProcess[str]]
SOLVERS = ("uniform", "eplb", "layer-partition", "prism", "exact")
PHASES = [
    {"number": n, "at_s": at_s, "everywhere_at_s": at_s, "tasks": {}, "arrival_interval_s": None}
    for n, at_s in ((1, 1.0), (2, 1500.0))
]
REPORT = make_report(
    [make_run(name, name, moves=[300, 900], stays=[600]) | {"phases": PHASES} for name in SOLVERS]
)
SWEEP = make_sweep([4, 16], [100, 500], solvers=SOLVERS, seeds=2)
KINDS: dict[str, Callable[[FigureOptions], Figure]] = {
    "heatmap": lambda options: plotting.heatmap(make_trace(), options=options),
    "entropy": lambda options: plotting.entropy(make_trace(), options=options),
    "placement": lambda options: plotting.placement_map(make_placement(), options=options),
    "comparison": lambda options: plotting.comparison(ROWS, options=options),
    "cdf": lambda options: plotting.simulation_cdf(REPORT, options=options),
    "timeline": lambda options: plotting.simulation_timeline(REPORT, options=options),
    "layer-latency": lambda options: plotting.layer_latency(REPORT, options=options),
    "latency": lambda options: plotting.simulation_bars(REPORT, options=options),
    "sweep": lambda options: plotting.sweep_figure(SWEEP, options=options),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_title_size_and_resolution(kind: str) -> None:
    """The title is the one given or none, letter by letter; the size is that in inches and dots."""
    figure = KINDS[kind](FigureOptions(title="My $x_1$\ntitle", size_in=(12, 6.5), dpi=50))
    assert title(figure) == "My $x_1$ title"
    assert tuple(figure.get_size_inches()) == (12, 6.5)
    check_readable(figure, width_px=600)
    assert title(KINDS[kind](FigureOptions(title=""))) == ""
    usual = KINDS[kind](FigureOptions())
    assert title(usual)
    assert (usual.get_figwidth(), usual.dpi) == (15, 100)


@kinds
@pytest.mark.parametrize("size_in", [(7.0, 5.0), (30.0, 12.0)])
def test_other_sizes_are_readable(kind: str, size_in: tuple[float, float]) -> None:
    """In a paper's two columns and on a poster no texts overlap and none is cut."""
    check_readable(KINDS[kind](FigureOptions(size_in=size_in)), width_px=int(100 * size_in[0]))


@kinds
def test_too_small_is_an_input_error(kind: str) -> None:
    """A size that leaves no room for the panels is refused, not drawn with a warning."""
    with pytest.raises(InputError, match="size_in: 1 × 1 inches; expected room for the panels"):
        KINDS[kind](FigureOptions(size_in=(1, 1)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dpi": 9}, "dpi: 9; expected a whole number from 10 to 1,200"),
        ({"dpi": 1201}, "dpi: 1201; expected"),
        ({"dpi": 72.5}, "dpi: 72.5; expected a whole number"),
        ({"size_in": (0.9, 5)}, "size_in: 0.9 × 5 inches; expected a width and a height of 1 to"),
        ({"size_in": (5, float("nan"))}, "size_in: 5 × nan inches; expected"),
        ({"size_in": (101, 5)}, "size_in: 101 × 5 inches; expected"),
        ({"size_in": (50, 50), "dpi": 1200}, "60,000 × 60,000 pixels; expected at most 64,000,000"),
        ({"size_in": (60, 1), "dpi": 1200}, "72,000 × 1,200 pixels; expected .* 65,535 a side"),
    ],
)
def test_bounds(values: dict[str, Any], message: str) -> None:
    """Sizes and resolutions out of bounds, or too large together, are refused before drawing."""
    with pytest.raises(InputError, match=message):
        FigureOptions(**values)


def test_content_that_needs_too_many_pixels() -> None:
    """A figure that grows with its rows is refused beyond as many pixels, saying so."""
    rows = [ROWS[0] | {"name": f"p{i}"} for i in range(2000)]
    with pytest.raises(InputError, match=r"^15 × 842 inches at 100 dots an inch"):
        plotting.comparison(rows)


# ------------------------------------------------------------------------------------------- files


def test_pdf_holds_truetype_and_svg_text(tmp_path: Path) -> None:
    """No Type 3 font is in a PDF, which publishers refuse; an SVG has its texts as texts."""
    figure = KINDS["comparison"](FigureOptions())
    plotting.save(figure, tmp_path / "f.pdf")
    plotting.save(figure, tmp_path / "f.svg")
    pdf = (tmp_path / "f.pdf").read_bytes()
    assert b"/FontType 42" in pdf or b"/Subtype /CIDFontType2" in pdf
    assert b"/Type3" not in pdf
    svg = (tmp_path / "f.svg").read_text()
    assert re.search(r"<text [^>]*>uniform</text>", svg)
    assert "sans-serif" in svg  # where DejaVu Sans is missing


def test_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Bytes do not depend on the process, the seed of hashes or the clock."""
    (tmp_path / "s.json").write_text(json.dumps(REPORT))
    program = (
        "import json\nfrom prism_plan import plotting\n"
        "figure = plotting.simulation_timeline(json.load(open('s.json')))\n"
        "for kind in ('png', 'svg', 'pdf'):\n    plotting.save(figure, f'f.{kind}')\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1000000000"}
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    figure = KINDS["timeline"](FigureOptions())
    for kind in ("png", "svg", "pdf"):
        plotting.save(figure, tmp_path / f"here.{kind}")
        here, there = (tmp_path / f"{name}.{kind}" for name in ("here", "f"))
        assert here.read_bytes() == there.read_bytes(), kind


def png_size(path: Path) -> tuple[int, ...]:
    """Width and height in pixels of a PNG file."""
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each kind of figure."""
    folder = tmp_path_factory.mktemp("inputs")
    trace = synthetic_trace(make_model(3, 8), ["a", "b"], requests=3, seed=0)
    write_trace(folder / "heatmap", trace)
    write_trace(folder / "entropy", trace)
    write_placement(folder / "placement", make_placement().replace(inputs={}))
    shutil.copy(Path(__file__).parents[1] / "golden" / "comparison-v1.json", folder / "comparison")
    for kind in ("cdf", "timeline", "layer-latency", "latency"):
        (folder / kind).write_text(json.dumps(REPORT))
    write_sweep(folder / "sweep.csv", SWEEP)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``prism-plan plot`` in this process; gives the exit code and standard error."""
    from prism_plan.cli.main import run as run_command

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prism-plan", "plot", *map(str, arguments)])
        monkeypatch.chdir(folder)
        return run_command(), capsys.readouterr().err

    return call


@kinds
def test_every_command_has_the_options(kind: str, run: Any, folder: Path, tmp_path: Path) -> None:
    """Each kind of plot takes --title, --no-title, --size and --dpi."""
    file, output = "sweep.csv" if kind == "sweep" else kind, tmp_path / "f.png"
    options = ("--title", "Mine", "--size", "14x7", "--dpi", "50", "-o", output)
    assert run(kind, file, *options) == (0, "")
    assert png_size(output) == (700, 350)
    svg = tmp_path / "f.svg"
    assert run(kind, file, "--title", "Quite my own", "-o", svg) == (0, "")
    assert ">Quite my own<" in svg.read_text()
    assert run(kind, file, "--no-title", "--size", "14X7", "-o", tmp_path / "n.svg") == (0, "")
    assert 'width="1008pt" height="504pt"' in (tmp_path / "n.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "7"), "--size: '7'; expected width x height in inches, such as 7x4.5"),
        (("--size", "axb"), "--size: 'axb'; expected width x height"),
        (("--size", "0x5"), "--size: 0 × 5 inches; expected a width and a height of 1 to 100"),
        (("--size", "1x1"), "--size: 1 × 1 inches; expected room for the panels"),
        (("--dpi", "5000"), "--dpi: 5000; expected a whole number from 10 to 1,200"),
        (("--size", "90x90", "--dpi", "600"), "--size: 90 × 90 inches at 600 dots"),
        (
            ("--title", "a", "--no-title"),
            "--title: given with --no-title; leave one of the two out",
        ),
    ],
)
def test_bad_options(
    options: tuple[str, ...], message: str, run: Any, folder: Path, tmp_path: Path
) -> None:
    """What cannot be drawn is one line that names the option, with code 2, and no file."""
    code, told = run("cdf", "cdf", *options, "-o", tmp_path / "f.png")
    assert code == 2
    assert told.startswith(f"prism-plan: {message}")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_paper_is_drawn_when_asked_for(run: Any, folder: Path, tmp_path: Path) -> None:
    """`plot layer-latency` marks 8.30 with --paper alone."""
    for options, marked in (((), False), (("--paper",), True)):
        output = tmp_path / "f.svg"
        assert run("layer-latency", "layer-latency", *options, "-o", output) == (0, "")
        assert ("8.30×" in output.read_text()) == marked
