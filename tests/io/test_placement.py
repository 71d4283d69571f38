"""Placement files: exact round trips, the schema, the golden file."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.execution_table import spans
from prism_plan.io.placement import (
    dump_placement,
    placement_from_json,
    placement_to_json,
    read_placement,
    write_placement,
)
from prism_plan.model_spec import ModelShape
from prism_plan.placement import InputFile, Placement, SolveReport, require_home_execution
from prism_plan.placement_check import violations

GOLDEN = Path(__file__).parents[1] / "golden" / "placement-v1.json"
GOLDEN_2 = Path(__file__).parents[1] / "golden" / "placement-v2.json"


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any placement, feasible or not, of equal or unequal sizes."""
    layers = sorted(draw(st.sets(st.integers(0, 90), min_size=1, max_size=4)))
    experts = draw(st.integers(1, 9))
    sizes = st.integers(1, 2**40)
    many = st.lists(sizes, min_size=len(layers), max_size=len(layers)).map(tuple)
    model = ModelShape(
        draw(st.text(min_size=1, max_size=8)),
        tuple(layers),
        experts,
        draw(st.integers(1, experts)),
        draw(sizes | many),
    )
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3, unique=True))
    capacity = tuple(
        tuple(draw(st.lists(st.integers(0, 2**50), min_size=1, max_size=3))) for _ in names
    )
    seed = draw(st.integers(0, 2**32))
    gpus = sum(map(len, capacity))
    held = np.random.default_rng(seed).random((gpus, len(layers), experts)) < 0.4
    share = st.none() | st.floats(0, 1)
    plan = SolveReport(
        solver=draw(st.text(min_size=1, max_size=8)),
        remote_share=draw(share),
        bound=draw(share),
        termination=draw(st.sampled_from(["optimal", "heuristic", "time_limit"])),
        seed=draw(st.integers(0, 2**62)),
        runtime_s=draw(st.floats(0, 1e6)),
        min_replicas=draw(st.integers(1, 5)),
        assumed=tuple(draw(st.lists(st.text(min_size=1, max_size=8), max_size=2))),
        extra=draw(st.dictionaries(st.sampled_from(["gap", "note"]), st.floats(0, 9) | st.text())),
    )
    inputs = {"trace": InputFile(draw(st.text()), "0123456789abcdef" * 4)}
    placement = Placement(model, tuple(names), capacity, held, plan, inputs)
    if draw(st.booleans()):
        return placement
    table = np.random.default_rng(seed + 1).integers(0, len(names), (len(names), len(layers)))
    table[0] = 0
    placement = placement.replace(execution=table)
    if placement.execution is None:
        return placement
    kv_tokens = {name: draw(st.integers(0, 2**40)) for name in names}
    return placement.replace(kv_tokens=kv_tokens, execute_at_home=(names[0],))


