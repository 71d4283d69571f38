"""Data frames hold the values of reports exactly, in columns of fixed dtypes; pandas comes late."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import prism_plan as pp
from prism_plan.errors import InputError
from prism_plan.evaluate.comparison import ComparisonRow
from prism_plan.io.sweep import COLUMNS
from tests.evaluate.simulation_material import simulated, small_cluster, small_trace
from tests.evaluate.simulation_reports import failed, make_report, make_run, make_sweep

RUNS = [make_run("exact.json", moves=[300, 900], stays=[600], busy=[1200]), make_run("p", "prism")]
EMPTY = make_run("none", "", finished=0)


@pytest.fixture(scope="module")
def comparison() -> pp.Comparison:
    """Three solvers, scored on requests that were held back."""
    solvers = ["uniform", "prism", "exact"]
    return pp.compare(small_trace(), small_cluster(), solvers=solvers, holdout=0.5)


@pytest.fixture(scope="module")
def simulation() -> pp.Simulation:
    """Two placements of which one is reviewed and moved."""
    result = simulated(
        small_trace(), small_cluster(), "uniform", "exact", migrate="partial", migrate_every_s=0.1
    )
    assert isinstance(result, pp.Simulation)
    return result


def same(found: Any, told: Any) -> bool:
    """Whether a value of a frame is that of a report, to the bit; null is missing."""
    return bool(pd.isna(found)) if told is None else bool(found == told)


# -------------------------------------------------------------------------------------- comparisons


def test_a_comparison_by_placement(comparison: pp.Comparison) -> None:
    """One row a placement, indexed by its name, with the values of the JSON."""
    frame = comparison.to_frame()
    rows = comparison.to_json()["rows"]
    assert frame.index.name == "placement"
    assert list(frame.index) == ["uniform", "prism", "exact"]
    others = {"name", "remote_share_by_server", "waiting_share_by_server"}
    assert set(frame.columns) == set(rows[0]) - others
    for row in rows:
        for key in frame.columns:
            assert same(frame.loc[row["name"], key], row[key]), key
    assert list(frame["solver"]) == list(frame.index)
    assert frame["remote_share"].idxmin() == "exact"


def test_a_comparison_by_server(comparison: pp.Comparison) -> None:
    """One row a placement and server, with the shares of the server's own requests."""
    frame = comparison.to_frame("server")
    rows = comparison.to_json()["rows"]
    assert frame.index.names == ["placement", "server"]
    assert len(frame) == len(rows) * 3
    for row in rows:
        for key in ("remote_share", "waiting_share"):
            assert frame.loc[row["name"]][key].to_dict() == row[f"{key}_by_server"]


def test_a_comparison_of_a_file(tmp_path: Path, comparison: pp.Comparison) -> None:
    """A file gives the frame that was written; a row without placement has missing values."""
    values = comparison.to_json()
    values["rows"].append(ComparisonRow("pinned", note="refused").to_json())
    (tmp_path / "r.json").write_text(json.dumps(values))
    frame = pp.comparison_frame(pp.read_comparison(tmp_path / "r.json"))
    pd.testing.assert_frame_equal(frame.iloc[:3], comparison.to_frame())
    last = frame.loc["pinned"]
    assert math.isnan(last["remote_share"])
    assert last["note"] == "refused"
    assert last["violations"] == 0
    assert last.drop(["note", "violations"]).isna().all()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("note", 5, "frame: note: 5; expected a text"),
        ("bound", "0.3", "frame: bound: '0.3'; expected a number"),
        ("violations", 1.5, "frame: violations: 1.5; expected a whole number"),
        ("runtime_s", True, "frame: runtime_s: True; expected a number"),
    ],
)
def test_a_value_that_is_none_of_its_column(key: str, value: Any, message: str) -> None:
    """Values that plots do not look at are checked when a frame is made of them."""
    with pytest.raises(InputError, match=message):
        pp.comparison_frame({"rows": [{"name": "a", "remote_share": 0.1, key: value}]})


# -------------------------------------------------------------------------------------- simulations


def test_a_simulation_by_placement(simulation: pp.Simulation) -> None:
    """One row a run, with the values of the JSON; times have their statistic and unit in names."""
    frame = simulation.to_frame()
    assert list(frame.index) == ["uniform", "exact"]
    for run in simulation.to_json()["runs"]:
        row = frame.loc[run["placement"]]
        for key in set(frame.columns) & set(run):
            assert same(row[key], run[key]), key
        for name in ("latency", "ttft", "tpot", "queueing"):
            for statistic, value in run[f"{name}_s"].items():
                assert same(row[f"{name}_{statistic}_s"], value)
        moves = [review for review in run["migrations"] if review["decision"] == "move"]
        assert row["reviews"] == len(run["migrations"])
        assert row["moves"] == len(moves)
        assert row["moved_bytes"] == sum(review["moved_bytes"] for review in moves)
    assert frame["moves"].sum() > 0


