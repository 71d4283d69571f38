"""Sweeps: each row is the run that `simulate` makes of the same settings."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster, PairLink
from prism_plan.errors import InputError
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.evaluate.simulation_runner import SimulationRunner
from prism_plan.evaluate.sweep import SweepOptions, sweep
from prism_plan.evaluate.sweep_grid import Grid, parse_grid, vary_cluster
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.sweep import COLUMNS, dump_sweep, read_sweep, sweep_from_csv, write_sweep
from prism_plan.placement import OFFLOAD
from prism_plan.simulate.calibration import Calibration, GpuCurves
from prism_plan.simulate.sampling import sample_requests
from prism_plan.solvers import Options, solve
from prism_plan.trace import Trace
from tests.evaluate.simulation_material import counts_of, small_cluster, small_trace

TIMES = ("solve_s", "runtime_s")
#: Two servers of one GPU: with all memory 15 experts beside the dense part, with half of it 5.
MEMORY_CLUSTER = """\
name = "memory"
[[server]]
name = "a"
arrival_interval_s = 0.05
tasks = { x = 1.0 }
[[server.gpu]]
memory_gb = 0.02
[[server]]
name = "b"
arrival_interval_s = 0.05
tasks = { y = 1.0 }
[[server.gpu]]
memory_gb = 0.02
"""


def memory_cluster() -> Cluster:
    """The cluster of :data:`MEMORY_CLUSTER`."""
    return parse_cluster(MEMORY_CLUSTER)


def rows_of(
    trace: Trace,
    cluster: Cluster,
    grid: Grid,
    options: SweepOptions | None = None,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """The rows of a sweep in this process."""
    return list(sweep(trace, cluster, grid, options, jobs=jobs))


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the seconds that they took."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# ------------------------------------------------------------------------------------ rows are runs


def by_hand(
    trace: Trace, cluster: Cluster, row: dict[str, Any], options: SweepOptions
) -> dict[str, Any]:
    """The figures of a row from single calls."""
    planned, scored = trace, trace
    if options.holdout is not None:
        planned, scored = trace.split(options.holdout, row["seed"])
    servers = []
    for copy in range(row["gpus"] // 2):
        for server in cluster.servers:
            gpus = tuple(
                gpu
                if row["memory_fraction"] is None
                else dataclasses.replace(gpu, memory_fraction=row["memory_fraction"])
                for gpu in server.gpus
            )
            servers.append(
                dataclasses.replace(
                    server,
                    name=f"{server.name}.{copy}" if copy else server.name,
                    gpus=gpus,
                    arrival_interval_s=row["arrival_interval_s"] or server.arrival_interval_s,
                )
            )
    link = dataclasses.replace(cluster.link, bandwidth_mbps=row["bandwidth_mbps"])
    target = Cluster(cluster.name, tuple(servers), link)
    instance = Instance.build(planned, target)
    if row["solver"] == OFFLOAD:
        placement = offload_placement(instance)
    else:
        placement = solve(instance, row["solver"], Options(seed=row["seed"]))
    requests = sample_requests(
        scored,
        target,
        requests_per_server=options.requests_per_server,
        decode_tokens=options.decode_tokens,
        seed=row["seed"],
    )
    found = simulate_placements(
        [("x", placement)],
        requests,
        scored,
        target,
        dataclasses.replace(options.simulation, seed=row["seed"]),
    )
    run = found.to_json()["runs"][0]
    return {
        "servers": len(servers),
        "status": "ok",
        "requests": run["requests"],
        "latency_mean_s": run["latency_s"]["mean"],
        "latency_p50_s": run["latency_s"]["p50"],
        "latency_p95_s": run["latency_s"]["p95"],
        "latency_p99_s": run["latency_s"]["p99"],
        "ttft_mean_s": run["ttft_s"]["mean"],
        "tpot_mean_s": run["tpot_s"]["mean"],
        "remote_share": run["remote_share"],
        "waiting_share": run["waiting_share"],
        "destinations": run["destinations"],
        "bytes_sent": run["bytes_sent"],
        "utilisation": max(server["utilisation"] for server in run["servers"]),
        "events": run["events"],
    }


GRID = Grid(
    gpus=(2, 4),
    bandwidth_mbps=(50.0, 400.0),
    arrival_interval_s=(None, 0.1),
    memory_fraction=(0.9, 1.0),
    solver=("exact", "redundance", OFFLOAD),
    seed=(0, 5),
)


@pytest.mark.parametrize(
    "options",
    [
        SweepOptions(requests_per_server=5),
        SweepOptions(
            requests_per_server=4,
            holdout=0.5,
            simulation=SimulationOptions(route="spread", migrate="partial", migrate_every_s=0.1),
        ),
    ],
    ids=["plain", "holdout, migrations"],
)
def test_rows_equal_single_runs(options: SweepOptions) -> None:
    """Every figure of every cell is that of solving, sampling and simulating by single calls."""
    trace, cluster = small_trace(), memory_cluster()
    rows = rows_of(trace, cluster, GRID, options)
    assert len(rows) == GRID.runs == 96
    for row in rows:
        assert list(row) == list(COLUMNS)
        assert row == row | by_hand(trace, cluster, row, options)
        assert row["solve_s"] >= 0
        assert row["runtime_s"] >= 0
    assert len({row["latency_mean_s"] for row in rows if row["solver"] == "exact"}) == 32


def test_rows_come_in_the_order_of_the_grid() -> None:
    """GPUs, memory, seed, solver, then bandwidth and interval; all combinations once."""
    rows = rows_of(small_trace(), memory_cluster(), GRID, SweepOptions(requests_per_server=1))
    keys = ("gpus", "memory_fraction", "seed", "solver", "bandwidth_mbps", "arrival_interval_s")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert found == list(itertools.product(*(getattr(GRID, key) for key in keys)))


def test_processes_change_nothing() -> None:
    """One process and two give the same rows in the same order, but for the seconds."""
    grid = Grid(gpus=(2, 4), solver=("uniform", "exact", "eplb"), seed=(1, 2))
    options = SweepOptions(requests_per_server=3)
    one = rows_of(small_trace(), memory_cluster(), grid, options, jobs=1)
    two = rows_of(small_trace(), memory_cluster(), grid, options, jobs=2)
    assert untimed(one) == untimed(two)
    assert len(one) == 12


def test_progress_counts_rows() -> None:
    """The progress ends at the number of rows and never falls."""
    told: list[int] = []
    grid = Grid(solver=("uniform", "exact"), bandwidth_mbps=(10.0, 20.0))
    options = SweepOptions(requests_per_server=1)
    list(sweep(small_trace(), memory_cluster(), grid, options, jobs=1, progress=told.append))
    assert told == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------- failed cells


def test_a_cell_that_fails_is_a_row() -> None:
    """What is infeasible or no multiple is a row whose status is the error; the others run."""
    grid = Grid(gpus=(2, 3, 4), memory_fraction=(0.2, 0.5, 1.0), solver=("exact",))
    rows = rows_of(small_trace(), memory_cluster(), grid, SweepOptions(requests_per_server=2))
    status = {(row["gpus"], row["memory_fraction"]): row["status"] for row in rows}
    assert "whole multiples of the 2 GPUs" in status[3, 1.0]
    assert "dense part" in status[2, 0.2]
    assert status[2, 0.5].startswith("infeasible: ")
    assert (status[2, 1.0], status[4, 1.0]) == ("ok", "ok")
    failed = [row for row in rows if row["status"] != "ok"]
    assert len(failed) == 7
    assert all(len(row["status"].splitlines()) == 1 for row in rows)
    assert all(row["latency_mean_s"] is None for row in failed)
    for kind in ("csv", "parquet"):
        assert dump_sweep(rows, kind)


def test_slots_given_directly_have_no_memory_fraction() -> None:
    """A fraction of memory that is not given is refused, cell by cell."""
    grid = Grid(memory_fraction=(0.5, None), solver=("exact",))
    rows = rows_of(small_trace(), small_cluster(), grid, SweepOptions(requests_per_server=1))
    assert "memory_fraction: a GPU gives its slots directly" in rows[0]["status"]
    assert rows[1]["status"] == "ok"


def test_time_limit_fails_the_cell() -> None:
    """Figures of half a run are not taken for those of the whole."""
    slow = SimulationOptions(engine="reference", time_limit_s=1e-9)
    options = SweepOptions(requests_per_server=200, simulation=slow)
    (row,) = rows_of(small_trace(), memory_cluster(), Grid(solver=("exact",)), options)
    assert "time limit" in row["status"]
    assert row["latency_mean_s"] is None


def test_ctrl_c_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run is no row; those before it have been given."""
    made = 0
    advance = SimulationRunner._advance

    def advancing(self: Any, until_s: float) -> None:
        nonlocal made
        made += 1
        advance(self, until_s)
        if made == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(SimulationRunner, "_advance", advancing)
    rows = []
    grid = Grid(solver=("exact",), seed=tuple(range(5)))
    with pytest.raises(KeyboardInterrupt):
        for row in sweep(
            small_trace(), memory_cluster(), grid, SweepOptions(requests_per_server=2), jobs=1
        ):
            rows.append(row)
    assert [row["seed"] for row in rows] == [0, 1]


