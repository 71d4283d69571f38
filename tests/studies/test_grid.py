"""The grid: its cells, what is run again and what is kept, and the judgement of made-up numbers."""

from __future__ import annotations

import dataclasses
import itertools
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import prism_plan as pp
import studies.grid.__main__ as runner
from studies.grid.cells import LOADS, MBPS, OTHERS, RTT_MS, SLOTS, all_cells, named, quarter
from studies.grid.measure import BASELINES, Run, fingerprint, interval_s, measured, routing
from studies.grid.processes import finished
from studies.grid.record import SEEDS, CellRecord, read_records, record_of, write_records
from studies.grid.verdict import report, verdict
from tests.limits import HANG_S

# ------------------------------------------------------------------------------------------- cells


def test_every_combination_is_a_cell() -> None:
    """All slots, bandwidths, round trips and loads are combined, and other regimes have two."""
    cells = all_cells()
    factors = [(cell.slots, cell.mbps, cell.rtt_ms, cell.load) for cell in cells.values()]
    assert set(itertools.product(SLOTS, MBPS, RTT_MS, LOADS)) <= set(factors)
    assert len(cells) == 4 * 3 * 2 * 3 + 2 * 5
    assert all(name == cell.name for name, cell in cells.items())


def test_every_two_values_meet_in_the_quarter() -> None:
    """A quarter of the cells, in which every two values of two factors occur together."""
    cells = list(quarter().values())
    regular = [cell for cell in cells if not cell.other]
    assert len(regular) == 72 / 4
    factors = {"slots": SLOTS, "mbps": MBPS, "rtt_ms": RTT_MS, "load": LOADS}
    for (one, values), (other, more) in itertools.combinations(factors.items(), 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in regular}
        assert met == set(itertools.product(values, more)), (one, other)
    assert [cell.other for cell in cells if cell.other] == list(OTHERS)
    assert {cell.load for cell in cells if cell.other} == {"idle", "40"}


def test_clusters_are_what_names_say() -> None:
    """Slots, links, GPUs, servers, users and places of a cell's cluster are those of its name."""
    cells = all_cells()
    mixtral = cells["mixtral-100-5-65"].cluster(2.0)
    slots = [[gpu.slots for gpu in server.gpus] for server in mixtral.servers]
    assert slots == [[70], [70], [75, 74]]
    assert (mixtral.link.bandwidth_mbps, mixtral.link.rtt_ms) == (100.0, 5.0)
    assert {server.concurrency for server in mixtral.servers} == {8}
    assert {server.arrival_interval_s for server in mixtral.servers} == {2.0}
    assert "college_medicine" in mixtral.servers[0].tasks
    weak = cells["weak-gpus-idle"].cluster(100.0)
    assert {gpu.memory_bandwidth_gbs for server in weak.servers for gpu in server.gpus} == {205.0}
    assert {server.concurrency for server in weak.servers} == {1}
    unequal = cells["unequal-gpus-40"].cluster(1.0)
    assert [server.gpus[0].tflops for server in unequal.servers] == [30.0, 312.0, 125.0]
    assert len(cells["unequal-links-40"].cluster(1.0).pair_links) == 3
    large = cells["48-servers-40"]
    assert large.cluster(1.0).num_servers == large.servers == 48
    assert large.requests == 50
    assert cells["12-servers-40"].requests == cells["541-100-5-40"].requests == 200


def test_names_are_patterns() -> None:
    """A star stands for any text; what fits nothing is refused."""
    assert len(named(["832-*", "weak-gpus-idle"], all_cells())) == 19
    with pytest.raises(pp.InputError, match="fits no cell"):
        named(["832"], all_cells())


@pytest.mark.traces
@pytest.mark.usefixtures("v2_trace")
def test_the_interval_gives_the_load() -> None:
    """A simulated pipeline's busiest GPU is as busy at the interval as the formula says.

    Within the noise of 900 random requests; with 600 slots a server that has one GPU is busiest,
    whose time is then the server's.
    """
    cell = all_cells()["600-10000-0.2-40"]
    cluster = cell.cluster(interval_s(cell))
    trace = routing(mixtral=False)
    plan = pp.solve(pp.Instance.build(trace, cluster), "pipeline")
    requests = pp.sample_requests(trace, cluster, requests_per_server=300)
    run = pp.simulate_placements([("pipeline", plan)], requests, trace, cluster).runs[0]
    shares = [share for name, share in run.offered_load().items() if "gpu" in name]
    assert max(shares) == pytest.approx(0.4, rel=0.15)


