"""Placement files: JSON, format ``prism-plan/placement`` (docs/design.md, sections 6 and 10).

Version 1 says which GPU holds which expert, and every layer executes at home. Version 2 says also
where layers execute; a placement that executes at home is written as version 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_GPUS, MAX_NAMES, require_array_size
from prism_plan.io.execution_runs import (
    ExecutionRuns,
    runs_of_table,
    server_index,
    table_of_runs,
)
from prism_plan.io.file_writing import write_bytes
from prism_plan.io.json import parse_json
from prism_plan.io.model_spec import ShapePart, spec_from_part
from prism_plan.io.pydantic_base import (
    ABSENT,
    Amount,
    Count,
    DictOf,
    FormatModel,
    ListOf,
    NonEmpty,
    Positive,
    Share,
    Version1,
    short_repr,
    validate,
)
from prism_plan.io.shared_fields import (
    FileIdentity,
    indented_json,
    require_distinct_names,
    shipped_schema,
)
from prism_plan.io.text_files import file_name_text, read_text, read_text_and_digest
from prism_plan.model_spec import ModelShape
from prism_plan.placement import InputFile, Placement, SolveReport, Termination

FORMAT = "prism-plan/placement"


def _skip_validated_integers(ids: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Accept a list of integers without a copy (there may be millions); pydantic refuses others."""
    return ids if type(ids) is list and set(map(type, ids)) == {int} else handler(ids)


LayerId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
#: Their bounds are checked with those of the model.
ExpertIds = Annotated[
    ListOf[Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]],
    Field(min_length=1),
    WrapValidator(_skip_validated_integers),
]


class GpuPart(FormatModel):
    """A GPU: what it can hold, as ``slots`` or ``bytes``, and what it holds."""

    slots: Count = Field(
        default=ABSENT, description="Experts that the GPU can hold (experts of one size)."
    )
    bytes: Count = Field(
        default=ABSENT, description="Bytes that the GPU has for experts (experts of unequal size)."
    )
    experts: DictOf[LayerId, ExpertIds] = Field(
        description="Expert ids by decoder layer index, ascending."
    )


class ServerPart(FormatModel):
    """A server and its GPUs."""

    name: NonEmpty
    gpus: Annotated[ListOf[GpuPart], Field(min_length=1, max_length=MAX_GPUS)]


class PlanPart(FormatModel):
    """Which solver made the placement, and how well. Further keys are kept."""

    model_config = ConfigDict(extra="allow")

    solver: NonEmpty
    objective: NonEmpty
    remote_share: Share | None
    bound: float | None
    termination: Termination
    seed: Count
    runtime_s: Amount
    min_replicas: Positive
    assumed: Annotated[
        ListOf[NonEmpty],
        Field(
            max_length=MAX_NAMES,
            description="Figures that the solver used and that the cluster file does not give.",
        ),
    ] = Field(default=[])


class PlacementFile(FormatModel):
    """Which GPU of which server holds which expert of a Mixture-of-Experts model."""

    format: Literal["prism-plan/placement"]
    version: Version1
    model: ShapePart
    servers: Annotated[
        ListOf[ServerPart],
        Field(min_length=1, max_length=MAX_NAMES),
        AfterValidator(require_distinct_names),
    ]
    plan: PlanPart
    inputs: Annotated[
        DictOf[str, FileIdentity], Field(description="The files that it was planned from.")
    ]


class PlacementFile2(PlacementFile):
    """Which GPU of which server holds which expert, and which server executes which layer."""

    version: Annotated[int, Field(ge=2, le=2)]
    execution: ExecutionRuns
    kv_tokens: Annotated[
        DictOf[str, Count],
        Field(
            max_length=MAX_NAMES,
            description="Tokens of a home's users for which the KV cache has memory.",
        ),
    ] = Field(default={})
    execute_at_home: Annotated[
        ListOf[str],
        Field(max_length=MAX_NAMES, description="Servers whose users' layers stay at home."),
    ] = Field(default=[])


#: Keys of ``plan`` that every placement has.
PLAN_KEYS = tuple(key for key, field in PlanPart.model_fields.items() if field.is_required())


