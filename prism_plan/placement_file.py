"""Placement files: JSON, format ``prism-plan/placement`` version 1 (DESIGN section 6)."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.files import parse_json, printable, read_identified, read_text, write_bytes
from prism_plan.limits import MAX_GPUS, MAX_NAMES, require_at_most, require_places
from prism_plan.model import ModelShape
from prism_plan.placement import InputFile, Placement, Plan
from prism_plan.schema import (
    check_format,
    check_numbers,
    check_schema,
    different_names,
    indented,
    shipped_schema,
)

FORMAT = "prism-plan/placement"
VERSION = 1
PLAN_KEYS = (
    "solver",
    "objective",
    "remote_share",
    "bound",
    "termination",
    "seed",
    "runtime_s",
    "min_replicas",
)


def placement_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a placement file, as shipped."""
    return shipped_schema("placement-1")


# ---------------------------------------------------------------------------------------- writing


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """The file's values; keys and lists in a fixed order."""
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
    plan = {key: getattr(placement.plan, key) for key in PLAN_KEYS} | dict(placement.plan.extra)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": placement.model.to_json(),
        "servers": servers,
        "plan": plan,
        "inputs": {
            key: {"name": file.name, "sha256": file.sha256}
            for key, file in placement.inputs.items()
        },
    }


def dump_placement(placement: Placement) -> bytes:
    """The bytes of a placement file: indented, each list of experts on one line."""
    return (indented(placement_to_json(placement)) + "\n").encode("utf-8")


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
    """Read a placement and check its form; whether it is feasible, `objective.violations` tells.

    Raises
    ------
    InputError
        Not JSON, not a placement, a newer version, a value that the schema does not allow, a
        layer or expert that the model does not have; names the place and the value.
    """
    return placement_from_json(parse_json(read_text(path), path), source=path)


def read_identified_placement(path: str | os.PathLike[str]) -> tuple[Placement, InputFile]:
    """A placement, as :func:`read_placement`, and the identity of the bytes that it is of."""
    text, digest = read_identified(path)
    placement = placement_from_json(parse_json(text, path), source=path)
    return placement, InputFile(printable(path), digest)


def placement_from_json(values: Any, source: object = "") -> Placement:
    """The reverse of :func:`placement_to_json`; see :func:`read_placement`."""
    remedy = "make placements with prism-plan solve"
    check_format(values, FORMAT, VERSION, source=source, remedy=remedy)
    _check_form(values, source)
    model = ModelShape.from_json(values["model"], source=source)
    names = [server["name"] for server in values["servers"]]
    different_names(names, source)
    num_gpus = sum(len(server["gpus"]) for server in values["servers"])
    require_places(
        num_gpus, model.num_layers, model.num_experts, "GPUs", source=source, place="servers"
    )
    on_gpu = np.zeros((num_gpus, model.num_layers, model.num_experts), bool)
    position = {layer: at for at, layer in enumerate(model.moe_layers)}
    index = 0
    unit = "slots" if model.equal_expert_bytes else "bytes"
    for n, server in enumerate(values["servers"]):
        for g, gpu in enumerate(server["gpus"]):
            place = f"servers[{n}].gpus[{g}]"
            if unit not in gpu:
                raise InputError(
                    f"key {unit!r} is missing",
                    source=source,
                    place=place,
                    expected=f"{unit!r}, for the experts are "
                    + ("of one size" if unit == "slots" else "of unequal size"),
                )
            _hold(on_gpu[index], gpu["experts"], model, position, source, f"{place}.experts")
            index += 1
    plan = values["plan"]
    return Placement(
        model=model,
        servers=tuple(names),
        gpu_capacity=tuple(
            tuple(gpu[unit] for gpu in server["gpus"]) for server in values["servers"]
        ),
        on_gpu=on_gpu,
        plan=Plan(
            **{key: plan[key] for key in PLAN_KEYS},
            extra={key: value for key, value in plan.items() if key not in PLAN_KEYS},
        ),
        inputs={key: InputFile(**file) for key, file in values["inputs"].items()},
    )


def _fraction(place: str) -> bool:
    """Whether a number that is not whole may stand there."""
    return place.startswith("plan.") and place not in ("plan.seed", "plan.min_replicas")


def _check_form(values: Mapping[str, Any], source: object) -> None:
    """The schema, where most GPUs are seen to be right without its slow machinery."""
    servers = values.get("servers")
    if isinstance(servers, list):
        require_at_most(len(servers), MAX_NAMES, "servers", source=source, place="servers")
        for n, server in enumerate(servers):
            gpus = server.get("gpus") if isinstance(server, Mapping) else None
            if isinstance(gpus, list):
                place = f"servers[{n}].gpus"
                require_at_most(len(gpus), MAX_GPUS, "GPUs", source=source, place=place)
        values = {**values, "servers": [_without_right_gpus(server) for server in servers]}
    check_schema(values, placement_schema(), source=source)
    check_numbers(values, source=source, fraction=_fraction)


#: A GPU that the schema allows.
_RIGHT: Mapping[str, Any] = {"slots": 0, "experts": {}}
_LAYER = re.compile("0|[1-9][0-9]{0,9}")


def _without_right_gpus(server: Any) -> Any:
    """A server with an empty GPU in place of each one that is what the schema says.

    Places in errors stay as they are.
    """
    if not isinstance(server, Mapping) or not isinstance(server.get("gpus"), list):
        return server
    return {**server, "gpus": [_RIGHT if _is_right(gpu) else gpu for gpu in server["gpus"]]}


def _is_right(gpu: Any) -> bool:
    """Whether a GPU is what the schema says; no only means that the schema has to tell."""
    if type(gpu) is not dict or gpu.keys() not in ({"slots", "experts"}, {"bytes", "experts"}):
        return False
    capacity, experts = gpu.get("slots", gpu.get("bytes")), gpu["experts"]
    return (
        _is_count(capacity)
        and type(experts) is dict
        and all(
            _LAYER.fullmatch(layer)
            and type(ids) is list
            and set(map(type, ids)) == {int}
            and min(ids) >= 0
            and max(ids) < 2**63
            for layer, ids in experts.items()
        )
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _hold(
    held: npt.NDArray[np.bool_],
    experts: Mapping[str, list[int]],
    model: ModelShape,
    position: Mapping[int, int],
    source: object,
    place: str,
) -> None:
    """Mark the ``experts`` of one GPU in ``held`` [L, E]; ``position`` is that of each layer."""
    for key, ids in experts.items():
        layer = int(key)
        if str(layer) != key:  # the schema's $ also matches before a line break
            raise InputError(
                f"layer {key!r}", source=source, place=place, expected=repr(str(layer))
            )
        if layer not in position:
            raise InputError(
                f"layer {layer}",
                source=source,
                place=place,
                expected=f"a MoE layer of {model.name}, {model.layers_text()}",
            )
        if max(ids) >= model.num_experts:
            raise InputError(
                f"expert {max(ids)}",
                source=source,
                place=f"{place}.{key}",
                expected=f"ids 0..{model.num_experts - 1} of {model.name}",
            )
        for a, b in itertools.pairwise(ids):
            if a >= b:
                raise InputError(
                    f"expert {b} after {a}",
                    source=source,
                    place=f"{place}.{key}",
                    expected="ascending ids, each once",
                )
        held[position[layer], ids] = True
