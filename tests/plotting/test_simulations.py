"""Figures of simulations and sweeps hold the numbers they claim to show and can be read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from prism_plan import plotting
from prism_plan.errors import InputError
from prism_plan.io.sweep import write_sweep
from tests.evaluate.simulation_reports import failed, make_report, make_run, make_sweep
from tests.plotting.test_plotting import check_readable, legend, title

Run = Callable[..., CompletedProcess[str]]
FIGURES = [
    plotting.simulation_cdf,
    plotting.simulation_timeline,
    plotting.layer_latency,
    plotting.simulation_bars,
]
REPORT = make_report(
    [
        make_run("uniform.json", "uniform", moves=[300, 900], stays=[600]),
        make_run("mine.json", "exact", scale=0.5, moves=[300], busy=[600], finished=60, seed=1),
    ],
    migrate="partial",
)


def many(count: int, scale: float = 1.0, long: bool = False) -> dict[str, Any]:
    """A report of so many runs, each ``scale`` times as slow as the one before."""
    name = "the-placement-of-a-region-with-a-very-long-name-{}.json" if long else "p{}.json"
    reviews = {"moves": [300, 1500], "stays": [600, 1200], "busy": [900]}
    return make_report(
        [
            make_run(name.format(i), "exact", scale=scale**i, seed=i, **(reviews if i else {}))
            for i in range(count)
        ],
        partial=True,
        migrate="partial",
        trace={"name": "t" * 90, "sha256": "", "kind": "counts"},
        cluster={"name": "c" * 90, "sha256": ""},
    )


# ------------------------------------------------------------------------------------- simulations


def test_cdf_lines_are_the_quantiles() -> None:
    """A line is the 101 quantiles over 0 to 1, with a marker at the mean on it."""
    figure = plotting.simulation_cdf(REPORT)
    lines = figure.axes[0].get_lines()
    for line, mark, run in zip(lines[::2], lines[1::2], REPORT["runs"], strict=True):
        np.testing.assert_allclose(line.get_xdata(), run["latency_quantiles_s"])
        np.testing.assert_allclose(line.get_ydata(), np.linspace(0, 1, 101))
        assert mark.get_xdata() == [run["latency_s"]["mean"]]
        under = np.mean(np.array(run["latency_quantiles_s"]) <= run["latency_s"]["mean"])
        assert mark.get_ydata()[0] == pytest.approx(under, abs=0.02)
    assert legend(figure) == ["uniform", "mine (exact)", "markers: mean"]
    for part in ("bigbench.parquet", "paper-v2lite.toml", "route cover", "migrate partial"):
        assert part in title(figure)


@pytest.mark.parametrize(("scale", "kind"), [(1.0, "linear"), (30.0, "log")])
def test_cdf_is_logarithmic_where_it_spans_much(scale: float, kind: str) -> None:
    """More than 20 times from the least to the most is drawn on a logarithmic axis."""
    axes = plotting.simulation_cdf(many(2, scale)).axes[0]
    assert axes.get_xscale() == kind
    assert ("logarithmic" in axes.get_xlabel()) == (kind == "log")


def test_timeline_lines_are_the_bins_and_leave_gaps() -> None:
    """A line stands at the middles of the bins; a bin without latency is a gap."""
    axes = plotting.simulation_timeline(REPORT).axes[0]
    for line, run in zip(axes.get_lines(), REPORT["runs"], strict=False):
        np.testing.assert_allclose(line.get_xdata(), 25 + 50 * np.arange(60))
        expected = np.array(run["timeline"]["mean_latency_s"], np.float64)
        np.testing.assert_array_equal(line.get_ydata(), expected)
    assert np.isnan(axes.get_lines()[1].get_ydata()).any()


def test_timeline_marks_moves_and_reviews() -> None:
    """Each move is a vertical line in its run's colour; the strip below marks every review."""
    figure = plotting.simulation_timeline(REPORT)
    axes, strip = figure.axes
    colours = [line.get_color() for line in axes.get_lines()[:2]]
    moves = [(line.get_xdata()[0], line.get_color()) for line in axes.get_lines()[2:]]
    assert moves == [(300.0, colours[0]), (300.0, colours[1]), (900.0, colours[0])]
    alone = [line.is_dashed() for line in axes.get_lines()[2:]]
    assert alone == [True, True, False]
    marks = {
        (line.get_color(), line.get_marker()): (list(line.get_xdata()), set(line.get_ydata()))
        for line in strip.get_lines()
    }
    assert marks == {
        (colours[0], "D"): ([300.0, 900.0], {0}),
        (colours[0], "|"): ([600.0], {0}),
        (colours[1], "D"): ([300.0], {1}),
        (colours[1], "x"): ([600.0], {1}),
    }
    names = [label.get_text() for label in strip.get_yticklabels()]
    assert names == ["uniform", "mine (exact)"]
    told = ["experts moved", "review: stayed", "review: still loading"]
    assert legend(figure) == [*names, *told]


