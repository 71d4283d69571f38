"""What users of `simulate` can get wrong: one line with file, place and value; nothing written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import pytest

from prism_plan.io.placement import write_placement
from prism_plan.io.trace_writer import write_trace
from tests.evaluate.simulation_material import (
    CLUSTER,
    SPEC,
    invoke,
    planned,
    small_cluster,
    small_trace,
)
from tests.profiling.synthetic import synthetic_trace

Run = Callable[..., CompletedProcess[str]]
#: A message longer than this is no longer one line to a reader.
LONGEST = 400
CURVE = [[1, 0.1], [64, 0.2]]
CALIBRATION = {
    "format": "prism-plan/calibration",
    "version": 1,
    "default": {"dense_ms": CURVE, "expert_ms": CURVE},
}
PHASES = "[[phase]]\nrequests = 1\n[[phase]]\ntasks = { a = { y = 1.0 } }\n"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files; tests copy it and spoil the copy."""
    folder = tmp_path_factory.mktemp("material")
    trace = small_trace()
    write_trace(folder / "t.parquet", trace)
    (folder / "c.toml").write_text(CLUSTER)
    write_placement(folder / "p.json", planned(trace, small_cluster(), "exact")[0][1])
    (folder / "k.json").write_text(json.dumps(CALIBRATION))
    (folder / "phases.toml").write_text(PHASES)
    (folder / "a.jsonl").write_text('{"server": "a", "at_s": 0.5}\n')
    return folder