def test_a_simulation_by_server_and_review(simulation: pp.Simulation) -> None:
    """One row a run and server, or a run and review by its time, with the values of the JSON."""
    servers, reviews = simulation.to_frame("server"), simulation.to_frame("review")
    runs = simulation.to_json()["runs"]
    assert len(servers) == sum(len(run["servers"]) for run in runs)
    assert len(reviews) == sum(len(run["migrations"]) for run in runs)
    for run in runs:
        for server in run["servers"]:
            row = servers.loc[(run["placement"], server["name"])]
            for key in set(servers.columns) & set(server) - {"gpus"}:
                assert same(row[key], server[key]), key
            assert same(row["latency_p95_s"], server["latency_s"]["p95"])
            assert row["gpus"] == len(server["gpus"])
            assert row["experts"] == sum(gpu["experts"] for gpu in server["gpus"])
        for review in run["migrations"]:
            row = reviews.loc[(run["placement"], review["at_s"])]
            for key in reviews.columns:
                assert same(row[key], review[key]), key


def test_a_simulation_by_request(simulation: pp.Simulation) -> None:
    """One row a request of each run; its times give the latencies of the report."""
    frame = simulation.to_frame("request")
    assert len(frame) == sum(len(run.scenario.requests) for run in simulation.runs)
    latency_s = frame["done_s"] - frame["arrival_s"]
    for number, run in enumerate(simulation.runs):
        assert (latency_s[frame["run"] == number].to_numpy() == run.latency_s).all()
    mean = latency_s.groupby(frame["placement"], observed=True).mean()
    assert mean["exact"] == pytest.approx(simulation.to_frame().loc["exact", "latency_mean_s"])


def test_a_simulation_of_a_file(tmp_path: Path, simulation: pp.Simulation) -> None:
    """A report that was written and read gives the same frames; requests it does not hold."""
    pp.write_simulation(tmp_path / "s.json", simulation)
    report = pp.read_simulation(tmp_path / "s.json")
    for level in ("placement", "server", "review"):
        frame = pp.simulation_frame(report, level)
        expected = simulation.to_frame(level)
        columns = [name for name in frame.columns if name != "runtime_s"]
        pd.testing.assert_frame_equal(frame[columns], expected[columns])
    with pytest.raises(InputError, match="level: 'request'; expected one of placement, server, re"):
        pp.simulation_frame(report, "request")
    with pytest.raises(InputError, match="level: 'servers', did you mean 'server'"):
        simulation.to_frame("servers")
    with pytest.raises(InputError, match="level: 'review'; expected one of placement, server"):
        pp.comparison_frame({"rows": []}, "review")


@pytest.mark.parametrize("level", ["placement", "server", "review"])
def test_dtypes_do_not_depend_on_the_values(level: str) -> None:
    """Reports with values, with nulls and without any row have the same dtypes and names."""
    frames = [
        pp.simulation_frame(make_report(runs), level)
        for runs in ([], RUNS, [EMPTY], [*RUNS, EMPTY])
    ]
    for frame in frames:
        assert frame.dtypes.equals(frames[0].dtypes)
        assert frame.index.names == frames[0].index.names
    assert set(frames[0].dtypes.astype(str)) <= {"int64", "float64", "bool", "string"}


# ------------------------------------------------------------------------------------------- sweeps


def test_a_sweep(tmp_path: Path) -> None:
    """One row a run in the columns of the table; counts of failed runs are missing, not zero."""
    rows = make_sweep([4], [None, 500], seeds=2)
    rows[1] = failed(rows[1])
    rows[0]["bytes_sent"] = 2**53 + 1
    pp.write_sweep(tmp_path / "r.parquet", rows)
    frame = pp.sweep_frame(pp.read_sweep(tmp_path / "r.parquet"))
    assert list(frame.columns) == list(COLUMNS)
    for (_, found), row in zip(frame.iterrows(), rows, strict=True):
        for key, value in row.items():
            assert same(found[key], value), key
    assert frame["bytes_sent"].dtype == "Int64"
    assert pp.sweep_frame([]).dtypes.equals(frame.dtypes)
    assert pp.sweep_frame(rows[2:]).dtypes.equals(frame.dtypes)


# ------------------------------------------------------------------------------------------ imports


def test_pandas_is_loaded_when_a_frame_is_made(tmp_path: Path) -> None:
    """Reading, planning, comparing, simulating and writing load no pandas; a frame does."""
    pp.write_trace(tmp_path / "t.parquet", small_trace())
    program = (
        "import sys\nimport prism_plan as pp\n"
        "from tests.evaluate.simulation_material import small_cluster\n"
        "trace, cluster = pp.read_trace(sys.argv[1]), small_cluster()\n"
        "comparison = pp.compare(trace, cluster, solvers=['prism', 'exact', 'ilp'])\n"
        "placement = pp.solve(pp.Instance.build(trace, cluster))\n"
        "requests = pp.sample_requests(trace, cluster, requests_per_server=2)\n"
        "simulation = pp.simulate_placements([('a', placement)], requests, trace, cluster)\n"
        "comparison.to_json(), simulation.to_json(), pp.comparison_frame, pp.sweep_frame\n"
        "assert 'pandas' not in sys.modules\n"
        "assert len(comparison.to_frame()) == 3 and len(simulation.to_frame('request')) == 6\n"
        "assert 'pandas' in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "t.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
