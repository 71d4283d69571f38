"""Whole layers: one owner each, then whole-layer copies, then each server's own favourites."""

from __future__ import annotations

import numpy as np

from prism_plan.instance import Instance
from prism_plan.solvers.contract import Options, Solver, SolverResult
from prism_plan.solvers.uniform import proportional_quotas


def _solve(instance: Instance, options: Options) -> SolverResult:
    servers, layers, experts = instance.activations.shape
    local = np.zeros((servers, layers, experts), bool)
    free = instance.slots.copy()

    # one owner for each layer, in proportion to capacity, contiguous runs in server order
    max_owned = free // experts
    num_owned = np.minimum(proportional_quotas(layers, free), max_owned)
    for n in range(servers):  # layers in the quotas of servers that are too small for one
        num_owned[n] += min(int((max_owned - num_owned)[n]), layers - int(num_owned.sum()))
    owner = np.repeat(np.arange(servers), num_owned)
    local[owner, np.arange(len(owner))] = True
    free -= num_owned * experts

    # layers that no server can own whole are dealt out expert by expert, in index order
    for layer in range(len(owner), layers):
        for expert in range(experts):
            n = int(np.argmax(free))
            local[n, layer, expert] = True
            free[n] -= 1

    # whole-layer copies while they fit: fewest copies first, then lowest index
    num_copies = local.all(axis=2).sum(axis=0)
    for n in range(servers):
        while free[n] >= experts:
            candidates = np.flatnonzero(~local[n].any(axis=1))
            if not len(candidates):
                break
            layer = candidates[np.argmin(num_copies[candidates])]
            local[n, layer] = True
            num_copies[layer] += 1
            free[n] -= experts

    # the experts that each server calls most in the slots that are left
    for n, slots in enumerate(free):
        frequency = np.where(local[n], -1.0, instance.activations[n]).ravel()
        order = np.argsort(-frequency, kind="stable")[: int(slots)]
        local[n].reshape(-1)[order[frequency[order] >= 0]] = True
    return SolverResult(local)


SOLVER = Solver(
    name="layer-partition",
    summary="whole layers: an owner each, whole-layer copies while they fit, then own favourites",
    guarantee="feasible; the honest baseline for waiting, not for remote calls",
    function=_solve,
)
