"""Placements in which replicas may be missing, at a price for each: exact, by the flow of `exact`.

A replica that is missing lies on a server that does not exist. There are as many of these as
replicas are wanted, each with room for every expert, and each the dearer by what one more missing
replica costs. A replica that must not be missing is forbidden on the dearest of them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, LimitReached
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.solvers.exact import solve_flow, weight_bits

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def solve_with_missing(instance: Instance, value: Floats, price: Floats) -> Bools:
    """Maximise Σ value·x − Σ price of missing replicas over placements x, bool [N, L, E].

    ``value`` is [N, L, E]. ``price`` [R, L, E] is that of the first replica of an expert that is
    missing, of the second, and so on up to the ``min_replicas`` R of the instance, none less than
    the one before; infinite for replicas that must not be missing. Experts are of one size.

    Raises
    ------
    Infeasible
        No placement has the replicas that must not be missing and keeps the rules.
    """
    required = np.isinf(price)
    if len(price) != instance.min_replicas or (price[1:] < price[:-1]).any():
        raise ValueError("a price for each replica, rising with the number that is missing")
    if required.all():
        require_feasible(instance)
        return solve_flow(instance, value)[0]
    added = _extended(instance, required)
    require_feasible(added)
    try:
        local, _, _ = solve_flow(added, np.concatenate([value, -np.where(required, 0.0, price)]))
    except Infeasible:
        # say it without the servers that do not exist, where a number of all experts is required
        least = int(required.sum(axis=0).min())
        if least:
            fewer = instance.replace(min_replicas=least)
            require_feasible(fewer)
            solve_flow(fewer, value)
        raise
    return local[: instance.num_servers]


def _extended(instance: Instance, required: Bools) -> Instance:
    """The instance with servers that do not exist, the r-th one for the r-th missing replica."""
    servers, replicas = instance.num_servers, len(required)
    names = (f"missing {r}" for r in range(servers + replicas))
    nowhere = [name for name in names if name not in instance.servers][:replicas]
    everything = ((instance.model.num_pairs,),) * replicas
    shape = (servers + replicas, instance.model.num_layers, instance.model.num_experts)
    barred = [(servers + r, layer, e) for r, layer, e in np.argwhere(required).tolist()]
    return Instance(
        model=instance.model,
        servers=(*instance.servers, *nowhere),
        activations=np.zeros(shape),
        gpu_capacity=(*instance.gpu_capacity, *everything),
        min_replicas=replicas,
        pinned=instance.pinned,
        forbidden=(*instance.forbidden, *barred),
        layer_caps=(*instance.layer_caps, *(None,) * replicas),
    )


def ranked_weights(instance: Instance, levels: int) -> tuple[float, ...]:
    """Weights of goals of :func:`solve_with_missing`, of which each outranks all later ones.

    A goal counts copies, or missing ones; the last one may instead add up integers of its copies,
    from 0 to the last weight. Not more than an exchange between two placements has to be outranked:
    it passes each server once, or each layer of a server where layer caps are given, so the ratio
    of two weights is twice the number of these.

    Raises
    ------
    LimitReached
        The problem is too large for so many goals in the integers of the flow.
    """
    servers = instance.num_servers + instance.min_replicas
    groups = instance.model.num_layers if any(c is not None for c in instance.layer_caps) else 1
    step = math.ceil(math.log2(2 * (servers * groups + 1)))
    bits = weight_bits(servers, groups)
    largest = bits - 1 - (levels - 1) * step
    if largest < 0:
        raise LimitReached(
            f"{servers:,} servers with layer caps of {groups:,} layers are too many for one flow "
            f"with {levels} goals; remove layer_cap"
        )
    return tuple(2.0 ** (largest + step * (levels - 1 - level)) for level in range(levels))
