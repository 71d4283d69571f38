"""Why there is no plan: memory, KV caches, replicas, or rules, whichever is short."""

from __future__ import annotations

import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.expert_capacity import gpu_capacity, kv_bytes
from prism_plan.instance_feasibility import explain_infeasible, require_feasible
from prism_plan.printable_text import listed, quantity
from prism_plan.solvers.contract import Options
from prism_plan.solvers.latency.problem import Capacity, LatencyProblem


def no_plan(problem: LatencyProblem, options: Options) -> Infeasible:
    """Why nothing fits, and where KV caches lie."""
    cause = _cause(problem, options)
    needed = kv_bytes(problem.cluster, problem.model)
    caches = [
        f"{kept:,} bytes of {server.name}"
        for server, kept in zip(problem.cluster.servers, needed, strict=True)
        if kept
    ]
    if not caches:
        return cause
    remedy = cause.remedy if "kv_tokens" in cause.remedy else f"{cause.remedy}, or lower kv_tokens"
    return Infeasible(
        f"{cause.constraint} (KV caches with every layer at home: {', '.join(caches)})",
        shortfall=cause.shortfall,
        unit=cause.unit,
        remedy=remedy,
    )


def _cause(problem: LatencyProblem, options: Options) -> Infeasible:
    """What the plan with every layer at home lacks, or one of whole layers."""
    instance = problem.instance
    try:
        capacity = gpu_capacity(problem.cluster, problem.model)
        at_home = instance.replace(gpu_capacity=capacity)
        require_feasible(at_home)
        if instance.in_slots and instance.has_rules:
            explain_infeasible(at_home)
    except Infeasible as error:
        return error
    if instance.in_slots and not options.whole_layers:
        rules = ", and keeps rules and replicas" if _has_rules(problem) else ""
        return Infeasible(
            f"latency: no plan was found that fits{_beside(problem)}{rules}",
            shortfall=1,
            unit="plan",
            remedy="lower kv_tokens or add memory",
        )
    return _no_whole_layers(problem, capacity)


def _no_whole_layers(problem: LatencyProblem, capacity: Capacity) -> Infeasible:
    """What plans of whole layers lack: memory for all copies, layer caps, or something in rules."""
    instance, servers = problem.instance, problem.cluster.servers
    layers, experts = problem.model.num_layers, problem.model.num_experts
    split = "plan without whole layers"
    if not instance.in_slots:  # candidates are pipelines alone
        split = "use solver ilp, which splits layers of unequal expert sizes"
    size = int(instance.expert_size.min())
    room = np.array([sum(gpus) for gpus in capacity]) // (size * experts)
    room = np.minimum(room, layers)
    capped = instance.max_per_layer < experts
    held, allowed = int(room.sum()), int(room[~capped].sum())
    needed = layers * instance.min_replicas
    copies = f"the model has {layers}"
    if instance.min_replicas > 1:
        copies = f"{instance.min_replicas} replicas of {quantity(layers, 'layer')} are {needed}"
    none = f"latency: no plan of whole layers was found that fits{_beside(problem)}"
    if allowed < needed <= held:
        names = (own.name for own, of_server in zip(servers, capped, strict=True) if of_server)
        return Infeasible(
            f"{none}: by layer_cap {listed(names)} may hold no whole layer of "
            f"{experts} experts; other servers have memory for "
            f"{quantity(allowed, 'whole layer')}, {copies}",
            shortfall=needed - allowed,
            unit="layers",
            remedy=f"raise layer_cap, or {split}",
        )
    if _has_rules(problem) and allowed >= needed:
        return Infeasible(
            f"{none}, and keeps rules and replicas: memory is enough, for servers can hold "
            f"{quantity(allowed, 'whole layer')}, {copies}",
            shortfall=1,
            unit="plan",
            remedy=f"loosen pin, forbid or layer_cap, or {split}",
        )
    fewer = ", or lower ``min_replicas``" if instance.min_replicas > 1 else ""
    return Infeasible(
        f"{none}: servers have memory for {quantity(held, 'whole layer')}, {copies}",
        shortfall=max(needed - held, 1),
        unit="layers",
        remedy=f"add memory{fewer}, or {split}",
    )


def _beside(problem: LatencyProblem) -> str:
    return " beside the KV caches" if any(s.kv_tokens for s in problem.cluster.servers) else ""


def _has_rules(problem: LatencyProblem) -> bool:
    return problem.instance.has_rules or problem.instance.min_replicas > 1