def measured(**changes: Any) -> SweepOptions:
    """Few requests with measured times of the servers a and b, 2 and 3 ms for all work."""
    curves = {
        (name, 0): GpuCurves(((1, ms * 1e-3), (64, ms * 1e-3)), ((1, ms * 1e-3), (64, ms * 1e-3)))
        for name, ms in (("a", 2.0), ("b", 3.0))
    }
    calibration = Calibration("k.json", gpus=curves, **changes)
    simulation_options = SimulationOptions(calibration=calibration)
    return SweepOptions(requests_per_server=2, simulation=simulation_options)


def test_copies_are_measured_as_their_server() -> None:
    """Times measured of a server are those of its copies too; a larger sweep needs no more."""
    cluster = memory_cluster()
    rows = rows_of(small_trace(), cluster, Grid(gpus=(2, 6), solver=("exact",)), measured())
    assert [row["status"] for row in rows] == ["ok", "ok"]
    large = vary_cluster(cluster, gpus=6)
    curves = measured().simulation.calibration.gpus  # type: ignore[union-attr]
    by_hand = {
        (f"{name}.{i}" if i else name, 0): curves[name, 0] for name in "ab" for i in range(3)
    }
    trace = small_trace()
    found = simulate_placements(
        [("x", solve(Instance.build(trace, large), "exact"))],
        sample_requests(trace, large, requests_per_server=2),
        trace,
        large,
        SimulationOptions(calibration=Calibration("k.json", gpus=by_hand)),
    )
    mean_s = found.to_json()["runs"][0]["latency_s"]["mean"]
    assert rows[1]["latency_mean_s"] == mean_s > 5 * 3 * 2e-3


