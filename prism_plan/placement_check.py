"""The check of a placement: coverage, the memory of each GPU, pins, forbids and layer caps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism_plan.execution_table import executed_elsewhere
from prism_plan.instance import Instance
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement
from prism_plan.printable_text import quantity


@dataclass(frozen=True)
class Violation:
    """One constraint that a placement breaks, by how much (``amount`` in ``unit``) and where."""

    constraint: str
    where: str
    amount: int
    unit: str
    message: str


def violations(
    placement: Placement, *, min_replicas: int = 1, instance: Instance | None = None
) -> list[Violation]:
    """Every constraint that a placement breaks; empty for a feasible placement.

    Coverage and the capacities that the placement itself states are always checked; with an
    ``instance`` also its capacities, replicas, pins, forbidden experts and layer caps, and of a
    placement with an execution table the ``execute_at_home`` and ``kv_tokens`` of its cluster.

    Raises
    ------
    WrongModel
        The instance is of another model.
    """
    found = _check_coverage(placement, max(min_replicas, instance.min_replicas if instance else 1))
    found += _check_memory(placement, placement.gpu_capacity, "the placement")
    if instance is not None:
        found += _check_instance(placement, instance)
    return found


def _check_coverage(placement: Placement, min_replicas: int) -> list[Violation]:
    num_replicas = placement.local.sum(axis=0).ravel()
    found = []
    for pair in np.flatnonzero(num_replicas < min_replicas):
        held_by = int(num_replicas[pair])
        where = placement.model.pair_text(int(pair))
        constraint, state = "coverage", "is held nowhere"
        if held_by:
            constraint = "min_replicas"
            state = f"is held by {held_by} servers, {min_replicas} required"
        missing = min_replicas - held_by
        found.append(Violation(constraint, where, missing, "servers", f"{where} {state}"))
    return found


def _check_memory(
    placement: Placement, gpu_capacity: tuple[tuple[int, ...], ...], source: str
) -> list[Violation]:
    """One violation for each GPU whose experts exceed its capacity in ``gpu_capacity``.

    Sizes are in slots if all experts are of one size, else in bytes. ``source`` says in messages
    whose capacities these are, such as "the cluster".
    """
    model = placement.model
    equal = model.equal_expert_bytes
    size = np.array((1,) * model.num_layers if equal else model.expert_bytes_by_layer, np.int64)
    unit = "slots" if equal else "bytes"
    used = iter((placement.on_gpu.sum(axis=2) @ size).tolist())
    found = []
    for name, capacities in zip(placement.servers, gpu_capacity, strict=True):
        for g, capacity in enumerate(capacities):
            held = next(used)
            if held > capacity:
                where = f"server {name!r} gpu[{g}]"
                text = f"{where} holds {held:,} {unit} of experts, {source} says {capacity:,}"
                found.append(Violation("capacity", where, held - capacity, unit, text))
    return found


def _check_home(placement: Placement, instance: Instance) -> list[Violation]:
    """Servers of the cluster that keep all layers of their users, and what a table reserves."""
    if placement.execution is None or instance.cluster is None:
        return []
    found = []
    away = executed_elsewhere(placement.execution).sum(axis=1).tolist()
    for server, layers in zip(instance.cluster.servers, away, strict=True):
        where = f"server {server.name!r}"
        if server.execute_at_home and layers:
            text = (
                f"{where} has execute_at_home = true, and {quantity(layers, 'layer')} of its users "
                "execute on other servers"
            )
            found.append(Violation("execute_at_home", where, layers, "layers", text))
        tokens = placement.kv_tokens.get(server.name, server.kv_tokens)
        if tokens != server.kv_tokens:
            text = (
                f"{where} has kv_tokens {tokens:,} in the placement, "
                f"{server.kv_tokens:,} in the cluster"
            )
            found.append(
                Violation("kv_tokens", where, abs(tokens - server.kv_tokens), "tokens", text)
            )
    return found


def _check_instance(placement: Placement, instance: Instance) -> list[Violation]:
    """What a placement breaks of an instance besides coverage."""
    require_same_model(
        placement.model, instance.model, source="placement", other="the planning problem"
    )
    if placement.servers != instance.servers:
        text = f"servers are {list(placement.servers)}, the cluster has {list(instance.servers)}"
        return [Violation("servers", "servers", 1, "servers", text)]
    num_gpus = [len(gpus) for gpus in placement.gpu_capacity]
    expected = [len(gpus) for gpus in instance.gpu_capacity]
    if num_gpus != expected:
        text = f"GPUs per server are {num_gpus}, the cluster has {expected}"
        return [Violation("gpus", "gpus", 1, "servers", text)]
    found = []
    if placement.gpu_capacity != instance.gpu_capacity:
        found += _check_memory(placement, instance.gpu_capacity, "the cluster")
    model, local = placement.model, placement.local
    for constraint, triples, broken in (
        ("pin", instance.pinned, "pinned but not held"),
        ("forbid", instance.forbidden, "forbidden but held"),
    ):
        for n, layer, expert in triples:
            if local[n, layer, expert] == (constraint == "forbid"):
                pair = model.pair_text(layer * model.num_experts + expert)
                where = f"server {placement.servers[n]!r} {pair}"
                found.append(Violation(constraint, where, 1, "experts", f"{where} is {broken}"))
    found += _check_home(placement, instance)
    for n, cap in enumerate(instance.layer_caps):
        if cap is None:
            continue
        for layer, held in enumerate(local[n].sum(axis=1).tolist()):
            if held > cap:
                where = f"server {placement.servers[n]!r} layer {model.moe_layers[layer]}"
                text = f"{where} holds {held} experts, layer_cap is {cap}"
                found.append(Violation("layer_cap", where, held - cap, "experts", text))
    return found
