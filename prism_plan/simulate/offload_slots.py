"""The slots of the baseline `offload`, in which a server keeps the experts that it uses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prism_plan.placement import Placement


class Slot(NamedTuple):
    """Room for one expert on a GPU: its (layer, expert) pair or -1, and the end of its last use.

    A load replaces the expert of the slot whose last use ended first; before any use, that end is
    -1 of a slot with an expert and -2 of an empty one, so that empty ones are filled first.
    """

    pair: int
    used_s: float
    gpu: int


def initial_slots(placement: Placement) -> list[list[Slot]]:
    """Each server's slots, GPU by GPU, with the experts of the placement in them.

    A second copy on one server would never be used: its slot begins empty. Of a GPU no more slots
    than there are experts, for more would never be filled.
    """
    held = placement.on_gpu.reshape(len(placement.on_gpu), -1)
    gpu = 0
    by_server = []
    for capacities in placement.gpu_capacity:
        slots: list[Slot] = []
        resident: set[int] = set()
        for slots_given in capacities:
            capacity = min(slots_given, held.shape[1])
            pairs = [p for p in np.flatnonzero(held[gpu]).tolist() if p not in resident][:capacity]
            resident.update(pairs)
            slots += [Slot(pair, -1.0, gpu) for pair in pairs]
            slots += [Slot(-1, -2.0, gpu)] * (capacity - len(pairs))
            gpu += 1
        by_server.append(slots)
    return by_server
