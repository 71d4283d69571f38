"""Which experts living servers load so that none is missing: a plain repair, expert by expert."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.placement import Placement, server_of_gpu

Bools = npt.NDArray[np.bool_]


def repair_placement(
    held: Placement, instance: Instance, priority: npt.NDArray[np.float64]
) -> Placement:
    """What is held, with copies of experts that have too few where there is room.

    First every expert gets one copy, then two, up to ``min_replicas``; those with the most calls
    first. A copy goes to the server without one that calls the expert most, of those with a free
    slot; where there is none, in place of the least valuable copy beyond those that its own expert
    needs. What finds no room is left out. ``held`` is within the capacities of ``instance``, which
    are zero at servers that are away; ``priority`` [N, L, E] are calls per second where they are
    made.
    """
    gpus, pairs = len(held.on_gpu), instance.model.num_pairs
    on_gpu = held.on_gpu.reshape(gpus, pairs).copy()
    owner = server_of_gpu(instance.gpu_capacity)
    size = np.repeat(instance.expert_size, instance.model.num_experts)
    room = np.array([slots for of in instance.gpu_capacity for slots in of]) - on_gpu @ size
    there = np.array([sum(slots) > 0 for slots in instance.gpu_capacity])
    value = priority.reshape(len(priority), pairs)[owner]  # of a copy on each GPU
    forbidden = instance.mask(instance.forbidden).reshape(-1, pairs)
    by_calls = np.argsort(-priority.sum(axis=0), axis=None, kind="stable").tolist()
    for copies in range(1, min(instance.min_replicas, int(there.sum())) + 1):
        for pair in by_calls:
            while _holders(on_gpu, owner, pair).sum() < copies:
                allowed = (there & ~_holders(on_gpu, owner, pair) & ~forbidden[:, pair])[owner]
                gpu = _gpu_with_room(allowed & (room >= size[pair]), value[:, pair], room)
                if gpu < 0:
                    gpu = _make_room(on_gpu, owner, room, size, allowed, pair, copies, value)
                if gpu < 0:
                    break
                on_gpu[gpu, pair] = True
                room[gpu] -= size[pair]
    return held.replace(on_gpu=on_gpu.reshape(held.on_gpu.shape))


def _holders(on_gpu: Bools, owner: npt.NDArray[np.int64], pair: int) -> Bools:
    """Which servers hold a pair, bool [N]."""
    return np.bincount(owner, on_gpu[:, pair], minlength=int(owner[-1]) + 1) > 0


def _gpu_with_room(
    possible: Bools, value: npt.NDArray[np.float64], room: npt.NDArray[np.int64]
) -> int:
    """The GPU where a copy is worth most, of equal ones that with the most room; -1 if none."""
    found = np.flatnonzero(possible)
    return int(max(found, key=lambda g: (value[g], room[g], -g), default=-1))


def _make_room(
    on_gpu: Bools, owner: npt.NDArray[np.int64], room: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64], allowed: Bools, pair: int, copies: int,
    value: npt.NDArray[np.float64],
) -> int:  # fmt: skip
    """Drop the least valuable copy whose expert has others enough; its GPU, or -1."""
    servers = int(owner[-1]) + 1
    local = np.zeros((servers, on_gpu.shape[1]), bool)
    for g, n in enumerate(owner):
        local[n] |= on_gpu[g]
    spare = on_gpu & (local.sum(axis=0) > copies) & allowed[:, None]
    spare &= room[:, None] + size >= size[pair]
    if not spare.any():
        return -1
    worth = np.where(spare, value, np.inf)
    gpu, dropped = np.unravel_index(int(np.argmin(worth)), worth.shape)
    on_gpu[gpu, dropped] = False
    room[gpu] += size[dropped]
    return int(gpu)