@pytest.fixture
def work(material: Path, tmp_path: Path) -> Path:
    """A fresh copy of the good files."""
    return Path(shutil.copytree(material, tmp_path / "work"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(
    work: Path,
    *args: object,
    words: tuple[str, ...],
    code: int = 2,
    output: tuple[str, ...] = ("-o", "s.json"),
    run: Callable[..., CompletedProcess[str]] = invoke,
) -> None:
    """One line on standard error with the words in it, the exit code, and no file changed."""
    before = contents(work)
    files = ("--trace", "t.parquet", "--cluster", "c.toml")
    result = run(work, "simulate", *args, *files, *output)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert len(result.stderr) <= LONGEST
    assert result.stderr.startswith("prism-plan: ")
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""
    assert contents(work) == before


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the values of a JSON file; what ``change`` returns counts, if anything."""
    values = json.loads(path.read_text())
    changed = change(values)
    path.write_text(json.dumps(values if changed is None else changed))


# --------------------------------------------------------------------------------------- placements


def another_model(work: Path) -> None:
    """A trace of a model with one more layer."""
    spec = dataclasses.replace(SPEC, moe_layers=(1, 2, 3, 4), num_decoder_layers=5)
    write_trace(work / "t.parquet", synthetic_trace(spec, ["x", "y", "z"], requests=2))


def another_server(work: Path) -> None:
    text = (work / "c.toml").read_text()
    (work / "c.toml").write_text(text.replace('name = "b"', 'name = "d"'))


def fewer_gpus(work: Path) -> None:
    text = (work / "c.toml").read_text()
    (work / "c.toml").write_text(text.replace("[[server.gpu]]\nslots = 3\n", ""))


def less_memory(work: Path) -> None:
    text = (work / "c.toml").read_text()
    (work / "c.toml").write_text(text.replace("slots = 8", "slots = 6"))


def a_hole(work: Path) -> None:
    def change(values: Any) -> None:
        for server in values["servers"]:
            for gpu in server["gpus"]:
                if 3 in gpu["experts"].get("2", []):
                    gpu["experts"]["2"].remove(3)

    edit(work / "p.json", change)


def too_many_experts(work: Path) -> None:
    def change(values: Any) -> None:
        gpu = values["servers"][1]["gpus"][1]
        gpu["experts"]["1"] = list(range(8))

    edit(work / "p.json", change)


PLACEMENTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "another model": (another_model, ("p.json: model", "moe_layers is (1, 2, 3)", "(1, 2, 3, 4)")),
    "another server": (another_server, ("p.json: servers: servers a, b, c", "a, d, c")),
    "fewer GPUs": (fewer_gpus, ("p.json: servers[1].gpus: 2 GPUs", "expected 1")),
    "less memory": (less_memory, ("p.json: servers", "server 'b' gpu[0] holds 8 slots", "says 6")),
    "a hole": (a_hole, ("p.json: servers: layer 2 expert 3", "held nowhere")),
    "too many experts": (too_many_experts, ("p.json", "server 'b' gpu[1] holds ", "says 3")),
}


@pytest.mark.parametrize("what", PLACEMENTS)
def test_placement_that_does_not_fit(work: Path, what: str) -> None:
    """A placement for something else names its file, where in it, and what was expected."""
    spoil, words = PLACEMENTS[what]
    spoil(work)
    assert_refused(work, "p.json", words=words)


# -------------------------------------------------------------------------------------- other files


def without_times(work: Path) -> None:
    text = (work / "c.toml").read_text().replace("arrival_interval_s = 0.02", "weight = 1.0")
    (work / "c.toml").write_text(text)


def without_users(work: Path) -> None:
    lines = (work / "c.toml").read_text().splitlines()
    (work / "c.toml").write_text("\n".join(line for line in lines if "tasks" not in line))


def zero_bandwidth(work: Path) -> None:
    text = (work / "c.toml").read_text()
    (work / "c.toml").write_text(text.replace("bandwidth_mbps = 100", "bandwidth_mbps = 0"))


def writing(name: str, text: str) -> Callable[[Path], None]:
    """Replace a file by a text."""

    def spoil(work: Path) -> None:
        (work / name).write_text(text)

    return spoil


def calibration(**changes: Any) -> Callable[[Path], None]:
    """A calibration with other values."""
    return writing("k.json", json.dumps(CALIBRATION | changes))


LOSSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no time": (("--lose", "a"), ("--lose: 'a'; expected NAME@SECONDS or NAME@SECONDS:RETURN",)),
    "back before": (("--lose", "a@0.2:0.1"), ("--lose: a: lost at 0.2 s, back at 0.1 s",)),
    "another server": (("--lose", "d@0.2"), ("--lose: 'd'", "the cluster: a, b, c")),
    "after the end": (("--lose", "a@1e6"), ("--lose: a at 1e+06 s", "up to the last arrival")),
    "twice": (("--lose", "a@0.1", "--lose", "a@0.2"), ("--lose: a at 0.2 s", "since 0.1 s")),
    "all": (
        ("--lose", "a@0.1", "--lose", "b@0.1", "--lose", "c@0.1"),
        ("--lose: no server is left at 0.1 s",),
    ),
    "no timeout": (("--lose", "a@0.1", "--timeout", "nan"), ("--timeout: nan; expected sec",)),
    "with offload": (("--lose", "a@0.1", "--offload"), ("--lose: servers are lost beside the",)),
}


@pytest.mark.parametrize("what", LOSSES)
def test_losses_that_cannot_be(work: Path, what: str) -> None:
    """Times, names and numbers of lost servers are checked before anything is simulated."""
    words, told = LOSSES[what]
    assert_refused(work, "p.json", *words, words=told)


MEASURED = ("--calibration", "k.json")
FIXED = ("--arrivals", "a.jsonl")
PHASED = ("--phases", "phases.toml")
OTHER_FILES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    "no arrival interval": (without_times, (), ("c.toml: server[0].arrival_interval_s",)),
    "no users": (without_users, (), ("c.toml: server: no server has tasks",)),
    "zero bandwidth": (zero_bandwidth, (), ("c.toml: link.bandwidth_mbps: 0",)),
    "negative round trip": (
        writing("c.toml", CLUSTER.replace("= 100", "= 100\nrtt_ms = -1")),
        (),
        ("c.toml: link.rtt_ms: -1",),
    ),
    "NaN interval": (
        writing("c.toml", CLUSTER.replace("0.04", "nan")),
        (),
        ("c.toml: server[2].arrival_interval_s: nan",),
    ),
    "trace is no trace": (writing("t.parquet", "PAR1"), (), ("t.parquet",)),
    "no JSON": (writing("k.json", "{"), MEASURED, ("k.json",)),
    "not a calibration": (writing("k.json", "{}"), MEASURED, ("k.json: keys 'format'",)),
    "negative time": (
        calibration(default={"dense_ms": [[1, -1], [2, 1]], "expert_ms": CURVE}),
        MEASURED,
        ("k.json: default.dense_ms[0][1]: -1",),
    ),
    "time of 400 digits": (calibration(rtt_ms=10**400), MEASURED, ("k.json: rtt_ms: 1000",)),
    "times of another server": (
        calibration(default=None, servers=[{"name": "a", "gpus": [CALIBRATION["default"]]}]),
        MEASURED,
        ("k.json: servers: no times of server 'b' gpu[0]",),
    ),
    "no arrivals": (writing("a.jsonl", "\n"), FIXED, ("a.jsonl: no arrivals",)),
    "NaN arrival": (
        writing("a.jsonl", '{"server": "a", "at_s": NaN}'),
        FIXED,
        ("a.jsonl: line 1",),
    ),
    "negative arrival": (
        writing("a.jsonl", '{"server": "a", "at_s": 1}\n{"server": "a", "at_s": -1}'),
        FIXED,
        ("a.jsonl: line 2: at_s: -1",),
    ),
    "arrival at another server": (
        writing("a.jsonl", '{"server": "d", "at_s": 1}'),
        FIXED,
        ("a.jsonl: line 1: server: unknown server 'd'",),
    ),
    "no phases": (writing("phases.toml", ""), PHASED, ("phases.toml: phase",)),
    "phase of another task": (
        writing("phases.toml", PHASES.replace("y =", "w =")),
        PHASED,
        ("phases.toml: phase[1].tasks.a: unknown task 'w'",),
    ),
    "phase of another server": (
        writing("phases.toml", PHASES.replace("a =", "d =")),
        PHASED,
        ("phases.toml: phase[1].tasks: unknown server 'd'",),
    ),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_broken_file(work: Path, what: str) -> None:
    """Cluster, trace, calibration, arrivals and phases: the file, the place in it, the value."""
    spoil, options, words = OTHER_FILES[what]
    spoil(work)
    assert_refused(work, "p.json", *options, words=words)


@pytest.mark.parametrize("name", ["p.json", "k.json", "a.jsonl", "phases.toml", "c.toml"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_files_cut_short(work: Path, name: str, share: float) -> None:
    """A file that ends early, or is empty, is named."""
    data = (work / name).read_bytes()
    (work / name).write_bytes(data[: int(share * len(data))])
    options = {"k.json": MEASURED, "a.jsonl": FIXED, "phases.toml": PHASED}.get(name, ())
    assert_refused(work, "p.json", *options, words=(f"{name}: ",))


# ------------------------------------------------------------------------------------------ options


PRISM = ("--migrate", "prism")
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nothing to simulate": ((), ("simulate: nothing to simulate",)),
    "no such placement": (("q.json",), ("q.json",)),
    "unknown solver": (("--solvers", "exakt"), ("--solvers", "did you mean 'exact'")),
    "offload is no solver": (("--solvers", "offload"), ("--solvers", "'offload'")),
    "no request": (("p.json", "--requests", "0"), ("--requests: 0",)),
    "negative requests": (("p.json", "--requests", "-5"), ("--requests: -5",)),
    "huge requests": (("p.json", "--requests", "9" * 30), ("--requests: 9999",)),
    "requests and duration": (
        ("p.json", "--requests", "5", "--duration", "9"),
        ("--requests", "--duration"),
    ),
    "requests and arrivals": (("p.json", "--requests", "5", *FIXED), ("--requests", "--arrivals")),
    "duration and arrivals": (("p.json", "--duration", "5", *FIXED), ("--duration", "--arrivals")),
    "burst and arrivals": (("p.json", "--burst", "5", *FIXED), ("--burst", "--arrivals")),
    "NaN duration": (("p.json", "--duration", "nan"), ("--duration: nan",)),
    "infinite duration": (("p.json", "--duration", "inf"), ("--duration: inf",)),
    "negative duration": (("p.json", "--duration", "-1"), ("--duration: -1",)),
    "tiny duration": (("p.json", "--duration", "1e-9"), ("--duration: no request arrives",)),
    "no burst": (("p.json", "--burst", "0"), ("--burst: 0",)),
    "negative decode": (("p.json", "--decode-tokens", "-1"), ("--decode-tokens: -1",)),
    "huge prompt": (("p.json", "--prompt-tokens", "9" * 12), ("--prompt-tokens: 999",)),
    "a period of nothing": (
        ("p.json", "--migrate", "partial", "--migrate-every", "1e-7"),
        ("--migrate-every: 1e-07 s", "reviews before the last request"),
    ),
    "zero period": (("p.json", *PRISM, "--migrate-every", "0"), ("--migrate-every: 0",)),
    "NaN period": (("p.json", *PRISM, "--migrate-every", "nan"), ("--migrate-every: nan",)),
    "infinite period": (("p.json", *PRISM, "--migrate-every", "inf"), ("--migrate-every: inf",)),
    "NaN half-life": (("p.json", *PRISM, "--half-life", "nan"), ("--half-life: nan",)),
    "infinite half-life": (("p.json", *PRISM, "--half-life", "inf"), ("--half-life: inf",)),
    "zero half-life": (("p.json", *PRISM, "--half-life", "0"), ("--half-life: 0",)),
    "half-life of all": (
        ("p.json", *PRISM, "--half-life", "9", "--statistics", "cumulative"),
        ("--half-life: has no effect with cumulative",),
    ),
    "negative horizon": (("p.json", *PRISM, "--horizon", "-1"), ("--horizon: -1",)),
    "infinite horizon": (("p.json", *PRISM, "--horizon", "inf"), ("--horizon: inf",)),
    "zero horizon": (("p.json", *PRISM, "--horizon", "0"), ("--horizon: 0",)),
    "zero limit": (("p.json", "--time-limit", "0"), ("--time-limit: 0",)),
    "NaN limit": (("p.json", "--time-limit", "nan"), ("--time-limit: nan",)),
    "negative seed": (("p.json", "--seed", "-1"), ("--seed: -1",)),
    "huge seed": (("p.json", "--seed", "9" * 30), ("--seed: 999",)),
    "no replicas": (("--solvers", "exact", "--min-replicas", "0"), ("--min-replicas",)),
    "unknown route": (("p.json", "--route", "far"), ("--route", "far")),
    "unknown policy": (("p.json", "--migrate", "always"), ("--migrate", "always")),
    "unknown candidate": (
        ("p.json", *PRISM, "--migrate-solver", "prsm"),
        ("--migrate-solver: 'prsm'",),
    ),
    "no processes": (("p.json", "--jobs", "0"), ("--jobs: 0",)),
    "holdout of all": (("p.json", "--holdout", "1"), ("--holdout: 1",)),
    "NaN holdout": (("p.json", "--holdout", "nan"), ("--holdout: nan",)),
    "phases too long": (
        ("p.json", *PHASED, "--requests", "1"),
        ("--requests: 1 requests of each server end before phase[1]",),
    ),
    "table to standard output": (("p.json", "--per-request", "-"), ("--per-request: '-'",)),
    "table over a plan": (("p.json", "--per-request", "t.parquet"), ("t.parquet: is also read",)),
    "no such folder": (("p.json", "--per-request", "no/r.parquet"), ("no/r.parquet",)),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_option_mistake(work: Path, what: str) -> None:
    """A wrong option is named with its value, and nothing is written."""
    args, words = OPTIONS[what]
    assert_refused(work, *args, words=words)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("p.json", ()),
        ("t.parquet", ()),
        ("c.toml", ()),
        ("k.json", MEASURED),
        ("a.jsonl", FIXED),
        ("phases.toml", PHASED),
    ],
)
def test_report_over_an_input(work: Path, name: str, options: tuple[str, ...]) -> None:
    """No input is written over, by whatever name it is called."""
    output = ("-o", f"../work/{name}")
    assert_refused(work, "p.json", *options, words=("is also read",), output=output)


# ------------------------------------------------------------------------------------------- sweeps


GRID = ("--sweep", "solver=exact")
SWEEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "with placements": (("p.json", *GRID), ("P.json: not in a sweep (--sweep)",)),
    "with arrivals": ((*GRID, *FIXED), ("--arrivals: not in a sweep (--sweep)",)),
    "with phases": ((*GRID, *PHASED), ("--phases: not in a sweep (--sweep)",)),
    "with a duration": ((*GRID, "--duration", "0"), ("--duration: not in a sweep (--sweep)",)),
    "with a time limit": ((*GRID, "--time-limit", "9"), ("--time-limit: not in a sweep",)),
    "with requests' rows": (
        (*GRID, "--per-request", "r.parquet"),
        ("--per-request: not in a sweep",),
    ),
    "with JSON": ((*GRID, "--json"), ("--json: not in a sweep (--sweep)",)),
    "unknown key": ((*GRID, "--sweep", "gpu=4"), ("--sweep", "did you mean 'gpus'")),
    "half a seed": ((*GRID, "--sweep", "seed=1.5"), ("--sweep: seed: '1.5'", "whole number")),
    "no solver": (("--sweep", "gpus=4"), ("--sweep: solver: no solver",)),
    "solvers twice": ((*GRID, "--solvers", "prism"), ("solver=prism' is duplicated",)),
    "no request": ((*GRID, "--requests", "0"), ("--requests: 0",)),
    "no burst": ((*GRID, "--burst", "0"), ("--burst: 0",)),
    "no replicas": ((*GRID, "--min-replicas", "0"), ("--min-replicas: 0",)),
    "all held out": ((*GRID, "--holdout", "1"), ("--holdout: 1",)),
    "no processes": ((*GRID, "--jobs", "0"), ("--jobs: 0",)),
    "few processes": ((*GRID, "--jobs", "-2"), ("--jobs: -2",)),
}


@pytest.mark.parametrize("what", SWEEPS)
def test_sweep_mistake(work: Path, what: str) -> None:
    """A wrong sweep is refused before the first run, and no table is written."""
    args, words = SWEEPS[what]
    assert_refused(work, *args, words=words, output=("-o", "s.csv"))


def test_sweep_outputs(work: Path) -> None:
    """A sweep needs a table of a known kind that is none of its inputs."""
    assert_refused(work, *GRID, words=("-o R.parquet",), output=())
    assert_refused(work, *GRID, words=("s.json", ".parquet or .csv"), output=("-o", "s.json"))
    assert_refused(work, *GRID, words=("is also read",), output=("-o", "t.parquet"))
    without_times(work)
    words = ("c.toml: server[0].arrival_interval_s", "sweep over arrival_interval_s")
    assert_refused(work, *GRID, words=words, output=("-o", "s.csv"))


# --------------------------------------------------------------------------- processes of their own


INSTALLED: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...], int]] = {
    "placement": (a_hole, ("p.json",), ("p.json: servers: layer 2 expert 3",), 2),
    "option": (None, ("p.json", "--duration", "nan"), ("--duration: nan",), 2),
    "sweep": (None, (*GRID, "--sweep", "seed=1.5", "-o", "-"), ("--sweep: seed",), 2),
    "infeasible": (
        None,
        ("--solvers", "exact", "--min-replicas", "3"),
        ("infeasible", "short by"),
        3,
    ),
}


@pytest.mark.parametrize("what", INSTALLED)
def test_through_the_installed_command(prism_plan: Run, work: Path, what: str) -> None:
    """One mistake of each class through the command as it is installed."""
    spoil, args, words, code = INSTALLED[what]
    if spoil is not None:
        spoil(work)

    def installed(folder: Path, *args: object) -> CompletedProcess[str]:
        return prism_plan(*args, cwd=folder)

    output = () if "-o" in args else ("-o", "s.json")
    assert_refused(work, *args, words=words, code=code, output=output, run=installed)


@pytest.mark.parametrize(
    "where",
    [
        "prism_plan.simulate.sampling.sample_requests",
        "prism_plan.evaluate.simulation_runner.SimulationRunner._advance",
    ],
)
def test_ctrl_c_before_anything_is_simulated(work: Path, where: str) -> None:
    """While requests are sampled, or before the first event: code 130, and nothing is written."""
    with mock.patch(where, side_effect=KeyboardInterrupt):
        words = ("interrupted; nothing was written",)
        assert_refused(work, "p.json", "--requests", "2", words=words, code=130)


def test_a_plan_that_needs_more_memory_than_there_is(work: Path) -> None:
    """A GPU that is too small for the dense part is infeasible: code 3, and by how much."""
    text = CLUSTER.replace("slots = 8", "memory_gb = 0.001")
    (work / "c.toml").write_text(text)
    words = ("c.toml: infeasible", "server 'b' gpu[0]", "short by 4,000,000 bytes")
    assert_refused(work, "p.json", words=words, code=3)
