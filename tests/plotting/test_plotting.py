"""Figures hold the numbers they claim to show, can be read, and are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from prism_plan import plotting
from prism_plan.errors import InputError, OutputError
from prism_plan.execution_table import home_execution
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import InputFile, Placement, SolveReport
from prism_plan.plotting.execution_panel import MAX_NAMED_SERVERS
from prism_plan.plotting.style import NO_DATA
from prism_plan.trace import Trace

ROWS = [
    {
        "name": "uniform",
        "remote_share": 0.6,
        "worst_server_share": 0.75,
        "waiting_share": 0.9,
        "destinations": 1.5,
        "bound": None,
    },
    {
        "name": "exact",
        "remote_share": 0.3,
        "worst_server_share": 0.45,
        "waiting_share": 0.7,
        "destinations": 0.9,
        "bound": 0.3,
    },
    {"name": "small", "remote_share": 0.02, "worst_server_share": None, "destinations": None},
]


def make_model(layers: int, experts: int, first: int = 1) -> ModelSpec:
    """A model of that many MoE layers and experts."""
    return ModelSpec(
        name="toy",
        moe_layers=tuple(range(first, first + layers)),
        num_experts=experts,
        top_k=2,
        expert_bytes=10,
        hidden_size=4,
        dtype_bytes=2,
        dense_bytes=10,
        kv_bytes_per_token=1,
    )


def make_trace(
    tasks: Sequence[str] = ("a", "b"), layers: int = 3, experts: int = 8, seed: int = 0
) -> Trace:
    """A counts-only trace with skewed counts, none of them zero."""
    shape = (len(tasks), layers, experts)
    counts = np.random.default_rng(seed).gamma(0.5, 50, shape).astype(np.int64) + 1
    tokens = np.full(len(tasks), 100)
    return Trace(make_model(layers, experts), tuple(tasks), counts, tokens, name="toy-trace")


def make_placement(
    servers: int = 2, gpus: int = 2, layers: int = 3, experts: int = 8, share: float = 0.4
) -> Placement:
    """A placement at random, where each GPU holds that share of the experts."""
    on_gpu = np.random.default_rng(1).random((servers * gpus, layers, experts)) < share
    return Placement(
        model=make_model(layers, experts).shape(),
        servers=tuple(f"edge-site-{n}" for n in range(servers)),
        gpu_capacity=((layers * experts,) * gpus,) * servers,
        on_gpu=on_gpu,
        plan=SolveReport("prism", remote_share=0.314),
        inputs={"trace": InputFile("toy-trace", ""), "cluster": InputFile("toy-cluster", "")},
    )


def images(figure: Figure) -> list[np.ndarray]:
    """The arrays behind the images of the panels, colour bars left out."""
    return [
        np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
        for axes in figure.axes
        if axes.images
    ]


def title(figure: Figure) -> str:
    """The title of the whole figure."""
    return figure.get_suptitle()


def legend(figure: Figure) -> list[str]:
    """The texts of the figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure: Figure) -> list[matplotlib.text.Text]:
    """Panel titles, tick labels, legend and title of a figure that has been drawn."""
    found = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        found += axes.texts
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [label for tick in shown for label in (tick.label1, tick.label2)]
    of_panels = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    for one in (*figure.legends, *of_panels):
        found += [*one.get_texts(), one.get_title()]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def check_readable(figure: Figure, width_px: int = 1500) -> None:
    """No two texts overlap, and none leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    assert width == width_px
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for text, box in boxes:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{text!r} leaves the figure"
    for (one, a), (other, b) in combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, f"{one!r} overlaps {other!r}"


# ------------------------------------------------------------------------------------------ heatmap


def test_heatmap_shows_share_over_uniform() -> None:
    """A panel's image is the share of the layer's calls over 1/E, for each task in order."""
    trace = make_trace()
    found = images(plotting.heatmap(trace))
    assert len(found) == 2
    for image, counts in zip(found, trace.counts, strict=True):
        share = counts / counts.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(image, share * 8)


def test_heatmap_draws_the_tasks_asked_for() -> None:
    """``tasks`` chooses the panels and their order, and titles name them, model and trace."""
    trace = make_trace(("a", "b", "c"))
    figure = plotting.heatmap(trace, ["c", "a"])
    assert [axes.get_title() for axes in figure.axes if axes.images] == ["c", "a"]
    np.testing.assert_allclose(images(figure)[0].sum(axis=1), 8)
    np.testing.assert_allclose(
        images(figure)[1], trace.counts[0] * 8 / trace.counts[0].sum(axis=1, keepdims=True)
    )
    assert "toy" in title(figure)
    assert "toy-trace" in title(figure)


def test_heatmap_uniform_is_white_and_nothing_is_grey() -> None:
    """A uniform layer is drawn neutral, a layer without calls grey, and the legend says so."""
    counts = np.ones((1, 2, 8), np.int64)
    counts[0, 1] = 0
    trace = Trace(make_model(2, 8), ("a",), counts, np.array([4]))
    figure = plotting.heatmap(trace)
    drawn = figure.axes[0].images[0]
    colours = drawn.cmap(drawn.norm(drawn.get_array()))
    np.testing.assert_allclose(colours[0, 0], to_rgba("#F7F7F7"), atol=0.02)
    np.testing.assert_allclose(colours[1, 0], to_rgba("#BBBBBB"), atol=0.01)
    assert legend(figure) == ["layer without calls"]


def test_heatmap_refuses_unknown_and_too_many_tasks() -> None:
    """An unknown task is named with the closest known one; 0 and 61 tasks are refused."""
    trace = make_trace(("intent", "law"))
    with pytest.raises(InputError, match="no task 'intnet', did you mean 'intent'"):
        plotting.heatmap(trace, ["intnet"])
    with pytest.raises(InputError, match="0 tasks; expected 1 to 60"):
        plotting.heatmap(trace, [])
    many = make_trace([f"t{i}" for i in range(61)], layers=1)
    with pytest.raises(InputError, match="61 tasks"):
        plotting.heatmap(many)


@pytest.mark.parametrize(
    ("tasks", "layers", "experts"), [(1, 1, 8), (2, 26, 64), (5, 4, 8), (14, 61, 256), (14, 26, 64)]
)
def test_trace_figures_are_readable_at_every_size(tasks: int, layers: int, experts: int) -> None:
    """No texts overlap from 1 to 14 long task names, 1 to 61 layers, 8 to 256 experts."""
    trace = make_trace([f"high_school_us_history_{i}" for i in range(tasks)], layers, experts)
    check_readable(plotting.heatmap(trace))
    check_readable(plotting.entropy(trace))


def test_names_are_drawn_letter_by_letter() -> None:
    """Dollar signs, leading underscores and line breaks in a task's name are only letters."""
    trace = make_trace(("$x_1$", "_hidden", "two\nlines", "x" * 100))
    figure = plotting.entropy(trace)
    check_readable(figure)
    check_readable(plotting.heatmap(trace))
    names = legend(figure)[:4]
    assert names[:3] == ["$x_1$", "_hidden", "two lines"]
    assert len(names[3]) == 40
    assert "…" in names[3]


