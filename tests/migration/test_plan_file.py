"""Migration files: exact round trips, the schema, and what is wrong is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.check.report import check_file
from prism_plan.errors import InputError
from prism_plan.execution_table import TableChange, home_execution
from prism_plan.io.migration import (
    dump_migration,
    migration_from_json,
    migration_to_json,
    read_migration,
    write_migration,
)
from prism_plan.io.shared_fields import shipped_schema
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import LoadTime, MigrationPlan
from prism_plan.migration_step import MigrationStep, ReplicaDip
from prism_plan.model_spec import ModelShape
from prism_plan.placement import InputFile
from tests.migration.moves_by_hand import placed


@st.composite
def plans(draw: st.DrawFn) -> MigrationPlan:
    """Any plan of well-formed steps, whether it makes sense or not."""
    layers = sorted(draw(st.sets(st.integers(0, 90), min_size=1, max_size=3)))
    experts = draw(st.integers(1, 6))
    sizes = st.integers(1, 2**40)
    many = st.lists(sizes, min_size=len(layers), max_size=len(layers)).map(tuple)
    model = ModelShape("mö", tuple(layers), experts, 1, draw(sizes | many))
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3, unique=True))
    gpus = tuple(draw(st.integers(1, 3)) for _ in names)
    latest: dict[tuple[int, int], bool] = {}
    steps = []
    for index in range(draw(st.integers(0, 12))):
        place = draw(st.integers(0, sum(gpus) - 1)), draw(st.integers(0, model.num_pairs - 1))
        latest[place] = not latest[place] if place in latest else draw(st.booleans())
        needs = draw(st.sets(st.integers(0, index - 1))) if index else set()
        kind = "load" if latest[place] else "drop"
        steps.append(MigrationStep(kind, *place, tuple(sorted(needs)), draw(st.booleans())))  # type: ignore[arg-type]
    change = None
    if draw(st.booleans()):
        server = st.integers(0, len(names) - 1)
        row = st.lists(server, min_size=len(layers), max_size=len(layers))
        table = draw(st.lists(row, min_size=len(names), max_size=len(names)))
        waits_from = draw(st.integers(0, len(steps)))
        begins_after = draw(st.sampled_from([0, waits_from]))
        change = TableChange(np.array(table, np.int32), begins_after, waits_from)
    replicas, dips = draw(st.sampled_from([1, 2, 5])), []
    for drop, step in enumerate(steps):
        ends = [i for i in range(drop, len(steps)) if steps[i].kind == "load"]
        ends = [i for i in ends if steps[i].pair == step.pair]
        if replicas > 1 and step.kind == "drop" and ends and draw(st.booleans()):
            wanted = draw(st.integers(2, replicas))
            copies = draw(st.integers(1, wanted - 1))
            dips.append(ReplicaDip(step.pair, wanted, copies, drop, draw(st.sampled_from(ends))))
    file = st.builds(InputFile, st.text(), st.just("0123456789abcdef" * 4))
    seconds = st.floats(0, 1e9)
    return MigrationPlan(
        model,
        tuple(names),
        gpus,
        tuple(steps),
        draw(st.dictionaries(st.sampled_from(["from", "to"]), file)),
        draw(st.none() | st.builds(LoadTime, seconds, seconds)),
        change,
        replicas,
        tuple(dips),
    )


@settings(max_examples=100)
@given(plan=plans())
def test_round_trip_is_exact(plan: MigrationPlan, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reading what was written gives every field back, and writing that the same bytes."""
    path = tmp_path_factory.mktemp("migration") / "m.json"
    write_migration(path, plan)
    again = read_migration(path)
    fields = ("model", "servers", "gpus", "steps", "inputs", "load_s", "min_replicas", "dips")
    for field in fields:
        assert getattr(again, field) == getattr(plan, field)
    assert (again.change is None) == (plan.change is None)
    if plan.change is not None and again.change is not None:
        assert (again.change.execution == plan.change.execution).all()
        assert again.change.begins_after == plan.change.begins_after
        assert again.change.waits_from == plan.change.waits_from
    assert dump_migration(again) == path.read_bytes()
    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), shipped_schema("migration-1"))
    assert not check_file(path).problems


