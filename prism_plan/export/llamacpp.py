"""Exports to llama.cpp: an rpc-server a GPU, and the llama-server of the head.

llama.cpp places whole layers; a layer's experts are one tensor. Two forms, as the plan has it:
layers execute where they are, or experts are elsewhere and attention is at home. Facts as run at
build 11669 (RPC protocol 8).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.export.shell_script import ShellScript, options_of, parse_script
from prism_plan.export.stages import Stage

CHECKED_WITH = "llama.cpp build 11669 (RPC protocol 8)"
#: llama.cpp takes no more devices.
MAX_DEVICES = 16
_EXPERTS = r"ffn_(up|down|gate|gate_up)_(ch|)exps"
_OVERRIDE = re.compile(
    r"blk\\\.\((?P<layers>[0-9]{1,5}(?:\|[0-9]{1,5})*)\)\\\."
    + re.escape(_EXPERTS)
    + r"=(?P<buffer>RPC0\[[^\[\]=]+\])"
)
_REMOTE = re.compile(r"RPC(?P<number>[0-9]{1,3})")
_ENDPOINT = re.compile(r"[A-Za-z0-9._-]+:(?P<port>[0-9]{1,5})")
_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
#: Which GPU a process sees, of the back ends that llama.cpp is built for.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
_OPTIONS = ("-m", "-c", "--rpc", "--device", "-ngl", "-fit", "-ts", "-ot")


@dataclass(frozen=True)
class Device:
    """A GPU as llama.cpp names it: over an ``endpoint``, or one of the head's own (empty).

    ``one_of_several`` GPUs of its server: its rpc-server may see no other.
    """

    server: str
    gpu: int
    endpoint: str
    name: str
    one_of_several: bool = False


def devices_of(
    gpus: Sequence[tuple[str, int]], head: str, hosts: Mapping[str, str],
    ports: Mapping[str, int], own: Sequence[str] | None, num_gpus: Mapping[str, int],
) -> list[Device]:  # fmt: skip
    """The devices of these GPUs, in order; ``own`` are names of the head's by GPU.

    The head's GPUs without a name are reached over an rpc-server on its own loopback.

    Raises
    ------
    InputError
        ``own`` has no name of one of the head's GPUs; two GPUs are at one endpoint.
    """
    found: list[Device] = []
    taken: set[tuple[str, int]] = set()
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
        port = ports[server] + gpu
        endpoint = f"{host}:{port}"
        machine = hosts.get(server, server), port
        if port > 65535 or machine in taken:
            raise InputError(
                endpoint, parameter="endpoints", place=f"{server} gpu[{gpu}]",
                expected="a port up to 65535, and another one for each GPU of a host",
            )  # fmt: skip
        taken.add(machine)
        several = num_gpus[server] > 1
        found.append(Device(server, gpu, endpoint, f"RPC{remote}", several))
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
    held: Mapping[int, tuple[int, int]], devices: Mapping[tuple[int, int], Device],
    servers: Sequence[str], head: str, num_layers: int, context: int, comments: Sequence[str],
) -> str:  # fmt: skip
    """The script of a plan whose attention is at home; ``held``: layer -> (server, GPU).

    The head computes on its first own device, or on its CPU where it has none.
    """
    own = [device for device in devices.values() if not device.endpoint]
    words = ["-ngl", "0", "-fit", "off"]
    if own:  # llama.cpp ends where a device is left out, so all are named, and one gets layers
        others = [device.name for device in devices.values() if device.endpoint]
        words = ["--device", ",".join([own[0].name, *others])]
        words += ["-ngl", str(num_layers + 1)]
        words += ["-fit", "off", "-ts", ",".join(["1", *("0" for _ in others)])]
    for gpu in sorted(set(held.values())):
        layers = "|".join(str(layer) for layer in sorted(held) if held[layer] == gpu)
        buffer = f"RPC0[{devices[gpu].endpoint}]"
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
        if at_head_name(head) in servers:
            raise InputError(
                f"servers {head!r} and {at_head_name(head)!r}", place="servers",
                expected="other names: the second one is that of the head's rpc-servers",
            )  # fmt: skip
        commands[at_head_name(head)] = at_head
    ordered = {head: [[*serve, *placing]], **commands}
    variables = {
        "MODEL": "model.gguf", "LLAMA_SERVER": "llama-server", "RPC_SERVER": "rpc-server"
    }  # fmt: skip
    return ShellScript(comments, variables, {}, ordered).text()


def at_head_name(head: str) -> str:
    """What the script calls the head's own rpc-servers."""
    return f"{head} rpc"


