"""Whether an engine's file is one that the engine loads, and loads as it is meant."""

from __future__ import annotations

from prism_plan.errors import InputError
from prism_plan.export import llamacpp, pipeline_partitions
from prism_plan.export.expert_maps.map_files import check_map, read_map
from prism_plan.io.export import SIDECAR, Engine, read_export
from prism_plan.io.text_files import read_text
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import quantity


def check_engine_file(
    path: str, engine: Engine, model: ModelSpec | None = None
) -> tuple[str, list[str]]:
    """A summary of an engine's file, and everything wrong with it.

    ``model`` is the one that it is for, where it is known. What engines accept in silence counts as
    wrong. How many ranks an expert map has is read from the sidecar beside it, where it does not
    say so itself.

    Raises
    ------
    InputError
        The file cannot be read, or is none of the engine's.
    """
    text = read_text(path)
    num_layers = None if model is None else model.num_decoder_layers
    if engine == "sglang" or engine == "vllm-ascend" or engine == "trtllm":
        rows, ranks = read_map(engine, text, path)
        problems = check_map(engine, text, path, model, ranks or _ranks_beside(path))
        return f"expert map of {quantity(len(rows), 'layer')}", problems
    if engine == "llamacpp":
        placing = llamacpp.read_placing(text, path)
        problems = llamacpp.check_script(text, path, num_layers)
        if placing.overrides:
            return f"experts of {quantity(len(placing.overrides), 'layer')} away", problems
        return f"{quantity(len(placing.devices), 'run')} of layers", problems
    problems = pipeline_partitions.check_partition(engine, text, path, num_layers)
    counts = pipeline_partitions.read_partition(engine, text, path)
    return f"{quantity(len(counts), 'rank')}, layers {','.join(map(str, counts))}", problems


def _ranks_beside(path: str) -> int | None:
    """How many ranks the sidecar of an expert map has, ``None`` without one."""
    try:
        return len(read_export(path + SIDECAR).ranks) or None
    except InputError:
        return None