def test_measured_bandwidth_and_swept_bandwidth() -> None:
    """A calibration that would replace the bandwidths of the sweep is refused, by its name."""
    options, trace, cluster = measured(bandwidth_mbps=50.0), small_trace(), memory_cluster()
    grid = Grid(solver=("exact",), bandwidth_mbps=(10.0, 20.0))
    with pytest.raises(InputError, match=r"^k\.json: bandwidth_mbps: 50 would replace"):
        rows_of(trace, cluster, grid, options)
    (row,) = rows_of(trace, cluster, Grid(solver=("exact",)), options)
    assert row["status"] == "ok"


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_hold_the_rows(tmp_path: Path, kind: str) -> None:
    """CSV and Parquet give back every row, failed ones and exact floats included."""
    grid = Grid(gpus=(2, 3), solver=("exact", OFFLOAD), bandwidth_mbps=(33.3, 100.0))
    rows = rows_of(small_trace(), memory_cluster(), grid, SweepOptions(requests_per_server=3))
    write_sweep(tmp_path / f"r.{kind}", rows)
    found = read_sweep(tmp_path / f"r.{kind}")
    assert found == rows
    if kind == "csv":
        assert sweep_from_csv((tmp_path / "r.csv").read_text()) == found


# ------------------------------------------------------------------------------- clusters and grids


def test_repeated_clusters() -> None:
    """Copies of servers have names of their own, and pairs keep their links within a copy."""
    cluster = dataclasses.replace(small_cluster(), pair_links=(PairLink(0, 2, 7.0, 3.0),))
    large = vary_cluster(cluster, gpus=12)
    assert [server.name for server in large.servers] == [
        "a", "b", "c", "a.1", "b.1", "c.1", "a.2", "b.2", "c.2",
    ]  # fmt: skip
    for n, server in enumerate(large.servers):
        own = cluster.servers[n % 3]
        assert dataclasses.replace(server, name=own.name) == own
    assert large.pair_links == tuple(PairLink(a, a + 2, 7.0, 3.0) for a in (0, 3, 6))
    assert vary_cluster(cluster) == cluster
    assert vary_cluster(cluster, gpus=4) == cluster


@pytest.mark.parametrize("gpus", [1, 3, 5, 6])
def test_no_multiple(gpus: int) -> None:
    """GPUs that are no multiple of the cluster's, or fewer, are refused."""
    with pytest.raises(InputError, match="whole multiples of the 4 GPUs of small"):
        vary_cluster(small_cluster(), gpus=gpus)


def test_varied_figures() -> None:
    """Bandwidth goes to [link] alone; interval and fraction to all servers and GPUs."""
    cluster = memory_cluster()
    own = dataclasses.replace(cluster.servers[0], uplink_mbps=5.0)
    cluster = dataclasses.replace(cluster, servers=(own, cluster.servers[1]))
    found = vary_cluster(cluster, bandwidth_mbps=9.0, arrival_interval_s=4.0, memory_fraction=0.25)
    assert (found.link.bandwidth_mbps, found.servers[0].uplink_mbps) == (9.0, 5.0)
    assert {server.arrival_interval_s for server in found.servers} == {4.0}
    assert {gpu.memory_fraction for s in found.servers for gpu in s.gpus} == {0.25}