def phase(number: int, at_s: float, everywhere_at_s: float, **tasks: str) -> dict[str, Any]:
    """A phase of a report in which servers take up one task each."""
    return {
        "number": number,
        "at_s": at_s,
        "everywhere_at_s": everywhere_at_s,
        "tasks": {server: {task: 1.0} for server, task in tasks.items()},
        "arrival_interval_s": None,
    }


def with_phases(report: dict[str, Any], phases: list[dict[str, Any]]) -> dict[str, Any]:
    """The report, as it would be of a workload with these phases."""
    return report | {"runs": [run | {"phases": phases} for run in report["runs"]]}


def test_timeline_marks_phases() -> None:
    """A dashed line begins a phase in both panels, a band ends where all servers reached it.

    Its number and tasks stand above, once for all runs, and the legend tells what the line is.
    """
    phases = [phase(1, 2.0, 9.0), phase(2, 1500.0, 1620.0, edge="law", far="summary")]
    figure = plotting.simulation_timeline(with_phases(REPORT, phases))
    plain = plotting.simulation_timeline(REPORT)
    for axes, before in zip(figure.axes, plain.axes, strict=True):
        more = axes.get_lines()[len(before.get_lines()) :]
        assert [list(line.get_xdata()) for line in more] == [[1500.0, 1500.0]]
        assert more[0].is_dashed()
        band = axes.patches[-1].get_window_extent().transformed(axes.transData.inverted())
        np.testing.assert_allclose([band.x0, band.x1], [1500.0, 1620.0])
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "phase 1",
        "phase 2: edge law, far summary",
    ]
    assert legend(figure)[-1] == "phase begins"
    check_readable(figure)
    assert not plotting.simulation_timeline(with_phases(REPORT, phases[:1])).axes[0].texts


def test_timeline_marks_losses() -> None:
    """A band from the loss to the return, or to the end, and a dotted line at the notice."""
    servers = [
        {"server": "edge", "at_s": 300.0, "return_s": 900.0, "noticed_s": 310.0},
        {"server": "far", "at_s": 1500.0, "return_s": None, "noticed_s": None},
    ]
    lost = REPORT | {"runs": [run | {"losses": {"servers": servers}} for run in REPORT["runs"]]}
    figure, plain = plotting.simulation_timeline(lost), plotting.simulation_timeline(REPORT)
    for axes, before in zip(figure.axes, plain.axes, strict=True):
        more = axes.get_lines()[len(before.get_lines()) :]
        assert [list(line.get_xdata()) for line in more] == [[310.0, 310.0]]
        bands = [
            patch.get_window_extent().transformed(axes.transData.inverted())
            for patch in axes.patches[-2:]
        ]
        end_s = axes.get_xlim()[1]
        np.testing.assert_allclose([bands[0].x0, bands[0].x1], [300.0, 900.0])
        np.testing.assert_allclose([bands[1].x0, bands[1].x1], [1500.0, end_s])
    assert legend(figure)[-1] == "away: edge, far (dotted: noticed)"
    check_readable(figure)