# ------------------------------------------------------------------------------------------ entropy


def test_entropy_lines_equal_scipy() -> None:
    """Each task's line is the entropy in bits of its calls, over decoder indices."""
    trace = make_trace(("a", "b", "c"), layers=5, experts=16)
    lines = plotting.entropy(trace).axes[0].get_lines()
    for line, task, counts in zip(lines, trace.tasks, trace.counts, strict=False):
        assert line.get_label() == task
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
        np.testing.assert_allclose(line.get_ydata(), scipy.stats.entropy(counts, base=2, axis=1))


def test_entropy_marks_the_maximum_and_leaves_gaps() -> None:
    """A dashed line stands at log2 E; a layer without calls is a gap; all are in the legend."""
    trace = make_trace(("a", "b"), layers=3, experts=8)
    counts = trace.counts.copy()
    counts[0, 1] = 0
    figure = plotting.entropy(Trace(trace.model, trace.tasks, counts, trace.tokens))
    *tasks, most = figure.axes[0].get_lines()
    assert set(most.get_ydata()) == {3.0}
    assert most.get_linestyle() == "--"
    assert np.isnan(tasks[0].get_ydata()).tolist() == [False, True, False]
    assert legend(figure) == ["a", "b", "maximum, log2 8 = 3"]


def test_entropy_of_a_trace_without_calls() -> None:
    """A trace without any call still gives a figure."""
    trace = Trace(make_model(2, 8), ("a",), np.zeros((1, 2, 8), np.int64), np.array([0]))
    check_readable(plotting.entropy(trace))
    check_readable(plotting.heatmap(trace))


