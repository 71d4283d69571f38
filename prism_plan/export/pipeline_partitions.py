"""Pipeline partitions: unequal numbers of decoder layers per rank (vLLM, SGLang, TensorRT-LLM).

Ranks are GPUs in the order in which their layers execute; counts are over all hidden layers. Facts
as read and run at vLLM 0.33.0, SGLang 0.5.23 and stored files of TensorRT-LLM of mid-2026.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prism_plan.errors import InputError, UnsupportedFeature
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
#: Where ranks meet, on the machine of the first one.
MEETING_PORT = 29500


def not_contiguous(stages: Sequence[Stage], servers: Sequence[str]) -> str:
    """Why stages are no pipeline of ranks, or empty: a GPU would be two ranks."""
    ranks = Counter((stage.server, stage.gpu) for stage in stages)
    (server, gpu), times = ranks.most_common(1)[0]
    if times == 1:
        return ""
    return (
        f"gpu[{gpu}] of {servers[server]!r} executes {times} runs of layers with others between "
        "them, and a pipeline rank executes one"
    )


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
    hosts: Mapping[str, str], comments: Sequence[str],
) -> str:  # fmt: skip
    """The file of an engine: a script for all machines, or TensorRT-LLM's options.

    Raises
    ------
    UnsupportedFeature
        The engine wants as many ranks on every machine, and these have not.
    """
    counts = [stage.num_layers for stage in stages]
    if engine == "trtllm-pp":
        options = {"pipeline_parallel_size": len(counts), "pp_partition": counts}
        return json.dumps(options) + "\n"
    names = list(dict.fromkeys(servers[stage.server] for stage in stages))
    by_server = Counter(servers[stage.server] for stage in stages)
    if len(set(by_server.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in by_server.items())
        raise UnsupportedFeature(
            f"{engine} starts as many ranks on every machine, and the plan has {listed}; plan with "
            "equally many GPUs a server"
        )
    first = hosts[names[0]]
    commands = {}
    for number, name in enumerate(names):
        common = ["--nnodes", str(len(names)), "--node-rank", str(number)]
        if engine == "vllm-pp":
            words = [
                "vllm", "serve", "$MODEL", "--pipeline-parallel-size", str(len(counts)),
                "--tensor-parallel-size", "1", "--distributed-executor-backend", "mp", *common,
                "--master-addr", first, "--master-port", str(MEETING_PORT),
            ]  # fmt: skip
            words += ["--headless"] if number else []
        else:
            words = [
                "python3", "-m", "sglang.launch_server", "--model-path", "$MODEL", "--pp-size",
                str(len(counts)), "--tp-size", "1", *common, "--dist-init-addr",
                f"{first}:{MEETING_PORT}",
            ]  # fmt: skip
        commands[name] = [words]
    exported = {VARIABLES[engine]: ",".join(map(str, counts))}
    return ShellScript(comments, {"MODEL": "model"}, exported, commands).text()


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
    flag = "--pipeline-parallel-size" if engine == "vllm-pp" else "--pp-size"
    found: list[str] = []
    ranks: list[str] = []
    sizes: set[str] = set()
    for name, commands in script.commands.items():
        for words in commands:
            sizes.add(_value(words, flag))
            ranks.append(_value(words, "--node-rank"))
            if _value(words, "--nnodes") != str(len(script.commands)):
                found.append(f"{name}: --nnodes is not {len(script.commands)}")
    if sorted(ranks) != sorted(map(str, range(len(ranks)))):
        found.append(f"--node-rank: {', '.join(ranks)}, not each of 0 to {len(ranks) - 1}")
    if len(sizes) > 1:
        found.append(f"{flag} differs between servers: {', '.join(sorted(sizes))}")
    size = min(sizes)
    number = int(size) if size.isascii() and size.isdigit() else None
    return found + _problems(counts, number, num_layers, VARIABLES[engine])


def _options(text: str, source: str) -> dict[str, Any]:
    """TensorRT-LLM's options: YAML, of which this reads what is JSON."""
    values = parse_json(text, source)
    if not isinstance(values, dict) or not isinstance(values.get("pp_partition"), list):
        raise InputError(
            "no list", source=source, place="pp_partition", expected="layers of each rank"
        )
    return values


def _problems(counts: Sequence[int], size: object, num_layers: int | None, name: str) -> list[str]:
    found = [
        f"{name}: rank {rank} has {count} layers; engines accept that in silence, and fail later"
        for rank, count in enumerate(counts)
        if count < 1
    ]
    if size != len(counts):
        found.append(f"{name} is of {len(counts)} ranks, and the pipeline of {size}")
    if num_layers is not None and sum(counts) != num_layers:
        found.append(f"{name} has {sum(counts)} layers, and the model has {num_layers}")
    return found


def _value(words: Sequence[str], flag: str) -> str:
    """What follows a flag, "none" where it is not given."""
    return words[words.index(flag) + 1] if flag in words[:-1] else "none"