@pytest.mark.parametrize("count", [2, 9, 30, 300])
def test_many_phases_and_moves_are_readable(count: int) -> None:
    """Names of phases get shorter and then go as they get many; lines of moves go beyond 60."""
    times = [3000.0 * i / count for i in range(1, count)]
    tasks = {f"edge-{n}": "a-task-with-a-long-name" for n in range(4)}
    phases = [phase(1, 1.0, 1.0)] + [
        phase(i, at_s, at_s + 5, **tasks) for i, at_s in enumerate(times, 2)
    ]
    run = make_run("prism.json", "prism", moves=[at_s + 1 for at_s in times])
    figure = plotting.simulation_timeline(with_phases(make_report([run]), phases))
    check_readable(figure)
    axes, strip = figure.axes
    lines = [line for line in axes.get_lines() if len(set(line.get_xdata())) == 1]
    moves = [x for line in lines if (x := line.get_xdata()[0]) in {t + 1 for t in times}]
    assert len(moves) == (count - 1 if count - 1 <= plotting.MAX_MOVE_LINES else 0)
    assert list(strip.get_lines()[0].get_xdata()) == [at_s + 1 for at_s in times]
    assert len(lines) - len(moves) == count - 1
    assert bool(axes.texts) == (count < 300)


def test_timeline_without_reviews_has_no_strip() -> None:
    """Where nothing was reviewed there is one panel, and the legend names the runs alone."""
    figure = plotting.simulation_timeline(make_report([make_run("exact.json")]))
    assert len(figure.axes) == 1
    assert legend(figure) == ["exact"]


def test_layer_latency_is_relative_to_no_remote_expert() -> None:
    """Lines start at 1 and are the ratios over r/K; the paper's figure is a line when asked for."""
    figure = plotting.layer_latency(REPORT, paper=True)
    *lines, paper = figure.axes[0].get_lines()
    for line, run in zip(lines, REPORT["runs"], strict=True):
        means = np.array([row["mean"] for row in run["layer_latency_s"]])
        np.testing.assert_allclose(line.get_xdata(), np.arange(7) / 6)
        np.testing.assert_allclose(line.get_ydata(), means / means[0])
    assert set(paper.get_ydata()) == {8.30}
    assert paper.get_linestyle() == ":"
    assert legend(figure)[-1] == "the paper's testbed: 8.30×"
    low, high = figure.axes[0].get_ylim()
    assert low <= 1
    assert high > 8.3
    without = plotting.layer_latency(REPORT)
    assert len(without.axes[0].get_lines()) == len(lines)
    assert legend(without) == ["uniform", "mine (exact)"]


def test_layer_latency_without_local_layers() -> None:
    """Numbers of remote experts that never occurred are left out; the base is told."""
    run = make_run("exact.json")
    for r in (0, 3):
        run["layer_latency_s"][r] |= {"steps": 0, "mean": None}
    figure = plotting.layer_latency(make_report([run]))
    line = figure.axes[0].get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), np.array([1, 2, 4, 5, 6]) / 6)
    assert line.get_ydata()[0] == 1
    assert legend(figure)[0] == "exact (from 1 remote)"


def test_bars_are_the_values() -> None:
    """Three bars of latency a run, from the top in order, and bars of both shares."""
    figure = plotting.simulation_bars(REPORT)
    latency, remote, waiting = figure.axes
    found = [[bar.get_width() for bar in bars] for bars in latency.containers]
    for bars, key in zip(found, ("mean", "p95", "p99"), strict=True):
        assert bars == [run["latency_s"][key] for run in REPORT["runs"]]
    tops = [bars[1].get_y() for bars in latency.containers]
    assert tops == sorted(tops)
    assert latency.yaxis_inverted()
    assert [bar.get_width() for bar in remote.patches] == [0.3, 0.15]
    assert [bar.get_width() for bar in waiting.patches] == [0.6, 0.3]
    assert legend(figure) == ["mean latency", "p95 latency", "p99 latency"]
    mean = REPORT["runs"][0]["latency_s"]["mean"]
    assert latency.texts[0].get_text() == f"{mean:#.3g}"


