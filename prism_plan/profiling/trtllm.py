"""Expert statistics of TensorRT-LLM, ``EXPERT_STATISTIC_ITER_RANGE`` and ``EXPERT_STATISTIC_PATH``.

Read in ``tensorrt_llm/_torch/modules/fused_moe`` of mid-2026 (class ``ExpertStatistic``). A folder
holds ``meta_info.json`` with ``num_experts`` and ``num_experts_per_token`` (more keys may stand
there) and ``rank<r>.safetensors`` with one int64 [E] for each ``<iteration>_<decoder layer>``. All
are summed. Without attention data parallelism every rank counts the same tokens: the sum is then a
multiple of the calls, and so is the number of tokens, which leaves calls per token as they were.
Layers right behind the model's last one are multi-token-prediction layers and are left out.

With its load balancer on the engine counts slots, not experts, and ``num_experts`` is the number
of slots. Such a recording is refused where the two numbers differ; where they are equal it cannot
be told apart, so record without a load balancer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.text_files import read_text
from prism_plan.model import ModelSpec
from prism_plan.profiling.added import AddedCounts
from prism_plan.profiling.layers import decoder_end, mtp_layers, mtp_notice
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import (
    CHECK_MODEL,
    CUT_SHORT,
    Notify,
    counts_trace,
    default_task,
    files_of_tasks,
    json_object,
)
from prism_plan.profiling.tokens import require_every_layer, sum_calls
from prism_plan.text import shown
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
        A file is missing, cut short or foreign; a tensor, layer or count is not of the model.
    """
    files = files_of_tasks(sources)
    added = AddedCounts()
    left_out: set[int] = set()
    for source in sources:
        calls, extra = _read_folder(source.path, model)
        added.add(source.task or default_task(source.path), calls, source)
        left_out.update(extra)
    for task, calls in added.calls.items():
        require_every_layer(task, calls, model, added.files(task))
    folders = {
        task: paths[0].resolve().name if len(paths) == 1 else [p.resolve().name for p in paths]
        for task, paths in files.items()
    }
    for text in added.copies:
        notify(text)
    if left_out:
        notify(mtp_notice(left_out, model))
    return counts_trace("trtllm", model, added.calls, {"folders": folders}, notify)


def _read_folder(folder: Path, model: ModelSpec) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Calls [L, E] of a folder, and the multi-token-prediction layers that were left out."""
    if not folder.is_dir():
        raise InputError(
            "not a folder",
            source=folder,
            expected="a folder of meta_info.json and rank*.safetensors",
        )
    _check_meta(folder / "meta_info.json", model)
    ranks = {}
    for path in folder.iterdir():
        match = RANK_FILE.fullmatch(path.name)
        if match:
            ranks[int(match.group(1))] = path
    if not ranks:
        raise InputError("no rank*.safetensors in it", source=folder)
    for rank in range(max(ranks)):
        if rank not in ranks:
            raise InputError(
                f"rank{rank}.safetensors is missing",
                source=folder,
                expected=f"the files of ranks 0..{max(ranks)}, whose calls are added up",
                remedy="copy the folder again",
            )
    counts = np.zeros((model.num_layers, model.num_experts), np.int64)
    beyond: dict[int, tuple[Path, str]] = {}
    for _, path in sorted(ranks.items()):
        _add_rank(path, model, counts, beyond)
    extra, stray = mtp_layers(beyond, model)
    if stray is not None:
        raise _foreign_layer(*beyond[stray], stray, model)
    return counts, extra


def _check_meta(path: Path, model: ModelSpec) -> None:
    meta = json_object(parse_json(read_text(path), path), path, "")
    wanted = {"num_experts": model.num_experts, "num_experts_per_token": model.top_k}
    for key, number in wanted.items():
        if key not in meta:
            raise InputError(
                f"key {key!r} is missing", source=path, expected=" and ".join(map(repr, wanted))
            )
        if meta[key] != number or isinstance(meta[key], bool):
            raise InputError(
                shown(meta[key]),
                source=path,
                place=key,
                expected=f"{number} of {model.name}",
                remedy=f"{CHECK_MODEL}, without a load balancer (which counts slots)",
            )


def _add_rank(
    path: Path,
    model: ModelSpec,
    counts: npt.NDArray[np.int64],
    beyond: dict[int, tuple[Path, str]],
) -> None:
    """Add a rank's calls to ``counts`` [L, E]; layers ``beyond`` the model's are noted there."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(
            "safetensors is not installed", source=path, remedy="pip install 'prism-plan[hf]'"
        ) from error

    OpenFile(path).close()  # refuses pipes and devices, for safetensors would wait for them
    try:
        with safe_open(path, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                layer = _layer(path, key, model)
                part = tensors.get_slice(key)
                if part.get_dtype() != "I64" or part.get_shape() != [model.num_experts]:
                    raise InputError(
                        f"{part.get_dtype()} {part.get_shape()}",
                        source=path,
                        place=f"key {key!r}",
                        expected=f"I64 [{model.num_experts}], calls of each expert of {model.name}",
                        remedy=CHECK_MODEL,
                    )
                calls = tensors.get_tensor(key)
                if calls.min() < 0 or calls.max() >= 2**53:
                    expert = int(np.argmax((calls < 0) | (calls >= 2**53)))
                    raise InputError(
                        f"{calls[expert]} calls",
                        source=path,
                        place=f"key {key!r} expert {expert}",
                        expected="a whole number of at least 0",
                    )
                if layer >= decoder_end(model):
                    beyond.setdefault(layer, (path, key))
                    continue
                at = model.moe_layers.index(layer)
                counts[at] = sum_calls(np.stack([counts[at], calls])[:, None], path)[0]
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"not a readable safetensors file: {error}", source=path, remedy=CUT_SHORT
        ) from error


def _layer(path: Path, key: str, model: ModelSpec) -> int:
    """The decoder layer of a key."""
    match = KEY.fullmatch(key)
    if match is None:
        raise InputError(
            f"key {key!r:.60}", source=path, expected="<iteration>_<decoder layer>, as in '100_3'"
        )
    layer = int(match.group(2))
    if layer not in model.moe_layers and layer < decoder_end(model):
        raise _foreign_layer(path, key, layer, model)
    return layer


def _foreign_layer(path: Path, key: str, layer: int, model: ModelSpec) -> InputError:
    return InputError(
        f"layer {layer}",
        source=path,
        place=f"key {key!r}",
        expected=f"a MoE layer of {model.name}, {model.layers_text()}",
        remedy=CHECK_MODEL,
    )