@pytest.mark.traces
@pytest.mark.usefixtures("v2_trace")
def test_solvers_that_are_run_later_serve_the_same_requests() -> None:
    """A run does not depend on which other solvers are run with it; the seed changes it."""
    cell = all_cells()["541-500-5-idle"]
    drawn, together = measured(cell, 50.0, 1, ("prism", "layer-partition"), "c")
    again, alone = measured(cell, 50.0, 1, ("layer-partition",), "c")
    assert drawn == again
    one, other = together["layer-partition"], alone["layer-partition"]
    assert one._replace(solve_s=None) == other._replace(solve_s=None)
    assert len(one.homes_s) == 3
    assert one.mean_s == pytest.approx(sum(one.homes_s) / 3)  # as many requests of each
    assert measured(cell, 50.0, 2, (), "c")[0] != drawn


def test_a_fingerprint_tells_requests_apart(tiny_requests: pp.Requests) -> None:
    """Equal draws have equal fingerprints; another time, home or prompt has another."""
    first = fingerprint(tiny_requests)
    assert fingerprint(dataclasses.replace(tiny_requests)) == first
    later = dataclasses.replace(tiny_requests, arrival_s=tiny_requests.arrival_s + 0.001)
    other = dataclasses.replace(tiny_requests, prompt=tiny_requests.prompt[::-1].copy())
    assert len({first, fingerprint(later), fingerprint(other)}) == 3


@pytest.fixture
def tiny_requests() -> pp.Requests:
    """Requests of the committed tiny trace."""
    root = Path(__file__).resolve().parents[2] / "traces"
    trace = pp.read_trace(root / "tiny-mixtral.parquet")
    cluster = pp.read_cluster(root / "tiny-cluster.toml")
    return pp.sample_requests(trace, cluster, requests_per_server=5)


# ---------------------------------------------------------------------------------------- resuming

CELL = "832-100-0.2-40"


def made(mean_s: float = 1.0, commit: str = "aaa", **more: Any) -> Run:
    """A run with made-up numbers: p99 three times the mean, homes alike."""
    p99_s, busiest = more.get("p99_s", 3 * mean_s), more.get("busiest", 0.3)
    homes_s = more.get("homes_s", (mean_s,) * 3)
    return Run(commit, mean_s, p99_s, mean_s / 10, busiest, 0.5, homes_s)


def fake(monkeypatch: pytest.MonkeyPatch, commit: str = "aaa", drawn: str = "d") -> list[Any]:
    """Runs are made up; what is asked for is noted."""
    asked: list[Any] = []

    def measure(cell: Any, interval: float, seed: int, solvers: Any, now: str) -> Any:
        asked.append((cell.name, seed, tuple(solvers)))
        return f"{drawn}{seed}", {solver: made(commit=now) for solver in solvers}

    monkeypatch.setattr(runner, "measured", measure)
    monkeypatch.setattr(runner, "interval_s", lambda cell: 2.5)
    monkeypatch.setattr(runner, "commit", lambda besides: commit)
    monkeypatch.setattr(runner, "known", lambda solver: solver in (*BASELINES, "latency"))
    return asked


def call(file: Path, *arguments: str) -> Any:
    """The command with one process."""
    given = ["--file", str(file), *arguments]
    return CliRunner().invoke(runner.main, ["--processes", "1", *given])


def test_only_what_is_missing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an interrupted run has kept is not run again, and the file is whole after each seed."""
    file, asked = tmp_path / "grid.json", fake(monkeypatch)
    assert call(file, "--cells", CELL, "--seeds", "2", "--solvers", "prism,exact").exit_code == 0
    assert asked == [(CELL, seed, ("prism", "exact")) for seed in (0, 1)]
    del asked[:]
    assert call(file, "--cells", CELL, "--seeds", "3").exit_code == 0
    rest = tuple(name for name in (*BASELINES, "latency") if name not in ("prism", "exact"))
    assert asked == [(CELL, 0, rest), (CELL, 1, rest), (CELL, 2, (*BASELINES, "latency"))]
    del asked[:]
    assert "0 to run" in call(file, "--cells", CELL, "--seeds", "3").output
    assert not asked


def test_a_run_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Runs before a failure are in the file."""
    file = tmp_path / "grid.json"
    fake(monkeypatch)
    measure = runner.measured

    def failing(cell: Any, interval: float, seed: int, solvers: Any, now: str) -> Any:
        if seed == 2:
            raise KeyboardInterrupt
        return measure(cell, interval, seed, solvers, now)

    monkeypatch.setattr(runner, "measured", failing)
    assert call(file, "--cells", CELL).exit_code != 0
    assert set(read_records(file)[CELL].runs["prism"]) == {0, 1}


def test_calls_that_share_processes() -> None:
    """Each call's result comes with its arguments, and a call's error is raised."""
    calls = [(7, 2), (9, 4), (5, 3)]
    for processes in (1, 2):
        assert dict(finished(divmod, calls, processes)) == {call: divmod(*call) for call in calls}
    with pytest.raises(ZeroDivisionError):
        list(finished(divmod, [(1, 0)], 2))


