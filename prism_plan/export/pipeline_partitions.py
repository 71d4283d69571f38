"""Pipeline partitions: unequal numbers of decoder layers per rank (vLLM, SGLang, TensorRT-LLM).

Ranks are GPUs in the order in which their layers execute; counts are over all hidden layers. Facts
as read and run at vLLM 0.33.0, SGLang 0.5.23 and stored files of TensorRT-LLM of mid-2026.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prism_plan.errors import InputError
from prism_plan.export.shell_script import ShellScript, parse_script
from prism_plan.export.stages import Stage
from prism_plan.io.json import parse_json

PipelineEngine = Literal["vllm-pp", "sglang-pp", "trtllm-pp"]
#: The environment variable that has the partition.
VARIABLES: dict[PipelineEngine, str] = {
    "vllm-pp": "VLLM_PP_LAYER_PARTITION",
    "sglang-pp": "SGLANG_PP_LAYER_PARTITION",
}
CHECKED_WITH: dict[PipelineEngine, str] = {
    "vllm-pp": "vLLM 0.33.0",
    "sglang-pp": "SGLang 0.5.23",
    "trtllm-pp": "TensorRT-LLM of mid-2026 (read, not run)",
}
_VISIBLE = re.compile(r"CUDA_VISIBLE_DEVICES=[0-9]{1,3}(?:,[0-9]{1,3})*")
#: Where ranks meet, on the machine of the first one.
MEETING_PORT = 29500
#: SGLang's own, of a node that is not told another one.
SGLANG_PORT = 30000


def not_contiguous(stages: Sequence[Stage], servers: Sequence[str]) -> str:
    """Why stages are no pipeline, or empty.

    Each GPU is one rank, and ranks of a machine follow each other.
    """
    runs = [(stage.server, stage.gpu) for stage in stages]
    (server, gpu), times = Counter(runs).most_common(1)[0]
    if times > 1:
        return (
            f"gpu[{gpu}] of {servers[server]!r} executes {times} runs of layers with others "
            "between them, and a pipeline rank executes one"
        )
    machines = [one for one, _ in itertools.groupby(stage.server for stage in stages)]
    machine, times = Counter(machines).most_common(1)[0]
    if times > 1:
        return (
            f"GPUs of {servers[machine]!r} execute {times} runs of layers with others between "
            "them, and ranks of a machine follow each other"
        )
    return ""


def default_partition(engine: PipelineEngine, layers: int, ranks: int) -> list[int]:
    """The partition that an engine takes by itself: equal, and one more for some ranks.

    As SGLang's ``get_pp_indices`` has it, for the last ones; as vLLM's, for those before the last
    one, from the end; of TensorRT-LLM reconstructed, for the first ones.
    """
    found = [layers // ranks] * ranks
    for number in range(layers % ranks):
        at = {"sglang-pp": -1 - number, "vllm-pp": -2 - number, "trtllm-pp": number}[engine]
        found[at] += 1
    return found


def partition_text(
    engine: PipelineEngine, stages: Sequence[Stage], servers: Sequence[str],
    hosts: Mapping[str, str], num_gpus: Mapping[str, int], comments: Sequence[str],
) -> str:  # fmt: skip
    """The file of an engine: a script for all machines, or TensorRT-LLM's options."""
    counts = [stage.num_layers for stage in stages]
    if engine == "trtllm-pp":
        options = {"pipeline_parallel_size": len(counts), "pp_partition": counts}
        return json.dumps(options) + "\n"
    nodes = nodes_of(stages)
    first = hosts[servers[nodes[0][0].server]]
    commands: dict[str, list[list[str]]] = {}
    for number, node in enumerate(nodes):
        name = servers[node[0].server]
        before = len(commands.setdefault(name, []))
        commands[name].append(
            _visible([stage.gpu for stage in node], num_gpus[name])
            + _command(engine, number, len(nodes), len(counts), first, before)
        )
    exported = {VARIABLES[engine]: ",".join(map(str, counts))}
    return ShellScript(comments, {"MODEL": "model"}, exported, commands).text()


