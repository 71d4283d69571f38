"""The event heap of the compiled engine: a 4-ary heap of entries in a total order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prism_plan.jit import inline_kernel, kernel
from prism_plan.simulate.compiled.records import HEAP_ENTRY
from prism_plan.simulate.events import PRIORITY

Array = Any

#: A key is the priority of the kind, and in the lower bits the number of the push.
NUMBER_BITS = 56
#: An event is its kind, and in the lower bits its subject: a request, a message or a step.
KIND_SHIFT = 32


class Heap(NamedTuple):
    """Records ``entries`` [H], first in the order of (time, key).

    ``counts`` int64 [2]: entries in the heap, events ever pushed. ``priority`` int64 by kind.
    """

    entries: Array
    counts: Array
    priority: Array

    @classmethod
    def empty(cls, room: int) -> Heap:
        """A heap with room for so many entries."""
        return cls(np.zeros(room, HEAP_ENTRY), np.zeros(2, np.int64), PRIORITY.astype(np.int64))


@kernel
def push_event(at_s: float, kind: int, subject: Any, heap: Heap) -> None:  # pragma: no cover
    """Add an event to the heap. Kernels pass ``kind`` as int64: numba compiles for each literal."""
    entries = heap.entries
    key = (heap.priority[kind] << NUMBER_BITS) | heap.counts[1]
    event = (np.int64(kind) << KIND_SHIFT) | np.int64(subject)
    i = heap.counts[0]
    heap.counts[0] += 1
    heap.counts[1] += 1
    while i > 0:
        above = (i - 1) >> 2
        parent = entries[above]
        if parent.time_s < at_s or (parent.time_s == at_s and parent.key < key):
            break
        entry = entries[i]
        entry.time_s = parent.time_s
        entry.key = parent.key
        entry.event = parent.event
        i = above
    entry = entries[i]
    entry.time_s = at_s
    entry.key = key
    entry.event = event


@inline_kernel
def remove_first_event(heap: Heap) -> None:  # pragma: no cover - compiled
    """Remove the first event of the heap."""
    heap.counts[0] -= 1
    size = heap.counts[0]
    if size == 0:
        return
    entries = heap.entries
    at_s = entries[size].time_s
    key = entries[size].key
    event = entries[size].event
    i = 0
    while True:
        first = 4 * i + 1
        if first >= size:
            break
        least = first
        least_s = entries[first].time_s
        least_key = entries[first].key
        for child in range(first + 1, min(first + 4, size)):
            child_s = entries[child].time_s
            if child_s < least_s or (child_s == least_s and entries[child].key < least_key):
                least = child
                least_s = child_s
                least_key = entries[child].key
        if at_s < least_s or (at_s == least_s and key < least_key):
            break
        entry = entries[i]
        entry.time_s = least_s
        entry.key = least_key
        entry.event = entries[least].event
        i = least
    entry = entries[i]
    entry.time_s = at_s
    entry.key = key
    entry.event = event
