"""Read expert statistics of TensorRT-LLM (``EXPERT_STATISTIC_ITER_RANGE``, ``…_PATH``).

As written by ``tensorrt_llm/_torch/modules/fused_moe`` of mid-2026 (class ``ExpertStatistic``). A
folder holds ``meta_info.json`` with ``num_experts`` and ``num_experts_per_token`` (and perhaps more
keys) and ``rank<r>.safetensors`` with one int64 [E] for each ``<iteration>_<decoder layer>``. All
are summed. Without attention data parallelism every rank counts the same tokens: the sum is then a
multiple of the calls, and so is the number of tokens, which leaves calls per token as they were.
Layers right behind the model's last one are multi-token-prediction layers and are left out.

With its load balancer on the engine counts slots, not experts, and ``num_experts`` is the number
of slots. Such a recording is refused where the two numbers differ; where they are equal
this cannot be detected, so record without a load balancer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prism_plan.io.json import parse_json
from prism_plan.io.location import Location
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import read_text
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import shown
from prism_plan.profiling.common.call_counts import Counts, sum_calls, trace_from_counts
from prism_plan.profiling.common.extra_layers import foreign_layer, split_mtp_layers
from prism_plan.profiling.common.json_fields import json_object
from prism_plan.profiling.common.messages import CHECK_MODEL, TRUNCATED, Notify
from prism_plan.profiling.common.task_counts import add_up_sources
from prism_plan.profiling.sources import Source, paths_by_task
from prism_plan.trace import Trace

RANK_FILE = re.compile(r"rank(\d+)\.safetensors")
KEY = re.compile(r"(\d{1,18})_(\d{1,9})")


def read_trtllm(
    sources: Sequence[Source], model: ModelSpec, *, notify: Notify = lambda message: None
) -> Trace:
    """One counts-only trace from statistics folders, each a task (its label or its folder's name).

    Folders of one label are added up.

    Raises
    ------
    InputError
        A file is missing, truncated or foreign; a tensor, layer or count is not of the model.
    """
    paths = paths_by_task(sources)
    calls = add_up_sources(sources, model, _read_folder, notify)
    folders = {}
    for task, parts in paths.items():
        names = [path.resolve().name for path in parts]
        folders[task] = names[0] if len(names) == 1 else names
    return trace_from_counts("trtllm", model, calls, {"folders": folders}, notify)


def _read_folder(folder: Path, model: ModelSpec) -> tuple[Counts, list[int]]:
    """Calls [L, E] of a folder, and the multi-token-prediction layers that were left out."""
    if not folder.is_dir():
        raise Location(folder).error(
            "not a folder", "a folder of meta_info.json and rank*.safetensors"
        )
    _check_meta(folder / "meta_info.json", model)
    ranks = {}
    for path in folder.iterdir():
        match = RANK_FILE.fullmatch(path.name)
        if match:
            ranks[int(match.group(1))] = path
    if not ranks:
        raise Location(folder).error("no rank*.safetensors in it")
    for rank in range(max(ranks)):
        if rank not in ranks:
            raise Location(folder).error(
                f"rank{rank}.safetensors is missing",
                f"the files of ranks 0..{max(ranks)}, whose calls are added up",
                "copy the folder again",
            )
    counts = np.zeros((model.num_layers, model.num_experts), np.int64)
    later_layers: dict[int, Location] = {}
    for _, path in sorted(ranks.items()):
        _add_rank(path, model, counts, later_layers)
    mtp_layers, stray = split_mtp_layers(later_layers, model)
    if stray is not None:
        raise foreign_layer(stray, model, later_layers[stray])
    return counts, mtp_layers


def _check_meta(path: Path, model: ModelSpec) -> None:
    meta = json_object(parse_json(read_text(path), path), Location(path))
    expected = {"num_experts": model.num_experts, "num_experts_per_token": model.top_k}
    for key, number in expected.items():
        if key not in meta:
            raise Location(path).error(f"key {key!r} is missing", " and ".join(map(repr, expected)))
        if meta[key] != number or isinstance(meta[key], bool):
            raise Location(path, key).error(
                shown(meta[key]),
                f"{number} of {model.name}",
                f"{CHECK_MODEL}, without a load balancer (which counts slots)",
            )


def _add_rank(
    path: Path, model: ModelSpec, counts: Counts, later_layers: dict[int, Location]
) -> None:
    """Read a rank's file and add its calls to ``counts`` [L, E] in place.

    Calls of layers after the model's last decoder layer are dropped; ``later_layers`` gets each
    such layer with the place in the file where it was first seen.

    Raises
    ------
    InputError
        The file cannot be read, safetensors is not installed, or a key, layer, shape or count is
        not of the model.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise Location(path).error(
            "safetensors is not installed", remedy="pip install 'prism-plan[hf]'"
        ) from error

    OpenFile(path).close()  # refuses pipes and devices, for safetensors would wait for them
    try:
        with safe_open(path, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                at = Location(path, f"key {key!r}")
                layer = _layer(key, model, at)
                part = tensors.get_slice(key)
                if part.get_dtype() != "I64" or part.get_shape() != [model.num_experts]:
                    raise at.error(
                        f"{part.get_dtype()} {part.get_shape()}",
                        f"I64 [{model.num_experts}], calls of each expert of {model.name}",
                        CHECK_MODEL,
                    )
                calls = tensors.get_tensor(key)
                bad = (calls < 0) | (calls >= 2**53)
                if bad.any():
                    expert = int(np.argmax(bad))
                    raise at.within(f"expert {expert}").error(
                        f"{calls[expert]} calls", "a whole number of at least 0"
                    )
                if layer >= model.num_decoder_layers:
                    later_layers.setdefault(layer, at)
                    continue
                row = model.moe_layers.index(layer)
                both = np.stack([counts[row], calls])[:, None]
                counts[row] = sum_calls(both, Location(path))[0]
    except (SafetensorError, OSError) as error:
        raise Location(path).error(
            f"not a readable safetensors file: {error}", remedy=TRUNCATED
        ) from error


def _layer(key: str, model: ModelSpec, at: Location) -> int:
    """The decoder layer of a key."""
    match = KEY.fullmatch(key)
    if match is None:
        raise Location(at.source).error(
            f"key {key!r:.60}", "<iteration>_<decoder layer>, as in '100_3'"
        )
    layer = int(match.group(2))
    if layer not in model.moe_layers and layer < model.num_decoder_layers:
        raise foreign_layer(layer, model, at)
    return layer
