"""Figures that a cluster file leaves to defaults are named by the commands that use them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from prism_plan.assumed_figures import assumed_texts
from prism_plan.check.assumed_figures import assumed_figures
from prism_plan.cluster import GPU_FIGURES, LINK_FIGURES, Cluster, Gpu, Link, Server, with_figures
from prism_plan.evaluate.sweep_grid import vary_cluster
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.placement import write_placement
from prism_plan.io.trace_writer import write_trace
from prism_plan.simulate.calibration import Calibration
from tests.evaluate.simulation_material import (
    CLUSTER,
    GIVEN,
    invoke,
    planned,
    small_cluster,
    small_trace,
)

Run = Callable[..., CompletedProcess[str]]
ALL = {"compute": True, "loads": True, "links": True}
FILES = ("--trace", "t.parquet", "--cluster", "c.toml")
COMPUTE = "memory_bandwidth_gbs 1555, tflops 312, launch_overhead_us 20"
LINKS = "rtt_ms 1, call_overhead_ms 0.2 of links"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a trace, a plan, a calibration, and a cluster that gives one figure."""
    trace, cluster = small_trace(), small_cluster()
    write_trace(tmp_path / "t.parquet", trace)
    (tmp_path / "c.toml").write_text(CLUSTER)
    write_placement(tmp_path / "p.json", planned(trace, cluster, "exact")[0][1])
    curve = [[1, 1.0], [64, 2.0]]
    values = {"format": "prism-plan/calibration", "version": 1, "rtt_ms": 2.0,
              "default": {"dense_ms": curve, "expert_ms": curve}}  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps(values))
    return tmp_path


# --------------------------------------------------------------------------------- what is assumed


def test_the_parser_keeps_what_was_not_given() -> None:
    """GPUs and links know which of their figures are defaults, which changes no comparison."""
    text = "[link]\nrtt_ms = 3\n[[server]]\n[[server.gpu]]\nslots = 1\ntflops = 100\n"
    found = parse_cluster(text)
    assert found.link.assumed == set(LINK_FIGURES) - {"rtt_ms"}
    gpu = found.servers[0].gpus[0]
    assert gpu.assumed == set(GPU_FIGURES) - {"tflops"}
    assert gpu == Gpu(slots=1, tflops=100.0)
    assert hash(gpu) == hash(Gpu(slots=1, tflops=100.0))
    assert parse_cluster(GIVEN) == parse_cluster(CLUSTER)
    assert assumed_figures(parse_cluster(GIVEN), **ALL) == ""


def test_a_cluster_made_in_python_assumes_nothing() -> None:
    """Whoever calls ``Gpu(...)`` chose its defaults."""
    cluster = Cluster("c", (Server("a", (Gpu(slots=1),)), Server("b", (Gpu(slots=1),))))
    assert assumed_figures(cluster, **ALL) == ""


def test_only_what_is_used_is_named() -> None:
    """Each kind of use names its own figures, with their values."""
    cluster = parse_cluster(CLUSTER)
    of_gpus = "of every GPU (as an A100 of 40 GB)"
    assert assumed_figures(cluster) == ""
    begin = "not given and assumed: "
    assert assumed_figures(cluster, compute=True) == f"{begin}{COMPUTE} {of_gpus}"
    assert assumed_figures(cluster, loads=True) == f"{begin}load_gbs 12 {of_gpus}"
    assert assumed_figures(cluster, links=True) == f"{begin}{LINKS}"
    together = f"{begin}{COMPUTE}, load_gbs 12 {of_gpus}; {LINKS}"
    assert assumed_figures(cluster, **ALL) == together
    assert "; ".join(assumed_texts(cluster, **ALL)) == together.removeprefix(begin)
    assert assumed_texts(cluster) == ()


