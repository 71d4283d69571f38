"""Reads a log of llama.cpp back: whether layers, caches and experts landed as planned.

Lines as llama.cpp build 11669 writes them with ``-v`` (``--verbose``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from prism_plan.errors import InputError
from prism_plan.export.llamacpp import Placing
from prism_plan.io.export import ExportFile

_ASSIGNED = re.compile(r"layer +(?P<layer>[0-9]{1,5}) assigned to device (?P<device>[^,\s]+)")
_USING = re.compile(r"using device RPC(?P<number>[0-9]{1,3}) \((?P<endpoint>[^()\s]+)\)")
_CACHE = re.compile(r"llama_kv_cache[a-z_]*: layer +(?P<layer>[0-9]{1,5}): dev = (?P<device>\S+)")
_OVERRIDDEN = re.compile(
    r"tensor blk\.(?P<layer>[0-9]{1,5})\.(?P<tensor>ffn_[a-z_]+exps)\.weight .*"
    r"(?:overridden to|buffer type overridden to) (?P<buffer>\S+)"
)


_FAILED = re.compile(r"error loading model|failed to load model")
_PARTS = {"ffn_down_exps"}, {"ffn_gate_exps", "ffn_up_exps"}, {"ffn_gate_up_exps"}


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
    problems = []
    for line in lines:
        if (found := _ASSIGNED.search(line)) is not None:
            layer, device = int(found["layer"]), found["device"]
            if assigned.setdefault(layer, device) != device:
                problems.append(f"layer {layer} is on {assigned[layer]} and on {device}: two runs")
        elif (found := _USING.search(line)) is not None:
            used[int(found["number"])] = found["endpoint"]
        elif (found := _CACHE.search(line)) is not None:
            caches[int(found["layer"])] = found["device"]
        elif (found := _OVERRIDDEN.search(line)) is not None:
            overridden.setdefault(int(found["layer"]), {})[found["tensor"]] = found["buffer"]
        elif _FAILED.search(line) is not None:
            problems.append("the model was not loaded")
    if not assigned:
        raise InputError(
            "no line says which device a layer is assigned to",
            source=source,
            expected="a log of llama-server -v",
        )
    problems += _endpoint_problems(used, placing)
    if placing.overrides:
        head = placing.devices[0] if placing.devices else "CPU"
        expected = [head] * (num_layers + 1)
    else:
        expected = [
            device
            for device, count in zip(placing.devices, placing.counts, strict=False)
            for _ in range(count)
        ]
        if len(expected) != num_layers + 1:
            problems.append(f"the script has {len(expected) - 1} layers, the plan {num_layers}")
    problems += _differences("layer", assigned, dict(enumerate(expected)))
    problems += _differences("KV cache of layer", caches, dict(enumerate(expected[:-1])))
    for layer, buffer in sorted(placing.overrides.items()):
        tensors = overridden.get(layer, {})
        down, apart, together = _PARTS
        if not down <= tensors.keys() or not (
            apart <= tensors.keys() or together <= tensors.keys()
        ):
            problems.append(f"not all experts of layer {layer} are overridden; planned {buffer}")
        problems += [
            f"blk.{layer}.{tensor} is at {found_at}, planned {buffer}"
            for tensor, found_at in sorted(tensors.items())
            if found_at != buffer
        ]
    problems += [
        f"experts of layer {layer} are overridden, and planned at the head"
        for layer in sorted(overridden.keys() - placing.overrides.keys())
    ]
    return problems


def _endpoint_problems(used: dict[int, str], placing: Placing) -> list[str]:
    """Devices of the network that are another machine's, or of which the log says nothing."""
    needed = range(len(placing.endpoints))
    if placing.devices:
        numbers = [device.removeprefix("RPC") for device in placing.devices]
        needed = sorted({int(n) for n in numbers if n.isascii() and n.isdigit()})  # type: ignore[assignment]
    problems = []
    for number in needed:
        planned = placing.endpoints[number] if number < len(placing.endpoints) else "nothing"
        found = used.get(number, "in no line")
        if found != planned:
            problems.append(f"RPC{number} is {found}, planned {planned}")
    return problems


def differs_from_export(placing: Placing, sidecar: ExportFile) -> list[str]:
    """Where a script, which may have been edited, is not what its sidecar says."""
    problems = []
    if sidecar.held:
        layers = [held.layer for held in sidecar.held]
        if sorted(placing.overrides) != layers:
            problems.append(
                f"the script has experts of layers {sorted(placing.overrides)} away, the export "
                f"{layers}"
            )
        by_server: dict[tuple[str, int], set[str]] = {}
        for held in sidecar.held:
            buffer = placing.overrides.get(held.layer, "")
            by_server.setdefault((held.server, held.gpu), set()).add(buffer)
        if any(len(buffers) != 1 for buffers in by_server.values()):
            problems.append("the script has experts of one GPU in several places")
        return problems
    counts = [stage.last - stage.first + 1 for stage in sidecar.stages]
    if [*placing.counts[:-1], *(count - 1 for count in placing.counts[-1:])] != counts:
        problems.append(f"the script has runs of {placing.counts} layers, the export {counts} + 1")
        return problems
    devices: dict[tuple[str, int], set[str]] = {}
    for stage, device in zip(sidecar.stages, placing.devices, strict=False):
        devices.setdefault((stage.server, stage.gpu), set()).add(device)
    if any(len(names) != 1 for names in devices.values()) or len(devices) != len(
        set().union(*devices.values())
    ):
        problems.append("the script has other devices than the export's GPUs")
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