def test_lines_of_many_tasks_differ() -> None:
    """No two of 40 tasks share colour, marker and line style."""
    figure = plotting.entropy(make_trace([f"task-{i}" for i in range(40)]))
    lines = figure.axes[0].get_lines()[:-1]
    looks = {(x.get_color(), x.get_marker(), str(x._dash_pattern)) for x in lines}
    assert len(looks) == 40


# ---------------------------------------------------------------------------------------- placement


def test_placement_map_shows_the_gpu_of_each_expert() -> None:
    """0 where not held, 1 + g on GPU g, one more than the GPUs on several; then the copies."""
    placement = make_placement(servers=3, gpus=2)
    *servers, copies = images(plotting.placement_map(placement))
    assert len(servers) == 3
    for n, image in enumerate(servers):
        first, second = placement.on_gpu[placement.gpus_of(n)]
        np.testing.assert_array_equal(image, first + 2 * second)
    np.testing.assert_array_equal(copies, placement.local.sum(axis=0))


def test_placement_map_says_what_it_shows() -> None:
    """Titles give solver, model, inputs, remote share and the experts of each server."""
    placement = make_placement()
    figure = plotting.placement_map(placement)
    for part in ("prism", "toy", "trace toy-trace", "cluster toy-cluster", "31.4%"):
        assert part in title(figure)
    held = placement.local.sum(axis=(1, 2))
    assert figure.axes[0].get_title() == f"edge-site-0: {held[0]} experts on 2 GPUs"
    assert legend(figure) == ["not held", "GPU 0", "GPU 1", "several GPUs of the server"]


def test_colours_of_gpus_match_the_legend() -> None:
    """What is held on a GPU has its colour in the legend, and what is not held is white."""
    placement = make_placement(servers=2, gpus=3, share=0.2)
    figure = plotting.placement_map(placement)
    patches = dict(zip(legend(figure), figure.legends[0].get_patches(), strict=True))
    drawn = figure.axes[1].images[0]
    colours = drawn.cmap(drawn.norm(drawn.get_array()))
    on_gpu = placement.on_gpu[3:]
    alone = on_gpu & (on_gpu.sum(axis=0) == 1)
    assert (colours[~on_gpu.any(axis=0)] == to_rgba("white")).all()
    for g in range(3):
        assert alone[g].any()
        assert (colours[alone[g]] == patches[f"GPU {g}"].get_facecolor()).all()


def test_copies_panel_makes_missing_experts_stand_out() -> None:
    """An expert that no server holds has a colour of its own and is counted in the title."""
    placement = make_placement(servers=2, gpus=1, share=0.3)
    missing = int((~placement.local.any(axis=0)).sum())
    assert missing
    figure = plotting.placement_map(placement)
    axes = next(axes for axes in figure.axes if axes.get_title().startswith("copies"))
    assert f"{missing} experts held nowhere" in axes.get_title()
    drawn = axes.images[0]
    colours = drawn.cmap(drawn.norm(drawn.get_array()))
    nowhere = ~placement.local.any(axis=0)
    assert (colours[nowhere] == to_rgba("#D55E00")).all()
    assert not (colours[~nowhere] == to_rgba("#D55E00")).all(axis=1).any()


def test_placement_map_of_many_servers() -> None:
    """From 13 servers on: the copies, a bar of experts for each server, and a word about it."""
    placement = make_placement(servers=13)
    figure = plotting.placement_map(placement)
    found = images(figure)
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], placement.local.sum(axis=0))
    bars = figure.axes[1].patches
    assert [bar.get_height() for bar in bars] == placement.local.sum(axis=(1, 2)).tolist()
    assert "13 servers, too many for a panel each" in title(figure)


