"""The forward passes in a dump of SGLang's recorder; see :mod:`prism_plan.profiling.sglang`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.profiling.sglang_dump import (
    array_of,
    number_of,
    require_decoder_layers,
    require_only_moe,
)
from prism_plan.profiling.tensors import CHECK_MODEL, CUT_SHORT
from prism_plan.text import shown
from prism_plan.trace import first_invalid_selection
from prism_plan.trace_totals import require_sum

EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE = 1, 2, 3, 4
#: Columns of ``topk_ids_of_layer``, whatever the model's top-k.
RECORDED_K = 8

Calls = npt.NDArray[np.int64]


@dataclass
class Pass:
    """A forward pass of one rank: T tokens, of which the rows ``kept`` [T] were recorded."""

    mode: int
    positions: npt.NDArray[np.int64]
    pieces: list[int] | None
    kept: npt.NDArray[np.bool_]
    experts: npt.NDArray[np.uint16]
    tokens_digest: bytes
    left_out_layers: list[int]


def pass_calls(
    record: Mapping[str, Any],
    table: npt.NDArray[np.int64],
    model: ModelSpec,
    path: Path,
    place: str,
) -> tuple[Calls, list[int]]:
    """Calls [MoE layers, E] of the logical experts in one pass, and layers that were left out."""
    key = "global_physical_count"
    counts = array_of(record, key, "L, P", path, place)
    place = f"{place} {key!r}"
    require_decoder_layers(len(counts), model, path, place)
    if counts.shape[1] != table.shape[1]:
        raise InputError(
            f"{counts.shape[1]} physical experts",
            source=path,
            place=place,
            expected=f"{table.shape[1]}, as in the map",
        )
    if counts.size and counts.min() < 0:
        layer, slot = np.unravel_index(int(counts.argmin()), counts.shape)
        raise InputError(
            f"{counts.min()}",
            source=path,
            place=f"{place} layer {layer} physical expert {slot}",
            expected="counts of at least 0",
        )
    extra = require_only_moe(counts != 0, model, "calls", path, place)
    require_sum(counts, "calls", path, place)
    calls = np.zeros((model.num_layers, model.num_experts), np.int64)
    rows = np.arange(model.num_layers)[:, None]
    np.add.at(calls, (rows, table), counts[list(model.moe_layers)].astype(np.int64))
    return calls, extra


def pass_tokens(
    record: Mapping[str, Any],
    table: npt.NDArray[np.int64],
    model: ModelSpec,
    path: Path,
    place: str,
) -> Pass:
    """The tokens of one pass, physical ids mapped back to logical ones."""
    mode = number_of(record, "forward_mode", path, place)
    if mode not in (EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE):
        raise InputError(
            f"forward_mode {mode}",
            source=path,
            place=place,
            expected="1 extend, 2 decode, 3 mixed or 4 idle",
            remedy="record without speculative decoding and split prefill",
        )
    ids = array_of(record, "topk_ids_of_layer", f"L, T, {RECORDED_K}", path, place)
    where = f"{place} 'topk_ids_of_layer'"
    require_decoder_layers(len(ids), model, path, where)
    if ids.shape[2] < model.top_k:
        raise InputError(
            f"{ids.shape[2]} columns",
            source=path,
            place=where,
            expected=f"at least {model.top_k}, top-k of {model.name}",
            remedy="this recorder keeps 8 experts a token; use its stat mode for more",
        )
    tokens = ids.shape[1]
    positions = _numbers(record, "positions", tokens, path, place)
    words = _numbers(record, "input_ids", tokens, path, place)
    extra = require_only_moe(ids != -1, model, "selections", path, where)
    ids = ids[list(model.moe_layers)]
    kept = (ids != -1).any(axis=(0, 2)) & (mode != IDLE_MODE)
    rows = ids[:, kept]
    at = np.flatnonzero(kept)
    whole = (rows[..., : model.top_k] >= 0).all(axis=2) & (rows[..., model.top_k :] == -1).all(
        axis=2
    )
    bad = ~whole | (rows >= table.shape[1]).any(axis=2)
    if bad.any():
        layer, row = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise InputError(
            f"physical experts {rows[layer, row].tolist()}",
            source=path,
            place=f"{where} layer {model.moe_layers[layer]} token {at[row]}",
            expected=f"{model.top_k} ids of 0..{table.shape[1] - 1}, then -1",
            remedy=f"{CHECK_MODEL}, with --disable-shared-experts-fusion and no pipeline stages",
        )
    index = np.arange(model.num_layers)[:, None, None]
    experts = np.ascontiguousarray(
        table[index, rows[..., : model.top_k]].transpose(1, 0, 2), np.uint16
    )
    twice = first_invalid_selection(experts, model.num_experts)
    if twice is not None and not rows[twice[1], twice[0], : model.top_k].any():
        raise InputError(
            "nothing was recorded (all ids are 0)",
            source=path,
            place=f"{where} layer {model.moe_layers[twice[1]]} token {at[twice[0]]}",
            expected=f"{model.top_k} different experts",
            remedy="record again; the recorder did not see this layer",
        )
    if twice is not None:
        raise InputError(
            f"experts {experts[twice].tolist()} name one expert twice",
            source=path,
            place=f"{where} layer {model.moe_layers[twice[1]]} token {at[twice[0]]}",
            expected=f"{model.top_k} different experts",
            remedy="record without --enable-eplb: experts that move while recording cannot be "
            "mapped back",
        )
    return Pass(
        mode=mode,
        positions=positions,
        pieces=_pieces(record, mode, positions, kept, path, place),
        kept=kept,
        experts=experts,
        tokens_digest=hashlib.sha256(positions.tobytes() + words.tobytes()).digest(),
        left_out_layers=extra,
    )


def _pieces(
    record: Mapping[str, Any],
    mode: int,
    positions: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    path: Path,
    place: str,
) -> list[int] | None:
    """``extend_seq_lens`` of an extend or mixed pass; rows after them are padding."""
    if mode not in (EXTEND_MODE, MIXED_MODE):
        return None
    lengths: list[int] = _numbers(record, "extend_seq_lens", None, path, place).tolist()
    if sum(lengths) > len(kept) or kept[sum(lengths) :].any():
        raise InputError(
            f"lengths of {sum(lengths)} tokens together",
            source=path,
            place=f"{place} 'extend_seq_lens'",
            expected=f"{len(kept)}",
            remedy=CUT_SHORT,
        )
    start = 0
    for length in lengths:
        piece = positions[start : start + length]
        if (np.diff(piece) != 1).any():
            raise InputError(
                f"positions {piece[:8].tolist()}",
                source=path,
                place=f"{place} tokens {start}..{start + length - 1}",
                expected="the consecutive positions of one request",
            )
        start += length
    return lengths


def _numbers(
    record: Mapping[str, Any], key: str, length: int | None, path: Path, place: str
) -> npt.NDArray[np.int64]:
    """A list of whole numbers of at least 0."""
    values = record.get(key)
    array: npt.NDArray[Any] = np.empty(0)
    if isinstance(values, list | tuple):
        try:
            array = np.array(values if values else np.empty(0, np.int64))
        except (ValueError, OverflowError):
            array = np.empty(0)
    # negative token ids stand for images and the like, and are of no matter here
    low = -(2**63) if key == "input_ids" else 0
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < low):
        raise InputError(
            shown(values),
            source=path,
            place=f"{place} {key!r}",
            expected="a list of whole numbers of at least 0",
        )
    if length is not None and len(array) != length:
        raise InputError(
            f"{len(array)} numbers",
            source=path,
            place=f"{place} {key!r}",
            expected=f"{length}, one for each token of 'topk_ids_of_layer'",
            remedy=CUT_SHORT,
        )
    if array.size and key != "input_ids" and array.max() >= 2**31:
        raise InputError(
            f"{array.max()}", source=path, place=f"{place} {key!r}", expected="numbers below 2^31"
        )
    return array.astype(np.int64)