@pytest.fixture
def values() -> dict[str, Any]:
    """The file's values of a swap with a temporary copy on the second GPU of server s1."""
    a = placed([[0], [1], []], [1, 1, 1], pairs=2, gpus=[1, 2])
    b = placed([[1], [0], []], [1, 1, 1], pairs=2, gpus=[1, 2])
    plan = migration_plan(a, b)
    files = {"from": InputFile("a.json", "a" * 64), "to": InputFile("b.json", "b" * 64)}
    timed = plan.replace(inputs=files, load_s=plan.load_seconds([1.0, 1.0, 1.0]))
    return migration_to_json(timed)


def test_the_file_reads_as_documented(values: dict[str, Any]) -> None:
    """Keys in a fixed order, GPUs counted within servers, a step on each line."""
    assert list(values) == [
        *("format", "version", "model", "servers", "from", "to", "loads", "drops"),
        *("extra_loads", "moved_bytes", "load_s", "steps"),
    ]
    assert values["servers"] == [{"name": "s0", "gpus": 1}, {"name": "s1", "gpus": 2}]
    assert values["from"] == {"name": "a.json", "sha256": "a" * 64}
    assert (values["loads"], values["drops"], values["extra_loads"]) == (3, 3, 1)
    assert (values["moved_bytes"], values["load_s"]["sum"]) == (30, pytest.approx(3e-8))
    first = {"do": "load", "server": "s1", "gpu": 1, "layer": 3, "expert": 1, "needs": []}
    moved = [step for step in values["steps"] if "temporary" in step]
    assert moved[0] == first | {"temporary": True}
    text = dump_migration(migration_from_json(values)).decode()
    assert json.loads(text) == values
    lines = [json.loads(line.strip().rstrip(",")) for line in text.splitlines() if '"do"' in line]
    assert lines == values["steps"]


MUTATIONS: dict[str, tuple[list[Any], Any, str]] = {
    "format": (["format"], "other", "format: 'other'"),
    "version": (["version"], 2, "newer prism-plan"),
    "steps": (["steps"], {}, "steps"),
    "word": (["steps", 1, "do"], "move", "steps[1].do"),
    "server": (["steps", 1, "server"], "edge", "steps[1].server: 'edge'"),
    "gpu": (["steps", 1, "gpu"], 2, "steps[1].gpu: 2"),
    "huge": (["steps", 1, "expert"], 2**63, "less than 9,223,372,036,854,775,808"),
    "layer": (["steps", 1, "layer"], 1, "steps[1].layer: 1; expected a MoE layer of m, 3"),
    "expert": (["steps", 1, "expert"], 2, "steps[1].expert: 2; expected ids 0..1 of m"),
    "later": (["steps", 1, "needs"], [1], "steps[1].needs: [1]; expected earlier steps"),
    "order": (["steps", 5, "needs"], [3, 1], "steps[5].needs"),
    "temporary": (["steps", 1, "temporary"], False, "steps[1].temporary"),
    "foreign": (["steps", 1, "colour"], 1, "unknown key 'colour'"),
    "no step": (["steps", 1], 5, "steps[1]: 5; expected an object"),
    "by turns": (["steps", 1], None, "steps[1].do: 'load'; expected loads and drops"),
    "count": (["loads"], 4, "loads: 4; expected 3, as the steps have it"),
    "bytes": (["moved_bytes"], 1, "moved_bytes: 1; expected 30"),
    "name taken": (["servers", 1, "name"], "s0", "taken by servers[0]"),
    "digest": (["from", "sha256"], "xyz", "from.sha256"),
    "seconds": (["load_s", "sum"], -1.0, "load_s.sum"),
    "layers": (["model", "moe_layers"], [2, 1], "ascending"),
}


@pytest.mark.parametrize("case", list(MUTATIONS))
def test_what_is_wrong_is_named(case: str, values: dict[str, Any], tmp_path: Path) -> None:
    """A wrong value is refused with the file and its place, by `check` too."""
    path, value, words = MUTATIONS[case]
    broken = copy.deepcopy(values)
    target: Any = broken
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = broken["steps"][0] if case == "by turns" else value
    file = tmp_path / "m.json"
    file.write_text(json.dumps(broken))
    for read in (read_migration, check_file):
        with pytest.raises(InputError) as caught:
            read(file)
        assert words in str(caught.value)
        assert str(file) in str(caught.value)