def test_shares_that_are_not_known() -> None:
    """A share of null is told in words, not drawn as zero."""
    run = make_run("offload", "offload") | {"waiting_share": None}
    waiting = plotting.simulation_bars(make_report([run])).axes[2]
    assert not waiting.patches
    assert [text.get_text() for text in waiting.texts] == ["not known"]


@pytest.mark.parametrize("draw", FIGURES)
def test_runs_with_nothing_to_show_are_left_out(draw: Callable[..., Figure]) -> None:
    """The title counts them, and the others keep their looks; none at all is refused."""
    empty = make_run("empty.json", finished=0)
    figure = draw(make_report([empty, make_run("exact.json")]))
    assert "1 of 2 runs left out" in title(figure)
    if draw is not plotting.simulation_bars:
        line = figure.axes[0].get_lines()[0]
        assert to_rgba(line.get_color()) == to_rgba(plotting.SOLVER_COLOURS["exact"])
        assert line.is_dashed()  # as the second of the solver
    check_readable(figure)
    for runs in ([], [empty]):
        with pytest.raises(InputError, match=r"^no run"):
            draw(make_report(runs))
    with pytest.raises(InputError, match="41 runs; expected at most 40"):
        draw(make_report([empty] * 41))


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (3, 6.0), (12, 1.1), (40, 1.0)])
def test_simulations_are_readable(draw: Callable[..., Figure], count: int, scale: float) -> None:
    """No texts overlap from 1 to 40 runs, with long names and reviews."""
    figure = draw(many(count, scale, long=True))
    check_readable(figure)
    if draw is plotting.simulation_cdf:
        assert len(set(legend(figure))) == count + 1  # also names that are cut stay apart


def test_one_request() -> None:
    """A run of one request, so of one latency, is drawn too."""
    for draw in FIGURES:
        check_readable(draw(make_report([make_run("exact.json", finished=1)])))


# ------------------------------------------------------------------------------------------ sweeps


