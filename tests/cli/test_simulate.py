"""`prism-plan simulate`: what is written, what is told, and what is left of an early end."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow.parquet as pq
import pytest

from prism_plan.check.report import check_file
from prism_plan.cli.error_boundary import run_command
from prism_plan.cli.main import cli
from prism_plan.evaluate import sweep as sweep_module
from prism_plan.evaluate.sweep_backends.contract import lost_worker
from prism_plan.io.placement import write_placement
from prism_plan.io.simulation import read_simulation
from prism_plan.io.sweep import read_sweep, sweep_from_csv
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from tests.evaluate.simulation_material import (
    GIVEN,
    counts_of,
    invoke,
    planned,
    simulated,
    small_cluster,
    small_trace,
    without_times,
)
from tests.limits import HANG_S

Run = Callable[..., CompletedProcess[str]]
#: Both are needed by every simulation.
FILES = ("--trace", "t.parquet", "--cluster", "c.toml")
PHASES = """\
[[phase]]
requests = 30
[[phase]]
[phase.tasks]
a = { y = 1.0 }
b = { x = 1.0 }
"""
CALIBRATION = {
    "format": "prism-plan/calibration",
    "version": 1,
    "default": {"dense_ms": [[1, 1.0], [64, 2.0]], "expert_ms": [[1, 1.0], [64, 2.0]]},
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The engine is compiled, so that processes to be interrupted do not spend a minute on that."""
    simulated(small_trace(), small_cluster(), "uniform", migrate="partial", migrate_every_s=0.1)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a trace, a cluster, a plan, phases, arrivals and a calibration."""
    trace, cluster = small_trace(), small_cluster()
    write_trace(tmp_path / "t.parquet", trace)
    (tmp_path / "c.toml").write_text(GIVEN)
    write_placement(tmp_path / "p.json", planned(trace, cluster, "exact")[0][1])
    (tmp_path / "phases.toml").write_text(PHASES)
    (tmp_path / "a.jsonl").write_text('{"server": "a", "at_s": 0.5}\n{"server": "b", "at_s": 1}\n')
    (tmp_path / "k.json").write_text(json.dumps(CALIBRATION))
    return tmp_path


def simulate(here: Path, *args: object) -> CompletedProcess[str]:
    """A simulation that ends well."""
    result = invoke(here, "simulate", *args, *FILES)
    assert result.returncode == 0, result.stderr
    return result


def test_report_table_and_requests(prism_plan: Run, here: Path) -> None:
    """Placements, solvers and `offload` are runs in this order; report, table and rows agree."""
    result = prism_plan(
        "simulate", "p.json", *FILES, "--solvers", "prism,uniform", "--offload",
        "--requests", 20, "-o", "s.json", "--per-request", "r.parquet", cwd=here,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = read_simulation(here / "s.json")
    names = ["p.json", "prism", "uniform", "offload"]
    assert [run["placement"] for run in values["runs"]] == names
    assert values["runs"][0]["solver"] == "exact"
    assert values["trace"]["sha256"] == read_trace(here / "t.parquet").sha256
    assert not values["partial"]
    lines = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert lines[-4:] == names
    assert f"{1e3 * values['runs'][2]['latency_s']['mean']:.2f} ms" in result.stdout
    assert result.stderr == ""
    rows = pq.read_table(here / "r.parquet").to_pydict()
    assert len(rows["run"]) == sum(run["requests"] for run in values["runs"]) == 240
    report = check_file(here / "s.json")
    assert (report.kind, report.problems) == ("simulation", ())
    assert "4 runs, 240 of 240 requests finished" in report.summary


def test_same_seed_same_report(here: Path) -> None:
    """One seed writes one report, but for the seconds it took; with either engine."""
    reports = []
    for name, *options in (("1",), ("2",), ("3", "--engine", "reference"), ("4", "--seed", "9")):
        simulate(
            here, "p.json", "--solvers", "redundance", "--requests", 10,
            "-o", name, *options,
        )  # fmt: skip
        reports.append(without_times(json.loads((here / name).read_text())))
    assert reports[0] == reports[1] == reports[2] != reports[3]


def test_standard_output_is_json_alone(here: Path) -> None:
    """`-o -` and `--json` write the report to standard output; the table goes elsewhere."""
    to_stdout = simulate(here, "p.json", "--requests", 2, "-o", "-")
    values = json.loads(to_stdout.stdout)
    assert "p.json" in to_stdout.stderr
    printed = simulate(here, "p.json", "--requests", 2, "--json")
    assert without_times(json.loads(printed.stdout)) == without_times(values)
    assert printed.stderr == ""


def test_offload_alone(here: Path) -> None:
    """The baseline needs no placement; nothing is called remotely, and experts are loaded."""
    simulate(here, "--offload", "--requests", 5, "-o", "s.json")
    (run,) = read_simulation(here / "s.json")["runs"]
    assert (run["placement"], run["solver"]) == ("offload", "offload")
    assert run["remote_calls"] == run["bytes_sent"] == 0
    assert run["loads"] > 0


def test_holdout(here: Path) -> None:
    """Simulated are the requests that the solvers did not plan on, and the report tells."""
    simulate(
        here, "--solvers", "exact", "--holdout", 0.25, "--requests", 50, "--seed", 3,
        "-o", "s.json", "--per-request", "r.parquet",
    )  # fmt: skip
    assert read_simulation(here / "s.json")["trace"]["holdout"] == 0.25
    planned_on, _ = read_trace(here / "t.parquet").split(0.25, 3)
    assert planned_on.batches is not None
    seen = {int(request) for batch in planned_on.batches() for request in batch.request}
    simulated = set(pq.read_table(here / "r.parquet")["trace_request"].to_pylist())
    assert len(simulated) == 6
    assert not simulated & seen


def test_phases_and_migrations(here: Path) -> None:
    """A shift and a policy: reviews in the report and in a table of their own."""
    result = simulate(
        here, "p.json", "--phases", "phases.toml", "--requests", 200,
        "--migrate", "partial", "--migrate-every", 0.5, "-o", "s.json",
    )  # fmt: skip
    values = read_simulation(here / "s.json")
    reviews = values["runs"][0]["migrations"]
    moves = [review for review in reviews if review["decision"] == "move"]
    assert moves
    assert values["review"] == {
        "every_s": 0.5, "horizon_s": 0.5, "half_life_s": 0.5, "cost": "sum", "solver": None,
    }  # fmt: skip
    *_, last = (line.split() for line in result.stdout.splitlines() if line.strip())
    assert last[:3] == ["p.json", str(len(reviews)), str(len(moves))]
    assert "Migrations by policy partial" in result.stdout


def test_fixed_times_and_measured_ones(here: Path) -> None:
    """Arrivals come from one file and times of GPU work from another, which the report names."""
    simulate(
        here, "p.json", "--arrivals", "a.jsonl", "--calibration", "k.json",
        "-o", "s.json", "--per-request", "r.parquet",
    )  # fmt: skip
    values = read_simulation(here / "s.json")
    assert values["timing"] == "k.json"
    assert pq.read_table(here / "r.parquet")["arrival_s"].to_pylist() == [0.5, 1.0]
    assert values["runs"][0]["latency_s"]["mean"] > 5 * 3 * 2e-3  # 5 steps of 3 layers, 2 ms each
    assert check_file(here / "k.json").kind == "calibration"


def test_counts_and_overload_are_told(here: Path) -> None:
    """Notes on standard error and in the report: drawn routing, and the overloaded server."""
    write_trace(here / "t.parquet", counts_of(small_trace()))
    text = GIVEN.replace('"\narrival', '"\nweight = 1.0\narrival').replace("0.04", "0.00001")
    (here / "c.toml").write_text(text)
    result = simulate(
        here, "--solvers", "exact", "--requests", 30, "--prompt-tokens", 4,
        "--decode-tokens", 3, "-o", "s.json",
    )  # fmt: skip
    notes = read_simulation(here / "s.json")["notes"]
    assert len(notes) == len(result.stderr.splitlines()) == 2
    for note, words in zip(
        notes, ("exact: unstable load.*utilisation .*c [0-9.]+", "drawn from counts"), strict=True
    ):
        assert re.search(words, note)
        assert f"prism-plan: {note}" in result.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_file_names_of_any_bytes(here: Path) -> None:
    """A placement whose name is no UTF-8 is simulated, and the report is UTF-8."""
    name = b"p\xff.json"
    os.rename(here / "p.json", os.path.join(os.fsencode(here), name))
    os.rename(here / "k.json", os.path.join(os.fsencode(here), b"k\xff.json"))
    command = [sys.executable, "-m", "prism_plan", "simulate", name, *FILES, "--requests", "2",
               "--calibration", b"k\xff.json", "-o", "s.json",
               "--per-request", "r.parquet"]  # fmt: skip
    result = subprocess.run(command, cwd=here, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    values = read_simulation(here / "s.json")
    assert (values["runs"][0]["placement"], values["timing"]) == ("p�.json", "k�.json")


# ------------------------------------------------------------------------------------------- sweeps


def test_sweep_tables(here: Path) -> None:
    """CSV, Parquet and standard output hold the same rows; the seed may be given beside."""
    grid = ("--sweep", "gpus=4,8", "--sweep", "bandwidth_mbps=10,100", "--requests", 2,
            "--offload", "--seed", 4, "--jobs", 1)  # fmt: skip
    found = []
    for name in ("s.csv", "s.parquet", "-"):
        result = simulate(here, *grid, "--solvers", "exact", "-o", name)
        rows = sweep_from_csv(result.stdout) if name == "-" else read_sweep(here / name)
        found.append([{**row, "solve_s": 0, "runtime_s": 0} for row in rows])
        assert "8 of 8 runs" in result.stderr
        if name != "-":
            assert result.stdout == ""
            assert check_file(here / name).kind == "sweep"
    assert found[0] == found[1] == found[2]
    assert {(row["solver"], row["seed"], row["gpus"]) for row in found[0]} == {
        (solver, 4, gpus) for solver in ("exact", "offload") for gpus in (4, 8)
    }


def test_sweep_with_failed_cells(here: Path) -> None:
    """Failed cells are told once for each reason; the table is written all the same."""
    result = simulate(
        here, "--sweep", "gpus=4,5,6", "--sweep", "solver=exact,prism",
        "--requests", 1, "--jobs", 1, "-o", "s.csv",
    )  # fmt: skip
    assert [row["status"] == "ok" for row in read_sweep(here / "s.csv")] == [True] * 2 + [False] * 4
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert sum("2 of 6 runs failed: --sweep: gpus: " in line for line in lines) == 2


def test_lost_workers_leave_the_rows_that_are_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a sweep ends because its workers are lost, its first rows are written, and code 4."""
    made = sweep_module.sweep

    def breaking(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        yield next(iter(made(*args, **options)))
        raise lost_worker("dask")

    monkeypatch.setattr(sweep_module, "sweep", breaking)
    monkeypatch.chdir(here)
    words = ("simulate", *FILES, "--sweep", "solver=exact", "--sweep", "seed=1,2",
             "--requests", "1", "--jobs", "1", "-o", "s.csv")  # fmt: skip
    assert run_command(cli, "prism-plan", program="prism-plan", arguments=words) == 4
    assert [row["seed"] for row in read_sweep(here / "s.csv")] == [1]
    told = capsys.readouterr().err
    assert "s.csv: 1 of 2 runs (interrupted)" in told
    assert "prism-plan: dask: workers that ran the same cells were lost 4 times" in told
    assert "or --jobs" in told


# ---------------------------------------------------------------------------------- ended too early


@contextlib.contextmanager
def under_way(here: Path, args: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A simulation whose progress bar has told of something done."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "prism_plan", "simulate", *args, *FILES],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "150"},
    )
    os.close(theirs)
    shown = bytearray()

    def read() -> None:
        # to the end: a terminal that nobody reads holds up whoever writes to it
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                shown.extend(part)

    reading = threading.Thread(target=read)
    reading.start()
    try:
        end = time.monotonic() + HANG_S
        begun = re.compile(rb"[^0-9][1-9][0-9]*/[0-9]")
        while not begun.search(re.sub(rb"\x1b\[[0-9;]*m", b"", bytes(shown))):
            assert time.monotonic() < end, bytes(shown)
            assert process.poll() is None, bytes(shown)
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        reading.join()
        os.close(ours)
        process.shown = bytes(shown)  # type: ignore[attr-defined]


def interrupted(here: Path, signum: int, *args: str) -> str:
    """What standard error says after a signal in the middle of the work; the exit code is 130."""
    with under_way(here, args) as process:
        process.send_signal(signum)
        assert process.wait(timeout=HANG_S) == 130
    shown: Any = process.shown  # type: ignore[attr-defined]
    assert b"Traceback" not in shown, shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


@pytest.mark.parametrize(
    ("signum", "options"),
    [
        (signal.SIGINT, ("--requests", "100000")),
        (signal.SIGTERM, ("--requests", "3000", "--engine", "reference")),
        (signal.SIGINT, ("--requests", "100000", "--migrate", "partial", "--migrate-every", "10",
                         "--time-limit", "600")),
    ],
    ids=["SIGINT", "SIGTERM, reference", "SIGINT, migrations"],
)  # fmt: skip
def test_a_signal_writes_what_is_done(here: Path, signum: int, options: tuple[str, ...]) -> None:
    """Ctrl-C and SIGTERM in the middle of a run: a valid report, marked partial, and code 130."""
    told = interrupted(
        here, signum, "p.json", "--solvers", "prism", *options,
        "-o", "s.json", "--per-request", "r.parquet",
    )  # fmt: skip
    assert "s.json is marked partial" in told
    values = read_simulation(here / "s.json")
    run = values["runs"][-1]
    assert values["partial"]
    assert run["partial"]
    assert 0 < run["finished"] < run["requests"]
    done = pq.read_table(here / "r.parquet")["done_s"]
    assert len(done) - done.null_count == sum(each["finished"] for each in values["runs"])
    assert "interrupted" in check_file(here / "s.json").summary


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_writes_the_rows_that_are_done(here: Path, jobs: str) -> None:
    """Ctrl-C in the middle of a sweep: a valid table of whole runs, and code 130."""
    seeds = ",".join(map(str, range(200)))
    told = interrupted(
        here, signal.SIGINT if jobs == "2" else signal.SIGTERM, "--sweep", "solver=uniform",
        "--sweep", f"seed={seeds}", "--requests", "3000", "--jobs", jobs, "-o", "s.csv",
    )  # fmt: skip
    rows = read_sweep(here / "s.csv")
    assert f"{len(rows)} of 200 runs (interrupted)" in told
    assert [row["seed"] for row in rows] == list(range(len(rows)))
    assert 0 < len(rows) < 200
    assert {(row["status"], row["requests"]) for row in rows} == {("ok", 9000)}
    assert check_file(here / "s.csv").kind == "sweep"


def test_time_limit(here: Path) -> None:
    """At the limit a partial report is written, which is no failure.

    What is sent per request is that of requests that are finished.
    """
    result = simulate(
        here, "p.json", "--requests", 20000, "--engine", "reference",
        "--time-limit", 0.2, "-o", "s.json", "--format", "csv",
    )  # fmt: skip
    assert "ended early: 1 of 1 placements" in result.stderr
    values = read_simulation(here / "s.json")
    assert values["partial"]
    assert 0 < values["runs"][0]["finished"] < 60000
    (row,) = csv.DictReader(io.StringIO(result.stdout))
    assert row["placement"] == "p.json (partial)"
    run = values["runs"][0]
    sent = float(row["bytes_sent_per_request"])
    assert sent == pytest.approx(run["bytes_sent"] / run["finished"], rel=1e-3)
