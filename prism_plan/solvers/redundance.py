"""`uniform`, then free slots filled with seeded random replicas."""

from __future__ import annotations

import numpy as np

from prism_plan.instance import Instance
from prism_plan.seeds import random_generator
from prism_plan.solvers.contract import Options, Solver, SolverResult
from prism_plan.solvers.uniform import uniform_local


def _solve(instance: Instance, options: Options) -> SolverResult:
    """Documented assumption: each server draws from the experts it lacks, all equally likely.

    The expected remote share is 1 − ΣC / (N·J).
    """
    rng = random_generator(options.seed)
    local = uniform_local(instance).reshape(instance.num_servers, -1)
    for n, slots in enumerate(instance.slots):
        lacking = np.flatnonzero(~local[n])
        free = int(slots) - int(local[n].sum())
        local[n, rng.permutation(lacking)[:free]] = True
    return SolverResult(local.reshape(instance.activations.shape))


SOLVER = Solver(
    name="redundance",
    summary="uniform, then free slots filled with random replicas (seeded)",
    guarantee="feasible; blind to activations; expected remote share 1 − ΣC/(N·J)",
    function=_solve,
)