@settings(max_examples=100)
@given(placement=placements())
def test_round_trip_is_exact(
    placement: Placement, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Reading what was written gives every field back, and writing that the same bytes."""
    path = tmp_path_factory.mktemp("placement") / "p.json"
    write_placement(path, placement)
    again = read_placement(path)
    assert (again.on_gpu == placement.on_gpu).all()
    assert (again.execution_table == placement.execution_table).all()
    assert (again.execution is None) == (placement.execution is None)
    for field in ("model", "servers", "gpu_capacity", "plan", "inputs"):
        assert getattr(again, field) == getattr(placement, field)
    for field in ("kv_tokens", "execute_at_home"):
        assert getattr(again, field) == getattr(placement, field)
    assert dump_placement(again) == path.read_bytes()


def test_golden_version_1() -> None:
    """A version-1 file loads for ever, byte for byte, with the content it had."""
    placement = read_placement(GOLDEN)
    assert dump_placement(placement) == GOLDEN.read_bytes()
    assert placement.model == ModelShape("deepseek-v2-lite", (1, 2), 64, 6, 17301504)
    assert placement.servers == ("edge-0", "edge-1")
    assert placement.gpu_capacity == ((70,), (40, 40))
    assert int(placement.on_gpu.sum()) == 150
    assert placement.plan.solver == "exact"
    assert placement.plan.bound == placement.plan.remote_share
    assert violations(placement, min_replicas=1) == []


def test_the_file_reads_as_documented() -> None:
    """Keys are those of docs/design.md, section 6, in order; expert lists are sorted in a line."""
    values = json.loads(GOLDEN.read_text())
    assert list(values) == ["format", "version", "model", "servers", "plan", "inputs"]
    assert list(values["model"]) == ["name", "moe_layers", "num_experts", "top_k", "expert_bytes"]
    gpu = values["servers"][0]["gpus"][0]
    assert list(gpu) == ["slots", "experts"]
    assert set(gpu["experts"]) <= {"1", "2"}
    assert all(ids == sorted(set(ids)) for ids in gpu["experts"].values())
    first = gpu["experts"]["1"]
    assert f'"1": [{",".join(map(str, first))}]' in GOLDEN.read_text()


MUTATIONS = {
    "format": (["format"], "other", "format"),
    "version": (["version"], 3, "newer prism-plan"),
    "version 2 without a table": (["version"], 2, "execution"),
    "a table in version 1": (["execution"], {}, "execution"),
    "true is not version 1": (["version"], True, "version"),
    "layer": (["servers", 0, "gpus", 0, "experts"], {"7": [1]}, "MoE layer of deepseek-v2-lite"),
    "leading zero": (["servers", 0, "gpus", 0, "experts"], {"01": [1]}, "experts"),
    "expert": (["servers", 0, "gpus", 0, "experts", "1"], [3, 64], "expert 64; expected ids 0..63"),
    "order": (["servers", 0, "gpus", 0, "experts", "1"], [5, 3], "expert 3 after 5"),
    "twice": (["servers", 0, "gpus", 0, "experts", "1"], [5, 5], "each once"),
    "name taken": (["servers", 1, "name"], "edge-0", "taken by servers"),
    "share": (["plan", "remote_share"], 1.5, "remote_share"),
    "word": (["plan", "termination"], "perfect", "termination"),
    "layers": (["model", "moe_layers"], [2, 1], "ascending"),
}


@pytest.mark.parametrize("case", list(MUTATIONS))
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    """A wrong value is refused with its place."""
    path, value, words = MUTATIONS[case]
    values = json.loads(GOLDEN.read_text())
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    file = tmp_path / "p.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_placement(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_assumed_figures_stand_in_the_plan(tmp_path: Path) -> None:
    """A plan has `assumed` only where a solver used assumed figures, and takes texts alone."""
    placement = read_placement(GOLDEN)
    assert placement.plan.assumed == ()
    assert "assumed" not in placement_to_json(placement)["plan"]
    plan = dataclasses.replace(placement.plan, assumed=("tflops 312 of every GPU",))
    values = placement_to_json(placement.replace(plan=plan))
    assert values["plan"]["assumed"] == ["tflops 312 of every GPU"]
    assert placement_from_json(values).plan == plan
    values["plan"]["assumed"] = ["tflops 312", 1]
    with pytest.raises(InputError, match=r"plan.assumed\[1\]: 1; expected a text"):
        placement_from_json(values)


def test_json_values_are_plain() -> None:
    """No numpy number reaches the file's values."""

    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(type(k) is str and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    assert plain(placement_to_json(read_placement(GOLDEN)))


# ---------------------------------------------------------------------------------------- version 2


def test_golden_version_2() -> None:
    """A version-2 file loads for ever, byte for byte, with the table that it had."""
    placement = read_placement(GOLDEN_2)
    assert dump_placement(placement) == GOLDEN_2.read_bytes()
    assert placement.servers == ("edge-0", "edge-1")
    assert placement.model.moe_layers == (1, 2, 4)
    assert placement.execution_table.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert placement.kv_tokens == {"edge-0": 4096, "edge-1": 0}
    assert placement.execute_at_home == ("edge-1",)
    values = json.loads(GOLDEN_2.read_text())
    assert list(values)[:6] == ["format", "version", "model", "servers", "execution", "kv_tokens"]
    assert values["execution"]["edge-0"] == [
        {"first": 1, "last": 2, "server": "edge-1"},
        {"first": 4, "last": 4, "server": "edge-0"},
    ]


def test_unmerged_runs_are_read_and_merged() -> None:
    """Neighbouring runs of one server are one table, and are written as one run."""
    values = json.loads(GOLDEN_2.read_text())
    runs = [{"first": layer, "last": layer, "server": "edge-1"} for layer in (1, 2)]
    values["execution"]["edge-0"][:1] = runs
    placement = placement_from_json(values)
    assert dump_placement(placement) == GOLDEN_2.read_bytes()


def test_a_table_at_home_is_version_1() -> None:
    """Old readers keep working: a placement that executes at home says nothing of tables."""
    at_home = read_placement(GOLDEN_2).replace(execution=np.array([[0] * 3, [1] * 3]))
    assert at_home.execution is None
    values = placement_to_json(at_home)
    assert values["version"] == 1
    assert not values.keys() & {"execution", "kv_tokens", "execute_at_home"}


def run(first: int, last: int, server: str = "edge-1") -> dict[str, object]:
    return {"first": first, "last": last, "server": server}


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (("execution", "edge-0"), [run(1, 1), run(4, 4)], "first 4; expected 2, the MoE layer"),
        (("execution", "edge-0"), [run(1, 2)], "ends with layer 2; expected a server for layer 4"),
        (("execution", "edge-0"), [run(1, 4), run(1, 4)], "expected no more runs"),
        (("execution", "edge-0"), [run(1, 3)], "last 3; expected a MoE layer"),
        (("execution", "edge-0"), [run(2, 4)], "first 2; expected 1"),
        (("execution", "edge-0"), [run(1, 4, "edge-7")], "server 'edge-7', did you mean 'edge-1'?"),
        (("execution", "edge-9"), [run(1, 4)], "server 'edge-9'"),
        (("execution",), {"edge-0": [run(1, 4)]}, "no runs of 'edge-1'"),
        (("execution", "edge-0"), [], "execution.edge-0"),
        (("execution", "edge-0"), [run(-1, 4)], "first"),
        (("kv_tokens", "edge-9"), 4, "kv_tokens"),
        (("kv_tokens", "edge-0"), -4, "kv_tokens"),
        (("execute_at_home",), ["edge-0"], "layers of 'edge-0' execute elsewhere"),
        (("execute_at_home",), ["edge-9"], "execute_at_home[0]"),
    ],
)
def test_a_wrong_table_is_named(at: tuple[str, ...], value: object, words: str) -> None:
    """Holes, unknown servers and what contradicts itself: one line with file, place and remedy."""
    values = json.loads(GOLDEN_2.read_text())
    target = values
    for key in at[:-1]:
        target = target[key]
    target[at[-1]] = value
    with pytest.raises(InputError) as caught:
        placement_from_json(values, source="p.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("p.json: ")
    assert "\n" not in str(caught.value)


def test_version_2_where_version_1_is_wanted() -> None:
    """What cannot execute a table refuses it, naming the first layer that is elsewhere."""
    require_home_execution(read_placement(GOLDEN))
    with pytest.raises(InputError) as caught:
        require_home_execution(read_placement(GOLDEN_2), source="p.json")
    assert str(caught.value) == (
        "p.json: version: 2: layer 1 of edge-0 executes on edge-1; expected 1, where every layer "
        "executes at home; plan it with every layer at home"
    )


def test_tables_are_checked_in_memory() -> None:
    """A table of another shape, of floats or with a server too many is a programming error."""
    placement = read_placement(GOLDEN_2)
    for table in (np.zeros((2, 2), int), np.zeros((2, 3)), np.full((2, 3), 2)):
        with pytest.raises(ValueError, match="execution"):
            placement.replace(execution=table)
    assert not placement.execution_table.flags.writeable


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_spans_are_maximal_runs(row: list[int]) -> None:
    """Spans cover the row in order; neighbours are of different servers."""
    found = spans(np.array(row))
    assert [s.server for s in found for _ in range(s.first, s.last + 1)] == row
    assert all(a.server != b.server and a.last + 1 == b.first for a, b in pairwise(found))
