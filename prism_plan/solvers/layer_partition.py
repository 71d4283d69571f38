"""Whole layers: one owner each, then whole-layer copies, then each server's own favourites."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.solvers.contract import Answer, Options, Solver
from prism_plan.solvers.uniform import proportional_quotas


def _solve(instance: Instance, options: Options) -> Answer:
    servers, layers, experts = instance.activations.shape
    local = np.zeros((servers, layers, experts), bool)
    free = instance.slots.copy()

    # one owner for each layer, in proportion to capacity, contiguous runs in server order
    fits = free // experts
    owned = np.minimum(proportional_quotas(layers, free), fits)
    spare = fits - owned
    for n in range(servers):  # layers that a quota promised to servers too small for one
        more = min(int(spare[n]), layers - int(owned.sum()))
        owned[n] += more
    owner = np.repeat(np.arange(servers), owned)
    local[owner, np.arange(len(owner))] = True
    free -= owned * experts

    # layers that no server can own whole are dealt out expert by expert, in index order
    for layer in range(len(owner), layers):
        for expert in range(experts):
            n = int(np.argmax(free))
            local[n, layer, expert] = True
            free[n] -= 1

    # whole-layer copies while they fit: fewest copies first, then lowest index
    copies = local.all(axis=2).sum(axis=0)
    for n in range(servers):
        while free[n] >= experts:
            candidates = np.flatnonzero(~local[n].any(axis=1))
            if not len(candidates):
                break
            layer = candidates[np.argmin(copies[candidates])]
            local[n, layer] = True
            copies[layer] += 1
            free[n] -= experts

    _fill_by_frequency(instance, local, free)
    return Answer(local)


def _fill_by_frequency(
    instance: Instance, local: npt.NDArray[np.bool_], free: npt.NDArray[np.int64]
) -> None:
    for n, slots in enumerate(free):
        frequency = np.where(local[n], -1.0, instance.activations[n]).ravel()
        order = np.argsort(-frequency, kind="stable")[: int(slots)]
        flat = local[n].reshape(-1)
        flat[order[frequency[order] >= 0]] = True


SOLVER = Solver(
    name="layer-partition",
    summary="whole layers: an owner each, whole-layer copies while they fit, then own favourites",
    guarantee="feasible; the honest baseline for waiting, not for remote calls",
    function=_solve,
)
