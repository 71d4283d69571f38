"""From servers to GPUs: balance the expected load of a server's GPUs."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.placement import Placement, server_of_gpu


def expected_load(
    activations: npt.NDArray[np.float64], local: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Calls per second that each server is expected to serve of each expert, float64 [N, L, E].

    A server serves its own calls of the experts it holds; the calls of servers that do not hold an
    expert are taken to spread evenly over those that do. Zero where a server holds no copy.
    """
    copies = np.maximum(local.sum(axis=0), 1)
    from_others = np.where(local, 0.0, activations).sum(axis=0) / copies
    return np.where(local, activations + from_others, 0.0)


def pack_on_gpus(
    instance: Instance, local: npt.NDArray[np.bool_], near: Placement | None = None
) -> npt.NDArray[np.bool_]:
    """Put each server's experts on its GPUs, bool [G, L, E] (experts of one size).

    Largest expected load first onto the least loaded GPU with room; ties to the lowest index.
    Experts that ``near`` already has on a GPU of that server stay there while there is room.

    Raises
    ------
    ValueError
        A server holds more experts than its GPUs have slots.
    """
    servers, layers, experts = local.shape
    load = expected_load(instance.activations, local).reshape(servers, -1)
    owner = server_of_gpu(instance.gpu_capacity)
    packed = np.zeros((len(owner), layers * experts), bool)
    stay = None if near is None else _standing(instance, near).reshape(len(owner), -1)
    for n in range(servers):
        gpus = np.flatnonzero(owner == n)
        room = dict(zip(gpus.tolist(), instance.gpu_capacity[n], strict=True))
        held = np.flatnonzero(local[n])
        if len(held) > sum(room.values()):
            raise ValueError(f"{len(held)} experts do not fit server {instance.servers[n]!r}")
        if len(gpus) == 1:
            packed[gpus[0], held] = True
            continue
        placed = np.zeros(len(held), bool)
        total = dict.fromkeys(gpus.tolist(), 0.0)
        if stay is not None:
            for g in gpus.tolist():
                kept = np.flatnonzero(stay[g, held] & ~placed)[: room[g]]
                packed[g, held[kept]] = True
                placed[kept] = True
                room[g] -= len(kept)
                total[g] += float(load[n, held[kept]].sum())
        rest = held[~placed]
        heap = [(total[g], g) for g in gpus.tolist() if room[g]]
        heapq.heapify(heap)
        for pair in rest[np.argsort(-load[n, rest], kind="stable")].tolist():
            weight, g = heap[0]
            packed[g, pair] = True
            room[g] -= 1
            if room[g]:
                heapq.heapreplace(heap, (weight + float(load[n, pair]), g))
            else:
                heapq.heappop(heap)
    return packed.reshape(len(owner), layers, experts)


def _standing(instance: Instance, near: Placement) -> npt.NDArray[np.bool_]:
    """What ``near`` has on each GPU of the instance, matched by server name, bool [G, L, E]."""
    owner = server_of_gpu(instance.gpu_capacity)
    standing = np.zeros((len(owner), *near.on_gpu.shape[1:]), bool)
    for n, name in enumerate(instance.servers):
        if name in near.servers:
            ours = np.flatnonzero(owner == n)
            theirs = near.gpus_of(near.servers.index(name))
            both = min(len(ours), len(theirs))
            standing[ours[:both]] = near.on_gpu[theirs[:both]]
    return standing


def standing_local(instance: Instance, near: Placement) -> npt.NDArray[np.bool_]:
    """What ``near`` has on each server of the instance, matched by name, bool [N, L, E]."""
    local = near.local
    standing = np.zeros((instance.num_servers, *local.shape[1:]), bool)
    for n, name in enumerate(instance.servers):
        if name in near.servers:
            standing[n] = local[near.servers.index(name)]
    return standing