def placement_schema(version: int = 1) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a placement file of version 1 or 2, as shipped."""
    return shipped_schema(f"placement-{version}")


# ---------------------------------------------------------------------------------------- writing


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """The JSON values of a placement file, keys and lists in a fixed order."""
    unit = "slots" if placement.model.equal_expert_bytes else "bytes"
    layers = placement.model.moe_layers
    servers = []
    index = 0
    for name, capacities in zip(placement.servers, placement.gpu_capacity, strict=True):
        gpus = []
        for capacity in capacities:
            held = placement.on_gpu[index]
            experts = {
                str(layer): np.flatnonzero(row).tolist()
                for layer, row in zip(layers, held, strict=True)
                if row.any()
            }
            gpus.append({unit: capacity, "experts": experts})
            index += 1
        servers.append({"name": name, "gpus": gpus})
    plan = {key: getattr(placement.plan, key) for key in PLAN_KEYS}
    if placement.plan.assumed:
        plan["assumed"] = list(placement.plan.assumed)
    plan |= placement.plan.extra
    return {
        "format": FORMAT,
        "version": 1 if placement.execution is None else 2,
        "model": placement.model.to_json(),
        "servers": servers,
        **_execution_to_json(placement),
        "plan": plan,
        "inputs": {
            key: {"name": file.name, "sha256": file.sha256}
            for key, file in placement.inputs.items()
        },
    }


def _execution_to_json(placement: Placement) -> dict[str, Any]:
    """What version 2 has beyond version 1; nothing where every layer executes at home."""
    if placement.execution is None:
        return {}
    runs = runs_of_table(placement.execution, placement.servers, placement.model)
    values: dict[str, Any] = {"execution": runs}
    if placement.kv_tokens:
        values["kv_tokens"] = dict(placement.kv_tokens)
    if placement.execute_at_home:
        values["execute_at_home"] = list(placement.execute_at_home)
    return values


def dump_placement(placement: Placement) -> bytes:
    """The bytes of a placement file: indented, each list of experts on one line."""
    return (indented_json(placement_to_json(placement)) + "\n").encode("utf-8")


def write_placement(path: str | os.PathLike[str], placement: Placement) -> None:
    """Write a placement whole or not at all.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_bytes(path, dump_placement(placement))


# ---------------------------------------------------------------------------------------- reading


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """Read a placement and check its form; `placement_check.violations` says whether it fits.

    Raises
    ------
    InputError
        Not JSON, not a placement, a newer version, a value that the schema does not allow, a
        layer or expert that the model does not have; names the place and the value.
    """
    return placement_from_json(parse_json(read_text(path), path), source=path)


def read_placement_and_identity(path: str | os.PathLike[str]) -> tuple[Placement, InputFile]:
    """A placement as :func:`read_placement` gives it, and the identity of its file."""
    text, digest = read_text_and_digest(path)
    placement = placement_from_json(parse_json(text, path), source=path)
    return placement, InputFile(file_name_text(path), digest)


