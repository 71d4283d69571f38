"""Capacities and rules by which the experts of a run move, also when servers are lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from prism_plan.cluster import Cluster, expert_room_bytes, gpu_slots
from prism_plan.errors import InputError
from prism_plan.instance import Instance, rule_triples
from prism_plan.model import ModelSpec
from prism_plan.objective import violations
from prism_plan.placement import Placement


def rules_of(placement: Placement, cluster: Cluster, model: ModelSpec) -> Instance:
    """The capacities and rules of a cluster, for servers that run a placement.

    Raises
    ------
    InputError
        The placement breaks one of them.
    Infeasible
        A GPU is too small for what must reside on it.
    """
    if model.equal_expert_bytes:
        capacity = [gpu_slots(model, server) for server in cluster.servers]
    else:
        capacity = [
            tuple(expert_room_bytes(model, server, g) for g in range(len(server.gpus)))
            for server in cluster.servers
        ]
    instance = Instance(
        model=model.shape(),
        servers=tuple(server.name for server in cluster.servers),
        activations=np.zeros((cluster.num_servers, model.num_layers, model.num_experts)),
        gpu_capacity=tuple(capacity),
        min_replicas=placement.plan.min_replicas,
        pinned=tuple(rule_triples(cluster, model, "pin")),
        forbidden=tuple(rule_triples(cluster, model, "forbid")),
        layer_caps=tuple(server.layer_cap for server in cluster.servers),
    )
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
