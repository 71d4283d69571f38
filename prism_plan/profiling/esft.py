"""Read expert-score folders of ESFT (github.com/deepseek-ai/ESFT, ``results/expert_scores``).

A folder holds one file per MoE layer, ``expert_weights_<decoder layer>.txt``, with one line per
request: the expert ids of all its tokens, tab-separated, K per token in no order of weight; two
tabs; then the gate weights in the same order. Line i is the same request in every file. Prefill
and decode are not distinguished. Files may be compressed with gzip, ``.txt.gz``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_LINE_OF_NUMBERS, require_at_most
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.gzip_text import read_maybe_gzipped_text
from prism_plan.io.location import Location
from prism_plan.io.open_file import unreadable
from prism_plan.io.text_files import iterate_lines
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.messages import CHECK_MODEL, Notify
from prism_plan.profiling.sources import Source, require_distinct
from prism_plan.trace import (
    UNKNOWN_PHASE,
    TokenBatch,
    Trace,
    first_invalid_selection,
    trace_from_batches,
)

FILE_NAME = re.compile(r"expert_weights_(0|[1-9][0-9]{0,8})\.txt(?:\.gz)?")

#: What an expert id and a gate weight look like; int() and float() would also take 1_0 and ٣.
ID = r"-?[0-9]{1,9}"
WEIGHT = r"-?(?:(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?|nan|inf)"

Row = tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]
#: A line that cannot be read stands as its error, where bad rows are left out.
Rows = list[Row | InputError]


def read_esft(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    weights: bool = True,
    skip_bad: bool = False,
    progress: Callable[[str, int], None] = lambda label, done: None,
    notify: Notify = lambda message: None,
) -> Trace:
    """One token-level trace from ESFT folders, each a task (named by its label or its folder).

    ``progress`` is called with the folder and the number of files read so far. With ``skip_bad``
    requests of which a line does not parse or is of another model are left out; ``notify`` is
    called with a notice of them.

    Raises
    ------
    InputError
        A layer file is missing or foreign, files disagree on the number of requests or tokens, or
        a line does not parse; names file and line.
    """
    tasks = [source.task or source.path.resolve().name for source in sources]
    require_distinct(tasks)
    bad = BadRows(skip_bad)
    batches = list(_batches(sources, model, weights, bad, progress))
    bad.require_good()
    bad.report(notify)
    return trace_from_batches(
        model,
        tasks,
        batches,
        provenance={
            "source": "esft",
            "folders": {t: s.path.name for t, s in zip(tasks, sources, strict=True)},
            **bad.provenance(),
        },
        name="esft",
    )


def _batches(
    sources: Sequence[Source],
    model: ModelSpec,
    weights: bool,
    bad: BadRows,
    progress: Callable[[str, int], None],
) -> Iterator[TokenBatch]:
    request = 0
    for code, source in enumerate(sources):
        folder = _read_folder(source.path, model, bad, progress, code * model.num_layers)
        for index in range(len(folder[0])):
            try:
                batch = _request(source.path, model, folder, index, (request, code), weights)
            except InputError as error:
                bad.skip_or_raise(source.path, error)
                continue
            bad.count_good(source.path)
            yield batch
            request += 1


def _request(
    folder: Path,
    model: ModelSpec,
    layers: Sequence[Rows],
    index: int,
    codes: tuple[int, int],
    weights: bool,
) -> TokenBatch:
    """The tokens of line ``index`` of every layer's file; ``codes`` of its request and task."""
    lines: list[Row] = []
    for rows in layers:
        row = rows[index]
        if isinstance(row, InputError):
            raise row
        lines.append(row)
    ids = [row[0] for row in lines]
    tokens = _same_tokens(folder, model, index, ids)
    shape = (tokens, model.num_layers, model.top_k)
    experts = np.stack([row.reshape(tokens, model.top_k) for row in ids], axis=1)
    gates = np.stack([row[1].reshape(tokens, -1) for row in lines], axis=1)
    batch = TokenBatch(
        request=np.full(tokens, codes[0], np.int32),
        position=np.arange(tokens, dtype=np.int32),
        phase=np.full(tokens, UNKNOWN_PHASE, np.int8),
        task=np.full(tokens, codes[1], np.int32),
        experts=experts.reshape(shape),
        weights=gates.reshape(shape) if weights else None,
    )
    bad = first_invalid_selection(batch.experts, model.num_experts)
    if bad is not None:
        error = batch.invalid_selection(model)
        assert error is not None
        layer = model.moe_layers[bad[1]]
        raise Location(
            folder / f"expert_weights_{layer}.txt", f"line {index + 1} token {bad[0] + 1}"
        ).error(error.found, error.expected, error.remedy)
    return batch


