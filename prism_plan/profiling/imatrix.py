"""Read importance matrices of llama.cpp, GGUF files of ``llama-imatrix`` (since July 2025).

As written by ``tools/imatrix/imatrix.cpp``: for each fused tensor of experts, such as
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
from prism_plan.input_limits import require_at_most
from prism_plan.io.location import Location
from prism_plan.io.open_file import OpenFile
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.call_counts import Counts, trace_from_counts
from prism_plan.profiling.common.extra_layers import foreign_layer, split_mtp_layers
from prism_plan.profiling.common.messages import CHECK_MODEL, TRUNCATED, Notify
from prism_plan.profiling.common.task_counts import add_up_sources
from prism_plan.profiling.sources import Source, paths_by_task
from prism_plan.trace import Trace

COUNTS = re.compile(r"blk\.(\d{1,9})\.ffn_(?:gate|up|down|gate_up)_exps\.weight\.counts")
DENSE_COUNTS = re.compile(r"blk\.\d{1,9}\.(?!.*_(?:ch)?exps\.).*\.counts")
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
        No GGUF file, of the older format or made from it, truncated, or of another model; the
        package ``gguf`` is not installed.
    """
    paths = paths_by_task(sources)
    chunks = {}

    def read(path: Path, model: ModelSpec) -> tuple[Counts, list[int]]:
        tensors, keys = _load_counts(path)
        chunks[path.name] = keys.get("imatrix.chunk_count")
        return _calls(tensors, model, path)

    calls = add_up_sources(sources, model, read, notify)
    files = {task: [path.name for path in parts] for task, parts in paths.items()}
    return trace_from_counts("imatrix", model, calls, {"files": files, "chunks": chunks}, notify)


def _calls(
    tensors: Mapping[str, npt.NDArray[Any]], model: ModelSpec, path: Path
) -> tuple[Counts, list[int]]:
    """Calls [L, E] of a file, and the multi-token-prediction layers that were left out."""
    by_layer: dict[int, tuple[str, Counts]] = {}
    for name, values in tensors.items():
        match = COUNTS.fullmatch(name)
        if match is None:
            continue
        at = Location(path, name)
        counts = _expert_counts(values, model, at)
        known, others = by_layer.setdefault(int(match[1]), (name, counts))
        if not np.array_equal(others, counts):
            expert = int(np.argmax(others != counts))
            found = f"{counts[expert]:,} calls of expert {expert}"
            raise at.error(found, f"{others[expert]:,}, as in {known}", TRUNCATED)
    if not by_layer:
        raise Location(path).error(
            "no counts of experts in it",
            "blk.N.ffn_gate_exps.weight.counts, as llama-imatrix writes it for a "
            "Mixture-of-Experts model",
            AGAIN,
        )
    mtp_layers, stray = split_mtp_layers(by_layer, model)
    for layer, (name, _) in sorted(by_layer.items()):
        dense = layer < model.num_decoder_layers and layer not in model.moe_layers
        if layer == stray or dense:
            raise foreign_layer(layer, model, Location(path, name))
    _check_tokens(tensors, by_layer, model, path)
    calls = np.zeros((model.num_layers, model.num_experts), np.int64)
    for row, layer in enumerate(model.moe_layers):
        if layer in by_layer:
            calls[row] = by_layer[layer][1]
    return calls, mtp_layers


def _expert_counts(values: npt.NDArray[Any], model: ModelSpec, at: Location) -> Counts:
    """The counts of a tensor, int64 [E]."""
    if values.dtype != np.float32 or values.size != max(values.shape, default=0):
        found = f"{values.dtype} of shape {list(values.shape)}"
        raise at.error(found, f"float32 [{model.num_experts}]")
    if values.size == 1 < model.num_experts:
        raise at.error(
            "one count for all experts",
            f"{model.num_experts} counts",
            f"the older format, of which it was made, has no counts of experts: {AGAIN}",
        )
    if values.size != model.num_experts:
        expected = f"{model.num_experts} of {model.name}"
        raise at.error(f"{values.size} experts", expected, CHECK_MODEL)
    flat = values.reshape(-1).astype(np.float64)
    good = (flat >= 0) & (flat < 2**53) & (flat == np.floor(flat))  # all False for NaN
    if not good.all():
        expert = int(np.argmin(good))
        raise at.within(f"expert {expert}").error(
            f"{flat[expert]:g} calls", "a whole number of at least 0 and below 2^53", TRUNCATED
        )
    return flat.astype(np.int64)


def _check_tokens(
    tensors: Mapping[str, npt.NDArray[Any]],
    by_layer: Mapping[int, tuple[str, Counts]],
    model: ModelSpec,
    path: Path,
) -> None:
    """Refuse more calls in a layer than the tokens counted by dense tensors can make."""
    num_tokens = [
        float(values.max())
        for name, values in tensors.items()
        if values.size == 1 and values.dtype == np.float32 and DENSE_COUNTS.fullmatch(name)
    ]
    max_calls = max(num_tokens, default=np.inf) * model.top_k * (1 + 1e-6)  # counts may be rounded
    for name, counts in by_layer.values():
        total = counts.sum(dtype=np.float64)
        if total > max_calls:
            raise Location(path, name).error(
                f"{total:,.0f} calls of {max(num_tokens):,.0f} tokens",
                f"{model.top_k} a token, top-k of {model.name}",
                f"{CHECK_MODEL}; if it continues from a file of the older format, {AGAIN}",
            )


# ------------------------------------------------------------------------------------ the file


def _load_counts(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The tensors of counts of a GGUF file, and its keys of numbers of chunks."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise Location(path).error(
            "gguf is not installed", remedy="pip install 'prism-plan[gguf]'"
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
            raise Location(path).error(
                f"not a readable GGUF file ({type(error).__name__}: {error!s:.80})",
                remedy=TRUNCATED,
            ) from error
        file.require_unchanged()
    return tensors, keys


def _check_header(file: OpenFile, path: Path) -> None:
    """Refuse what is no GGUF file, and one whose header declares more than the file can hold.

    The ``gguf`` package reads a declared array of any length item by item, also past the end.
    """

    def read(form: str, at: int) -> int:
        data = file.pread(struct.calcsize(form), min(at, file.size))
        if len(data) < struct.calcsize(form):
            raise Location(path).error("the file ends within its header", remedy=TRUNCATED)
        return int(struct.unpack(form, data)[0])

    def text_end(at: int) -> int:
        end = at + 8 + read("<Q", at)
        read("<B", end - 1)  # raises where the file ends before
        return end

    if file.pread(4, 0) != b"GGUF":
        older = b"blk." in file.pread(4096, 0)
        raise Location(path).error(
            "an importance matrix of the older format (.dat)" if older else "no GGUF file",
            "a GGUF file of llama-imatrix",
            f"the older format has no counts of experts: {AGAIN}" if older else "",
        )
    require_at_most(read("<Q", 8), MAX_TENSORS, "tensors", source=path)
    keys = read("<Q", 16)
    require_at_most(keys, MAX_KEYS, "keys", source=path)
    at = 24
    left = MAX_VALUES
    for _ in range(keys):
        at = text_end(at)
        kind = read("<I", at)
        at += 4
        count = 1
        if kind == _ARRAY:
            kind, count = read("<I", at), read("<Q", at + 4)
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
            raise Location(path).error(f"a value of type {kind}", remedy=TRUNCATED)