def test_processes_end_with_their_caller() -> None:
    """Calls that have not ended are left, so that Ctrl-C and refused runs end the grid."""
    results = finished(time.sleep, [(0.0,), (HANG_S,), (HANG_S,), (HANG_S,)], 2)
    assert next(results) == ((0.0,), None)
    results.close()
    assert not active_children()


def test_named_solvers_are_run_anew_after_a_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of another commit, in recorded cells, and baselines stay; a changed tree is always run."""
    file = tmp_path / "grid.json"
    fake(monkeypatch)
    call(file, "--cells", CELL, "--seeds", "1")
    asked = fake(monkeypatch)
    call(file, "--solvers", "latency", "--seeds", "1")
    assert not asked
    for commit in ("bbb", "bbb-dirty", "bbb-dirty"):
        asked = fake(monkeypatch, commit)
        call(file, "--solvers", "latency", "--seeds", "1")
        assert asked == [(CELL, 0, ("latency",))]
    commits = {name: rows[0].commit for name, rows in read_records(file)[CELL].runs.items()}
    assert commits == {**dict.fromkeys(BASELINES, "aaa"), "latency": "bbb-dirty"}
    asked = fake(monkeypatch, "ccc")
    call(file, "--cells", CELL, "--renew", "latency", "--seeds", "2")
    assert asked == [(CELL, 0, ("latency",)), (CELL, 1, (*BASELINES, "latency"))]


def test_other_requests_are_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs on other requests than the recorded ones, and another set-up, are refused."""
    file = tmp_path / "grid.json"
    fake(monkeypatch)
    call(file, "--cells", CELL, "--seeds", "1")
    before = file.read_bytes()
    fake(monkeypatch, "bbb", drawn="other")
    result = call(file, "--solvers", "latency", "--seeds", "1")
    assert (result.exit_code, file.read_bytes()) == (2, before)
    assert "not those of the recorded runs" in result.output
    records = read_records(file)
    records[CELL].requests = 60
    with pytest.raises(pp.InputError, match="60 requests"):
        record_of(all_cells()[CELL], records, 1.0)


def test_without_the_solver_the_others_are_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is said that the solver is missing, and no claim holds; other names are refused."""
    file, asked = tmp_path / "grid.json", fake(monkeypatch)
    monkeypatch.setattr(runner, "known", lambda solver: solver in BASELINES)
    result = call(file, "--cells", CELL)
    assert "there is no solver 'latency'" in result.output
    assert asked == [(CELL, seed, BASELINES) for seed in SEEDS]
    result = call(file, "--cells", CELL, "--report")
    assert result.exit_code == 1
    assert "open: not run: latency" in result.output
    for option in ("--solvers", "--renew"):
        result = call(file, "--cells", CELL, option, "latncy")
        assert (result.exit_code, "unknown solver 'latncy'" in result.output) == (2, True)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Records survive their file, plans that nobody found too; other files are refused."""
    file = tmp_path / "grid.json"
    runs = {"prism": {0: made(1.5), 3: Run("aaa")}, "offload": {0: made(0.25)}}
    records = {CELL: CellRecord(2.5, 8, 200, {0: "d0", 3: "d3"}, runs)}
    write_records(file, records, all_cells())
    assert read_records(file) == records
    assert len(file.read_bytes()) < 700
    for text in ("{", "[]", '{"columns": [], "cells": {}}'):
        file.write_text(text)
        with pytest.raises(pp.InputError, match="not a record of the grid"):
            read_records(file)
    assert read_records(tmp_path / "none.json") == {}


# ----------------------------------------------------------------------------------------- verdict


def runs_of(latency: dict[str, Any] | None = None, **best: Any) -> dict[str, dict[int, Run]]:
    """Five seeds in which `pipeline` takes 1 s, the next 1.1 s and all others 2 s."""
    found = {name: {seed: made(2.0) for seed in SEEDS} for name in BASELINES}
    found["pipeline"] = {seed: made(**{"mean_s": 1.0, **best}) for seed in SEEDS}
    found["exact+paths"] = {seed: made(1.1) for seed in SEEDS}
    if latency is not None:
        found["latency"] = {seed: made(**latency) for seed in SEEDS}
    return found


