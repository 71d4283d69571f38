"""Reads a log of llama.cpp back: whether layers, caches and experts landed as planned.

Lines as llama.cpp build 11669 writes them with ``-v`` (``--verbose``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from prism_plan.errors import InputError
from prism_plan.export.llamacpp import Placing

_ASSIGNED = re.compile(r"layer +(?P<layer>[0-9]{1,5}) assigned to device (?P<device>[^,\s]+)")
_USING = re.compile(r"using device RPC(?P<number>[0-9]{1,3}) \((?P<endpoint>[^()\s]+)\)")
_CACHE = re.compile(r"llama_kv_cache[a-z_]*: layer +(?P<layer>[0-9]{1,5}): dev = (?P<device>\S+)")
_OVERRIDDEN = re.compile(
    r"tensor blk\.(?P<layer>[0-9]{1,5})\.(?P<tensor>ffn_[a-z_]+exps)\.weight .*"
    r"(?:overridden to|buffer type overridden to) (?P<buffer>\S+)"
)


def verify_log(lines: Iterable[str], placing: Placing, num_layers: int, source: str) -> list[str]:
    """What a log has elsewhere than a script says; empty where all is as planned.

    Raises
    ------
    InputError
        The log tells nothing of layers: it was not verbose, or is none of llama.cpp's.
    """
    assigned: dict[int, str] = {}
    caches: dict[int, str] = {}
    overridden: dict[int, dict[str, str]] = {}
    used: dict[int, str] = {}
    for line in lines:
        if (found := _ASSIGNED.search(line)) is not None:
            assigned[int(found["layer"])] = found["device"]
        elif (found := _USING.search(line)) is not None:
            used[int(found["number"])] = found["endpoint"]
        elif (found := _CACHE.search(line)) is not None:
            caches[int(found["layer"])] = found["device"]
        elif (found := _OVERRIDDEN.search(line)) is not None:
            overridden.setdefault(int(found["layer"]), {})[found["tensor"]] = found["buffer"]
    if not assigned:
        raise InputError(
            "no line says which device a layer is assigned to",
            source=source,
            expected="a log of llama-server -v",
        )
    problems = [
        f"RPC{number} is {endpoint}, planned {placing.endpoints[number]}"
        for number, endpoint in sorted(used.items())
        if number < len(placing.endpoints) and endpoint != placing.endpoints[number]
    ]
    if placing.devices and not placing.overrides:
        expected = [
            device
            for device, count in zip(placing.devices, placing.counts, strict=True)
            for _ in range(count)
        ]
        problems += _differences("layer", assigned, dict(enumerate(expected)))
        problems += _differences("KV cache of layer", caches, dict(enumerate(expected[:-1])))
    elif len(assigned) != num_layers + 1:
        problems.append(f"the log has {len(assigned)} layers, and the plan {num_layers + 1}")
    for layer, buffer in sorted(placing.overrides.items()):
        tensors = overridden.get(layer, {})
        if not tensors:
            problems.append(f"experts of layer {layer} are not overridden; planned {buffer}")
        problems += [
            f"blk.{layer}.{tensor} is at {found}, planned {buffer}"
            for tensor, found in sorted(tensors.items())
            if found != buffer
        ]
    problems += [
        f"experts of layer {layer} are overridden, and planned at the head"
        for layer in sorted(overridden.keys() - placing.overrides.keys())
    ]
    return problems


def _differences(what: str, found: dict[int, str], expected: dict[int, str]) -> list[str]:
    problems = [
        f"{what} {layer} is on {found.get(layer, 'no device')}, planned {device}"
        for layer, device in expected.items()
        if found.get(layer) != device
    ]
    return problems + [
        f"{what} {layer} is on {device}, and there is none in the plan"
        for layer, device in sorted(found.items())
        if layer not in expected
    ]
