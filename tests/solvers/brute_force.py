"""Find the optimum by trying every placement, for tests. Not offered on the command line."""

from __future__ import annotations

import math

import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.instance import Instance
from prism_plan.placement import server_of_gpu
from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult
from prism_plan.solvers.packing import reference_local

#: At most 2 to this power of placements are tried: the number of (GPU or server, expert) pairs.
MAX_BITS = 18


def _solve(instance: Instance, options: Options) -> SolverResult:
    """Try all 2^(N·J) localities, or 2^(G·J) where experts differ in size.

    Raises
    ------
    ValueError
        More than :data:`MAX_BITS` bits.
    Infeasible
        None of them is feasible.
    """
    servers, layers, experts = instance.activations.shape
    pairs = layers * experts
    server_of = np.arange(servers) if instance.in_slots else server_of_gpu(instance.gpu_capacity)
    capacity = (
        instance.slots
        if instance.in_slots
        else np.array([room for gpus in instance.gpu_capacity for room in gpus])
    )
    holders = len(server_of)
    bits = holders * pairs
    if bits > MAX_BITS:
        raise ValueError(f"{bits} bits are too many to try")
    codes = np.arange(2**bits)[:, None]
    held = ((codes >> np.arange(bits)) & 1).astype(bool).reshape(-1, holders, pairs)
    size = np.repeat(instance.expert_size, experts)
    held = held[((held * size).sum(axis=2) <= capacity).all(axis=1)]
    per_server = np.stack([held[:, server_of == n].sum(axis=1) for n in range(servers)], axis=1)
    local = per_server > 0
    feasible = (per_server <= 1).all(axis=(1, 2))
    feasible &= (local.sum(axis=1) >= instance.min_replicas).all(axis=1)
    feasible &= local[:, instance.mask(instance.pinned).reshape(servers, pairs)].all(axis=1)
    feasible &= ~local[:, instance.mask(instance.forbidden).reshape(servers, pairs)].any(axis=1)
    per_layer = local.reshape(-1, servers, layers, experts).sum(axis=3)
    for n, cap in enumerate(instance.layer_caps):
        if cap is not None:
            feasible &= (per_layer[:, n] <= cap).all(axis=1)
    if not feasible.any():
        raise Infeasible("none of all placements is feasible", shortfall=1, unit="placement")
    held, local = held[feasible], local[feasible]
    remote = (~local * instance.activations.reshape(servers, pairs)).sum(axis=(1, 2))
    loads = np.zeros(len(local))
    if options.reference is not None:
        before = reference_local(instance, options.reference).reshape(servers, pairs)
        loads = (local & ~before).sum(axis=(1, 2))
    best = int(np.lexsort((loads, remote + options.load_price * loads))[0])
    chosen = local[best].reshape(instance.activations.shape)
    objective = math.fsum(instance.activations[~chosen]) + options.load_price * float(loads[best])
    return SolverResult(
        local=chosen,
        termination="optimal",
        bound=objective,
        on_gpu=None if instance.in_slots else held[best].reshape(holders, layers, experts),
    )


SOLVER = Solver(
    name="brute-force",
    summary="every placement tried; for tests",
    guarantee="optimal",
    function=_solve,
    supports=frozenset(Feature),
)