def points(figure: Figure) -> list[list[tuple[list[float], list[float]]]]:
    """The lines of each panel."""
    return [
        [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        for axes in figure.axes
    ]


def mean(rows: list[dict[str, Any]], **wanted: Any) -> float:
    """The mean latency of the rows with these values."""
    found = [r["latency_mean_s"] for r in rows if all(r[k] == v for k, v in wanted.items())]
    assert found
    return float(np.mean(found))


def test_sweep_lines_are_means_over_seeds() -> None:
    """By bandwidth, a panel for each number of GPUs, a line a solver, a band least to most."""
    rows = make_sweep()
    figure = plotting.sweep_figure(rows, name="sweep.parquet")
    assert [axes.get_title() for axes in figure.axes] == [f"{n} GPUs" for n in (4, 16, 64, 256)]
    assert legend(figure) == ["eplb", "prism", "exact"]
    for axes, lines, gpus in zip(figure.axes, points(figure), (4, 16, 64, 256), strict=True):
        for (x, y), solver in zip(lines, ("eplb", "prism", "exact"), strict=True):
            assert x == [100, 250, 500, 1000]
            expected = [mean(rows, gpus=gpus, bandwidth_mbps=b, solver=solver) for b in x]
            np.testing.assert_allclose(y, expected)
        band = axes.collections[0].get_paths()[0].vertices
        seeds = [
            row["latency_mean_s"]
            for row in rows
            if (row["gpus"], row["bandwidth_mbps"], row["solver"]) == (gpus, 100, "eplb")
        ]
        at_100 = band[band[:, 0] == 100][:, 1]
        np.testing.assert_allclose([at_100.min(), at_100.max()], [min(seeds), max(seeds)])
    for part in ("by bandwidth", "sweep.parquet", "mean of 3 seeds"):
        assert part in title(figure)


def test_sweep_of_one_bandwidth_is_by_gpus() -> None:
    """With one bandwidth x is the GPUs, and the title tells the bandwidth; one seed has no band."""
    rows = make_sweep(bandwidths=[500], seeds=1)
    figure = plotting.sweep_figure(rows)
    assert len(figure.axes) == 1
    assert points(figure)[0][0][0] == [4, 16, 64, 256]
    assert not figure.axes[0].collections
    assert "500 Mbit/s" in title(figure)
    assert "seeds" not in title(figure)


def test_sweep_never_mixes_conditions() -> None:
    """What is neither x nor panels has rows of panels of its own."""
    rows = make_sweep([4, 16], [100, 500], [8.0, 10.0, 15.0], seeds=1)
    figure = plotting.sweep_figure(rows, x="gpus", panels="bandwidth_mbps", solvers=["exact"])
    told = [axes.get_title() for axes in figure.axes]
    wanted = list(itertools.product((8.0, 10.0, 15.0), (100.0, 500.0)))
    assert told == [f"{b:g} Mbit/s, a request every {a:g} s" for a, b in wanted]
    for [(x, y)], (interval, bandwidth) in zip(points(figure), wanted, strict=True):
        expected = [
            mean(rows, gpus=g, bandwidth_mbps=bandwidth, arrival_interval_s=interval,
                 solver="exact") for g in x
        ]  # fmt: skip
        np.testing.assert_allclose(y, expected)


@pytest.mark.parametrize(
    ("swept", "x"),
    [
        ({"intervals": [8.0, 10.0, 15.0], "gpus": [4], "bandwidths": [100, 500]}, "time between"),
        ({"fractions": [0.3, 0.5, 0.7], "gpus": [4], "bandwidths": [500]}, "usable part"),
        ({"intervals": [None, 8.0], "gpus": [4, 16, 64], "bandwidths": [500]}, "GPUs"),
        ({"gpus": [4], "bandwidths": [500]}, "GPUs"),
        ({"gpus": [4, 8, 16], "bandwidths": [100, 500]}, "bandwidth"),
    ],
)
def test_sweep_chooses_x(swept: dict[str, Any], x: str) -> None:
    """Bandwidth, else GPUs; with intervals or memory swept too, the condition of most values."""
    figure = plotting.sweep_figure(make_sweep(**swept, seeds=1))
    assert x in figure.axes[-1].get_xlabel()
    check_readable(figure)


def test_sweep_leaves_failed_runs_out() -> None:
    """Runs that failed are not drawn and are counted in the title."""
    rows = make_sweep([4], [100, 500], solvers=["exact"], seeds=2)
    rows = [rows[0], *map(failed, rows[1:2]), *map(failed, rows[2:])]
    figure = plotting.sweep_figure(rows)
    assert points(figure) == [[([4], [rows[0]["latency_mean_s"]])]]
    assert "3 of 4 runs left out: failed" in title(figure)
    with pytest.raises(InputError, match="none of 3 runs has a latency"):
        plotting.sweep_figure(rows[1:])


def test_sweep_refuses_what_it_does_not_know() -> None:
    """Unknown keys and solvers are named with the closest; x needs a value; 24 panels are most."""
    rows = make_sweep(intervals=[None, 8.0], seeds=1)
    with pytest.raises(InputError, match="x: unknown key 'gpu', did you mean 'gpus'"):
        plotting.sweep_figure(rows, x="gpu")
    with pytest.raises(InputError, match="panels: unknown key 'bandwidth', did you mean 'bandwi"):
        plotting.sweep_figure(rows, panels="bandwidth")
    with pytest.raises(InputError, match="no solver 'exakt', did you mean 'exact'"):
        plotting.sweep_figure(rows, solvers=["exakt"])
    with pytest.raises(InputError, match=r"^panels: 'gpus', as x"):
        plotting.sweep_figure(rows, x="gpus", panels="gpus")
    with pytest.raises(InputError, match="runs without a value of arrival_interval_s"):
        plotting.sweep_figure(rows, x="arrival_interval_s")
    with pytest.raises(InputError, match="25 panels; expected at most 24"):
        plotting.sweep_figure(make_sweep(range(4, 29), [100, 500], seeds=1))
    with pytest.raises(InputError, match="22 solvers"):
        plotting.sweep_figure(make_sweep(solvers=[f"s{i}" for i in range(22)]))


@pytest.mark.parametrize(
    "swept",
    [
        {},
        {"gpus": [4], "bandwidths": [500], "seeds": 1},
        {"gpus": [2**i for i in range(1, 9)], "bandwidths": range(100, 1001, 50), "seeds": 1,
         "solvers": [f"layer-partition-{i}" for i in range(21)]},
        {"gpus": [4, 16], "bandwidths": [1, 10, 11, 12, 10000], "fractions": [None, 0.3, 0.7],
         "intervals": [None, 8.0], "seeds": 2},
        {"gpus": range(1, 25), "bandwidths": [100, 110, 1000], "seeds": 1},
    ],
)  # fmt: skip
def test_sweeps_are_readable(swept: dict[str, Any]) -> None:
    """No texts overlap from one run to 24 panels, or with 21 solvers."""
    check_readable(plotting.sweep_figure(make_sweep(**swept), name="sweep" * 20 + ".parquet"))


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["f.png", "f.svg"])
def test_same_report_same_bytes(tmp_path: Path, name: str) -> None:
    """Drawing or saving again gives the same bytes."""
    rows = make_sweep([4, 16], [100, 500])
    draw = [lambda function=f: function(REPORT) for f in FIGURES]
    for function in (*draw, lambda: plotting.sweep_figure(rows)):
        figure = function()
        written = []
        for again in (figure, function()):
            plotting.save(again, tmp_path / name)
            written.append((tmp_path / name).read_bytes())
        assert len(set(written)) == 1


