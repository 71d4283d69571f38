"""Whether any placement satisfies an instance, and if not, which constraint fails by how much."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible
from prism_plan.instance import Instance
from prism_plan.placement import server_of_gpu
from prism_plan.printable_text import listed


def require_feasible(instance: Instance) -> None:
    """Refuse an instance of equal expert sizes that no placement satisfies.

    The test is Σ_n min(C[n], J) ≥ min_replicas·J and min_replicas ≤ N (docs/design.md, section 2).
    It is complete without rules. With pins, forbidden experts or layer caps only the solver finds
    out, and :func:`explain_infeasible` says why.

    Raises
    ------
    Infeasible
        The constraint and the shortfall.
    """
    replicas, pairs = instance.min_replicas, instance.model.num_pairs
    if replicas > instance.num_servers:
        raise Infeasible(
            f"min_replicas {replicas} on {instance.num_servers} servers",
            shortfall=replicas - instance.num_servers,
            unit="servers",
            remedy="lower ``min_replicas`` or add servers",
        )
    if not instance.in_slots:
        _require_bytes(instance)
        return
    if instance.has_rules:
        _require_pins_fit(instance)
    slots = int(instance.slots.sum())
    if slots < replicas * pairs:
        if instance.has_rules:  # rules can make it fall short by more
            explain_infeasible(instance)
        each, lower = "", ""
        if replicas > 1:
            each, lower = f" with {replicas} replicas each", ", or lower ``min_replicas``"
        raise Infeasible(
            f"coverage: {pairs:,} experts{each} need {replicas * pairs:,} slots, "
            f"{instance.num_servers} servers have {slots:,}",
            shortfall=replicas * pairs - slots,
            unit="slots",
            remedy=f"add memory or servers{lower}",
        )


def _require_bytes(instance: Instance) -> None:
    """Refuse too few bytes in all: enough is necessary, not sufficient, for whole experts."""
    needed = int(instance.expert_size.sum()) * instance.model.num_experts * instance.min_replicas
    capacity = sum(sum(gpus) for gpus in instance.gpu_capacity)
    if capacity < needed:
        raise Infeasible(
            f"coverage: the experts need {needed:,} bytes, the GPUs have {capacity:,}",
            shortfall=needed - capacity,
            unit="bytes",
            remedy="add memory or servers",
        )


def _require_pins_fit(instance: Instance) -> None:
    pinned = instance.mask(instance.pinned).sum(axis=2)
    for n, name in enumerate(instance.servers):
        slots = int(instance.slots[n])
        if pinned[n].sum() > slots:
            raise Infeasible(
                f"server {name!r} has {pinned[n].sum()} pinned experts and {slots} slots",
                shortfall=int(pinned[n].sum()) - slots,
                unit="slots",
                remedy="remove pins or add memory",
            )
        cap = instance.layer_caps[n]
        if cap is not None and pinned[n].max() > cap:
            layer = int(np.argmax(pinned[n]))
            raise Infeasible(
                f"server {name!r} has {pinned[n, layer]} pinned experts in layer "
                f"{instance.model.moe_layers[layer]} and layer_cap {cap}",
                shortfall=int(pinned[n, layer]) - cap,
                unit="slots",
                remedy="remove pins or raise layer_cap",
            )


def explain_infeasible(instance: Instance) -> None:
    """Refuse an instance with rules that no placement satisfies, naming a violated cut.

    The maximum flow server → (server, layer) → expert → sink gives the shortfall, its minimum cut
    the experts. Pins are subtracted first, from the capacities and from what their experts need.

    Raises
    ------
    Infeasible
        Which experts lack replicas, and how many.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    servers, layers, experts = instance.activations.shape
    pairs = layers * experts
    pinned = instance.mask(instance.pinned)
    open_ = ~(pinned | instance.mask(instance.forbidden))
    need = np.maximum(instance.min_replicas - pinned.sum(axis=0), 0).ravel()
    slots = instance.slots - pinned.sum(axis=(1, 2))
    caps = instance.max_per_layer[:, None] - pinned.sum(axis=2)

    # nodes: source, sink, servers, (server, layer), pairs
    server_node = 2 + np.arange(servers)
    layer_node = 2 + servers + np.arange(servers * layers).reshape(servers, layers)
    pair_node = 2 + servers + servers * layers + np.arange(pairs)
    n, layer, expert = np.nonzero(open_)
    tails = np.concatenate(
        [np.zeros(servers), np.repeat(server_node, layers), layer_node[n, layer], pair_node]
    )
    heads = np.concatenate(
        [server_node, layer_node.ravel(), pair_node[layer * experts + expert], np.ones(pairs)]
    )
    capacity = np.concatenate([slots, caps.ravel(), np.ones(len(n)), need])
    num_nodes = 2 + servers + servers * layers + pairs
    graph = csr_array(
        (capacity.astype(np.int32), (tails.astype(np.int32), heads.astype(np.int32))),
        shape=(num_nodes, num_nodes),
    )
    result = maximum_flow(graph, 0, 1)
    shortfall = int(need.sum()) - int(result.flow_value)
    if shortfall <= 0:
        return
    residual = graph - result.flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reached = np.zeros(num_nodes, bool)
    reached[breadth_first_order(residual, 0, return_predecessors=False)] = True
    # experts beyond the cut need more replicas than the servers before it can hold
    short = np.flatnonzero(~reached[pair_node] & (need > 0))
    names = listed(map(instance.model.pair_text, short.tolist()))
    needed = int(need[short].sum())
    besides = " besides pinned ones" if instance.pinned else ""
    raise Infeasible(
        f"{names} want {needed:,} copies{besides}, but slots, pins, forbid and "
        f"layer_cap leave room for {needed - shortfall:,}",
        shortfall=shortfall,
        unit="slots",
        remedy="loosen forbid, pin or layer_cap, add memory, or lower ``min_replicas``",
    )


def first_fit(instance: Instance) -> bool:
    """Whether experts of unequal size fit when they are placed one by one, the largest first.

    Each goes to the GPU with the most free bytes among those that may hold it, pinned ones first.
    ``True`` proves that a placement exists, ``False`` proves nothing.
    """
    size = np.repeat(instance.expert_size, instance.model.num_experts)
    server_of = server_of_gpu(instance.gpu_capacity)
    free = np.array([size for gpus in instance.gpu_capacity for size in gpus], np.int64)
    shape = (instance.num_servers, instance.model.num_pairs)
    open_ = ~instance.mask(instance.forbidden).reshape(shape)
    pinned = instance.mask(instance.pinned).reshape(shape)
    held = np.zeros(shape, bool)
    left_in_layer = np.tile(instance.max_per_layer[:, None], instance.model.num_layers)

    def place(pair: int, servers: npt.NDArray[np.bool_]) -> bool:
        layer = pair // instance.model.num_experts
        allowed = servers & ~held[:, pair] & (left_in_layer[:, layer] > 0)
        candidates = np.where(allowed[server_of] & (free >= size[pair]), free, -1)
        gpu = int(np.argmax(candidates))
        if candidates[gpu] < 0:
            return False
        free[gpu] -= size[pair]
        held[server_of[gpu], pair] = True
        left_in_layer[server_of[gpu], layer] -= 1
        return True

    by_size = np.argsort(-size, kind="stable").tolist()
    for pair in by_size:
        for n in np.flatnonzero(pinned[:, pair]):
            if not place(pair, np.arange(instance.num_servers) == n):
                return False
    for pair in by_size:
        while held[:, pair].sum() < instance.min_replicas:
            if not place(pair, open_[:, pair]):
                return False
    return True
