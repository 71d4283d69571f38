"""Can any placement satisfy an instance? If not: which constraint, and by how much."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible
from prism_plan.instance import Instance
from prism_plan.placement import server_of_gpu


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
    copies, pairs = instance.min_replicas, instance.model.num_pairs
    if copies > instance.num_servers:
        raise Infeasible(
            f"min_replicas {copies} on {instance.num_servers} servers",
            shortfall=copies - instance.num_servers,
            unit="servers",
            remedy="lower ``min_replicas`` or add servers",
        )
    if not instance.in_slots:
        _require_bytes(instance)
        return
    if instance.has_rules:
        _require_pins_fit(instance)
    slots = int(instance.slots.sum())
    if slots < copies * pairs:
        if instance.has_rules:  # rules can make it fall short by more
            explain_infeasible(instance)
        each = f" with {copies} replicas each" if copies > 1 else ""
        raise Infeasible(
            f"coverage: {pairs:,} experts{each} need {copies * pairs:,} slots, "
            f"{instance.num_servers} servers have {slots:,}",
            shortfall=copies * pairs - slots,
            unit="slots",
            remedy="add memory or servers" + (", or lower ``min_replicas``" if copies > 1 else ""),
        )


def _require_bytes(instance: Instance) -> None:
    """Necessary, not sufficient: whole experts may still not pack."""
    need = int(instance.expert_size.sum()) * instance.model.num_experts * instance.min_replicas
    room = sum(sum(gpus) for gpus in instance.gpu_capacity)
    if room < need:
        raise Infeasible(
            f"coverage: the experts need {need:,} bytes, the GPUs have {room:,}",
            shortfall=need - room,
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

    The maximum flow server → (server, layer) → expert → sink tells the shortfall, its minimum cut
    the experts. Pins are taken off the capacities first; a pinned copy serves its expert's need.

    Raises
    ------
    Infeasible
        Which experts want copies that do not fit, and how many.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    servers, layers, experts = instance.activations.shape
    pairs = layers * experts
    pinned = instance.mask(instance.pinned)
    open_ = ~(pinned | instance.mask(instance.forbidden))
    need = np.maximum(instance.min_replicas - pinned.sum(axis=0), 0).ravel()
    slots = instance.slots - pinned.sum(axis=(1, 2))
    caps = np.minimum(instance.max_per_layer, experts)[:, None] - pinned.sum(axis=2)

    # nodes: source, sink, servers, (server, layer), pairs
    server_at = 2 + np.arange(servers)
    layer_at = 2 + servers + np.arange(servers * layers).reshape(servers, layers)
    pair_at = 2 + servers + servers * layers + np.arange(pairs)
    at_server, at_layer, at_expert = np.nonzero(open_)
    tails = np.concatenate(
        [np.zeros(servers), np.repeat(server_at, layers), layer_at[at_server, at_layer], pair_at]
    )
    heads = np.concatenate(
        [server_at, layer_at.ravel(), pair_at[at_layer * experts + at_expert], np.ones(pairs)]
    )
    capacity = np.concatenate([slots, caps.ravel(), np.ones(len(at_server)), need])
    size = 2 + servers + servers * layers + pairs
    graph = csr_array(
        (capacity.astype(np.int32), (tails.astype(np.int32), heads.astype(np.int32))),
        shape=(size, size),
    )
    result = maximum_flow(graph, 0, 1)
    shortfall = int(need.sum()) - int(result.flow_value)
    if shortfall <= 0:
        return
    residual = graph - result.flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reached = np.zeros(size, bool)
    reached[breadth_first_order(residual, 0, return_predecessors=False)] = True
    # experts beyond the cut want more copies than the servers before it can still give
    short = np.flatnonzero(~reached[pair_at] & (need > 0))
    names = [instance.model.pair_text(int(pair)) for pair in short[:3]]
    more = f" and {len(short) - 3} more" if len(short) > 3 else ""
    wanted = int(need[short].sum())
    besides = " besides pinned ones" if instance.pinned else ""
    raise Infeasible(
        f"{', '.join(names)}{more} want {wanted:,} copies{besides}, but slots, pins, forbid and "
        f"layer_cap leave room for {wanted - shortfall:,}",
        shortfall=shortfall,
        unit="slots",
        remedy="loosen forbid, pin or layer_cap, add memory, or lower ``min_replicas``",
    )


def first_fit(instance: Instance) -> bool:
    """Whether experts of unequal size fit when they are placed one by one, the largest first.

    Each goes to the GPU with the most room among those that may hold it; of pinned ones first.
    ``True`` proves that a placement exists, ``False`` proves nothing.
    """
    size = np.repeat(instance.expert_size, instance.model.num_experts)
    owner = server_of_gpu(instance.gpu_capacity)
    room = np.array([bytes_ for gpus in instance.gpu_capacity for bytes_ in gpus], np.int64)
    shape = (instance.num_servers, instance.model.num_pairs)
    open_ = ~instance.mask(instance.forbidden).reshape(shape)
    pinned = instance.mask(instance.pinned).reshape(shape)
    held = np.zeros(shape, bool)
    left = np.tile(instance.max_per_layer[:, None], instance.model.num_layers)

    def place(pair: int, servers: npt.NDArray[np.bool_]) -> bool:
        layer = pair // instance.model.num_experts
        may = servers & ~held[:, pair] & (left[:, layer] > 0)
        fits = np.where(may[owner] & (room >= size[pair]), room, -1)
        gpu = int(np.argmax(fits))
        if fits[gpu] < 0:
            return False
        room[gpu] -= size[pair]
        held[owner[gpu], pair] = True
        left[owner[gpu], layer] -= 1
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