def test_what_the_table_of_gpus_gives_is_not_assumed() -> None:
    """Of a named GPU only the launch overhead is left, and nothing where the file gives that."""
    named = '[[server]]\n[[server.gpu]]\ngpu = "rtx-4090"\n'
    texts = assumed_texts(parse_cluster(named), compute=True, loads=True)
    assert texts == ("launch_overhead_us 20 of every GPU (as an A100 of 40 GB)",)
    given = parse_cluster(f"{named}launch_overhead_us = 5")
    assert assumed_texts(given, compute=True, loads=True) == ()
    mixed = parse_cluster(f"{named}[[server.gpu]]\nmemory_gb = 8")
    assert assumed_texts(mixed, compute=True) == (
        "memory_bandwidth_gbs 1555, tflops 312 of server-0 gpu[1] (as an A100 of 40 GB)",
        "launch_overhead_us 20 of every GPU (as an A100 of 40 GB)",
    )


def test_alike_gpus_stand_together() -> None:
    """GPUs that lack the same figures are one group, named by server and place."""
    text = CLUSTER.replace("slots = 8", "slots = 8\ntflops = 100")
    found = assumed_figures(parse_cluster(text), compute=True)
    assert "memory_bandwidth_gbs 1555, launch_overhead_us 20 of every GPU" in found
    assert "tflops 312 of a gpu[0], b gpu[1], c gpu[0] (as" in found
    assert "b gpu[0]" not in found


def test_the_line_is_short_for_any_cluster() -> None:
    """A hundred servers of long names that lack figures make a line of some hundred letters."""
    gpus = [Gpu(slots=1, assumed=frozenset(GPU_FIGURES[: n % 4 + 1])) for n in range(100)]
    servers = tuple(Server(f"{n}-{'x' * 1000}", (gpu,)) for n, gpu in enumerate(gpus))
    link = Link(assumed=frozenset(LINK_FIGURES))
    found = assumed_figures(Cluster("c", servers, link), **ALL)
    assert "and 72 more" in found  # 25 of 100 lack load_gbs, 75 lack launch_overhead_us
    assert len(found) < 1000


PORTS = "uplink_mbps = 5\ndownlink_mbps = 5\n"
TWO = "[[server]]\nname = 'a'\n{0}[[server.gpu]]\nslots = 1\n[[server]]\nname = 'b'\n{0}[[server.gpu]]\nslots = 1\n"  # noqa: E501


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[server]]\n[[server.gpu]]\nslots = 1\n", ""),
        (TWO.format(""), "bandwidth_mbps 1000, rtt_ms 1, call_overhead_ms 0.2"),
        (TWO.format(PORTS), "bandwidth_mbps 1000, rtt_ms 1, call_overhead_ms 0.2"),
        (
            "[[links]]\na = 'a'\nb = 'b'\nbandwidth_mbps = 5\nrtt_ms = 1\n" + TWO.format(""),
            "bandwidth_mbps 1000, call_overhead_ms 0.2",
        ),
        (
            "[[links]]\na = 'a'\nb = 'b'\nbandwidth_mbps = 5\nrtt_ms = 1\n" + TWO.format(PORTS),
            "call_overhead_ms 0.2",
        ),
    ],
    ids=["one server", "nothing given", "ports", "pair", "ports and pair"],
)
def test_links_that_no_pair_goes_by(text: str, named: str) -> None:
    """A default of ``[link]`` is named where some pair goes by it: ports and pairs replace it."""
    found = assumed_figures(parse_cluster(text), links=True)
    assert found == (f"not given and assumed: {named} of links" if named else "")


def test_replaced_figures_are_given() -> None:
    """What a sweep or a calibration sets is no assumption; other fields can change freely."""
    cluster = parse_cluster(CLUSTER.replace("bandwidth_mbps = 100", ""))
    assert "bandwidth_mbps 1000" in assumed_figures(cluster, links=True)
    assert "bandwidth" not in assumed_figures(
        vary_cluster(cluster, bandwidth_mbps=500.0), links=True
    )
    measured = Calibration(rtt_ms=2.0, call_overhead_ms=0.1).applied(cluster)
    assert assumed_figures(measured, links=True).endswith(": bandwidth_mbps 1000 of links")
    assert measured.link.rtt_ms == 2.0
    gpu = dataclasses.replace(with_figures(cluster.servers[0].gpus[0], tflops=9.0), slots=3)
    assert gpu.assumed == set(GPU_FIGURES) - {"tflops"}