@pytest.mark.parametrize(
    ("servers", "gpus", "layers", "experts"),
    [(1, 1, 1, 8), (3, 2, 26, 64), (5, 12, 3, 8), (12, 8, 8, 64), (64, 1, 61, 256), (100, 1, 2, 8)],
)
def test_placement_map_is_readable_at_every_size(
    servers: int, gpus: int, layers: int, experts: int
) -> None:
    """No texts overlap from 1 to 100 servers and 1 to 12 GPUs each."""
    check_readable(plotting.placement_map(make_placement(servers, gpus, layers, experts)))


# ---------------------------------------------------------------------------------- execution table


def make_table(servers: int, layers: int, seed: int = 0) -> np.ndarray:
    """An execution table of one to four spans a row, on servers at random; int32 [N, L]."""
    rng = np.random.default_rng(seed)
    table = np.empty((servers, layers), np.int32)
    for row in table:
        starts = np.flatnonzero(rng.random(layers) < 2 / layers)
        for start in (0, *starts):
            row[start:] = rng.integers(servers)
    table[0, 0] = servers - 1  # not all at home
    return table


def panel_of_execution(figure: Figure) -> Axes:
    """The panel of an execution table."""
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == "home server")
    return axes


@pytest.mark.parametrize("servers", [2, 3, 12, 13, 64])
def test_execution_table_is_drawn(servers: int) -> None:
    """The image is the table, rows are the home servers, columns the numbers of MoE layers."""
    table = make_table(servers, 26)
    figure = plotting.placement_map(make_placement(servers, 1, 26).replace(execution=table))
    axes = panel_of_execution(figure)
    np.testing.assert_array_equal(images(figure)[-1], table)
    assert [x.get_text() for x in axes.get_yticklabels()] == [
        f"edge-site-{n}" for n in range(servers)
    ]
    assert axes.get_yticks().tolist() == list(range(servers))
    assert [x.get_text() for x in axes.get_xticklabels()] == [str(n) for n in range(1, 27)]
    assert axes.get_xticks().tolist() == list(range(26))


@pytest.mark.parametrize("servers", [3, 64])
def test_colours_of_executing_servers_are_in_the_legend(servers: int) -> None:
    """The legend names the servers that execute layers; each cell has the colour of its server.

    Also the servers' names in the spans are those of the table.
    """
    table = make_table(servers, 8)
    figure = plotting.placement_map(make_placement(servers, 1, 8).replace(execution=table))
    axes = panel_of_execution(figure)
    entries = axes.get_legend()
    names = [text.get_text() for text in entries.get_texts()]
    assert names == [f"edge-site-{m}" for m in np.unique(table)]
    shades = {
        name: patch.get_facecolor()
        for name, patch in zip(names, entries.get_patches(), strict=True)
    }
    assert len(set(shades.values())) == len(names)
    drawn = axes.images[0]
    cells = drawn.cmap(drawn.norm(drawn.get_array()))
    for (n, layer), m in np.ndenumerate(table):
        assert tuple(cells[n, layer]) == shades[f"edge-site-{m}"]
    for text in axes.texts:
        x, y = text.get_position()
        assert text.get_text() == f"edge-site-{table[int(y), int(x)]}"
    assert len(axes.texts) >= servers


def test_servers_beyond_the_named_ones_are_grey() -> None:
    """Where more servers execute than have colours of their own, the least used share a grey."""
    table = np.repeat(np.roll(np.arange(100, dtype=np.int32), 1)[:, None], 2, axis=1)
    table[0] = 1  # server 1 executes for two homes, 99 for none
    figure = plotting.placement_map(make_placement(100, 1, 2).replace(execution=table))
    axes = panel_of_execution(figure)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(names) == MAX_NAMED_SERVERS + 1
    assert names[-1] == f"{99 - MAX_NAMED_SERVERS} other servers"
    drawn = axes.images[0]
    cells = drawn.cmap(drawn.norm(drawn.get_array()))[:, 0]
    grey = (cells == to_rgba(NO_DATA)).all(axis=1)
    assert grey.sum() == 99 - MAX_NAMED_SERVERS
    assert not grey[[0, 2]].any()


