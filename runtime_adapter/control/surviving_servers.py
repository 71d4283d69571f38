"""The capacities, rules and links of the servers of a run that are not lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prism_plan.cluster import Cluster
from prism_plan.instance import Instance


def surviving_instance(instance: Instance, alive: Sequence[int], min_replicas: int) -> Instance:
    """The instance of the servers that are alive; replicas are limited to their number."""
    if len(alive) == instance.num_servers:
        return instance.replace(min_replicas=min_replicas)
    index = {n: i for i, n in enumerate(alive)}

    def surviving(rules: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
        return tuple((index[n], layer, e) for n, layer, e in rules if n in index)

    return instance.replace(
        servers=tuple(instance.servers[n] for n in alive),
        activations=instance.activations[list(alive)],
        gpu_capacity=tuple(instance.gpu_capacity[n] for n in alive),
        layer_caps=tuple(instance.layer_caps[n] for n in alive),
        pinned=surviving(instance.pinned),
        forbidden=surviving(instance.forbidden),
        min_replicas=min(min_replicas, len(alive)),
    )


def surviving_cluster(cluster: Cluster, alive: Sequence[int]) -> Cluster:
    """The cluster of the servers that are alive, with the links between them."""
    index = {n: i for i, n in enumerate(alive)}
    return dataclasses.replace(
        cluster,
        servers=tuple(cluster.servers[n] for n in alive),
        pair_links=tuple(
            dataclasses.replace(link, a=index[link.a], b=index[link.b])
            for link in cluster.pair_links
            if link.a in index and link.b in index
        ),
    )
