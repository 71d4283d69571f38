"""Distribute each server's experts over its GPUs so that their expected loads are balanced."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

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
    num_replicas = np.maximum(local.sum(axis=0), 1)
    from_others = np.where(local, 0.0, activations).sum(axis=0) / num_replicas
    return np.where(local, activations + from_others, 0.0)


def assign_to_least_loaded(
    load: npt.NDArray[np.float64],
    order: Iterable[int],
    free: dict[int, int],
    total: dict[int, float],
) -> Iterator[tuple[int, int]]:
    """Assign experts one by one to the least loaded GPU with a free slot; yields (expert, GPU).

    ``load`` [J] is that of each expert, ``order`` lists the experts to assign; ``free`` slots and
    ``total`` load are by GPU, in ascending order. Ties: lowest GPU.
    """
    heap = [(total[g], g) for g in free if free[g]]
    heapq.heapify(heap)
    for expert in order:
        gpu_load, g = heap[0]
        yield expert, g
        free[g] -= 1
        if free[g]:
            heapq.heapreplace(heap, (gpu_load + float(load[expert]), g))
        else:
            heapq.heappop(heap)


def pack_on_gpus(
    instance: Instance, local: npt.NDArray[np.bool_], reference: Placement | None = None
) -> npt.NDArray[np.bool_]:
    """Put each server's experts on its GPUs, bool [G, L, E] (experts of one size).

    Largest expected load first onto the least loaded GPU with a free slot; ties to the lowest
    index. Experts that ``reference`` has on a GPU of that server stay there while it has slots.

    Raises
    ------
    ValueError
        A server holds more experts than its GPUs have slots.
    """
    servers, layers, experts = local.shape
    server_of = server_of_gpu(instance.gpu_capacity)
    packed = np.zeros((len(server_of), layers * experts), bool)
    before = np.zeros_like(packed)
    if reference is not None:
        before = reference_on_gpu(instance, reference).reshape(packed.shape)
    if any(len(gpus) != 1 for gpus in instance.gpu_capacity):  # else there is nothing to balance
        load = expected_load(instance.activations, local).reshape(servers, -1)
    for n in range(servers):
        gpus = np.flatnonzero(server_of == n).tolist()
        free = dict(zip(gpus, instance.gpu_capacity[n], strict=True))
        held = np.flatnonzero(local[n])
        if len(held) > sum(free.values()):
            raise ValueError(f"{len(held)} experts do not fit server {instance.servers[n]!r}")
        if len(gpus) == 1:
            packed[gpus[0], held] = True
            continue
        placed = np.zeros(len(held), bool)
        total = dict.fromkeys(gpus, 0.0)
        for g in gpus:
            kept = np.flatnonzero(before[g, held] & ~placed)[: free[g]]
            packed[g, held[kept]] = True
            placed[kept] = True
            free[g] -= len(kept)
            total[g] += float(load[n, held[kept]].sum())
        rest = held[~placed]
        order = rest[np.argsort(-load[n, rest], kind="stable")].tolist()
        for pair, g in assign_to_least_loaded(load[n], order, free, total):
            packed[g, pair] = True
    return packed.reshape(len(server_of), layers, experts)


def reference_on_gpu(instance: Instance, reference: Placement) -> npt.NDArray[np.bool_]:
    """What a reference placement has on each GPU of the instance's servers, bool [G, L, E].

    Servers are matched by name, their GPUs by index.
    """
    on_gpu = []
    for name, gpus in zip(instance.servers, instance.gpu_capacity, strict=True):
        before = reference.on_gpus_of(name)[: len(gpus)]
        on_gpu.append(np.pad(before, ((0, len(gpus) - len(before)), (0, 0), (0, 0))))
    return np.concatenate(on_gpu)


def reference_local(instance: Instance, reference: Placement) -> npt.NDArray[np.bool_]:
    """What a reference placement has on each server of the instance, by name, bool [N, L, E]."""
    return np.stack([reference.on_gpus_of(name).any(axis=0) for name in instance.servers])
