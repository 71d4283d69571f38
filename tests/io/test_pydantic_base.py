"""Formats as pydantic models: shipped JSON Schemas, and errors in our words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from prism_plan.errors import InputError
from prism_plan.io.calibration import calibration_from_json
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.comparison import comparison_from_json
from prism_plan.io.migration import migration_from_json
from prism_plan.io.placement import placement_from_json
from prism_plan.io.shared_fields import shipped_schema
from prism_plan.io.simulation import simulation_from_json
from tools.make_schemas import FOLDER, MODELS, schema_text

GOLDEN = Path(__file__).parents[1] / "golden"
CURVES = {"dense_ms": [[1, 0.5], [2, 1]], "expert_ms": [[1, 0.5], [2, 1]]}
#: A good file of each JSON format, and its reader.
FILES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "placement-1": (GOLDEN / "placement-v1.json", placement_from_json),
    "comparison-1": (GOLDEN / "comparison-v1.json", comparison_from_json),
    "simulation-1": (GOLDEN / "inputs/ours/simulation.json", simulation_from_json),
    "migration-1": (GOLDEN / "inputs/ours/migration.json", migration_from_json),
    "calibration-1": (
        {
            "format": "prism-plan/calibration",
            "version": 1,
            "bandwidth_mbps": 500,
            "default": CURVES,
            "servers": [{"name": "a", "gpus": [CURVES]}],
        },
        calibration_from_json,
    ),
}
WRONG: tuple[Any, ...] = (None, True, -1, 0.5, 2.0, "", "x", [], {}, [[]], 10**400, float("inf"))


def read(name: str) -> tuple[Any, Callable[[Any], Any]]:
    found, reader = FILES[name]
    return (json.loads(found.read_text()) if isinstance(found, Path) else found), reader


def places(values: Any, most: int = 3) -> Iterator[tuple[Any, ...]]:
    """Places in values; of a long list or object the first entries alone."""
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    for number, (key, value) in enumerate(inner):
        yield (key,)
        if isinstance(value, dict | list) and (number < most or isinstance(key, str)):
            yield from ((key, *place) for place in places(value, 1))


def changed(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place, or without it (KeyError)."""
    values = copy.deepcopy(values)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return values


@pytest.mark.parametrize("name", MODELS)
def test_shipped_schemas_are_those_of_the_models(name: str) -> None:
    """After a change of a model `make schemas` has to write its schema anew."""
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(schema_text(name)), "run `make schemas`"
    jsonschema.Draft202012Validator.check_schema(shipped_schema(name))


@pytest.mark.parametrize("name", FILES)
def test_readers_refuse_what_their_schema_refuses(name: str) -> None:
    """Whatever a value is replaced by, the reader takes nothing that jsonschema does not."""
    values, reader = read(name)
    reader(values)
    validator = jsonschema.Draft202012Validator(shipped_schema(name))
    assert validator.is_valid(values)
    refused = 0
    for place in list(places(values)):
        for wrong in (*WRONG, KeyError):
            broken = changed(values, place, wrong)
            try:
                reader(broken)
            except InputError:
                refused += 1
                continue
            assert validator.is_valid(broken), (place, wrong)
    assert refused


SERVER = '[[server]]\nname = "a"\n'
GPU = "[[server.gpu]]\nslots = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "c: unknown key 'x'; expected one of name, link, server, links"),
        ("server = 3", "c: server: 3; expected tables, each written as [[server]]"),
        (f"{SERVER}gpu = 3", "c: server[0].gpu: 3; expected tables, each written as [[server[0]"),
        (
            f"{SERVER}wieght = 1\n{GPU}",
            "c: server[0]: unknown key 'wieght', did you mean 'weight'",
        ),
        (f"{SERVER}weight = nan\n{GPU}", "c: server[0].weight: nan; expected a finite number"),
        (f"{SERVER}weight = 1e-13\n{GPU}", "c: server[0].weight: 1e-13; expected 0 or a number of"),
        (f"{SERVER}pin = [[1]]\n{GPU}", "c: server[0].pin[0]: 1 entries; expected at least 2"),
        (f"{SERVER}pin = [[1, true]]\n{GPU}", "c: server[0].pin[0][1]: true; expected a whole nu"),
        (f"link = 0\n{SERVER}{GPU}", "c: link: 0; expected a table"),
        (f'name = " "\n{SERVER}{GPU}', "c: name: ' '; expected a non-empty text"),
        (f"{SERVER}weight = 0.5.5\n{GPU}", "c: not TOML"),
    ],
)
def test_an_error_names_place_value_and_expectation(text: str, message: str) -> None:
    """Errors of pydantic are told in one line of ours."""
    with pytest.raises(InputError) as error:
        parse_cluster(text, source="c")
    assert str(error.value).startswith(message)


def test_another_format_is_told_first() -> None:
    """A file of another format or version is not told by the first key that it lacks."""
    values, _ = read("placement-1")
    for change, message in (
        ({"format": "prism-plan/trace"}, "format: 'prism-plan/trace'; expected 'prism-plan/place"),
        (
            {"version": 3, "execution": {}},
            "version: 3; expected at most 2; a newer file needs a newer",
        ),
        ({"format": 3, "version": 2}, "format: 3; "),
    ):
        broken = {"aaa": 1} | values | change
        with pytest.raises(InputError, match=message):
            placement_from_json(broken)


def test_the_first_error_in_the_file_is_told() -> None:
    """Errors are told in the order of the file, whatever the order of the model; then all gaps."""
    values, _ = read("placement-1")
    plan = {"seed": -1, "runtime_s": -1.0}
    with pytest.raises(InputError, match=r"^plan\.seed: -1"):
        placement_from_json({**values, "plan": plan})
    with pytest.raises(InputError, match=r"^plan: keys 'solver', .* 'min_replicas' are missing$"):
        placement_from_json({**values, "plan": {"seed": 1, "runtime_s": 1.0}})
