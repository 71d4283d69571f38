"""The planning problem solved exactly, with a certificate: bound == objective."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.feasibility import explain_infeasible
from prism_plan.instance import Instance
from prism_plan.solvers import flow
from prism_plan.solvers.certificate import Prices, worth_bound
from prism_plan.solvers.contract import Answer, Options, Rule, Solver
from prism_plan.solvers.packing import standing_local

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Bound and objective agree within this share of all calls, or the answer is not called optimal.
TOLERANCE = 1e-9
#: Weights become whole numbers of at most so many bits; paths add up to less than 2**62.
WEIGHT_BITS = 50


def _solve(instance: Instance, options: Options) -> Answer:
    _load_compiled()
    begin = time.perf_counter()
    standing = None if options.near is None else standing_local(instance, options.near)
    worth = instance.activations
    if standing is not None:
        worth = worth - options.load_price * ~standing
    local, prices, work = solve_flow(instance, worth, standing)
    total = math.fsum(instance.activations.ravel())
    objective = total - math.fsum(worth[local])
    bound = total - worth_bound(instance, worth, prices)
    scale = max(total, options.load_price * int(local.sum()))
    proven = objective - bound <= TOLERANCE * scale
    if standing is None:
        _fill_free_slots(instance, local)
    runtime_s = time.perf_counter() - begin
    return Answer(
        local=local,
        termination="optimal" if proven else "heuristic",
        bound=objective if proven else bound,
        runtime_s=runtime_s,
        extra={
            "augmentations": int(work[0]),
            "expanded": int(work[1]),
            "certificate_gap": max(objective - bound, 0.0),
        },
    )


def solve_flow(
    instance: Instance, worth: Floats, preferred: Bools | None = None
) -> tuple[Bools, Prices, npt.NDArray[np.int64]]:
    """Maximise Σ worth·x over the feasible placements x of an instance of equal expert sizes.

    ``worth`` [N, L, E] may be negative; ``preferred`` [N, L, E] breaks ties. Returns x, bool
    [N, L, E], the dual prices, and the counts (augmentations, expanded nodes).

    Raises
    ------
    Infeasible
        No placement satisfies the instance.
    """
    servers, layers, experts = worth.shape
    pairs = layers * experts
    capped = any(cap is not None for cap in instance.layer_caps)
    groups, group_size = (layers, experts) if capped else (1, pairs)
    slots = instance.slots
    cap = np.empty((servers, groups), np.int64)
    for n, limit in enumerate(instance.layer_caps):
        cap[n] = min(group_size, pairs if limit is None else limit)

    bits = min(WEIGHT_BITS, 57 - math.ceil(math.log2(2 * servers * (groups + 1))))
    largest = float(np.abs(worth).max()) or 1.0
    scale = 2.0 ** (bits - math.ceil(math.log2(largest)))
    weight = np.rint(worth.reshape(servers, pairs) * scale).astype(np.int64)
    if preferred is not None:
        weight += 2 * preferred.reshape(servers, pairs)
    state = np.zeros((servers, pairs), np.int8)
    state[instance.mask(instance.pinned).reshape(servers, pairs)] = flow.PINNED
    state[instance.mask(instance.forbidden).reshape(servers, pairs)] = flow.FORBIDDEN
    most = int(max(1, min(int(slots.max()), group_size))) + 1
    tables = flow.Tables(
        weight=np.ascontiguousarray(weight.T),
        slots=slots,
        sizes=np.array([group_size, instance.min_replicas]),
        far=1 << 59,
        order=np.argsort(-weight, axis=1, kind="stable").astype(np.int32),
        cap=cap,
        state=np.ascontiguousarray(state.T),
        held=np.empty((servers, groups, most), np.int32),
        place=np.full((pairs, servers), -1, np.int32),
        number=np.zeros((servers, groups), np.int64),
        used=np.zeros(servers, np.int64),
        copies=np.zeros(pairs, np.int64),
        potential=np.zeros(servers * (groups + 1), np.int64),
        cheapest=np.full((servers, groups, servers + 1), flow.UNKNOWN, np.int32),
        cost=np.zeros((servers, groups, servers + 1), np.int64),
        work=np.zeros(2, np.int64),
    )
    flow.start(tables)
    stuck = flow.cover(tables)
    if stuck >= 0:
        explain_infeasible(instance)
        raise AssertionError(f"no path for {instance.model.pair_text(stuck)}, yet no cut")
    local = ((tables.state == flow.HELD) | (tables.state == flow.PINNED)).T.reshape(worth.shape)
    return np.ascontiguousarray(local), _prices(tables, instance, scale), tables.work


def _prices(tables: flow.Tables, instance: Instance, scale: float) -> Prices:
    """Prices from potentials: a slot costs its hub's, a layer cap what its node adds to that."""
    servers, layers, experts = instance.activations.shape
    groups = tables.cap.shape[1]
    slot = tables.potential[servers * groups :]
    node = tables.potential[: servers * groups].reshape(servers, groups)
    above = np.maximum(node - slot[:, None], 0)
    # what the dearest holder would lose by the price of its slot is paid by coverage
    per_pair = np.repeat(slot[:, None] + above, layers * experts // groups, axis=1)
    lack = np.where(tables.state.T == flow.HELD, per_pair - tables.weight.T, 0).max(axis=0)
    coverage = np.where(tables.copies == instance.min_replicas, np.maximum(lack, 0), 0)
    return Prices(
        slot=slot / scale,
        # without caps there is one group, whose node is never dearer than its hub
        layer_cap=np.broadcast_to(above / scale, (servers, layers)),
        coverage=(coverage / scale).reshape(layers, experts),
    )


def _fill_free_slots(instance: Instance, local: Bools) -> None:
    """Free slots hold what the other servers call most: it costs nothing and shortens ways."""
    forbidden = instance.mask(instance.forbidden)
    demand = np.argsort(-instance.activations.sum(axis=0), axis=None, kind="stable")
    experts = instance.model.num_experts
    for n, slots in enumerate(instance.slots):
        free = int(slots) - int(local[n].sum())
        cap = instance.layer_caps[n]
        if free <= 0:
            continue
        of_layer = local[n].sum(axis=1)
        for pair in demand.tolist():
            layer, expert = divmod(pair, experts)
            if local[n, layer, expert] or forbidden[n, layer, expert]:
                continue
            if cap is not None and of_layer[layer] >= cap:
                continue
            local[n, layer, expert] = True
            of_layer[layer] += 1
            free -= 1
            if not free:
                break


_compiled: list[bool] = []


def _load_compiled() -> None:
    """Compile, or load from the cache, before the clock starts."""
    if _compiled:
        return
    from prism_plan.model import ModelShape

    model = ModelShape("compile", (0,), 2, 1, 1)
    activations: Any = np.ones((2, 1, 2))
    tiny = Instance(model, ("a", "b"), activations, ((1,), (1,)))
    solve_flow(tiny, tiny.activations)
    _compiled.append(True)


SOLVER = Solver(
    name="exact",
    summary="minimum-cost flow by shortest augmenting paths over servers",
    guarantee="optimal, with a certificate (bound == objective)",
    function=_solve,
    knows=frozenset({Rule.MIN_REPLICAS, Rule.RULES, Rule.LOAD_PRICE}),
)
