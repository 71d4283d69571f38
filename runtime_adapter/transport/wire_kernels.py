"""Compiled packing and unpacking of the words that name a call's experts and gate weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import kernel


@kernel
def pack_calls(  # pragma: no cover - compiled
    chosen: Any, server: int, experts: Any, weights: Any, bits: int, rows: Any, words: Any
) -> Any:
    """Fill ``rows`` [tokens] and ``words`` [calls] with the part of a step that goes to a server.

    ``chosen`` [T, K] is the server of each call; ``weights`` are float32 as uint32 [T, K]; words
    are those of :mod:`runtime_adapter.transport.wire_format`, with weights rounded, not truncated.
    Returns whether all weights can be sent.
    """
    low = (np.int64(1) << bits) - 1
    half = np.int64(1) << (bits - 1)
    tokens, top_k = chosen.shape
    token, call = 0, 0
    for t in range(tokens):
        first = call
        for k in range(top_k):
            if chosen[t, k] != server:
                continue
            weight = np.int64(weights[t, k])
            if weight > 0x7F800000 and weight != 0x80000000:
                return False  # negative (but for -0) or not a number
            words[call] = ((weight + half) & 0x7FFFFFFF & ~low) | np.int64(experts[t, k])
            call += 1
        if call > first:
            words[call - 1] |= 0x80000000
            rows[token] = t
            token += 1
    return True


@kernel
def unpack_calls(  # pragma: no cover - compiled
    words: Any, bits: int, first: int, held_by: Any, experts: Any, weights: Any, token: Any
) -> Any:
    """Unpack words [C] that :func:`pack_calls` made.

    Fills ``experts``, ``weights`` (float32 as uint32) and ``token``, all [C]. ``held_by`` int [J]
    is -1 for pairs that are not here, ``first`` the layer's first pair. Returns the number of
    tokens named, and the last expert that is not here, -1 if all are.
    """
    low = (np.uint32(1) << np.uint32(bits)) - np.uint32(1)
    tokens, missing_expert = np.int64(0), np.int64(-1)
    for c in range(len(words)):
        word = words[c]
        expert = np.int64(word & low)
        experts[c] = expert
        weights[c] = word & np.uint32(0x7FFFFFFF) & ~low
        token[c] = tokens
        tokens += np.int64(word >> np.uint32(31))
        if first + expert >= len(held_by) or held_by[first + expert] < 0:
            missing_expert = expert
    return tokens, missing_expert


def compile_unpacking() -> None:
    """Compile what a worker runs, or load it from the cache: the first call must not wait."""
    ids, words = np.zeros(0, np.int64), np.zeros(0, np.uint32)
    unpack_calls(words, 1, 0, np.zeros(0, np.int32), ids, words, ids)
