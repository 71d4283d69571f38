"""Prompts of a token-level trace: its requests, and the tokens of those that are sampled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.simulate.requests import Prompts
from prism_plan.trace import PHASES, UNKNOWN_PHASE, Trace
from prism_plan.trace_totals import RequestLengths

DECODE_PHASE = PHASES.index("decode")


def gather_prompts(
    trace: Trace, requests: RequestLengths, chosen: npt.NDArray[np.int64], decode_tokens: int
) -> Prompts:
    """Read the prompts of the ``chosen`` [P] requests (indices, ascending), tokens by position.

    Where the phases of all tokens of a request are recorded, they hold. Where one is unknown, the
    last ``decode_tokens``, at most half of the request, are decode steps.

    Raises
    ------
    InputError
        A prefill token comes after a decode token.
    """
    assert trace.batches is not None
    length = requests.tokens[chosen]
    rows = int(length.sum())
    owner = np.empty(rows, np.int64)
    position = np.empty(rows, np.int32)
    phase = np.empty(rows, np.int8)
    experts = np.empty((rows, trace.model.num_layers, trace.model.top_k), np.uint16)
    by_id = np.argsort(requests.request[chosen])
    ids = requests.request[chosen][by_id]
    at = 0
    for batch in trace.batches():
        index = np.minimum(np.searchsorted(ids, batch.request), len(ids) - 1)
        kept = np.flatnonzero(ids[index] == batch.request)
        part = slice(at, at + len(kept))
        owner[part] = by_id[index[kept]]
        position[part] = batch.position[kept]
        phase[part] = batch.phase[kept]
        experts[part] = batch.experts[kept]
        at += len(kept)
    order = np.lexsort((position, owner))
    if (np.diff(order) < 0).any():  # most traces are in order already: spare the copy
        experts = experts[order]
    owner, position, phase = owner[order], position[order], phase[order]
    unknown = np.bincount(owner, phase == UNKNOWN_PHASE, minlength=len(chosen)) > 0
    wrong = (owner[1:] == owner[:-1]) & (phase[1:] < phase[:-1]) & ~unknown[owner[1:]]
    if wrong.any():
        row = int(np.argmax(wrong)) + 1
        raise InputError(
            f"request {requests.request[chosen[owner[row]]]} position {position[row]} is prefill "
            "after decode",
            source=trace.name or "trace",
            expected="prefill tokens before decode tokens",
            remedy="record the phases anew, or mark them unknown",
        )
    recorded = np.bincount(owner, phase == DECODE_PHASE, minlength=len(chosen)).astype(np.int64)
    decode = np.where(unknown, np.minimum(decode_tokens, length // 2), recorded)
    return Prompts(
        tasks=trace.tasks,
        task=requests.task[chosen].astype(np.int32),
        trace_request=requests.request[chosen].astype(np.int32),
        first_row=np.cumsum(length) - length,
        prefill_tokens=(length - decode).astype(np.int32),
        decode_tokens=decode.astype(np.int32),
        experts=experts,
    )
