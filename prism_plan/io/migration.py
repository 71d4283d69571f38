"""Migration files: JSON, format ``prism-plan/migration`` version 1 (docs/design.md, section 6)."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from prism_plan.errors import InputError
from prism_plan.execution_table import TableChange
from prism_plan.input_limits import MAX_GPUS, MAX_NAMES, MAX_REPLICAS
from prism_plan.io.execution_runs import ExecutionRuns, runs_of_table, table_of_runs
from prism_plan.io.file_writing import write_bytes
from prism_plan.io.json import parse_json
from prism_plan.io.model_spec import ShapePart, spec_from_part
from prism_plan.io.pydantic_base import (
    ABSENT,
    Amount,
    CheckedList,
    Count,
    FormatModel,
    ListOf,
    NonEmpty,
    Version1,
    short_repr,
    validate,
    validation_error,
)
from prism_plan.io.shared_fields import FileIdentity, indented_json, require_distinct_names
from prism_plan.io.text_files import read_text
from prism_plan.migration.plan import LoadTime, MigrationPlan
from prism_plan.migration_step import MigrationStep, ReplicaDip
from prism_plan.model_spec import ModelShape
from prism_plan.placement import InputFile

_COUNTS = ("loads", "drops", "extra_loads", "moved_bytes")


def _only_true(temporary: bool) -> bool:
    if not temporary:
        raise validation_error("False", "true, or no such key")
    return temporary


class ServerPart(FormatModel):
    """A server, by its name and the number of its GPUs."""

    name: NonEmpty
    gpus: Annotated[int, Field(ge=1, le=MAX_GPUS)] = Field(description="Number of GPUs.")


class LoadTimePart(FormatModel):
    """Seconds of loading: one after the other, and with all GPUs side by side."""

    sum: Amount
    makespan: Amount


class StepPart(FormatModel):
    """An expert that a GPU loads or drops."""

    do: Literal["load", "drop"]
    server: NonEmpty = Field(description="Name of the server.")
    gpu: Count = Field(description="Which GPU of the server.")
    layer: Count = Field(description="Decoder index.")
    expert: Count
    #: Steps that must be complete before, ascending, counted from 0.
    needs: ListOf[Count]
    #: A copy for the time of the move only, or a kept one that makes room for a while.
    temporary: Annotated[bool, AfterValidator(_only_true), WithJsonSchema({"const": True})] = False


class TableChangePart(FormatModel):
    """When the execution table of the placement at the end begins, for new requests."""

    begins_after: Count = Field(
        description="The first so many steps are complete before it begins; 0: at once."
    )
    waits_from: Count = Field(
        description="Steps from this one on wait until it has begun and no request runs on another."
    )
    execution: ExecutionRuns


class DipPart(FormatModel):
    """An expert that has fewer copies than are wanted during a part of the steps."""

    layer: Count = Field(description="Decoder index.")
    expert: Count
    wanted: Count = Field(description="On how many servers it should be at every moment.")
    copies: Count = Field(description="On how many servers it is at least.")
    drop: Count = Field(description="The step with which that may begin, counted from 0.")
    load: Count = Field(description="The step with which it ends.")


class ReplicasPart(FormatModel):
    """On how many servers every expert is kept during the move."""

    min_replicas: Annotated[int, Field(ge=2, le=MAX_REPLICAS)] = Field(
        description="At every moment, or as many as at the start or in the end, if that is less."
    )
    extra_bytes: Count = Field(description="Bytes of the extra loads.")
    dips: CheckedList[DipPart] = Field(
        description="Where no order was found that keeps so many, by their first step."
    )


class MigrationFile(FormatModel):
    """In which order experts are loaded and dropped to get from one placement to another."""

    format: Literal["prism-plan/migration"]
    version: Version1
    model: ShapePart
    servers: Annotated[
        ListOf[ServerPart],
        Field(min_length=1, max_length=MAX_NAMES),
        AfterValidator(require_distinct_names),
    ]
    start: FileIdentity | None = Field(
        alias="from", description="The placement at the start, if it is a file."
    )
    end: FileIdentity | None = Field(
        alias="to", description="The placement at the end, if it is a file."
    )
    loads: Count = Field(description="Load steps, extra ones included.")
    drops: Count = Field(description="Drop steps; each extra load has one.")
    extra_loads: Count = Field(description="Loads beyond those that the two placements differ by.")
    moved_bytes: Count = Field(description="Bytes of all loads.")
    load_s: LoadTimePart | None
    #: Absent where layers execute where they did.
    table: TableChangePart = Field(
        default=ABSENT, description="How the execution table changes, where it does."
    )
    #: Absent where one copy of each expert is enough.
    replicas: ReplicasPart = Field(
        default=ABSENT, description="Copies that every expert keeps, where that is more than one."
    )
    #: In an order that is safe; any other that respects the needs is safe too, also side by side.
    steps: CheckedList[StepPart]


# ---------------------------------------------------------------------------------------- writing


def migration_to_json(plan: MigrationPlan) -> dict[str, Any]:
    """The JSON values of a migration file, keys in a fixed order; GPUs numbered within servers."""
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
        "format": "prism-plan/migration",
        "version": 1,
        "model": plan.model.to_json(),
        "servers": [
            {"name": name, "gpus": n} for name, n in zip(plan.servers, plan.gpus, strict=True)
        ],
        "from": files.get("from"),
        "to": files.get("to"),
        **{key: getattr(plan, key) for key in _COUNTS},
        "load_s": None if time is None else {"sum": time.sum_s, "makespan": time.makespan_s},
        **_change_to_json(plan),
        **_replicas_to_json(plan),
        "steps": steps,
    }


def _change_to_json(plan: MigrationPlan) -> dict[str, Any]:
    change = plan.change
    if change is None:
        return {}
    runs = runs_of_table(change.execution, plan.servers, plan.model)
    table = {"begins_after": change.begins_after, "waits_from": change.waits_from}
    return {"table": {**table, "execution": runs}}


def _replicas_to_json(plan: MigrationPlan) -> dict[str, Any]:
    if plan.min_replicas == 1:
        return {}
    dips = []
    for dip in plan.dips:
        layer, expert = divmod(dip.pair, plan.model.num_experts)
        dips.append(
            {
                "layer": plan.model.moe_layers[layer],
                "expert": expert,
                **{key: getattr(dip, key) for key in ("wanted", "copies", "drop", "load")},
            }
        )
    kept = {"min_replicas": plan.min_replicas, "extra_bytes": plan.extra_bytes, "dips": dips}
    return {"replicas": kept}


def dump_migration(plan: MigrationPlan) -> bytes:
    """The bytes of a migration file: indented, each step on one line."""
    values = migration_to_json(plan)
    steps = values.pop("steps")
    head = indented_json(values).removesuffix("\n}")
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
    """Read a migration plan and check its form.

    Raises
    ------
    InputError
        Not JSON, not a migration, a newer version, a value that the schema does not allow, a
        server, GPU, layer or expert that is not there, a need that is not an earlier step, a pair
        loaded or dropped twice in a row, a count that its steps do not have, a dip that begins or
        ends with another step than a drop and a load of its expert.
    """
    return migration_from_json(parse_json(read_text(path), path), source=path)


def migration_from_json(values: Any, source: object = "") -> MigrationPlan:
    """The reverse of :func:`migration_to_json`; see :func:`read_migration`."""
    remedy = "make migrations with prism-plan migrate -o"
    file = validate(MigrationFile, values, source=source, remedy=remedy)
    model = spec_from_part(ModelShape, file.model, source)
    time, files = file.load_s, {"from": file.start, "to": file.end}
    plan = MigrationPlan(
        model=model,
        servers=tuple(server.name for server in file.servers),
        gpus=tuple(server.gpus for server in file.servers),
        steps=_steps(values["steps"], model, file.servers, source),
        inputs={key: InputFile(one.name, one.sha256) for key, one in files.items() if one},
        load_s=None if time is None else LoadTime(float(time.sum), float(time.makespan)),
    )
    if file.table is not ABSENT:
        plan = plan.replace(change=_change(file.table, plan, source))
    stated = [(key, getattr(file, key), key) for key in _COUNTS]
    if file.replicas is not ABSENT:
        dips = _dips(values["replicas"]["dips"], file.replicas.min_replicas, plan, source)
        plan = plan.replace(min_replicas=file.replicas.min_replicas, dips=dips)
        stated.append(("extra_bytes", file.replicas.extra_bytes, "replicas.extra_bytes"))
    for key, number, place in stated:
        if number != getattr(plan, key):
            raise InputError(
                f"{number:,}",
                source=source,
                place=place,
                expected=f"{getattr(plan, key):,}, as the steps have it",
            )
    return plan


def _change(part: TableChangePart, plan: MigrationPlan, source: object) -> TableChange:
    if part.waits_from > len(plan.steps):
        raise InputError(
            f"{part.waits_from:,}",
            source=source,
            place="table.waits_from",
            expected=f"at most {len(plan.steps):,}, the number of steps",
        )
    if part.begins_after not in (0, part.waits_from):
        raise InputError(
            f"{part.begins_after:,}",
            source=source,
            place="table.begins_after",
            expected=f"0, or {part.waits_from:,} as waits_from",
        )
    table = table_of_runs(part.execution, plan.servers, plan.model, source)
    return TableChange(table, part.begins_after, part.waits_from)


def _dips(
    dips: Sequence[Mapping[str, Any]], min_replicas: int, plan: MigrationPlan, source: object
) -> tuple[ReplicaDip, ...]:
    model = plan.model
    position = {layer: at for at, layer in enumerate(model.moe_layers)}
    found: list[ReplicaDip] = []
    for index, dip in enumerate(dips):

        def wrong(key: str, expected: str, dip: Any = dip, index: int = index) -> InputError:
            return InputError(
                short_repr(dip[key]),
                source=source,
                place=f"replicas.dips[{index}].{key}",
                expected=expected,
            )

        if dip["layer"] not in position:
            raise wrong("layer", f"a MoE layer of {model.name}, {model.layers_text()}")
        if dip["expert"] >= model.num_experts:
            raise wrong("expert", f"ids 0..{model.num_experts - 1} of {model.name}")
        pair = position[dip["layer"]] * model.num_experts + dip["expert"]
        if not 2 <= dip["wanted"] <= min_replicas:
            raise wrong("wanted", f"from 2 to min_replicas, {min_replicas:,}")
        if not 1 <= dip["copies"] < dip["wanted"]:
            raise wrong("copies", f"from 1 to {dip['wanted'] - 1:,}, fewer than wanted")
        first = found[-1].drop + 1 if found else 0
        for key, begin in (("drop", first), ("load", dip["drop"] + 1)):
            steps = plan.steps[dip[key] : dip[key] + 1]
            if dip[key] < begin or not any((s.kind, s.pair) == (key, pair) for s in steps):
                raise wrong(key, f"a {key} of that expert, at steps[{begin}] or later")
        found.append(ReplicaDip(pair, dip["wanted"], dip["copies"], dip["drop"], dip["load"]))
    return tuple(found)


def _steps(
    steps: Sequence[Mapping[str, Any]],
    model: ModelShape,
    servers: Sequence[ServerPart],
    source: object,
) -> tuple[MigrationStep, ...]:
    number = {server.name: server.gpus for server in servers}
    first_gpu = dict(zip(number, itertools.accumulate(number.values(), initial=0), strict=False))
    position = {layer: at for at, layer in enumerate(model.moe_layers)}
    latest: dict[tuple[int, int], str] = {}
    found = []
    for index, step in enumerate(steps):
        server, needs = step["server"], step["needs"]

        def wrong(key: str, expected: str, step: Any = step, index: int = index) -> InputError:
            return InputError(
                short_repr(step[key]),
                source=source,
                place=f"steps[{index}].{key}",
                expected=expected,
            )

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
        found.append(
            MigrationStep(step["do"], gpu, pair, tuple(needs), step.get("temporary", False))
        )
    return tuple(found)