def placement_from_json(values: Any, source: object = "") -> Placement:
    """The reverse of :func:`placement_to_json`; see :func:`read_placement`."""
    remedy = "make placements with prism-plan solve"
    version = values.get("version") if isinstance(values, Mapping) else None
    is_second = type(version) is int and version >= 2  # a newer one is refused there
    kind = PlacementFile2 if is_second else PlacementFile
    file = validate(kind, values, source=source, remedy=remedy)
    model = spec_from_part(ModelShape, file.model, source)
    num_gpus = sum(len(server.gpus) for server in file.servers)
    require_array_size(
        num_gpus, model.num_layers, model.num_experts, "GPUs", source=source, place="servers"
    )
    on_gpu = np.zeros((num_gpus, model.num_layers, model.num_experts), bool)
    position = {str(layer): at for at, layer in enumerate(model.moe_layers)}
    unit = "slots" if model.equal_expert_bytes else "bytes"
    gpus = [
        (gpu, f"servers[{n}].gpus[{g}]")
        for n, server in enumerate(file.servers)
        for g, gpu in enumerate(server.gpus)
    ]
    for held, (gpu, place) in zip(on_gpu, gpus, strict=True):
        given = gpu.model_fields_set - {"experts"}
        if given != {unit}:
            raise InputError(
                " and ".join(sorted(given)) or "neither 'slots' nor 'bytes'",
                source=source,
                place=place,
                expected=f"{unit!r}, for the experts are "
                + ("of one size" if unit == "slots" else "of unequal size"),
            )
        _mark_experts(held, gpu.experts, model, position, source, f"{place}.experts")
    extra = file.plan.model_extra or {}
    _require_finite_numbers(extra, source, "plan")
    names = tuple(server.name for server in file.servers)
    return Placement(
        model=model,
        servers=names,
        **(_execution(file, names, model, source) if isinstance(file, PlacementFile2) else {}),
        gpu_capacity=tuple(
            tuple(getattr(gpu, unit) for gpu in server.gpus) for server in file.servers
        ),
        on_gpu=on_gpu,
        plan=SolveReport(
            **{key: getattr(file.plan, key) for key in PLAN_KEYS},
            assumed=tuple(file.plan.assumed),
            extra=extra,
        ),
        inputs={key: InputFile(one.name, one.sha256) for key, one in file.inputs.items()},
    )


def _execution(
    file: PlacementFile2, names: tuple[str, ...], model: ModelShape, source: object
) -> dict[str, Any]:
    """The fields of a placement that version 2 adds."""
    index_of = {name: n for n, name in enumerate(names)}
    table = table_of_runs(file.execution, names, model, source)
    for name in file.kv_tokens:
        server_index(name, index_of, source, "kv_tokens")
    for number, name in enumerate(file.execute_at_home):
        n = server_index(name, index_of, source, f"execute_at_home[{number}]")
        if (table[n] != n).any():
            raise InputError(
                f"layers of {name!r:.60} execute elsewhere",
                source=source,
                place=f"execution.{name}",
                expected=f"{name!r:.60} alone, for it is in execute_at_home",
            )
    return {
        "execution": table,
        "kv_tokens": dict(file.kv_tokens),
        "execute_at_home": tuple(file.execute_at_home),
    }


def _require_finite_numbers(values: Any, source: object, place: str) -> None:
    """Refuse numbers under unknown keys that are infinite or beyond 64 bits."""
    inner: Any = enumerate(values) if isinstance(values, list) else ()
    for key, value in values.items() if isinstance(values, Mapping) else inner:
        at = f"{place}.{key}" if isinstance(key, str) else f"{place}[{key}]"
        if (isinstance(value, int) and abs(value) >= 2**63) or value in (math.inf, -math.inf):
            raise InputError(short_repr(value), source=source, place=at, expected="a finite number")
        _require_finite_numbers(value, source, at)


def _mark_experts(
    held: npt.NDArray[np.bool_],
    experts: Mapping[str, list[int]],
    model: ModelShape,
    position: Mapping[str, int],
    source: object,
    place: str,
) -> None:
    """Mark the ``experts`` of one GPU in ``held`` [L, E]; ``position`` is that of each layer."""
    for layer, ids in experts.items():
        if layer not in position:
            raise InputError(
                f"layer {layer}",
                source=source,
                place=place,
                expected=f"a MoE layer of {model.name}, {model.layers_text()}",
            )
        least, most = min(ids), max(ids)
        if least < 0 or most >= model.num_experts:
            raise InputError(
                f"expert {least if least < 0 else most}",
                source=source,
                place=f"{place}.{layer}",
                expected=f"ids 0..{model.num_experts - 1} of {model.name}",
            )
        given = np.array(ids)
        wrong = np.flatnonzero(given[1:] <= given[:-1])
        if len(wrong):
            a, b = given[wrong[0]], given[wrong[0] + 1]
            raise InputError(
                f"expert {b} after {a}",
                source=source,
                place=f"{place}.{layer}",
                expected="ascending ids, each once",
            )
        held[position[layer], given] = True
