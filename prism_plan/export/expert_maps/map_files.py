"""Expert maps as SGLang, vLLM-Ascend and TensorRT-LLM load them, and what their loaders miss.

Layers are numbered as each engine does: SGLang has a row for every hidden layer, dense ones too,
vLLM-Ascend a list by MoE layer position, TensorRT-LLM decoder layer indices. Facts as run at SGLang
0.5.23 and vLLM-Ascend 182b75ea; TensorRT-LLM of mid-2026 was read only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.export import MapEngine
from prism_plan.io.json import parse_json
from prism_plan.model_spec import ModelSpec

Ints = npt.NDArray[np.int64]
CHECKED_WITH: dict[MapEngine, str] = {
    "sglang": "SGLang 0.5.23",
    "vllm-ascend": "vLLM-Ascend 182b75ea",
    "trtllm": "TensorRT-LLM of mid-2026 (read, not run)",
}
_LINE = re.compile(r"^  (?P<layer>[0-9]{1,5}): \[(?P<experts>[0-9]{1,7}(?:, [0-9]{1,7})*)\]$")


def map_text(engine: MapEngine, physical: Ints, model: ModelSpec) -> str:
    """The file of an engine; ``physical`` int64 [L, R, S]."""
    layers, ranks, slots = physical.shape
    rows: list[list[int]] = physical.reshape(layers, -1).tolist()
    if engine == "sglang":
        dense = [expert % model.num_experts for expert in range(ranks * slots)]
        positions = {layer: at for at, layer in enumerate(model.moe_layers)}
        every = [
            rows[positions[layer]] if layer in positions else dense
            for layer in range(model.num_decoder_layers)
        ]
        return json.dumps({"physical_to_logical_map": every}) + "\n"
    if engine == "vllm-ascend":
        listed = [
            {
                "layer_id": at,
                "device_count": ranks,
                "device_list": [
                    {"device_id": rank, "device_expert": physical[at, rank].tolist()}
                    for rank in range(ranks)
                ],
            }
            for at in range(layers)
        ]
        return json.dumps({"moe_layer_count": layers, "layer_list": listed}) + "\n"
    lines = [f"num_slots: {ranks * slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: {row}" for layer, row in zip(model.moe_layers, rows, strict=True)]
    return "\n".join([*lines, "layer_updates_per_iter: 0", ""])


def check_map(
    engine: MapEngine, text: str, source: str, model: ModelSpec | None, num_ranks: int | None
) -> list[str]:
    """Everything wrong with a file; also what the engine's loader accepts in silence.

    Raises
    ------
    InputError
        It is no such file.
    """
    rows, ranks = read_map(engine, text, source)
    num_ranks = ranks if ranks is not None else num_ranks
    lengths = {len(row) for row in rows.values()}
    problems = [] if rows else ["no layers"]
    if len(lengths) > 1:
        problems.append(f"layers have {', '.join(map(str, sorted(lengths)))} slots")
    if model is not None:
        problems += _layer_problems(engine, list(rows), model)
    experts = model.num_experts if model is not None else None
    for layer, row in rows.items():
        name = f"layer {layer}"
        highest = experts if experts is not None else max(row, default=0) + 1
        wrong = [expert for expert in row if not 0 <= expert < highest]
        if wrong:
            problems.append(f"{name}: expert {wrong[0]}; the model has 0 to {highest - 1}")
            continue
        missing = sorted(set(range(highest)) - set(row))
        if missing:
            problems.append(f"{name}: expert {missing[0]} is in no slot")
        if num_ranks is None:
            continue
        if len(row) % num_ranks:
            problems.append(f"{name}: {len(row)} slots for {num_ranks} ranks")
            continue
        slots = len(row) // num_ranks
        for rank in range(num_ranks):
            own = row[rank * slots : (rank + 1) * slots]
            twice = next((e for e in own if own.count(e) > 1), None)
            if twice is not None and not _is_dense(engine, layer, model):
                problems.append(f"{name}: rank {rank} has expert {twice} twice")
    return problems


def _is_dense(engine: MapEngine, layer: int, model: ModelSpec | None) -> bool:
    """Whether a row is of a layer without experts, which SGLang ignores."""
    return engine == "sglang" and model is not None and layer not in model.moe_layers


def _layer_problems(engine: MapEngine, layers: Sequence[int], model: ModelSpec) -> list[str]:
    expected = {
        "sglang": list(range(model.num_decoder_layers)),
        "vllm-ascend": list(range(model.num_layers)),
        "trtllm": list(model.moe_layers),
    }[engine]
    if list(layers) == expected:
        return []
    if len(layers) != len(expected):
        return [f"{len(layers)} layers; {engine} needs {len(expected)} of this model"]
    wrong = next(a for a, b in zip(layers, expected, strict=True) if a != b)
    return [f"layer {wrong} is not where {engine} needs it: {expected[list(layers).index(wrong)]}"]


def read_map(engine: MapEngine, text: str, source: str) -> tuple[dict[int, list[int]], int | None]:
    """Experts by slot, by layer as the engine numbers it, and the number of ranks if it says.

    Raises
    ------
    InputError
        It is no file of the engine's.
    """
    if engine == "trtllm":
        return _read_yaml(text, source), None
    values = parse_json(text, source)
    if not isinstance(values, dict):
        raise InputError("no object", source=source, expected=f"a map of {engine}")
    if engine == "sglang":
        if list(values) != ["physical_to_logical_map"]:
            raise InputError(
                f"keys {', '.join(map(str, values))[:80]}", source=source,
                expected="physical_to_logical_map alone: SGLang fails at any other",
            )  # fmt: skip
        rows = values["physical_to_logical_map"]
        if not isinstance(rows, list):
            raise InputError(
                "no list", source=source, place="physical_to_logical_map", expected="a row a layer"
            )
        return {at: _row(row, source, f"row {at}") for at, row in enumerate(rows)}, None
    return _read_ascend(values, source)


def _read_ascend(values: dict[str, Any], source: str) -> tuple[dict[int, list[int]], int | None]:
    listed = values.get("layer_list")
    if not isinstance(listed, list) or values.get("moe_layer_count") != len(listed):
        raise InputError(
            f"moe_layer_count {values.get('moe_layer_count')!r:.20}", source=source,
            place="layer_list", expected="a list of so many layers",
        )  # fmt: skip
    found: dict[int, list[int]] = {}
    counts = set()
    for at, layer in enumerate(listed):
        place = f"layer_list[{at}]"
        devices = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(devices, list) or layer.get("layer_id") != at:
            raise InputError(
                f"{layer!r:.60}", source=source, place=place,
                expected=f"layer_id {at} and a device_list: order decides",
            )  # fmt: skip
        row: list[int] = []
        sizes = set()
        for rank, device in enumerate(devices):
            own = device.get("device_expert") if isinstance(device, dict) else None
            if not isinstance(own, list) or device.get("device_id") != rank:
                raise InputError(
                    f"{device!r:.60}", source=source, place=f"{place}.device_list[{rank}]",
                    expected=f"device_id {rank} and device_expert",
                )  # fmt: skip
            row += _row(own, source, f"{place}.device_list[{rank}]")
            sizes.add(len(own))
        if layer.get("device_count") != len(devices) or len(sizes) != 1:
            raise InputError(
                f"{len(devices)} devices of {sorted(sizes)} experts", source=source, place=place,
                expected=f"device_count {layer.get('device_count')!r:.20}, all of one length",
            )  # fmt: skip
        counts.add(len(devices))
        found[at] = row
    if len(counts) > 1:
        raise InputError(
            f"{sorted(counts)} devices", source=source, expected="the same for every layer"
        )
    return found, next(iter(counts), None)


def _read_yaml(text: str, source: str) -> dict[int, list[int]]:
    lines = text.splitlines()
    head = re.fullmatch(r"num_slots: ([0-9]{1,7})", lines[0]) if lines else None
    if head is None or len(lines) < 3 or lines[1] != "initial_global_assignments:":
        raise InputError(
            f"{lines[0] if lines else ''!r:.40}", source=source, place="line 1",
            expected="num_slots: N and initial_global_assignments, as export writes them",
        )  # fmt: skip
    found: dict[int, list[int]] = {}
    for number, line in enumerate(lines[2:], 3):
        if line == "layer_updates_per_iter: 0":
            continue
        row = _LINE.match(line)
        if row is None or int(row["layer"]) in found:
            raise InputError(
                f"{line!r:.60}", source=source, place=f"line {number}",
                expected="LAYER: [expert of each slot], each layer once",
            )  # fmt: skip
        found[int(row["layer"])] = [int(part) for part in row["experts"].split(", ")]
    for layer, experts in found.items():
        if len(experts) != int(head[1]):
            raise InputError(
                f"{len(experts)} slots", source=source, place=f"layer {layer}",
                expected=f"num_slots, {head[1]}",
            )  # fmt: skip
    if lines[-1] != "layer_updates_per_iter: 0":
        raise InputError(
            "not its last line", source=source, place="layer_updates_per_iter",
            expected="0: else experts move while it runs",
        )  # fmt: skip
    return found


def _row(values: Any, source: str, place: str) -> list[int]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise InputError(
            f"{values!r:.60}", source=source, place=place, expected="a list of expert numbers"
        )
    return values
