"""Exports to llama.cpp: an rpc-server a GPU, and the llama-server of the head.

llama.cpp places whole layers; a layer's experts are one tensor. Two forms, as the plan has it:
layers execute where they are, or experts are elsewhere and attention is at home. Facts as run at
build 11669 (RPC protocol 8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.export.shell_script import ShellScript, parse_script
from prism_plan.export.stages import Stage

CHECKED_WITH = "llama.cpp build 11669 (RPC protocol 8)"
#: llama.cpp takes no more devices.
MAX_DEVICES = 16
_EXPERTS = r"ffn_(up|down|gate|gate_up)_(ch|)exps"
_OVERRIDE = re.compile(
    r"^blk\\\.\((?P<layers>[0-9|]+)\)\\\."
    + re.escape(r"ffn_(up|down|gate|gate_up)_(ch|)exps")
    + r"=(?P<buffer>RPC0\[[^\[\]=]+\])$"
)
_DEVICE = re.compile(r"^RPC(?P<number>[0-9]{1,3})$")


@dataclass(frozen=True)
class Device:
    """A GPU as llama.cpp names it: over an ``endpoint``, or one of the head's own (empty)."""

    server: str
    gpu: int
    endpoint: str
    name: str


def devices_of(
    gpus: Sequence[tuple[str, int]], head: str, hosts: Mapping[str, str],
    ports: Mapping[str, int], own: Sequence[str] | None,
) -> list[Device]:  # fmt: skip
    """The devices of these GPUs, in order; ``own`` are names of the head's by GPU.

    The head's GPUs without a name are reached over an rpc-server on its own loopback.

    Raises
    ------
    InputError
        ``own`` has no name of one of the head's GPUs.
    """
    found: list[Device] = []
    remote = 0
    for server, gpu in gpus:
        if server == head and own is not None:
            if gpu >= len(own):
                raise InputError(
                    f"{len(own)} devices of {server!r}",
                    place="devices",
                    expected=f"one for each of its GPUs, gpu[{gpu}] too",
                )
            found.append(Device(server, gpu, "", own[gpu]))
            continue
        host = "127.0.0.1" if server == head else hosts[server]
        found.append(Device(server, gpu, f"{host}:{ports[server] + gpu}", f"RPC{remote}"))
        remote += 1
    return found


def layers_script(
    stages: Sequence[Stage], devices: Mapping[tuple[int, int], Device], servers: Sequence[str],
    head: str, num_layers: int, context: int, comments: Sequence[str],
) -> str:  # fmt: skip
    """The script of a plan whose layers execute where they are.

    ``devices`` by server and GPU. Counts of layers are exact where they add up to all layers and
    one, which is the output's, on the last device.

    Raises
    ------
    UnsupportedFeature
        There are more runs of layers than llama.cpp takes devices.
    """
    if len(stages) > MAX_DEVICES - 1:
        raise UnsupportedFeature(
            f"llama.cpp takes {MAX_DEVICES - 1} runs of layers at most, and the plan has "
            f"{len(stages)}; plan with fewer servers"
        )
    counts = [stage.num_layers for stage in stages]
    counts[-1] += 1
    words = [
        "--device", ",".join(devices[stage.server, stage.gpu].name for stage in stages),
        "-ngl", str(num_layers + 1), "-fit", "off", "-ts", ",".join(map(str, counts)),
    ]  # fmt: skip
    return _script(list(devices.values()), words, servers, head, context, comments)


def experts_script(
    held: Mapping[int, int], devices: Mapping[tuple[int, int], Device], servers: Sequence[str],
    head: str, num_layers: int, context: int, comments: Sequence[str],
) -> str:  # fmt: skip
    """The script of a plan whose attention is at home; ``held``: decoder layer -> server.

    Experts of a layer lie on the server's first GPU. The head computes on its first own device, or
    on its CPU where it has none.
    """
    own = [device for device in devices.values() if not device.endpoint]
    words = ["-ngl", "0", "-fit", "off"]
    if own:  # llama.cpp ends where a device is left out, so all are named, and one gets layers
        others = [device.name for device in devices.values() if device.endpoint]
        words = ["--device", ",".join([own[0].name, *others]), "-ngl", str(num_layers + 1)]
        words += ["-fit", "off", "-ts", ",".join(["1", *("0" for _ in others)])]
    for server in sorted(set(held.values())):
        layers = "|".join(str(layer) for layer in sorted(held) if held[layer] == server)
        buffer = f"RPC0[{devices[server, 0].endpoint}]"
        words += ["-ot", rf"blk\.({layers})\.{_EXPERTS}={buffer}"]
    return _script(list(devices.values()), words, servers, head, context, comments)


def _script(
    devices: Sequence[Device], placing: Sequence[str], servers: Sequence[str], head: str,
    context: int, comments: Sequence[str],
) -> str:  # fmt: skip
    remote = [device for device in devices if device.endpoint]
    serve = ["$LLAMA_SERVER", "-m", "$MODEL", "-c", str(context)]
    if remote:  # before what names its devices
        serve += ["--rpc", ",".join(device.endpoint for device in remote)]
    commands: dict[str, list[list[str]]] = {}
    for name in servers:
        own = [device for device in remote if device.server == name]
        if own and name != head:
            commands[name] = [_rpc_server(device, name == head) for device in own]
    at_head = [_rpc_server(device, True) for device in remote if device.server == head]
    if at_head:
        commands[f"{head} rpc"] = at_head
    ordered = {head: [[*serve, *placing]], **commands}
    variables = {
        "MODEL": "model.gguf", "LLAMA_SERVER": "llama-server", "RPC_SERVER": "rpc-server"
    }  # fmt: skip
    return ShellScript(comments, variables, {}, ordered).text()


