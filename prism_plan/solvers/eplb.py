"""DeepSeek's Expert Parallelism Load Balancer (github.com/deepseek-ai/EPLB), for unequal servers.

The solver uses the two steps of the published algorithm, replication and balanced packing, layer by
layer with servers in the place of GPUs; capacities may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.solvers.contract import Options, Solver, SolverResult

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def replicate_experts(weight: Floats, num_physical: int) -> tuple[Ints, Ints]:
    """Give each further replica to the expert with the highest load per replica.

    ``weight`` [E] is the load of one layer. Returns ``physical_to_logical`` [P] and the number of
    replicas of each expert [E]. Ties: lowest index. Equals EPLB's function on one row.
    """
    num_replicas = np.ones(len(weight), np.int64)
    physical = list(range(len(weight)))
    for _ in range(len(weight), num_physical):
        expert = int(np.argmax(weight / num_replicas))
        physical.append(expert)
        num_replicas[expert] += 1
    return np.array(physical, np.int64), num_replicas


def balanced_packing(weight: Floats, capacity: Sequence[int]) -> tuple[Ints, Ints]:
    """Pack items onto packs, heaviest first onto the pack with the least load for its size.

    ``weight`` [n]; ``capacity`` [packs] sums to n. Returns the pack of each item and its rank in
    it, both [n]. Ties: lowest index. Equals ``balanced_packing`` of EPLB on one row where all
    capacities are equal.
    """
    capacities = np.asarray(capacity, np.float64)
    pack = np.zeros(len(weight), np.int64)
    rank = np.zeros(len(weight), np.int64)
    if (capacities == 1).all():
        return np.arange(len(weight)), rank
    # relative size is exactly 1 for equal packs, so that their loads compare as published
    size = capacities / capacities.mean()
    load = np.zeros(len(capacities))
    count = np.zeros(len(capacities), np.int64)
    for item in np.argsort(-weight, kind="stable"):
        relative = np.divide(load, size, out=np.full_like(load, np.inf), where=count < capacities)
        chosen = int(np.argmin(relative))
        pack[item] = chosen
        rank[item] = count[chosen]
        load[chosen] += weight[item]
        count[chosen] += 1
    return pack, rank


def layer_slots(slots: Ints, layers: int, experts: int) -> Ints:
    """Divide the slots of each server among the layers, int64 [N, L].

    Evenly, as in EPLB; the remainder goes one slot at a time to the layers with the fewest so far,
    so that every layer has a slot for each expert if the servers together have enough.
    """
    share = np.zeros((len(slots), layers), np.int64)
    for n, capacity in enumerate(slots):
        share[n], remainder = divmod(min(int(capacity), layers * experts), layers)
        share[n, np.argsort(share.sum(axis=0), kind="stable")[:remainder]] += 1
    return share


def _solve(instance: Instance, options: Options) -> SolverResult:
    """Layer by layer: replicate to fill the slots, pack to balance load.

    A second replica on one server is of no use: it is left out, and its slot goes to the expert of
    the highest load per replica that the server lacks.
    """
    servers, layers, experts = instance.activations.shape
    load = instance.activations.sum(axis=0)
    share = layer_slots(instance.slots, layers, experts)
    local = np.zeros((servers, layers, experts), bool)
    for layer in range(layers):
        used = np.flatnonzero(share[:, layer])
        capacity = share[used, layer]
        physical, replicas_of = replicate_experts(load[layer], int(capacity.sum()))
        pack, _ = balanced_packing((load[layer] / replicas_of)[physical], capacity.tolist())
        local[used[pack], layer, physical] = True
        for n in used:
            while local[n, layer].sum() < share[n, layer]:
                per_replica = load[layer] / local[:, layer].sum(axis=0)
                local[n, layer, np.argmax(np.where(local[n, layer], -1.0, per_replica))] = True
    return SolverResult(local)


SOLVER = Solver(
    name="eplb",
    summary="DeepSeek's EPLB: replicate the most loaded experts, pack to balance load",
    guarantee="feasible; the published algorithm on equal servers; blind to locality",
    function=_solve,
)