def nodes_of(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages by node of an engine, which wants as many ranks on every node.

    A machine is a node where all have equally many GPUs, otherwise each GPU is.
    """
    by_server = [list(own) for _, own in itertools.groupby(stages, lambda stage: stage.server)]
    if len({len(own) for own in by_server}) == 1:
        return by_server
    return [[stage] for stage in stages]


def read_partition(engine: PipelineEngine, text: str, source: str) -> list[int]:
    """Layers of each rank, as an engine's file has them.

    Raises
    ------
    InputError
        It is no such file.
    """
    if engine == "trtllm-pp":
        counts = _options(text, source)["pp_partition"]
        if any(type(count) is not int for count in counts):
            raise InputError(
                f"{counts!r:.60}", source=source, place="pp_partition", expected="whole numbers"
            )
        found: list[int] = counts
    else:
        variable = VARIABLES[engine]
        given = parse_script(text, source).exported.get(variable)
        if given is None:
            raise InputError(f"no {variable}", source=source, expected="it to be exported")
        parts = given.split(",")
        if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            raise InputError(
                f"{given!r:.60}", source=source, place=variable,
                expected="numbers of layers with commas between them",
            )  # fmt: skip
        found = [int(part) for part in parts]
    return found


def check_partition(
    engine: PipelineEngine, text: str, source: str, num_layers: int | None
) -> list[str]:
    """Everything wrong with an engine's file; also what its loader accepts in silence.

    Raises
    ------
    InputError
        As :func:`read_partition`.
    """
    counts = read_partition(engine, text, source)
    if engine == "trtllm-pp":
        size = _options(text, source).get("pipeline_parallel_size")
        return _problems(counts, size, num_layers, "pp_partition")
    script = parse_script(text, source)
    found = []
    if list(script.exported) != [VARIABLES[engine]]:
        found.append(f"exports {', '.join(script.exported)}; expected {VARIABLES[engine]} alone")
    nodes = [
        (name, before, words)
        for name, commands in script.commands.items()
        for before, words in enumerate(commands)
    ]
    number, first = len(nodes), ""
    seen: dict[str, set[str]] = {}
    for rank, (name, before, given) in enumerate(nodes):
        words = list(given)
        if words[0] == "env":
            if len(words) < 3 or not _VISIBLE.fullmatch(words[1]):
                found.append(f"{name}: env {' '.join(words[1:2])!r:.60}; expected GPUs it may see")
            elif words[1] in seen.setdefault(name, set()):
                found.append(f"{name}: {words[1]} of two nodes")
            seen.setdefault(name, set()).update(words[1:2])
            words = words[2:]
        address = "--master-addr" if engine == "vllm-pp" else "--dist-init-addr"
        if rank == 0 and address in words[:-1]:
            first = words[words.index(address) + 1].partition(":")[0]
        expected = _command(engine, rank, number, len(counts), first, before)
        if words != expected:
            wrong = (
                next((a for a, b in itertools.zip_longest(words, expected) if a != b), None)
                or "the end"
            )
            found.append(f"{name}: {wrong!r:.60} is not what a rank {rank} of {number} is given")
    return found + _problems(counts, len(counts), num_layers, VARIABLES[engine])


def _visible(gpus: Sequence[int], of: int) -> list[str]:
    """What a machine of several GPUs is told of those that it uses, in the order of ranks."""
    return ["env", f"CUDA_VISIBLE_DEVICES={','.join(map(str, gpus))}"] if of > 1 else []


def _command(
    engine: PipelineEngine, rank: int, nodes: int, size: int, first: str, before: int
) -> list[str]:
    """What node ``rank`` of ``nodes`` runs; ``first`` is the host of the first one.

    There are ``before`` nodes on the same machine: SGLang answers health checks on a port of each.
    """
    common = ["--nnodes", str(nodes), "--node-rank", str(rank)]
    if engine == "vllm-pp":
        words = [
            "vllm", "serve", "$MODEL", "--pipeline-parallel-size", str(size),
            "--tensor-parallel-size", "1", "--distributed-executor-backend", "mp", *common,
            "--master-addr", first, "--master-port", str(MEETING_PORT),
        ]  # fmt: skip
        return [*words, "--headless"] if rank else words
    words = [
        "python3", "-m", "sglang.launch_server", "--model-path", "$MODEL", "--pp-size", str(size),
        "--tp-size", "1", *common, "--dist-init-addr", f"{first}:{MEETING_PORT}",
    ]  # fmt: skip
    return [*words, "--port", str(SGLANG_PORT + before)] if before else words


def _options(text: str, source: str) -> dict[str, Any]:
    """TensorRT-LLM's options: YAML, of which this reads what is JSON."""
    values = parse_json(text, source)
    if not isinstance(values, dict) or not isinstance(values.get("pp_partition"), list):
        raise InputError(
            "no list", source=source, place="pp_partition", expected="layers of each rank"
        )
    return values


def _problems(counts: Sequence[int], size: object, num_layers: int | None, name: str) -> list[str]:
    found = [f"{name} is empty"] if not counts else []
    found += [
        f"{name}: rank {rank} has {count} layers; engines accept that in silence, and fail later"
        for rank, count in enumerate(counts)
        if count < 1
    ]
    if size != len(counts):
        found.append(f"{name} is of {len(counts)} ranks, and the pipeline of {size}")
    if num_layers is not None and sum(counts) != num_layers:
        found.append(f"{name} has {sum(counts)} layers, and the model has {num_layers}")
    return found