def _numbers(text: str, pattern: str, dtype: type[np.generic], at: Location) -> npt.NDArray[Any]:
    """Parse tab-separated numbers."""
    words = text.split("\t")
    if not re.fullmatch(f"{pattern}(\t{pattern})*", text):
        index = next(i for i, word in enumerate(words) if not re.fullmatch(pattern, word))
        remedy = "the file may be truncated or damaged"
        raise at.within(f"number {index + 1}").error(f"{words[index]!r:.40}", "a number", remedy)
    return np.array(words, dtype=dtype)


def _same_tokens(
    folder: Path, model: ModelSpec, index: int, ids: Sequence[npt.NDArray[np.uint16]]
) -> int:
    for layer, row in zip(model.moe_layers, ids, strict=True):
        if len(row) != len(ids[0]):
            raise Location(folder / f"expert_weights_{layer}.txt", f"line {index + 1}").error(
                f"{len(row) // model.top_k} tokens",
                f"{len(ids[0]) // model.top_k}, as in layer {model.moe_layers[0]}",
                "the file may be truncated",
            )
    return len(ids[0]) // model.top_k


def _read_folder(
    folder: Path,
    model: ModelSpec,
    bad: BadRows,
    progress: Callable[[str, int], None],
    num_read: int,
) -> list[Rows]:
    """The rows of every MoE layer's file, in layer order."""
    if not folder.is_dir():
        raise Location(folder).error("not a folder", "a folder of expert_weights_*.txt")
    found = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(error, folder, "give a readable folder") from error
    for name in names:
        match = FILE_NAME.fullmatch(name)
        if match and int(match.group(1)) not in found:
            found[int(match.group(1))] = folder / name
        elif name.startswith("expert_weights_") and name.endswith((".txt", ".txt.gz")):
            raise Location(folder / name).error(
                "its layer was read already" if match else "not the name of a layer",
                "expert_weights_<decoder layer>.txt, each layer once",
            )
    if not found:
        raise Location(folder).error("no expert_weights_*.txt in it")
    for layer in sorted(set(found) - set(model.moe_layers)):
        raise Location(found[layer]).error(
            f"layer {layer}",
            f"a MoE layer of {model.name}, {model.layers_text()}",
            "check ``model``",
        )
    for layer in model.moe_layers:
        if layer not in found:
            raise Location(folder).error(
                f"expert_weights_{layer}.txt is missing",
                f"a file for each MoE layer of {model.name}, {model.layers_text()}",
            )
    layers = []
    for number, layer in enumerate(model.moe_layers, start=1):
        layers.append(_read_layer(found[layer], model, bad))
        progress(folder.name, num_read + number)
    for layer, rows in zip(model.moe_layers, layers, strict=True):
        if len(rows) != len(layers[0]):
            raise Location(found[layer]).error(
                f"{len(rows)} requests",
                f"{len(layers[0])}, as in layer {model.moe_layers[0]}",
                "the file may be truncated",
            )
    if not layers[0]:
        raise Location(folder).error("no requests in it")
    return layers


def _read_layer(path: Path, model: ModelSpec, bad: BadRows) -> Rows:
    rows: Rows = []
    for number, line in enumerate(iterate_lines(read_maybe_gzipped_text(path)), start=1):
        at = Location(path, f"line {number}")
        require_at_most(len(line), MAX_LINE_OF_NUMBERS, "characters", source=path, place=at.place)
        try:
            rows.append(_read_line(line, model, at))
        except InputError as error:
            if not bad.skip:
                raise
            rows.append(error)
    return rows


def _read_line(line: str, model: ModelSpec, at: Location) -> Row:
    ids_text, tabs, weights_text = line.rstrip("\r").partition("\t\t")
    if not tabs:
        raise at.error(
            "no two tabs between ids and gate weights",
            "ids, two tabs, weights",
            "the file may be truncated",
        )
    ids = _numbers(ids_text, ID, np.int64, Location(at.source, f"{at.place}: ids"))
    gates = _numbers(weights_text, WEIGHT, np.float64, Location(at.source, f"{at.place}: weights"))
    if len(ids) != len(gates) or len(ids) % model.top_k:
        raise at.error(
            f"{len(ids)} ids and {len(gates)} weights",
            f"as many of both, {model.top_k} a token",
            "the line may be truncated, or ``model`` is not the model that was recorded",
        )
    if ids.min() < 0 or ids.max() >= model.num_experts:
        bad = int(np.argmax((ids < 0) | (ids >= model.num_experts)))
        raise at.within(f"token {bad // model.top_k + 1}").error(
            f"expert {ids[bad]}", f"ids 0..{model.num_experts - 1} of {model.name}", CHECK_MODEL
        )
    if not np.isfinite(gates).all() or (gates < 0).any() or (gates > 65504).any():
        raise at.error("a gate weight is negative, NaN or too large")
    return ids.astype(np.uint16), gates.astype(np.float16)
