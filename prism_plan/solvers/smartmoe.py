"""The placement part of SmartMoE: balance expected load, one copy each, no locality."""

from __future__ import annotations

import numpy as np

from prism_plan.instance import Instance
from prism_plan.placement import server_of_gpu
from prism_plan.solvers.contract import Options, Solver, SolverResult
from prism_plan.solvers.packing import assign_to_least_loaded


def _solve(instance: Instance, options: Options) -> SolverResult:
    """Documented assumption: the GPU is the unit that is balanced, as in SmartMoE.

    Experts by falling total load, each onto the least loaded GPU of the cluster with a free slot.
    """
    server_of = server_of_gpu(instance.gpu_capacity)
    free = dict(enumerate(slots for gpus in instance.gpu_capacity for slots in gpus))
    load = instance.activations.sum(axis=0).ravel()
    local = np.zeros((instance.num_servers, len(load)), bool)
    order = np.argsort(-load, kind="stable").tolist()
    for pair, g in assign_to_least_loaded(load, order, free, dict.fromkeys(free, 0.0)):
        local[server_of[g], pair] = True
    return SolverResult(local.reshape(instance.activations.shape))


SOLVER = Solver(
    name="smartmoe",
    summary="one copy of each expert, expected load balanced over all GPUs (SmartMoE's placement)",
    guarantee="feasible; load balanced greedily; blind to locality",
    function=_solve,
)
