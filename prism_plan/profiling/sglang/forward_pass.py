"""Read the forward passes in a dump of SGLang's recorder; see :mod:`.reader`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import shown
from prism_plan.profiling.common.call_counts import Counts
from prism_plan.profiling.common.messages import CHECK_MODEL, TRUNCATED
from prism_plan.profiling.sglang.dump_fields import (
    array_of,
    require_decoder_layers,
    require_only_moe,
    required_count,
)
from prism_plan.trace import first_invalid_selection
from prism_plan.trace_totals import require_sum

EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE = 1, 2, 3, 4
#: Columns of ``topk_ids_of_layer``, whatever the model's top-k.
RECORDED_K = 8


@dataclass
class RecordedPass:
    """A forward pass of T tokens on one rank.

    ``mode`` is SGLang's ``forward_mode``; ``extend_lengths`` are the tokens of each sequence of an
    extend or mixed pass; ``recorded`` bool [T] says which of the tokens have ``experts``
    [recorded, L, K], the others are padding.
    """

    mode: int
    positions: npt.NDArray[np.int64]
    extend_lengths: list[int] | None
    recorded: npt.NDArray[np.bool_]
    experts: npt.NDArray[np.uint16]
    tokens_digest: bytes
    mtp_layers: list[int]


def read_pass_calls(
    record: Mapping[str, Any],
    logical_of: npt.NDArray[np.int64],
    model: ModelSpec,
    at: Location,
) -> tuple[Counts, list[int]]:
    """Calls [L, E] of the logical experts in one pass, and the MTP layers that were left out.

    ``logical_of`` [L, P] is the logical expert of each physical one.
    """
    key = "global_physical_count"
    counts = array_of(record, key, "L, P", at)
    at = at.within(repr(key))
    require_decoder_layers(len(counts), model, at)
    if counts.shape[1] != logical_of.shape[1]:
        raise at.error(
            f"{counts.shape[1]} physical experts", f"{logical_of.shape[1]}, as in the map"
        )
    if counts.size and counts.min() < 0:
        layer, slot = np.unravel_index(int(counts.argmin()), counts.shape)
        where = at.within(f"layer {layer} physical expert {slot}")
        raise where.error(f"{counts.min()}", "counts of at least 0")
    extra = require_only_moe(counts != 0, model, "calls", at)
    require_sum(counts, "calls", at.source, at.place)
    calls = np.zeros((model.num_layers, model.num_experts), np.int64)
    rows = np.arange(model.num_layers)[:, None]
    np.add.at(calls, (rows, logical_of), counts[list(model.moe_layers)].astype(np.int64))
    return calls, extra


def read_pass_tokens(
    record: Mapping[str, Any],
    logical_of: npt.NDArray[np.int64],
    model: ModelSpec,
    at: Location,
) -> RecordedPass:
    """The tokens of one pass; ``logical_of`` [L, P] maps physical experts to logical ones."""
    mode = required_count(record, "forward_mode", at)
    if mode not in (EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE):
        raise at.error(
            f"forward_mode {mode}",
            "1 extend, 2 decode, 3 mixed or 4 idle",
            "record without speculative decoding and split prefill",
        )
    ids = array_of(record, "topk_ids_of_layer", f"L, T, {RECORDED_K}", at)
    of_ids = at.within("'topk_ids_of_layer'")
    require_decoder_layers(len(ids), model, of_ids)
    top_k = model.top_k
    if ids.shape[2] < top_k:
        raise of_ids.error(
            f"{ids.shape[2]} columns",
            f"at least {top_k}, top-k of {model.name}",
            "this recorder keeps 8 experts a token; use its stat mode for more",
        )
    positions = _numbers(record, "positions", ids.shape[1], at)
    input_ids = _numbers(record, "input_ids", ids.shape[1], at)
    mtp_layers = require_only_moe(ids != -1, model, "selections", of_ids)
    ids = ids[list(model.moe_layers)]
    recorded = (ids != -1).any(axis=(0, 2)) & (mode != IDLE_MODE)
    rows = ids[:, recorded]
    token = np.flatnonzero(recorded)

    def selection(layer: Any, row: Any) -> Location:
        return of_ids.within(f"layer {model.moe_layers[layer]} token {token[row]}")

    complete = (rows[..., :top_k] >= 0).all(axis=2) & (rows[..., top_k:] == -1).all(axis=2)
    bad = ~complete | (rows >= logical_of.shape[1]).any(axis=2)
    if bad.any():
        layer, row = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise selection(layer, row).error(
            f"physical experts {rows[layer, row].tolist()}",
            f"{top_k} ids of 0..{logical_of.shape[1] - 1}, then -1",
            f"{CHECK_MODEL}, with --disable-shared-experts-fusion and no pipeline stages",
        )
    index = np.arange(model.num_layers)[:, None, None]
    experts = np.ascontiguousarray(
        logical_of[index, rows[..., :top_k]].transpose(1, 0, 2), np.uint16
    )
    twice = first_invalid_selection(experts, model.num_experts)
    if twice is not None:
        nothing = not rows[twice[1], twice[0], :top_k].any()
        raise selection(twice[1], twice[0]).error(
            "nothing was recorded (all ids are 0)"
            if nothing
            else f"experts {experts[twice].tolist()} name one expert twice",
            f"{top_k} different experts",
            "record again; the recorder did not see this layer"
            if nothing
            else "record without --enable-eplb: experts that move while recording cannot be "
            "mapped back",
        )
    return RecordedPass(
        mode=mode,
        positions=positions,
        extend_lengths=_extend_lengths(record, mode, positions, recorded, at),
        recorded=recorded,
        experts=experts,
        tokens_digest=hashlib.sha256(positions.tobytes() + input_ids.tobytes()).digest(),
        mtp_layers=mtp_layers,
    )


def _extend_lengths(
    record: Mapping[str, Any],
    mode: int,
    positions: npt.NDArray[np.int64],
    recorded: npt.NDArray[np.bool_],
    at: Location,
) -> list[int] | None:
    """``extend_seq_lens`` of an extend or mixed pass; rows after them are padding."""
    if mode not in (EXTEND_MODE, MIXED_MODE):
        return None
    lengths: list[int] = _numbers(record, "extend_seq_lens", None, at).tolist()
    if sum(lengths) > len(recorded) or recorded[sum(lengths) :].any():
        found = f"lengths of {sum(lengths)} tokens together"
        raise at.within("'extend_seq_lens'").error(found, f"{len(recorded)}", TRUNCATED)
    start = 0
    for length in lengths:
        piece = positions[start : start + length]
        if (np.diff(piece) != 1).any():
            raise at.within(f"tokens {start}..{start + length - 1}").error(
                f"positions {piece[:8].tolist()}", "the consecutive positions of one request"
            )
        start += length
    return lengths


def _numbers(
    record: Mapping[str, Any], key: str, length: int | None, at: Location
) -> npt.NDArray[np.int64]:
    """The whole numbers of a list, int64 [``length``]; of at least 0 but for ``input_ids``."""
    values, at_key = record.get(key), at.within(repr(key))
    array: npt.NDArray[Any] = np.empty(0)
    if isinstance(values, list | tuple):
        try:
            array = np.array(values if values else np.empty(0, np.int64))
        except (ValueError, OverflowError):
            array = np.empty(0)
    # negative token ids stand for images and the like
    lowest = -(2**63) if key == "input_ids" else 0
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < lowest):
        raise at_key.error(shown(values), "a list of whole numbers of at least 0")
    if length is not None and len(array) != length:
        expected = f"{length}, one for each token of 'topk_ids_of_layer'"
        raise at_key.error(f"{len(array)} numbers", expected, TRUNCATED)
    if array.size and key != "input_ids" and array.max() >= 2**31:
        raise at_key.error(f"{array.max()}", "numbers below 2^31")
    return array.astype(np.int64)