# ------------------------------------------------------------------------------- what commands say


def test_simulate_names_what_it_uses(prism_plan: Run, here: Path) -> None:
    """One line on standard error through the installed command; the report is as it was."""
    result = prism_plan("simulate", "p.json", *FILES, "--requests", 2, "-o", "-", cwd=here)
    assert result.returncode == 0
    line = f"prism-plan: c.toml: not given and assumed: {COMPUTE} of every GPU"
    assert [text for text in result.stderr.splitlines() if "assumed" in text] == [
        f"{line} (as an A100 of 40 GB); {LINKS}"
    ]
    assert json.loads(result.stdout)["notes"] == []


@pytest.mark.parametrize(
    ("options", "named", "unnamed"),
    [
        (("p.json", "--offload"), (COMPUTE, "load_gbs", LINKS), ()),
        (("--offload",), (COMPUTE, "load_gbs"), ("of links",)),
        (("p.json", "--migrate", "prism"), (COMPUTE, "load_gbs", LINKS), ()),
        (("p.json", "--calibration", "k.json"), ("call_overhead_ms",), (COMPUTE, "rtt_ms")),
    ],
    ids=["with offload", "offload alone", "migrate", "calibration"],
)
def test_simulate_names_no_more(
    here: Path, options: tuple[str, ...], named: tuple[str, ...], unnamed: tuple[str, ...]
) -> None:
    """Loads count where something loads, links where something is sent; measured is given."""
    result = invoke(here, "simulate", *options, *FILES, "--requests", 2)
    assert result.returncode == 0, result.stderr
    lines = [text for text in result.stderr.splitlines() if "not given and assumed" in text]
    assert len(lines) == 1
    assert all(words in lines[0] for words in named)
    assert not any(words in lines[0] for words in unnamed)


def test_sweep_names_what_it_does_not_vary(here: Path) -> None:
    """The bandwidths of a sweep are given, the rest is not."""
    text = CLUSTER.replace("bandwidth_mbps = 100", "")
    (here / "c.toml").write_text(text)
    for option, assumed in (((), True), (("--sweep", "bandwidth_mbps=100,200"), False)):
        result = invoke(
            here, "simulate", "--sweep", "solver=uniform", *option, *FILES, "--requests", 1,
            "--jobs", 1, "-o", "s.csv",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert ("bandwidth_mbps 1000" in result.stderr) == assumed
        assert LINKS in result.stderr


def test_migrate_names_load_speeds(prism_plan: Run, here: Path) -> None:
    """`migrate` uses load_gbs alone."""
    result = prism_plan("migrate", "p.json", "p.json", "--cluster", "c.toml", cwd=here)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "prism-plan: c.toml: not given and assumed: load_gbs 12 of every GPU (as an A100 of 40 GB)"
    ]
    (here / "c.toml").write_text(GIVEN)
    result = prism_plan("migrate", "p.json", "p.json", "--cluster", "c.toml", cwd=here)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["solve", "compare", "check"])
def test_planning_assumes_nothing(here: Path, command: str) -> None:
    """Placing experts for the fewest remote calls uses no speeds, and says nothing of them.

    `compare` uses them for latencies.
    """
    arguments = {
        "solve": ("solve", "t.parquet", "--cluster", "c.toml", "--solver", "exact", "-o", "q.json"),
        "compare": (
            "compare", "t.parquet", "--cluster", "c.toml", "--solvers", "exact", "--requests", 0,
        ),
        "check": ("check", "c.toml", "--trace", "t.parquet"),
    }[command]  # fmt: skip
    result = invoke(here, *arguments)
    assert result.returncode == 0, result.stderr
    assert "assumed" not in result.stderr
