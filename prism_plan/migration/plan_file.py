"""Migration files: JSON, format ``prism-plan/migration`` version 1 (DESIGN section 6)."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prism_plan.errors import InputError
from prism_plan.files import parse_json, read_text, write_bytes
from prism_plan.limits import MAX_GPUS, MAX_NAMES, require_at_most
from prism_plan.migration.plan import LoadTime, MigrationPlan
from prism_plan.model import ModelShape
from prism_plan.moves import Step
from prism_plan.placement import InputFile
from prism_plan.schema import (
    check_format,
    check_numbers,
    check_schema,
    different_names,
    indented,
    shipped_schema,
)

FORMAT = "prism-plan/migration"
VERSION = 1
_COUNTS = ("loads", "drops", "extra_loads", "moved_bytes")


def migration_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a migration file, as shipped."""
    return shipped_schema("migration-1")


# ---------------------------------------------------------------------------------------- writing


def migration_to_json(plan: MigrationPlan) -> dict[str, Any]:
    """The file's values; keys in a fixed order. GPUs are counted within their server."""
    places = [
        (name, gpu) for name, n in zip(plan.servers, plan.gpus, strict=True) for gpu in range(n)
    ]
    steps = []
    for step in plan.steps:
        server, gpu = places[step.gpu]
        layer, expert = divmod(step.pair, plan.model.num_experts)
        values: dict[str, Any] = {
            "do": step.kind,
            "server": server,
            "gpu": gpu,
            "layer": plan.model.moe_layers[layer],
            "expert": expert,
            "needs": list(step.needs),
        }
        if step.temporary:
            values["temporary"] = True
        steps.append(values)
    files = {key: {"name": file.name, "sha256": file.sha256} for key, file in plan.inputs.items()}
    time = plan.load_s
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": plan.model.to_json(),
        "servers": [
            {"name": name, "gpus": n} for name, n in zip(plan.servers, plan.gpus, strict=True)
        ],
        "from": files.get("from"),
        "to": files.get("to"),
        **{key: getattr(plan, key) for key in _COUNTS},
        "load_s": None if time is None else {"sum": time.sum_s, "makespan": time.makespan_s},
        "steps": steps,
    }


def dump_migration(plan: MigrationPlan) -> bytes:
    """The bytes of a migration file: indented, each step on one line."""
    values = migration_to_json(plan)
    steps = values.pop("steps")
    head = indented(values).removesuffix("\n}")
    lines = ",".join("\n  " + json.dumps(step, ensure_ascii=False) for step in steps)
    return f'{head},\n "steps": [{lines}\n ]\n}}\n'.encode()


