"""Capacities and rules by which the experts of a run move, also when servers are lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.model import ModelSpec
from prism_plan.placement import Placement
from prism_plan.placement_check import violations


def rules_of(placement: Placement, cluster: Cluster, model: ModelSpec) -> Instance:
    """The capacities and rules of a cluster, for servers that run a placement.

    Raises
    ------
    InputError
        The placement breaks one of them.
    Infeasible
        A GPU is too small for what must reside on it.
    """
    instance = Instance.of_cluster(cluster, model, min_replicas=placement.plan.min_replicas)
    for violation in violations(placement, instance=instance)[:1]:
        raise InputError(
            violation.message,
            place="servers",
            expected=f"a placement by the rules of {cluster.name}, for moves have to keep them",
            remedy="plan again for this cluster",
        )
    return instance


def rules_among(whole: Instance, alive: Sequence[int], min_replicas: int) -> Instance:
    """Those of the servers that are left, of which each expert has as many as there can be."""
    if len(alive) == whole.num_servers:
        return whole.replace(min_replicas=min_replicas)
    place = {n: at for at, n in enumerate(alive)}

    def left(triples: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
        return tuple((place[n], layer, e) for n, layer, e in triples if n in place)

    return whole.replace(
        servers=tuple(whole.servers[n] for n in alive),
        activations=whole.activations[list(alive)],
        gpu_capacity=tuple(whole.gpu_capacity[n] for n in alive),
        layer_caps=tuple(whole.layer_caps[n] for n in alive),
        pinned=left(whole.pinned),
        forbidden=left(whole.forbidden),
        min_replicas=min(min_replicas, len(alive)),
    )


def cluster_among(whole: Cluster, alive: Sequence[int]) -> Cluster:
    """The servers that are left, and their links."""
    place = {n: at for at, n in enumerate(alive)}
    return dataclasses.replace(
        whole,
        servers=tuple(whole.servers[n] for n in alive),
        pair_links=tuple(
            dataclasses.replace(link, a=place[link.a], b=place[link.b])
            for link in whole.pair_links
            if link.a in place and link.b in place
        ),
    )