def _rpc_server(device: Device, at_head: bool) -> list[str]:
    """llama.cpp listens at numeric addresses alone; where a name is given, at all of them."""
    host, _, port = device.endpoint.rpartition(":")
    listen = "127.0.0.1" if at_head else host if _ADDRESS.fullmatch(host) else "0.0.0.0"
    words = ["$RPC_SERVER", "--host", listen, "--port", port]
    if not device.one_of_several:
        return words
    return ["env", *(f"{name}={device.gpu}" for name in _VISIBLE), *words]


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
    """Where a script has layers, by decoder layer: devices, or the endpoints of their experts.

    ``fits`` is whether llama.cpp is kept from fitting layers to the memory that it finds.
    """

    endpoints: list[str]
    devices: list[str]
    counts: list[int]
    overrides: dict[int, str]
    gpu_layers: int
    fits: bool


def read_placing(text: str, source: str) -> Placing:
    """Where a script of :func:`layers_script` or :func:`experts_script` has layers.

    Raises
    ------
    InputError
        It is no such script, or not in the order that llama.cpp needs.
    """
    script = parse_script(text, source)
    name, commands = next(iter(script.commands.items()))
    words = list(commands[0])
    if len(commands) != 1 or words[:1] != ["$LLAMA_SERVER"]:
        raise InputError("no llama-server", source=source, place=name, expected="$LLAMA_SERVER ...")
    given = options_of(words[1:], _OPTIONS, source, name, repeated=("-ot",))
    if "--rpc" in given and any(
        list(given).index("--rpc") > list(given).index(flag)
        for flag in ("--device", "-ot")
        if flag in given
    ):
        raise InputError(
            "--rpc after --device or -ot", source=source, place=name,
            expected="--rpc first: it makes the devices",
        )  # fmt: skip
    if "-ngl" not in given:
        raise InputError("no -ngl", source=source, place=name, expected="how many layers")
    overrides: dict[int, str] = {}
    for pattern in given.get("-ot", []):
        found = _OVERRIDE.fullmatch(pattern)
        if found is None:
            raise InputError(
                f"{pattern!r:.80}", source=source, place=f"{name}: -ot",
                expected=rf"blk\.(1|2)\.{_EXPERTS}=RPC0[HOST:PORT]; others match more or nothing",
            )  # fmt: skip
        for layer in map(int, found["layers"].split("|")):
            if layer in overrides:
                raise InputError(
                    f"layer {layer} twice", source=source, place=f"{name}: -ot", expected="it once"
                )
            overrides[layer] = found["buffer"]
    return Placing(
        endpoints=_list(given, "--rpc"),
        devices=_list(given, "--device"),
        counts=[_number(part, source, "-ts") for part in _list(given, "-ts")],
        overrides=overrides,
        gpu_layers=_number(given["-ngl"][0], source, "-ngl"),
        fits=_list(given, "-fit") == ["off"],
    )


