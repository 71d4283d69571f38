"""Whether an engine's file is one that the engine loads, and loads as it is meant."""

from __future__ import annotations

from prism_plan.export import llamacpp, pipeline_partitions
from prism_plan.io.export import Engine
from prism_plan.io.text_files import read_text
from prism_plan.printable_text import quantity


def check_engine_file(path: str, engine: Engine, num_layers: int | None) -> tuple[str, list[str]]:
    """A summary of an engine's file, and everything wrong with it.

    ``num_layers`` are the decoder layers of the model, where it is known. What engines accept
    in silence counts as wrong.

    Raises
    ------
    InputError
        The file cannot be read, or is none of the engine's.
    """
    text = read_text(path)
    if engine == "llamacpp":
        placing = llamacpp.read_placing(text, path)
        problems = llamacpp.check_script(text, path, num_layers)
        if placing.overrides:
            return f"experts of {quantity(len(placing.overrides), 'layer')} away", problems
        return f"{quantity(len(placing.devices), 'run')} of layers", problems
    problems = pipeline_partitions.check_partition(engine, text, path, num_layers)
    counts = pipeline_partitions.read_partition(engine, text, path)
    return f"{quantity(len(counts), 'rank')}, layers {','.join(map(str, counts))}", problems
