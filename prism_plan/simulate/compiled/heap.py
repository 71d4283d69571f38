"""The event heap of the compiled engine: a 4-ary heap of entries in a total order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prism_plan.jit import inline_kernel, kernel
from prism_plan.simulate.events import PRIORITY

Array = Any

#: A key is the priority of the kind, and in the lower bits the number of the push.
NUMBER_BITS = 56
#: An event is its kind, and in the lower bits its subject: a request, a message or a step.
KIND_SHIFT = 32


class Heap(NamedTuple):
    """Arrays [H] of entries, first in the order of (time, key).

    ``counts`` int64 [2]: entries in the heap, events ever pushed. ``priority`` int64 by kind.
    """

    time_s: Array
    key: Array
    event: Array
    counts: Array
    priority: Array

    @classmethod
    def empty(cls, room: int) -> Heap:
        """A heap with room for so many entries."""
        times, keys, events = np.zeros(room), np.zeros(room, np.int64), np.zeros(room, np.int64)
        return cls(times, keys, events, np.zeros(2, np.int64), PRIORITY.astype(np.int64))


@kernel
def push_event(  # pragma: no cover - compiled
    at_s: float, kind: int, subject: Any,
    time_s: Array, keys: Array, events: Array, counts: Array, priority: Array,
) -> None:  # fmt: skip
    """Add an event to the heap, whose arrays are passed one by one, which is faster."""
    key = (priority[kind] << NUMBER_BITS) | counts[1]
    event = (np.int64(kind) << KIND_SHIFT) | np.int64(subject)
    i = counts[0]
    counts[0] += 1
    counts[1] += 1
    while i > 0:
        above = (i - 1) >> 2
        if time_s[above] < at_s or (time_s[above] == at_s and keys[above] < key):
            break
        time_s[i] = time_s[above]
        keys[i] = keys[above]
        events[i] = events[above]
        i = above
    time_s[i] = at_s
    keys[i] = key
    events[i] = event


@inline_kernel
def remove_first_event(  # pragma: no cover - compiled
    time_s: Array, keys: Array, events: Array, counts: Array
) -> None:
    """Remove the first event of the heap."""
    counts[0] -= 1
    size = counts[0]
    if size == 0:
        return
    at_s = time_s[size]
    key = keys[size]
    event = events[size]
    i = 0
    while True:
        first = 4 * i + 1
        if first >= size:
            break
        least = first
        for child in range(first + 1, min(first + 4, size)):
            if time_s[child] < time_s[least] or (
                time_s[child] == time_s[least] and keys[child] < keys[least]
            ):
                least = child
        if at_s < time_s[least] or (at_s == time_s[least] and key < keys[least]):
            break
        time_s[i] = time_s[least]
        keys[i] = keys[least]
        events[i] = events[least]
        i = least
    time_s[i] = at_s
    keys[i] = key
    events[i] = event