def test_figures_of_home_plans_do_not_change() -> None:
    """A table adds a panel and changes none of the others; without one there is none."""
    placement = make_placement(3, 2, 4)
    home = plotting.placement_map(placement)
    table = plotting.placement_map(placement.replace(execution=make_table(3, 4)))
    assert all(axes.get_ylabel() != "home server" for axes in home.axes)
    for one, other in zip(images(home), images(table)[:-1], strict=True):
        np.testing.assert_array_equal(one, other)
    assert legend(home) == legend(table)
    assert home.legends[0].get_title().get_text() == ""
    at_home = placement.replace(execution=home_execution(3, 4))
    assert len(plotting.placement_map(at_home).axes) == len(home.axes)


@pytest.mark.parametrize(
    ("servers", "layers", "experts"),
    [(2, 1, 8), (3, 26, 64), (12, 32, 8), (13, 61, 256), (64, 61, 256), (64, 1, 8), (150, 3, 8)],
)
def test_execution_panels_are_readable(servers: int, layers: int, experts: int) -> None:
    """No texts overlap or leave the figure, with long names too, from 2 to 150 home servers."""
    placement = make_placement(servers, 1, layers, experts)
    placement = placement.replace(execution=make_table(servers, layers))
    check_readable(plotting.placement_map(placement))
    names = tuple(f"$a_very$-long-name-of-a-server-in-the-field-{n}" for n in range(servers))
    check_readable(plotting.placement_map(placement.replace(servers=names)))


@pytest.mark.parametrize("size_in", [(7.0, 6.0), (12.0, 6.5), (30.0, 12.0)])
def test_execution_panels_of_other_sizes(size_in: tuple[float, float]) -> None:
    """In a paper's two columns and on a poster no texts overlap; what has no room is refused."""
    placement = make_placement(2).replace(execution=make_table(2, 3))
    options = plotting.FigureOptions(size_in=size_in)
    figure = plotting.placement_map(placement, options=options)
    check_readable(figure, width_px=int(100 * size_in[0]))
    with pytest.raises(InputError, match="expected room for the panels"):
        plotting.placement_map(placement, options=plotting.FigureOptions(size_in=(2, 2)))


# --------------------------------------------------------------------------------------- comparison


def test_comparison_bars_are_the_values() -> None:
    """Bars, from the top in the order given, are as long as the values; unknown ones are absent."""
    figure = plotting.comparison(ROWS, "a title")
    remote, waiting, destinations = figure.axes
    assert title(figure) == "a title"
    assert [bar.get_width() for bar in remote.patches] == [0.6, 0.3, 0.02]
    assert [bar.get_width() for bar in waiting.patches] == [0.9, 0.7]
    assert [bar.get_width() for bar in destinations.patches] == [1.5, 0.9]
    assert [label.get_text() for label in remote.get_yticklabels()] == ["uniform", "exact", "small"]
    assert remote.yaxis_inverted()
    assert [text.get_text() for text in remote.texts] == ["60.0%", "30.0%", "2.0%"]
    assert [text.get_text() for text in waiting.texts] == ["90.0%", "70.0%", "not known"]
    assert [text.get_text() for text in destinations.texts] == ["1.5", "0.9", "not known"]
    check_readable(figure)


def test_comparison_marks_worst_server_and_exact() -> None:
    """Markers stand at the worst servers, a thin line at the row named exact; both explained."""
    figure = plotting.comparison(ROWS)
    worst, exact = figure.axes[0].get_lines()
    assert list(worst.get_xdata()) == [0.75, 0.45]
    assert list(worst.get_ydata()) == [0, 1]
    assert set(exact.get_xdata()) == {0.3}
    assert legend(figure) == ["remote share of the worst server", "remote share of exact"]


def test_comparison_leaves_unknown_panels_out() -> None:
    """Counts-only rows give one panel and, without worst servers or exact, no legend."""
    figure = plotting.comparison([{"name": "a", "remote_share": 0.0, "waiting_share": None}])
    assert len(figure.axes) == 1
    assert not figure.legends
    check_readable(figure)


