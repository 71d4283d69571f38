"""Importance matrices of llama.cpp, GGUF files that ``llama-imatrix`` writes (since July 2025).

Read in ``tools/imatrix/imatrix.cpp``: for each fused tensor of experts, such as
``blk.3.ffn_gate_exps.weight``, the file holds sums over its inputs, ``….in_sum2`` (in newer files
also ``….in_sum``), and ``….counts``, float32 [E] (in the file's order [1, E]): how many rows each
expert was given, one a token and selection. Counts are of tokens, not of chunks, and are added up
over chunks and over files read with ``--in-file``. Gate, up and down projections (or gate and up
fused) have the same inputs, so that their counts are equal. A dense tensor has one count, the
number of tokens. Counts above 2^24 are rounded to what a float32 holds. ``blk.N`` is decoder
layer N.

The older format (``.dat``) has no counts of single experts: converted to GGUF each expert has the
same one count, and continued with more text the old tokens count for every expert. All of these
are refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.open_file import OpenFile
from prism_plan.limits import require_at_most
from prism_plan.model import ModelSpec
from prism_plan.profiling.common.call_counts import require_every_layer
from prism_plan.profiling.common.extra_layers import decoder_end, mtp_layers, mtp_notice
from prism_plan.profiling.common.json_fields import (
    CHECK_MODEL,
    CUT_SHORT,
    Notify,
    counts_trace,
    default_task,
    files_of_tasks,
)
from prism_plan.profiling.common.task_counts import AddedCounts
from prism_plan.profiling.sources import Source
from prism_plan.trace import Trace

COUNTS = re.compile(r"blk\.(\d{1,9})\.ffn_(?:gate|up|down|gate_up)_exps\.weight\.counts")
OF_DENSE = re.compile(r"blk\.\d{1,9}\.(?!.*_(?:ch)?exps\.).*\.counts")
AGAIN = "run llama-imatrix again with -o imatrix.gguf"
#: Tensors and keys of a file, and values of the arrays under its keys: the reader makes some
#: objects of each. A file has some ten tensors a layer and four keys.
MAX_TENSORS, MAX_KEYS, MAX_VALUES = 2**16, 2**10, 2**16
#: Bytes of each kind of value of a key that has a fixed size; then the numbers of the other kinds.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


def read_imatrix(
    sources: Sequence[Source], model: ModelSpec, *, notify: Notify = lambda message: None
) -> Trace:
    """One counts-only trace from GGUF files, each a task (its label or its stem).

    Files of one label are added up.

    Raises
    ------
    InputError
        No GGUF file, of the older format or made from it, cut short, or of another model; the
        package ``gguf`` is not installed.
    """
    files = files_of_tasks(sources)
    added = AddedCounts()
    left_out: set[int] = set()
    chunks = {}
    for source in sources:
        tensors, keys = _tensors(source.path)
        calls, extra = _calls(tensors, model, source.path)
        added.add(source.task or default_task(source.path), calls, source)
        left_out.update(extra)
        chunks[source.path.name] = keys.get("imatrix.chunk_count")
    for task, calls in added.calls.items():
        require_every_layer(task, calls, model, added.files(task))
    for text in [*added.copies, mtp_notice(left_out, model)]:
        if text:
            notify(text)
    names = {task: [path.name for path in paths] for task, paths in files.items()}
    provenance = {"files": names, "chunks": chunks}
    return counts_trace("imatrix", model, added.calls, provenance, notify)


def _calls(
    tensors: Mapping[str, npt.NDArray[Any]], model: ModelSpec, path: Path
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Calls [L, E] of a file, and the multi-token-prediction layers that were left out."""
    first: dict[int, tuple[str, npt.NDArray[np.int64]]] = {}
    for name, values in tensors.items():
        match = COUNTS.fullmatch(name)
        if match is None:
            continue
        counts = _whole(name, values, model, path)
        known, others = first.setdefault(int(match[1]), (name, counts))
        if not np.array_equal(others, counts):
            expert = int(np.argmax(others != counts))
            raise InputError(
                f"{counts[expert]:,} calls of expert {expert}",
                source=path,
                place=name,
                expected=f"{others[expert]:,}, as in {known}",
                remedy=CUT_SHORT,
            )
    if not first:
        raise InputError(
            "no counts of experts in it",
            source=path,
            expected="blk.N.ffn_gate_exps.weight.counts, as llama-imatrix writes it for a "
            "Mixture-of-Experts model",
            remedy=AGAIN,
        )
    extra, stray = mtp_layers(first, model)
    for layer, (name, _) in sorted(first.items()):
        if layer == stray or (layer < decoder_end(model) and layer not in model.moe_layers):
            raise InputError(
                f"layer {layer}",
                source=path,
                place=name,
                expected=f"a MoE layer of {model.name}, {model.layers_text()}",
                remedy=CHECK_MODEL,
            )
    _check_tokens(tensors, first, model, path)
    calls = np.zeros((model.num_layers, model.num_experts), np.int64)
    for at, layer in enumerate(model.moe_layers):
        if layer in first:
            calls[at] = first[layer][1]
    return calls, extra