def _rpc_server(device: Device, at_head: bool) -> list[str]:
    host, _, port = device.endpoint.rpartition(":")
    words = ["$RPC_SERVER", "--host", "127.0.0.1" if at_head else host, "--port", port]
    return words if device.gpu == 0 else ["env", f"CUDA_VISIBLE_DEVICES={device.gpu}", *words]


def default_split(free: Sequence[int], num_layers: int) -> list[int]:
    """How many layers each device gets where llama.cpp splits by free memory, without the output.

    As its ``load_tensors`` has it: the device of layer n is the first whose share of memory, added
    up, is above n / (layers + 1).
    """
    ends = np.cumsum(np.array(free, np.float64)) / float(sum(free))
    at = np.searchsorted(ends, np.arange(num_layers) / (num_layers + 1), side="right")
    counted: list[int] = np.bincount(np.minimum(at, len(free) - 1), minlength=len(free)).tolist()
    return counted


# ------------------------------------------------------------------------------------------ checks


@dataclass(frozen=True)
class Placing:
    """Where a script has layers, by decoder layer: devices, or the endpoints of their experts."""

    endpoints: list[str]
    devices: list[str]
    counts: list[int]
    overrides: dict[int, str]
    gpu_layers: int


def read_placing(text: str, source: str) -> Placing:
    """Where a script of :func:`layers_script` or :func:`experts_script` has layers.

    Raises
    ------
    InputError
        It is no such script, or not in the order that llama.cpp needs.
    """
    script = parse_script(text, source)
    name, commands = next(iter(script.commands.items()))
    words = commands[0] if commands else []
    flags = [word for word in words if word in ("--rpc", "--device", "-ot", "-ngl", "-ts", "-fit")]
    if "-ngl" not in flags or "-m" not in words:
        raise InputError("no llama-server", source=source, place=name, expected="-m, -ngl ...")
    if "--rpc" in flags and any(
        flag in flags[: flags.index("--rpc")] for flag in ("--device", "-ot")
    ):
        raise InputError(
            "--rpc after --device or -ot", source=source, place=name,
            expected="--rpc first: it makes the devices",
        )  # fmt: skip
    overrides: dict[int, str] = {}
    for at, word in enumerate(words[:-1]):
        if word != "-ot":
            continue
        found = _OVERRIDE.match(words[at + 1])
        if found is None:
            raise InputError(
                f"{words[at + 1]!r:.80}", source=source, place=f"{name}: -ot",
                expected=rf"blk\.(1|2)\.{_EXPERTS}=RPC0[HOST:PORT]; others match more or nothing",
            )  # fmt: skip
        for layer in found["layers"].split("|"):
            if not layer:
                continue
            overrides.setdefault(int(layer), found["buffer"])
    return Placing(
        endpoints=_list(words, "--rpc"),
        devices=_list(words, "--device"),
        counts=[_number(part, source, "-ts") for part in _list(words, "-ts")],
        overrides=overrides,
        gpu_layers=_number(words[words.index("-ngl") + 1], source, "-ngl"),
    )


def check_script(text: str, source: str, num_layers: int | None) -> list[str]:
    """Everything wrong with a script; also what llama.cpp accepts in silence.

    Raises
    ------
    InputError
        As :func:`read_placing`.
    """
    placing = read_placing(text, source)
    script = parse_script(text, source)
    found = []
    words = next(iter(script.commands.values()))[0]
    if _list(words, "-fit") != ["off"]:
        found.append("-fit is not off: llama.cpp may move layers to fit what it finds")
    if len(set(placing.endpoints)) < len(placing.endpoints):
        found.append("--rpc names an endpoint twice: an rpc-server serves one client at a time")
    for device in placing.devices:
        number = _DEVICE.match(device)
        if number is not None and int(number["number"]) >= len(placing.endpoints):
            found.append(f"--device {device}: --rpc has {len(placing.endpoints)} endpoints")
    if len(placing.devices) != len(placing.counts):
        found.append(f"{len(placing.devices)} devices, and -ts is of {len(placing.counts)}")
    if len(placing.devices) > MAX_DEVICES:
        found.append(f"{len(placing.devices)} devices; llama.cpp takes {MAX_DEVICES}")
    if any(count < 1 for count in placing.counts) and not placing.overrides:
        found.append("-ts gives a device no layer")
    if placing.devices and not placing.overrides and sum(placing.counts) != placing.gpu_layers:
        found.append(
            f"-ts adds up to {sum(placing.counts)}, and -ngl is {placing.gpu_layers}: counts are "
            "taken as shares then"
        )
    if num_layers is not None:
        if placing.devices and placing.gpu_layers != num_layers + 1:
            found.append(f"-ngl is {placing.gpu_layers}; {num_layers} layers and the output need "
                         f"{num_layers + 1}")  # fmt: skip
        found += [
            f"-ot: the model has no layer {layer}"
            for layer in placing.overrides
            if layer >= num_layers
        ]
    known = {f"RPC0[{endpoint}]" for endpoint in placing.endpoints}
    found += [
        f"-ot: layer {layer} goes to {buffer}, which --rpc does not name"
        for layer, buffer in placing.overrides.items()
        if buffer not in known
    ]
    return found


def _list(words: Sequence[str], flag: str) -> list[str]:
    return words[words.index(flag) + 1].split(",") if flag in words[:-1] else []


def _number(text: str, source: str, place: str) -> int:
    if not text.isdigit() or len(text) > 6:
        raise InputError(f"{text!r:.40}", source=source, place=place, expected="a whole number")
    return int(text)