def test_grid_from_texts() -> None:
    """Keys and values as on the command line; doubles once; what is not named stays as it is."""
    grid = parse_grid(["gpus=4, 16", "bandwidth_mbps=100,250.5", "solver=exact,offload,exact"])
    assert grid == Grid(
        gpus=(4, 16), bandwidth_mbps=(100.0, 250.5), solver=("exact", "offload"), seed=(0,)
    )
    assert grid.runs == 8


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["gpu=4", "solver=exact"], "did you mean 'gpus'"),
        (["gpus"], "KEY=VALUE"),
        (["=4"], "KEY=VALUE"),
        (["solver=exact", "solver=prism"], "is duplicated"),
        (["solver="], "expected values"),
        (["solver=,"], "expected values"),
        (["solver=exakt"], "did you mean 'exact'"),
        (["gpus=4"], "no solver"),
        (["solver=exact", "gpus=four"], "gpus: 'four'; expected a whole number"),
        (["solver=exact", "gpus=4.5"], "gpus: '4.5'; expected a whole number"),
        (["solver=exact", "seed=1.5"], "seed: '1.5'; expected a whole number"),
        (["solver=exact", "seed=-1"], "seed: -1; expected a whole number from 0"),
        (["solver=exact", f"seed={2**63}"], "seed"),
        (["solver=exact", "seed=" + "9" * 5000], "seed"),
        (["solver=exact", "gpus=0"], "gpus: 0"),
        (["solver=exact", "gpus=1000000"], "gpus: 1000000"),
        (["solver=exact", "bandwidth_mbps=0"], "bandwidth_mbps: 0.0"),
        (["solver=exact", "bandwidth_mbps=nan"], "bandwidth_mbps: nan"),
        (["solver=exact", "bandwidth_mbps=1e999"], "bandwidth_mbps: inf"),
        (["solver=exact", "bandwidth_mbps=fast"], "bandwidth_mbps: 'fast'; expected a number"),
        (["solver=exact", "arrival_interval_s=-3"], "arrival_interval_s: -3.0"),
        (["solver=exact", "memory_fraction=1.5"], "memory_fraction: 1.5"),
        (["solver=exact", "memory_fraction=0"], "memory_fraction: 0.0"),
        (
            ["solver=exact", "seed=" + ",".join(map(str, range(100001)))],
            "100,001 runs; expected at most 100,000",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_grids_that_are_none(texts: list[str], words: str) -> None:
    """Mistyped grids are refused in one line that names the option, the key and the value."""
    with pytest.raises(InputError) as caught:
        parse_grid(texts)
    message = str(caught.value)
    assert message.startswith("grid: ")
    assert words in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"requests_per_server": 0}, "requests_per_server: 0"),
        ({"requests_per_server": 10**9}, "requests_per_server"),
        ({"requests_per_server": 1.5}, "requests_per_server: 1.5"),
        ({"burst": 0}, "burst: 0"),
        ({"decode_tokens": -1}, "decode_tokens: -1"),
        ({"prompt_tokens": -1}, "prompt_tokens: -1"),
        ({"min_replicas": 0}, "min_replicas: 0"),
        ({"holdout": 0.0}, "holdout: 0.0"),
        ({"holdout": math.nan}, "holdout: nan"),
    ],
    ids=str,
)
def test_options_out_of_range(values: dict[str, Any], word: str) -> None:
    """What no cell could run with is refused before the first one."""
    with pytest.raises(InputError, match=f"^{word}"):
        SweepOptions(**values)


def test_sweeps_in_which_every_run_would_fail() -> None:
    """No time between requests anywhere, or a split of counts: refused, not a table of errors."""
    silent = parse_cluster(MEMORY_CLUSTER.replace("arrival_interval_s = 0.05", "weight = 1.0"))
    trace, grid = small_trace(), Grid(solver=("exact",))
    with pytest.raises(InputError, match=r"server\[0\]\.arrival_interval_s"):
        rows_of(trace, silent, grid)
    timed = dataclasses.replace(grid, arrival_interval_s=(0.1,))
    options = SweepOptions(requests_per_server=2)
    assert rows_of(trace, silent, timed, options)[0]["status"] == "ok"
    halves = dataclasses.replace(options, holdout=0.5)
    with pytest.raises(InputError, match="counts-only"):
        rows_of(counts_of(trace), silent, timed, halves)
    (row,) = rows_of(counts_of(trace), silent, timed, options)
    assert row["status"] == "ok"
    assert np.isfinite(row["latency_mean_s"])
