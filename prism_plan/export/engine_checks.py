"""Whether an engine's file is one that the engine loads, and loads as it is meant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

from prism_plan.export import llamacpp, pipeline_partitions
from prism_plan.export.expert_maps.map_files import check_map, read_map
from prism_plan.export.llamacpp_log import differs_from_export
from prism_plan.io.export import SIDECAR, Engine, ExportFile, read_export
from prism_plan.io.text_files import read_text
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import quantity


def check_engine_file(
    path: str, engine: Engine, model: ModelSpec | None = None
) -> tuple[str, list[str]]:
    """A summary of an engine's file, and everything wrong with it.

    ``model`` is the one that it is for, where it is known. What engines accept in silence counts as
    wrong, and what is otherwise than in the sidecar beside it, if there is one. From there also
    comes how many ranks an expert map has, where it does not say so itself.

    Raises
    ------
    InputError
        The file cannot be read, or is none of the engine's.
    """
    text = read_text(path)
    sidecar = _sidecar_of(path)
    beside = [] if sidecar is None else _unlike_sidecar(path, text, engine, sidecar)
    summary, problems = _own_problems(path, text, engine, model, sidecar)
    return summary, [*problems, *beside]


def _unlike_sidecar(path: str, text: str, engine: Engine, sidecar: ExportFile) -> list[str]:
    """Whether a file is another one than the sidecar was written with."""
    if sidecar.engine != engine:
        return [f"{path}{SIDECAR} is of {sidecar.engine}"]
    if hashlib.sha256(text.encode()).hexdigest() != sidecar.file_sha256:
        return [f"it is not the file that {path}{SIDECAR} was written with: export it again"]
    return []


def _own_problems(
    path: str, text: str, engine: Engine, model: ModelSpec | None, sidecar: ExportFile | None
) -> tuple[str, list[str]]:
    num_layers = None if model is None else model.num_decoder_layers
    if num_layers is None and sidecar is not None:
        num_layers = sidecar.num_hidden_layers
    problems = []
    if engine == "sglang" or engine == "vllm-ascend" or engine == "trtllm":
        rows, ranks = read_map(engine, text, path)
        if sidecar is not None:
            ranks = ranks or len(sidecar.ranks)
            problems = _unlike_ranks(rows, ranks, sidecar)
        problems += check_map(engine, text, path, model, ranks)
        if engine == "sglang" and num_layers not in (None, len(rows)) and model is None:
            problems.append(f"{len(rows)} layers, and the model has {num_layers}")
        summary = f"expert map of {quantity(len(rows), 'layer')}"
        if ranks is None:
            summary += " (of how many ranks is not known: their slots were not checked)"
        return summary, problems
    if engine == "llamacpp":
        placing = llamacpp.read_placing(text, path)
        moe_layers = None if model is None else model.moe_layers
        problems = llamacpp.check_script(text, path, num_layers, moe_layers)
        if sidecar is not None:
            problems += differs_from_export(placing, sidecar)
        if placing.overrides:
            return f"experts of {quantity(len(placing.overrides), 'layer')} away", problems
        return f"{quantity(len(placing.devices), 'run')} of layers", problems
    problems = pipeline_partitions.check_partition(engine, text, path, num_layers)
    counts = pipeline_partitions.read_partition(engine, text, path)
    if sidecar is not None and counts != (planned := [part.num_layers for part in sidecar.stages]):
        problems.append(f"ranks have {counts} layers, and {planned} in {path}{SIDECAR}")
    return f"{quantity(len(counts), 'rank')}, layers {','.join(map(str, counts))}", problems


def _sidecar_of(path: str) -> ExportFile | None:
    """The sidecar beside an engine's file, ``None`` without one."""
    return read_export(path + SIDECAR) if os.path.exists(path + SIDECAR) else None


def _unlike_ranks(rows: Mapping[int, Sequence[int]], ranks: int, sidecar: ExportFile) -> list[str]:
    """Where a map has other ranks or slots than its sidecar."""
    if ranks != len(sidecar.ranks):
        return [f"{ranks} ranks, and {len(sidecar.ranks)} in the file beside it"]
    slots = ranks * (sidecar.slots or 0)
    return [
        f"layer {layer}: {len(row)} slots, and {slots} by the file beside it"
        for layer, row in rows.items()
        if len(row) != slots
    ][:1]
