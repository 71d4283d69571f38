"""`check`: statements of a file that are untrue are found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prism_plan.check.report import check_file
from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.placement import placement_to_json, read_placement, write_placement
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import InputFile
from prism_plan.solvers import solve
from tests.profiling.synthetic import synthetic_trace

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
CLUSTER = """
[[server]]
name = "a"
weight = 1.0
tasks = { x = 1.0 }
[[server.gpu]]
slots = 5
[[server]]
name = "b"
weight = 2.0
tasks = { y = 1.0 }
[[server.gpu]]
slots = 4
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A trace, a cluster and a placement that belong together."""
    paths = {name: tmp_path / name for name in ("t.parquet", "c.toml", "p.json")}
    write_trace(paths["t.parquet"], synthetic_trace(SPEC, ["x", "y"], requests=3))
    paths["c.toml"].write_text(CLUSTER)
    instance = Instance.build(read_trace(paths["t.parquet"]), parse_cluster(CLUSTER))
    write_placement(paths["p.json"], solve(instance, "exact"))
    return paths


def checked(files: dict[str, Path], changes: dict[str, Any] | None = None) -> Any:
    """Check the placement against trace and cluster, with changes to its plan."""
    values = json.loads(files["p.json"].read_text())
    values["plan"] |= changes or {}
    files["p.json"].write_text(json.dumps(values))
    return check_file(
        files["p.json"],
        cluster=(str(files["c.toml"]), parse_cluster(CLUSTER), InputFile("c.toml", "0" * 64)),
        trace=(str(files["t.parquet"]), read_trace(files["t.parquet"])),
    )


def test_good_files_are_good(files: dict[str, Path]) -> None:
    """All three kinds are told apart by content and found valid."""
    assert checked(files).problems == ()
    kinds = {name: check_file(path) for name, path in files.items()}
    assert [report.kind for report in kinds.values()] == ["trace", "cluster", "placement"]
    assert not any(report.problems for report in kinds.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"remote_share": 0.9, "termination": "heuristic"}, "plan.remote_share says 0.9"),
        ({"bound": 0.99}, "lies below its bound"),
        ({"bound": 0.0}, "called optimal, but remote_share exceeds its bound"),
        ({"min_replicas": 2}, "2 required"),
    ],
)
def test_untrue_statements(files: dict[str, Path], changes: dict[str, Any], words: str) -> None:
    """A wrong share, bound or promise of replicas is a problem."""
    assert any(words in problem for problem in checked(files, changes).problems)


def test_uncovered_and_overfull(files: dict[str, Path]) -> None:
    """A missing expert and a GPU beyond its slots are named, also without other files."""
    values = json.loads(files["p.json"].read_text())
    values["servers"][0]["gpus"][0]["experts"] = {"1": [0, 1, 2, 3], "2": [0, 1, 2]}
    values["servers"][1]["gpus"][0]["experts"] = {"1": [0]}
    files["p.json"].write_text(json.dumps(values))
    problems = check_file(files["p.json"]).problems
    assert "layer 2 expert 3 is held nowhere" in problems
    assert any("server 'a' gpu[0] holds 7 slots" in problem for problem in problems)


def test_another_cluster(files: dict[str, Path]) -> None:
    """Against a cluster with less memory the placement no longer fits."""
    smaller = CLUSTER.replace("slots = 4", "slots = 3")
    report = check_file(
        files["p.json"],
        cluster=("small.toml", parse_cluster(smaller), InputFile("small.toml", "0" * 64)),
        trace=(str(files["t.parquet"]), read_trace(files["t.parquet"])),
    )
    assert any("the cluster says 3" in problem for problem in report.problems)


def test_inputs_that_are_not_the_planned_ones_are_noted(files: dict[str, Path]) -> None:
    """Digests in the file tell whether it was planned from the files at hand."""
    values = placement_to_json(
        solve(
            Instance.build(read_trace(files["t.parquet"]), parse_cluster(CLUSTER)), "uniform"
        ).replace(inputs={})
    )
    values["inputs"] = {"trace": {"name": "t.parquet", "sha256": "0" * 64}}
    files["p.json"].write_text(json.dumps(values))
    assert any("not a file that it was planned from" in note for note in checked(files).notes)


def test_foreign_files(tmp_path: Path) -> None:
    """Neither ours by name nor by content."""
    path = tmp_path / "x.txt"
    path.write_text("hello")
    with pytest.raises(InputError, match="neither Parquet, JSON nor"):
        check_file(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="format"):
        check_file(path)


CALIBRATION = {
    "format": "prism-plan/calibration",
    "version": 1,
    "rtt_ms": 1.0,
    "default": {"dense_ms": [[1, 0.1], [64, 0.2]], "expert_ms": [[1, 0.1], [64, 0.2]]},
}


def test_calibrations_and_phases(tmp_path: Path) -> None:
    """Measured times and phase schedules are told apart from placements and clusters."""
    path = tmp_path / "k.json"
    path.write_text(json.dumps(CALIBRATION))
    report = check_file(path)
    assert (report.kind, report.problems) == ("calibration", ())
    assert "round trip time" in report.summary
    path.write_text(json.dumps(CALIBRATION | {"rtt_ms": -1}))
    with pytest.raises(InputError, match="rtt_ms"):
        check_file(path)
    path = tmp_path / "phases.toml"
    path.write_text("[[phase]]\nrequests = 5\n[[phase]]\ntasks = { a = { x = 1.0 } }\n")
    report = check_file(path)
    assert (report.kind, report.summary) == ("phases", "2 phases, tasks of 1 server")
    path.write_text("[[phase]]\n[[phase]]\nrequests = 5\n")
    with pytest.raises(InputError, match=r"phase\[0\]\.requests"):
        check_file(path)


def test_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    """A file of another format is refused with the list of all formats."""
    path = tmp_path / "x.json"
    path.write_text('{"format": "prism-plan/calibratoin"}')
    with pytest.raises(InputError, match=r"calibratoin'; expected one of .*prism-plan/calibration"):
        check_file(path)


def test_states_of_layers_without_keys_are_named(files: dict[str, Path]) -> None:
    """What linear attention keeps of a request is not reserved, which a note says."""
    model = dataclasses.replace(SPEC, state_bytes_per_request=39_518_208)
    report = check_file(files["c.toml"], model=("m.json", model))
    (note,) = [note for note in report.notes if "a state of" in note]
    assert (
        "layers of tiny without keys and values keep a state of 39,518,208 bytes a request" in note
    )
    assert not [
        note for note in check_file(files["c.toml"], model=("m", SPEC)).notes if "state" in note
    ]
    cluster = ("c.toml", parse_cluster(CLUSTER), InputFile("c.toml", "0" * 64))
    placed = ("p.json", read_placement(files["p.json"]))
    for found in (
        check_file(files["p.json"], cluster=cluster, model=("m.json", model)),
        check_file(files["c.toml"], model=("m.json", model), placement=placed),
    ):
        assert note in found.notes
    with pytest.raises(ValueError, match="a placement has no sizes"):
        check_file(files["c.toml"], placement=placed)