def check_script(
    text: str, source: str, num_layers: int | None, moe_layers: Collection[int] | None = None
) -> list[str]:
    """Everything wrong with a script; also what llama.cpp accepts in silence.

    ``num_layers`` and the ``moe_layers`` among them are the model's, where it is known.

    Raises
    ------
    InputError
        As :func:`read_placing`.
    """
    placing = read_placing(text, source)
    found = []
    if not placing.fits:
        found.append("-fit is not off: llama.cpp may move layers to fit what it finds")
    if len(set(placing.endpoints)) < len(placing.endpoints):
        found.append("--rpc names an endpoint twice: an rpc-server serves one client at a time")
    found += _rpc_problems(text, source, placing)
    for device in placing.devices:
        number = _REMOTE.fullmatch(device)
        if number is not None and int(number["number"]) >= len(placing.endpoints):
            found.append(f"--device {device}: --rpc has {len(placing.endpoints)} endpoints")
    if len(placing.devices) != len(placing.counts):
        found.append(f"{len(placing.devices)} devices, and -ts is of {len(placing.counts)}")
    if len(placing.devices) > MAX_DEVICES:
        found.append(f"{len(placing.devices)} devices; llama.cpp takes {MAX_DEVICES}")
    if placing.overrides:
        found += _override_problems(placing, num_layers)
        found += [
            f"-ot: layer {layer} has no experts, so that its pattern matches nothing"
            for layer in placing.overrides
            if moe_layers is not None and layer not in moe_layers
        ]
    else:
        found += _count_problems(placing, num_layers)
    return found


def _count_problems(placing: Placing, num_layers: int | None) -> list[str]:
    """What is wrong where layers execute where they are."""
    found = []
    if not placing.devices:
        found.append("neither --device nor -ot: llama.cpp would place all layers by itself")
    if any(count < 1 for count in placing.counts):
        found.append("-ts gives a device no layer")
    if sum(placing.counts) != placing.gpu_layers:
        found.append(
            f"-ts adds up to {sum(placing.counts)}, and -ngl is {placing.gpu_layers}: counts are "
            "taken as shares then"
        )
    if num_layers is not None and placing.gpu_layers != num_layers + 1:
        found.append(
            f"-ngl is {placing.gpu_layers}; {num_layers} layers and the output need "
            f"{num_layers + 1}"
        )
    return found


def _override_problems(placing: Placing, num_layers: int | None) -> list[str]:
    """What is wrong where experts are away and the head executes all layers."""
    found = []
    known = {f"RPC0[{endpoint}]" for endpoint in placing.endpoints}
    for layer, buffer in placing.overrides.items():
        if buffer not in known:
            found.append(f"-ot: layer {layer} goes to {buffer}, which --rpc does not name")
        if num_layers is not None and layer >= num_layers:
            found.append(f"-ot: the model has no layer {layer}")
    if not placing.devices and placing.gpu_layers:
        found.append(f"-ngl is {placing.gpu_layers}: layers would leave the head; it needs 0")
    if placing.devices and placing.counts != [1, *([0] * (len(placing.devices) - 1))]:
        found.append("-ts has to give the first device, the head's, all layers: 1,0,0")
    if placing.devices and _REMOTE.fullmatch(placing.devices[0]) is not None:
        found.append(f"--device {placing.devices[0]} is not the head's")
    if placing.devices and num_layers is not None and placing.gpu_layers != num_layers + 1:
        found.append(f"-ngl is {placing.gpu_layers}; it needs {num_layers + 1}")
    return found


def _rpc_problems(text: str, source: str, placing: Placing) -> list[str]:
    """Endpoints that no rpc-server of the script listens at."""
    ports = set()
    for name, commands in list(parse_script(text, source).commands.items())[1:]:
        for words in commands:
            program = next((at for at, word in enumerate(words) if word == "$RPC_SERVER"), None)
            if program is None:
                raise InputError("no rpc-server", source=source, place=name, expected="$RPC_SERVER")
            given = options_of(words[program + 1 :], ("--host", "--port"), source, name)
            ports.add(given.get("--port", [""])[0])
    found = []
    for endpoint in placing.endpoints:
        match = _ENDPOINT.fullmatch(endpoint)
        if match is None:
            found.append(f"--rpc {endpoint}: not HOST:PORT")
        elif match["port"] not in ports:
            found.append(f"--rpc {endpoint}: no rpc-server of this script has that port")
    return found


def _list(given: Mapping[str, Sequence[str]], flag: str) -> list[str]:
    return given[flag][0].split(",") if flag in given else []


def _number(text: str, source: str, place: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise InputError(f"{text!r:.40}", source=source, place=place, expected="a whole number")
    return int(text)
