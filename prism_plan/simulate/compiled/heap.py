"""The event heap of the compiled engine: four children a node, entries in a total order."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import jit
from prism_plan.simulate.compiled.engine_state import HEAP, PUSHED

Array = Any

#: A key is the rank of the kind, then the number of the push; what happens is kind and subject.
NUMBER_BITS = 56
KIND_SHIFT = 32


@jit
def push(  # pragma: no cover - compiled
    heap_s: Array, heap_key: Array, heap_what: Array, number: Array, time_s: float, rank: int,
    kind: int, subject: Any,
) -> None:  # fmt: skip
    """Add an event to the heap."""
    key = (np.int64(rank) << NUMBER_BITS) | number[PUSHED]
    what = (np.int64(kind) << KIND_SHIFT) | np.int64(subject)
    number[PUSHED] += 1
    i = number[HEAP]
    number[HEAP] += 1
    while i > 0:
        above = (i - 1) >> 2
        if heap_s[above] < time_s or (heap_s[above] == time_s and heap_key[above] < key):
            break
        heap_s[i] = heap_s[above]
        heap_key[i] = heap_key[above]
        heap_what[i] = heap_what[above]
        i = above
    heap_s[i] = time_s
    heap_key[i] = key
    heap_what[i] = what


@jit
def drop_first(  # pragma: no cover - compiled
    heap_s: Array, heap_key: Array, heap_what: Array, number: Array
) -> None:
    """Take the first event out of the heap (of four children a node)."""
    number[HEAP] -= 1
    size = number[HEAP]
    if size == 0:
        return
    time_s = heap_s[size]
    key = heap_key[size]
    what = heap_what[size]
    i = 0
    while True:
        first = 4 * i + 1
        if first >= size:
            break
        least = first
        last = min(first + 4, size)
        for child in range(first + 1, last):
            if heap_s[child] < heap_s[least] or (
                heap_s[child] == heap_s[least] and heap_key[child] < heap_key[least]
            ):
                least = child
        if time_s < heap_s[least] or (time_s == heap_s[least] and key < heap_key[least]):
            break
        heap_s[i] = heap_s[least]
        heap_key[i] = heap_key[least]
        heap_what[i] = heap_what[least]
        i = least
    heap_s[i] = time_s
    heap_key[i] = key
    heap_what[i] = what