def test_commands(prism_plan: Run, tmp_path: Path) -> None:
    """Each command writes its figure; a fault is one line with the file or option, and code 2."""
    (tmp_path / "s.json").write_text(json.dumps(REPORT))
    empty = make_report([make_run("exact.json", finished=0)])
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    write_sweep(tmp_path / "r.parquet", make_sweep([4, 16], [100, 500], seeds=1))
    for kind in ("cdf", "timeline", "layer-latency", "latency"):
        done = prism_plan("plot", kind, "s.json", "-o", f"{kind}.png", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    options = ("--x", "gpus", "--panels", "bandwidth_mbps", "--solver", "exact")
    done = prism_plan("plot", "sweep", "r.parquet", *options, "-o", "f.svg", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for arguments, words in (
        (("cdf", "empty.json"), "empty.json: no run in which a request finished"),
        (("latency", "r.parquet"), "r.parquet: "),
        (("sweep", "r.parquet", "--x", "gpu"), "--x: unknown key 'gpu', did you mean 'gpus'?"),
        (("sweep", "r.parquet", "--solver", "exakt"), "r.parquet: no solver 'exakt', did you mean"),
        (("sweep", "s.json"), "s.json: extension '.json'; expected .parquet or .csv"),
    ):
        bad = prism_plan("plot", *arguments, "-o", "bad.png", cwd=tmp_path)
        assert bad.returncode == 2
        assert bad.stderr.startswith(f"prism-plan: {words}")
        assert bad.stderr.count("\n") == 1
    assert not (tmp_path / "bad.png").exists()