def _whole(
    name: str, values: npt.NDArray[Any], model: ModelSpec, path: Path
) -> npt.NDArray[np.int64]:
    """The counts of a tensor, int64 [E]."""
    if values.dtype != np.float32 or values.size != max(values.shape, default=0):
        raise InputError(
            f"{values.dtype} of shape {list(values.shape)}",
            source=path,
            place=name,
            expected=f"float32 [{model.num_experts}]",
        )
    if values.size == 1 < model.num_experts:
        raise InputError(
            "one count for all experts",
            source=path,
            place=name,
            expected=f"{model.num_experts} counts",
            remedy=f"the older format, of which it was made, has no counts of experts: {AGAIN}",
        )
    if values.size != model.num_experts:
        raise InputError(
            f"{values.size} experts",
            source=path,
            place=name,
            expected=f"{model.num_experts} of {model.name}",
            remedy=CHECK_MODEL,
        )
    flat = values.reshape(-1).astype(np.float64)
    good = (flat >= 0) & (flat < 2**53) & (flat == np.floor(flat))  # NaN is none of them
    if not good.all():
        expert = int(np.argmin(good))
        raise InputError(
            f"{flat[expert]:g} calls",
            source=path,
            place=f"{name} expert {expert}",
            expected="a whole number of at least 0 and below 2^53",
            remedy=CUT_SHORT,
        )
    return flat.astype(np.int64)


def _check_tokens(
    tensors: Mapping[str, npt.NDArray[Any]],
    first: Mapping[int, tuple[str, npt.NDArray[np.int64]]],
    model: ModelSpec,
    path: Path,
) -> None:
    """Refuse more calls in a layer than the tokens that dense tensors counted can make."""
    counted = [
        float(values.max())
        for name, values in tensors.items()
        if values.size == 1 and values.dtype == np.float32 and OF_DENSE.fullmatch(name)
    ]
    most = max(counted, default=np.inf) * model.top_k * (1 + 1e-6)  # counts may be rounded
    for name, counts in first.values():
        total = counts.sum(dtype=np.float64)
        if total > most:
            raise InputError(
                f"{total:,.0f} calls of {max(counted):,.0f} tokens",
                source=path,
                place=name,
                expected=f"{model.top_k} a token, top-k of {model.name}",
                remedy=f"{CHECK_MODEL}; if it goes on from a file of the older format, {AGAIN}",
            )


# ------------------------------------------------------------------------------------ the file


def _tensors(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The tensors of counts of a GGUF file, in memory, and its numbers of chunks by their keys."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(
            "gguf is not installed", source=path, remedy="pip install 'prism-plan[gguf]'"
        ) from error

    with OpenFile(path) as file:
        _check_header(file, path)
        try:
            with file.regular() as regular:
                reader = GGUFReader(regular)
            tensors = {
                tensor.name: np.array(tensor.data)
                for tensor in reader.tensors
                if tensor.name.endswith(".counts")
            }
            keys = {
                name: field.contents()
                for name, field in reader.fields.items()
                if name.startswith("imatrix.chunk")
            }
        except InputError:
            raise
        except Exception as error:  # hostile bytes make the reader raise anything
            raise InputError(
                f"not a readable GGUF file ({type(error).__name__}: {error!s:.80})",
                source=path,
                remedy=CUT_SHORT,
            ) from error
        file.require_unchanged()
    return tensors, keys


def _check_header(file: OpenFile, path: Path) -> None:
    """Refuse what is no GGUF file, and one whose header declares more than the file can hold.

    The ``gguf`` package reads a declared array of any length item by item, also past the end.
    """

    def number(form: str, at: int) -> int:
        data = file.pread(struct.calcsize(form), min(at, file.size))
        if len(data) < struct.calcsize(form):
            raise InputError("the file ends within its header", source=path, remedy=CUT_SHORT)
        return int(struct.unpack(form, data)[0])

    def text_end(at: int) -> int:
        end = at + 8 + number("<Q", at)
        number("<B", end - 1)  # it is there
        return end

    if file.pread(4, 0) != b"GGUF":
        older = b"blk." in file.pread(4096, 0)
        raise InputError(
            "an importance matrix of the older format (.dat)" if older else "no GGUF file",
            source=path,
            expected="a GGUF file of llama-imatrix",
            remedy=f"the older format has no counts of experts: {AGAIN}" if older else "",
        )
    require_at_most(number("<Q", 8), MAX_TENSORS, "tensors", source=path)
    keys = number("<Q", 16)
    require_at_most(keys, MAX_KEYS, "keys", source=path)
    at = 24
    left = MAX_VALUES
    for _ in range(keys):
        at = text_end(at)
        kind = number("<I", at)
        at += 4
        count = 1
        if kind == _ARRAY:
            kind, count = number("<I", at), number("<Q", at + 4)
            at += 12
            require_at_most(
                count,
                left,
                "values in an array",
                source=path,
                remedy="give the file of llama-imatrix, not the model",
            )
            left -= count
        if kind in _BYTES:
            at += count * _BYTES[kind]
        elif kind == _TEXT:
            for _ in range(count):
                at = text_end(at)
        else:
            raise InputError(f"a value of type {kind}", source=path, remedy=CUT_SHORT)
