"""The placement part of SmartMoE: balance expected load, one copy each, no locality."""

from __future__ import annotations

import heapq

import numpy as np

from prism_plan.instance import Instance
from prism_plan.placement import server_of_gpu
from prism_plan.solvers.contract import Answer, Options, Solver


def _solve(instance: Instance, options: Options) -> Answer:
    """Documented assumption: the GPU is the unit that is balanced, as in SmartMoE.

    Experts by falling total load, each onto the least loaded GPU of the cluster with room.
    """
    owner = server_of_gpu(instance.gpu_capacity)
    room = [capacity for gpus in instance.gpu_capacity for capacity in gpus]
    load = instance.activations.sum(axis=0).ravel()
    local = np.zeros((instance.num_servers, len(load)), bool)
    heap = [(0.0, g) for g in range(len(room)) if room[g]]
    for pair in np.argsort(-load, kind="stable").tolist():
        total, g = heap[0]
        local[owner[g], pair] = True
        room[g] -= 1
        if room[g]:
            heapq.heapreplace(heap, (total + float(load[pair]), g))
        else:
            heapq.heappop(heap)
    return Answer(local.reshape(instance.activations.shape))


SOLVER = Solver(
    name="smartmoe",
    summary="one copy of each expert, expected load balanced over all GPUs (SmartMoE's placement)",
    guarantee="feasible; load balanced greedily; blind to locality",
    function=_solve,
)