TABLE_MUTATIONS: dict[str, tuple[list[Any], Any, str]] = {
    "no such step": (["waits_from"], 7, "table.waits_from: 7; expected at most 6"),
    "begins in between": (["begins_after"], 1, "table.begins_after: 1; expected 0, or 4"),
    "unknown server": (["execution", "s0", 0, "server"], "s9", "execution.s0[0].server"),
    "layer": (["execution", "s1", 0, "first"], 4, "execution.s1[0]: first 4; expected 3"),
    "key": (["colour"], 1, "unknown key 'colour'"),
}


@pytest.mark.parametrize("case", list(TABLE_MUTATIONS))
def test_what_is_wrong_with_a_table_is_named(case: str, values: dict[str, Any]) -> None:
    """When it begins, which steps wait, and every run of its layers are checked."""
    plan = migration_from_json(values)
    table = home_execution(2, 1)[::-1].copy()
    good = migration_to_json(plan.replace(change=TableChange(table, 4, 4)))
    assert list(good)[-2:] == ["table", "steps"]
    assert migration_from_json(good).change is not None
    path, value, words = TABLE_MUTATIONS[case]
    target: Any = good["table"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(InputError) as caught:
        migration_from_json(good, source="m.json")
    assert words in str(caught.value)


@pytest.fixture
def with_replicas() -> dict[str, Any]:
    """The file's values of a swap of two experts with two copies each, without a free slot."""
    a = placed([[0], [1], [0, 1]], [1, 1, 2], pairs=2)
    b = placed([[1], [0], [0, 1]], [1, 1, 2], pairs=2)
    return migration_to_json(migration_plan(a, b, min_replicas=2))


def test_replicas_read_as_documented(with_replicas: dict[str, Any], tmp_path: Path) -> None:
    """A part of its own where more than one copy is kept, and `check` tells of the dips.

    Files without it, as all were before, are of moves that keep one copy.
    """
    assert with_replicas["replicas"] == {
        "min_replicas": 2,
        "extra_bytes": 0,
        "dips": [{"layer": 3, "expert": 0, "wanted": 2, "copies": 1, "drop": 0, "load": 3}],
    }
    assert list(with_replicas)[-2:] == ["replicas", "steps"]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(with_replicas))
    assert "1 expert has fewer than 2 copies for a while" in check_file(path).summary
    del with_replicas["replicas"]
    older = migration_from_json(with_replicas)
    assert (older.min_replicas, older.dips) == (1, ())
    assert "replicas" not in migration_to_json(older)


REPLICA_MUTATIONS: dict[str, tuple[list[Any], Any, str]] = {
    "one": (["min_replicas"], 1, "replicas.min_replicas: 1"),
    "bytes": (["extra_bytes"], 10, "replicas.extra_bytes: 10; expected 0, as the steps have it"),
    "layer": (["dips", 0, "layer"], 1, "replicas.dips[0].layer: 1; expected a MoE layer of m, 3"),
    "expert": (["dips", 0, "expert"], 2, "replicas.dips[0].expert: 2; expected ids 0..1 of m"),
    "wanted": (["dips", 0, "wanted"], 3, "dips[0].wanted: 3; expected from 2 to min_replicas, 2"),
    "copies": (["dips", 0, "copies"], 0, "replicas.dips[0].copies: 0; expected from 1 to 1"),
    "many": (["dips", 0, "copies"], 2, "replicas.dips[0].copies: 2; expected from 1 to 1"),
    "other step": (["dips", 0, "drop"], 2, "dips[0].drop: 2; expected a drop of that expert"),
    "no step": (["dips", 0, "load"], 2**40, "dips[0].load: 1099511627776; expected a load"),
    "load": (
        ["dips", 0, "load"],
        1,
        "dips[0].load: 1; expected a load of that expert, at steps[1]",
    ),
    "twice": (
        ["dips"],
        None,
        "replicas.dips[1].drop: 0; expected a drop of that expert, at steps[1]",
    ),
    "foreign": (["colour"], 1, "unknown key 'colour'"),
}


@pytest.mark.parametrize("case", list(REPLICA_MUTATIONS))
def test_what_is_wrong_with_replicas_is_named(case: str, with_replicas: dict[str, Any]) -> None:
    """Number, bytes, and every dip with the steps that begin and end it are checked."""
    path, value, words = REPLICA_MUTATIONS[case]
    target: Any = with_replicas["replicas"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = 2 * target[path[-1]] if case == "twice" else value
    with pytest.raises(InputError) as caught:
        migration_from_json(with_replicas, source="m.json")
    assert words in str(caught.value)