def write_migration(path: str | os.PathLike[str], plan: MigrationPlan) -> None:
    """Write a migration plan whole or not at all.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_bytes(path, dump_migration(plan))


# ---------------------------------------------------------------------------------------- reading


def read_migration(path: str | os.PathLike[str]) -> MigrationPlan:
    """Read a migration plan and check its form; :func:`~.plan.check_plan` replays it.

    Raises
    ------
    InputError
        Not JSON, not a migration, a newer version, a value that the schema does not allow, a
        server, GPU, layer or expert that is not there, a need that is not an earlier step, a pair
        loaded or dropped twice in a row, a count that its steps do not have.
    """
    return migration_from_json(parse_json(read_text(path), path), source=path)


def migration_from_json(values: Any, source: object = "") -> MigrationPlan:
    """The reverse of :func:`migration_to_json`; see :func:`read_migration`."""
    remedy = "make migrations with prism-plan migrate -o"
    check_format(values, FORMAT, VERSION, source=source, remedy=remedy)
    _check_schema(values, source)
    model = ModelShape.from_json(values["model"], source=source)
    names = [server["name"] for server in values["servers"]]
    different_names(names, source)
    require_at_most(len(names), MAX_NAMES, "servers", source=source, place="servers")
    for index, server in enumerate(values["servers"]):
        place = f"servers[{index}].gpus"
        require_at_most(server["gpus"], MAX_GPUS, "GPUs", source=source, place=place)
    gpus = tuple(server["gpus"] for server in values["servers"])
    time = values["load_s"]
    plan = MigrationPlan(
        model=model,
        servers=tuple(names),
        gpus=gpus,
        steps=_steps(values["steps"], model, names, gpus, source),
        inputs={key: InputFile(**values[key]) for key in ("from", "to") if values[key] is not None},
        load_s=None if time is None else LoadTime(float(time["sum"]), float(time["makespan"])),
    )
    for key in _COUNTS:
        if values[key] != getattr(plan, key):
            raise InputError(
                f"{values[key]:,}",
                source=source,
                place=key,
                expected=f"{getattr(plan, key):,}, as the steps have it",
            )
    return plan


def _check_schema(values: Mapping[str, Any], source: object) -> None:
    """The schema, where most steps are seen to be right without its slow machinery."""
    schema = migration_schema()
    steps = values.get("steps")
    if not isinstance(steps, list):
        check_schema(values, schema, source=source)
    check_schema({**values, "steps": []}, schema, source=source)
    check_numbers({**values, "steps": []}, source=source, fraction=lambda at: at[:6] == "load_s")
    for index, step in enumerate(steps or ()):
        if not _plainly_right(step):
            place = f"steps[{index}]"
            check_schema(step, schema["properties"]["steps"]["items"], source=source, place=place)
            check_numbers(step, source=source, fraction=lambda at: False, place=place)


_KEYS = {"do", "server", "gpu", "layer", "expert", "needs"}


def _plainly_right(step: Any) -> bool:
    """Whether a step is what the schema says; no only means that the schema has to tell."""
    return (
        type(step) is dict
        and step.keys() - {"temporary"} == _KEYS
        and step.get("temporary", True) is True
        and step["do"] in ("load", "drop")
        and type(step["server"]) is str
        and step["server"] != ""
        and all(_is_count(step[key]) for key in ("gpu", "layer", "expert"))
        and type(step["needs"]) is list
        and all(map(_is_count, step["needs"]))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _steps(
    steps: Sequence[Mapping[str, Any]],
    model: ModelShape,
    names: Sequence[str],
    gpus: Sequence[int],
    source: object,
) -> tuple[Step, ...]:
    first_gpu = dict(zip(names, itertools.accumulate(gpus, initial=0), strict=False))
    number = dict(zip(names, gpus, strict=True))
    position = {layer: at for at, layer in enumerate(model.moe_layers)}
    latest: dict[tuple[int, int], str] = {}
    found = []
    for index, step in enumerate(steps):

        def wrong(key: str, expected: str, step: Any = step, index: int = index) -> InputError:
            return InputError(
                f"{step[key]!r:.60}",
                source=source,
                place=f"steps[{index}].{key}",
                expected=expected,
            )

        server, needs = step["server"], step["needs"]
        if server not in number:
            raise wrong("server", "the name of one of the servers")
        if step["gpu"] >= number[server]:
            raise wrong("gpu", f"below {number[server]}, the GPUs of server {server!r}")
        if step["layer"] not in position:
            raise wrong("layer", f"a MoE layer of {model.name}, {model.layers_text()}")
        if step["expert"] >= model.num_experts:
            raise wrong("expert", f"ids 0..{model.num_experts - 1} of {model.name}")
        if any(a >= b for a, b in itertools.pairwise((*needs, index))):
            raise wrong("needs", "earlier steps, ascending, each once")
        gpu = first_gpu[server] + step["gpu"]
        pair = position[step["layer"]] * model.num_experts + step["expert"]
        if latest.get((gpu, pair)) == step["do"]:
            raise wrong("do", "loads and drops of an expert on a GPU by turns")
        latest[gpu, pair] = step["do"]
        found.append(Step(step["do"], gpu, pair, tuple(needs), step.get("temporary", False)))
    return tuple(found)