def test_comparison_of_refused_and_broken_rows() -> None:
    """A row without placement says so, one that breaks constraints has a star with its meaning."""
    rows = [
        {"name": "exact", "remote_share": None},
        {"name": "p" * 90 + ".json", "remote_share": 0.1, "violations": 3},
    ]
    figure = plotting.comparison(rows)
    assert figure.axes[0].texts[0].get_text() == "no placement"
    assert figure.axes[0].get_yticklabels()[1].get_text().endswith(" *")
    assert legend(figure) == ["* breaks constraints of the cluster"]
    check_readable(figure)


def test_comparison_of_many_rows_is_readable() -> None:
    """Forty rows with long names do not overlap."""
    rows = [ROWS[i % 2] | {"name": f"placement-with-a-long-name-{i}.json"} for i in range(40)]
    check_readable(plotting.comparison(rows, "t" * 300))


@pytest.mark.parametrize("rows", [[], [{"name": "", "remote_share": 0.1}]])
def test_comparison_refuses_bad_rows(rows: list[dict[str, object]]) -> None:
    """No rows, or one without a name, is an input error."""
    with pytest.raises(InputError, match="comparison"):
        plotting.comparison(rows)


# --------------------------------------------------------------------------------------------- save


@pytest.mark.parametrize(
    ("name", "signature"),
    [("f.png", b"\x89PNG\r\n\x1a\n"), ("f.PDF", b"%PDF-"), ("f.svg", b"<?xml")],
)
def test_same_input_same_bytes(tmp_path: Path, name: str, signature: bytes) -> None:
    """A file is of the kind its extension says; drawing or saving again gives the same bytes."""
    trace, placement = make_trace(), make_placement(servers=1)
    draw = [
        lambda: plotting.heatmap(trace),
        lambda: plotting.entropy(trace),
        lambda: plotting.placement_map(placement),
        lambda: plotting.placement_map(make_placement(4).replace(execution=make_table(4, 3))),
        lambda: plotting.comparison(ROWS),
    ]
    path = tmp_path / name
    for function in draw:
        figure = function()
        written = []
        for again in (figure, figure, function()):
            plotting.save(again, path)
            written.append(path.read_bytes())
        assert written[0].startswith(signature)
        assert len(written[0]) > 2000
        assert len(set(written)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_do_not_depend_on_settings_or_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's matplotlib settings and the build's clock leave no trace in a file."""
    path = tmp_path / "f.svg"
    plotting.save(plotting.comparison(ROWS), path)
    first = path.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    changed = {"font.size": 20, "xtick.labelsize": 20, "svg.hashsalt": "x", "svg.fonttype": "path"}
    with matplotlib.rc_context(changed):
        plotting.save(plotting.comparison(ROWS), path)
        assert matplotlib.rcParams["font.size"] == 20
    assert path.read_bytes() == first


@pytest.mark.parametrize("name", ["f.jpg", "f", "f.png.gz"])
def test_other_extensions_are_refused(tmp_path: Path, name: str) -> None:
    """Another extension is an input error that lists the three, and nothing is written."""
    with pytest.raises(InputError, match=r"expected \.png, \.svg or \.pdf"):
        plotting.save(plotting.comparison(ROWS), tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="extension"):
        plotting.check_extension(name)
    assert plotting.check_extension("x/y.Svg") == "svg"


def test_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    """A folder that is not there is an output error and is not made."""
    with pytest.raises(OutputError, match="does not exist"):
        plotting.save(plotting.comparison(ROWS), tmp_path / "none" / "f.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder_is_an_output_error(tmp_path: Path) -> None:
    """A folder that cannot be written is an output error and stays empty."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write"):
        plotting.save(plotting.comparison(ROWS), folder / "f.png")
    assert not list(folder.iterdir())


def test_failure_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up is an output error; the earlier file stays, no temporary file does."""
    path = tmp_path / "f.png"
    path.write_bytes(b"earlier")

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OutputError, match="no space left"):
        plotting.save(plotting.comparison(ROWS), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_matplotlib_is_loaded_late_and_pyplot_never(tmp_path: Path) -> None:
    """Importing the module loads no matplotlib; drawing and saving load no pyplot."""
    program = (
        "import sys\n"
        "from prism_plan import plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figure = plotting.comparison([{'name': 'a', 'remote_share': 0.5}])\n"
        "plotting.save(figure, sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "f.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
