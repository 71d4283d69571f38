"""EPLB as published, from the two steps that the solver uses: compared with its own example."""

from __future__ import annotations

import numpy as np

from prism_plan.solvers.eplb import Floats, Ints, balanced_packing, replicate_experts


def rebalance_experts(
    weight: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Ints:
    """The published algorithm: physical to logical expert, int64 [L, num_replicas].

    ``weight`` [L, E]. Groups of experts are packed onto nodes, experts replicated within nodes,
    and the copies packed onto GPUs; where groups do not divide evenly, replication is global.
    Chunk r of a row is GPU r.

    Raises
    ------
    ValueError
        A count does not divide as EPLB requires.
    """
    layers, experts = weight.shape
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    if experts % num_groups or num_gpus % num_nodes or num_replicas % num_gpus:
        raise ValueError("experts % groups, gpus % nodes and replicas % gpus must be zero")
    if num_replicas < experts:
        raise ValueError("fewer replicas than experts")
    rows = [
        _rebalance_layer(weight[layer], num_replicas, num_groups, num_nodes, num_gpus)
        for layer in range(layers)
    ]
    return np.stack(rows)


def _rebalance_layer(
    weight: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Ints:
    group_size = len(weight) // num_groups
    group_load = weight.reshape(num_groups, group_size).sum(axis=1)
    node_of_group, rank = balanced_packing(group_load, [num_groups // num_nodes] * num_nodes)
    per_node, per_gpu = num_replicas // num_nodes, num_replicas // num_gpus
    result = np.empty(num_replicas, np.int64)
    for node in range(num_nodes):
        groups = np.flatnonzero(node_of_group == node)
        groups = groups[np.argsort(rank[groups])]
        logical = (groups[:, None] * group_size + np.arange(group_size)).ravel()
        physical, copies = replicate_experts(weight[logical], per_node)
        gpu, place = balanced_packing(
            (weight[logical] / copies)[physical], [per_gpu] * (num_gpus // num_nodes)
        )
        result[node * per_node + gpu * per_gpu + place] = logical[physical]
    return result