@pytest.mark.parametrize(
    ("latency", "result", "why"),
    [
        ({"mean_s": 0.9}, "PASS", ""),
        ({"mean_s": 1.019}, "PASS", ""),
        ({"mean_s": 1.021}, "FAIL", "mean"),
        ({"mean_s": 0.9, "p99_s": 3.14}, "PASS", ""),
        ({"mean_s": 0.9, "p99_s": 3.16}, "FAIL", "p99"),
        ({"mean_s": 0.9, "homes_s": (0.7, 0.9, 1.04)}, "PASS", ""),
        ({"mean_s": 0.9, "homes_s": (0.7, 0.9, 1.06)}, "FAIL", "worst home"),
        ({"mean_s": 1.5}, "FAIL", "mean, p99, worst home"),
    ],
)
def test_margins(latency: dict[str, Any], result: str, why: str) -> None:
    """Two percent of the mean, five of p99 and of the worst home, of the best baseline's."""
    found = verdict(runs_of(latency))
    assert (found.result, found.why, found.best) == (result, why, "pipeline")
    assert (found.second, found.behind) == ("exact+paths", pytest.approx(0.1))
    assert found.ratio == pytest.approx(latency["mean_s"])


def test_tails_are_those_of_the_baseline_with_the_best_mean() -> None:
    """A baseline of a worse mean with a better p99 does not count."""
    runs = runs_of({"mean_s": 1.0})
    runs["exact+paths"] = {seed: made(1.01, p99_s=0.1, homes_s=(0.1,) * 3) for seed in SEEDS}
    assert verdict(runs).result == "PASS"


def test_means_over_seeds_decide() -> None:
    """Not single seeds: these are told. A home is the worst in the mean over seeds."""
    runs = runs_of()
    means = (1.5, 0.9, 0.8, 0.9, 0.9)
    runs["latency"] = {seed: made(means[seed], p99_s=3.0, homes_s=(1.0,) * 3) for seed in SEEDS}
    found = verdict(runs)
    assert (found.result, found.ratio, found.by_seed) == ("PASS", pytest.approx(1.0), means)
    homes = [(1.2, 0.8, 1.0) if seed % 2 else (0.8, 1.2, 1.0) for seed in SEEDS]
    runs["latency"] = {seed: made(1.0, homes_s=homes[seed]) for seed in SEEDS}
    assert verdict(runs).home_ratio == pytest.approx((2 * 0.8 + 3 * 1.2) / 5)


def test_overloaded_cells_are_not_judged() -> None:
    """From 80 % load of the best baseline on, whatever the solver does."""
    assert verdict(runs_of({"mean_s": 5.0}, busiest=0.79)).result == "FAIL"
    assert verdict(runs_of({"mean_s": 5.0}, busiest=0.8)).result == "loaded"


def test_plans_that_do_not_fit() -> None:
    """A baseline without a plan in a seed does not count; a solver without one fails."""
    runs = runs_of({"mean_s": 1.1})
    runs["pipeline"][3] = Run("aaa")
    assert (verdict(runs).best, verdict(runs).result) == ("exact+paths", "PASS")
    runs["latency"][2] = Run("aaa")
    assert (verdict(runs).result, verdict(runs).why) == ("FAIL", "no plan in some seed")


def test_missing_runs_leave_a_cell_open() -> None:
    """Seeds that a solver lacks count for none; without a baseline, or seeds, nothing is said."""
    runs = runs_of({"mean_s": 1.0})
    runs["latency"] = {seed: run for seed, run in runs["latency"].items() if seed < 2}
    runs["pipeline"][4] = made(100.0)
    assert (verdict(runs).result, verdict(runs).seeds) == ("PASS", 2)
    del runs["latency"]
    assert (verdict(runs).result, verdict(runs).why) == ("open", "not run: latency")
    del runs["offload"]
    assert (verdict(runs).result, verdict(runs).why) == ("open", "not run: offload")


def test_the_claim_holds_only_where_all_cells_are_judged() -> None:
    """A failure, a cell that was not run, or fewer seeds than five: the claim does not hold."""
    good = CellRecord(2.5, 8, 200, runs=runs_of({"mean_s": 0.9, "commit": "bbb"}))
    text, holds = report({CELL: good}, [CELL])
    assert holds
    assert "1 PASS, 0 FAIL, 0 loaded, 0 open" in text
    row = (
        f"| {CELL} | 2.5 s | `pipeline` | 1 s | 30% | `exact+paths` +10.0% | 0.900 | 0.900–0.900 |"
    )
    assert row in text
    assert "`offload`: aaa (5 runs)\ncommits of `latency`: bbb (5 runs)" in text
    assert not report({CELL: good}, [CELL, "832-100-5-40"])[1]
    bad = CellRecord(2.5, 8, 200, runs=runs_of({"mean_s": 1.1}))
    assert not report({CELL: bad}, [CELL])[1]
    del good.runs["latency"][4]
    text, holds = report({CELL: good}, [CELL])
    assert not holds
    assert f"fewer than 5 seeds, so not the claim: {CELL}" in text
