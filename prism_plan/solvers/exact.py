"""The planning problem solved exactly, with a certificate: bound == objective."""

from __future__ import annotations

import functools
import math
import time

import numpy as np
import numpy.typing as npt

from prism_plan.exact_sum import exact_sum
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import explain_infeasible
from prism_plan.model_spec import ModelShape
from prism_plan.solvers import flow
from prism_plan.solvers.certificate import Prices, value_bound
from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult
from prism_plan.solvers.packing import reference_local

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Bound and objective agree within this share of all calls, or the result is not called optimal.
TOLERANCE = 1e-9
#: Values become integers of at most so many bits; paths add up to less than 2**62.
WEIGHT_BITS = 50


def _solve(instance: Instance, options: Options) -> SolverResult:
    _compile()
    begin = time.perf_counter()
    value, held_before = instance.activations, None
    if options.reference is not None:
        held_before = reference_local(instance, options.reference)
        value = value - options.load_price * ~held_before
    local, prices, counters = solve_flow(instance, value, held_before)
    total = exact_sum(instance.activations)
    objective = total - exact_sum(value[local])
    bound = total - value_bound(instance, value, prices)
    scale = max(total, options.load_price * int(local.sum()))
    proven = objective - bound <= TOLERANCE * scale
    if held_before is None:
        fill_free_slots(instance, local)
    runtime_s = time.perf_counter() - begin
    return SolverResult(
        local=local,
        termination="optimal" if proven else "heuristic",
        bound=objective if proven else bound,
        runtime_s=runtime_s,
        extra={
            "augmentations": int(counters[0]),
            "expanded": int(counters[1]),
            "certificate_gap": max(objective - bound, 0.0),
        },
    )


def solve_flow(
    instance: Instance, value: Floats, preferred: Bools | None = None
) -> tuple[Bools, Prices, npt.NDArray[np.int64]]:
    """Maximise Σ value·x over the feasible placements x of an instance of equal expert sizes.

    ``value`` [N, L, E] may be negative; ``preferred`` [N, L, E] breaks ties. Returns x, bool
    [N, L, E], the dual prices, and the counts (augmentations, expanded nodes).

    Raises
    ------
    Infeasible
        No placement satisfies the instance.
    """
    servers, layers, experts = value.shape
    pairs = layers * experts
    capped = any(cap is not None for cap in instance.layer_caps)
    groups, group_size = (layers, experts) if capped else (1, pairs)
    slots = instance.slots
    cap_of_server = np.minimum(instance.max_per_layer if capped else pairs, group_size)
    cap = np.broadcast_to(cap_of_server, (groups, servers)).T.copy()

    bits = weight_bits(servers, groups)
    largest = float(np.abs(value).max()) or 1.0
    scale = 2.0 ** (bits - math.ceil(math.log2(largest)))
    weight = np.rint(value.reshape(servers, pairs) * scale).astype(np.int64)
    if preferred is not None:
        weight += 2 * preferred.reshape(servers, pairs)
    state = np.zeros((servers, pairs), np.int8)
    state[instance.mask(instance.pinned).reshape(servers, pairs)] = flow.PINNED
    state[instance.mask(instance.forbidden).reshape(servers, pairs)] = flow.FORBIDDEN
    # pinned and forbidden experts are passed over, and with caps those of full layers
    most = pairs if capped else int(slots.max() + (state != flow.FREE).sum(axis=1).max())
    by_weight = best_experts(weight, min(most, pairs))
    search = flow.FlowState.build(
        np.ascontiguousarray(weight.T),
        slots,
        cap,
        np.ascontiguousarray(state.T),
        group_size,
        instance.min_replicas,
    )
    flow.initialise(search, by_weight)
    uncovered = flow.augment(search)
    if uncovered >= 0:
        explain_infeasible(instance)
        raise AssertionError(f"no path for {instance.model.pair_text(uncovered)}, yet no cut")
    local = ((search.state == flow.HELD) | (search.state == flow.PINNED)).T.reshape(value.shape)
    return np.ascontiguousarray(local), _prices(search, instance, scale), search.counters


def weight_bits(servers: int, groups: int) -> int:
    """Bits of the values of the flow, of ``servers`` whose experts are in so many groups.

    Values that are integers below 2 to this power are not rounded.
    """
    return min(WEIGHT_BITS, 57 - math.ceil(math.log2(2 * servers * (groups + 1))))


def best_experts(weight: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int32]:
    """The ``most`` experts of largest weight [N, J] by server, int32 [N, most], by falling weight.

    Of equal weights the lowest index comes first.
    """
    servers, pairs = weight.shape
    if most < pairs // 2:
        least = np.partition(weight, pairs - max(most, 1), axis=1)[:, pairs - max(most, 1), None]
        chosen = weight > least
        equal = weight == least
        chosen |= equal & (
            np.cumsum(equal, axis=1, dtype=np.int32) <= most - chosen.sum(axis=1)[:, None]
        )
        expert = np.nonzero(chosen)[1].reshape(servers, most)
    else:
        expert = np.broadcast_to(np.arange(pairs), weight.shape)
    order = np.argsort(-np.take_along_axis(weight, expert, axis=1), axis=1, kind="stable")
    best = np.take_along_axis(expert, order[:, :most], axis=1)
    return np.ascontiguousarray(best, np.int32)


def _prices(search: flow.FlowState, instance: Instance, scale: float) -> Prices:
    """Dual prices from potentials: a slot has that of its hub, a layer cap what its node adds."""
    servers, layers, experts = instance.activations.shape
    groups = search.cap.shape[1]
    slot = search.potential[servers * groups :]
    node = search.potential[: servers * groups].reshape(servers, groups)
    above = np.maximum(node - slot[:, None], 0)
    # coverage pays what the holder with the dearest slot would lose by the price of that slot
    lack = np.zeros(layers * experts, np.int64)
    for n, g in np.ndindex(servers, groups):
        held = search.held[n, g, : search.num_held[n, g]]
        lack[held] = np.maximum(lack[held], slot[n] + above[n, g] - search.weight[held, n])
    coverage = np.where(search.num_replicas == instance.min_replicas, lack, 0)
    return Prices(
        slot=slot / scale,
        # without caps there is one group, whose node is never dearer than its hub
        layer_cap=np.broadcast_to(above / scale, (servers, layers)),
        coverage=(coverage / scale).reshape(layers, experts),
    )


def fill_free_slots(instance: Instance, local: Bools) -> None:
    """Fill free slots with the experts that all servers together call most.

    Free slots do not change the objective; popular experts in them save message hops.
    """
    if (instance.slots <= local.sum(axis=(1, 2))).all():
        return
    forbidden = instance.mask(instance.forbidden)
    by_demand = np.argsort(-instance.activations.sum(axis=0), axis=None, kind="stable")
    for n, cap in enumerate(instance.max_per_layer):
        free = int(instance.slots[n]) - int(local[n].sum())
        num_held = local[n].sum(axis=1)
        for pair in by_demand.tolist():
            if free <= 0:
                break
            layer, expert = divmod(pair, instance.model.num_experts)
            taken = local[n, layer, expert] or forbidden[n, layer, expert]
            if not taken and num_held[layer] < cap:
                local[n, layer, expert] = True
                num_held[layer] += 1
                free -= 1


@functools.cache
def _compile() -> None:
    """Compile the search, or load it from the cache, before the clock starts."""
    activations = np.ones((2, 1, 2))
    tiny = Instance(ModelShape("compile", (0,), 2, 1, 1), ("a", "b"), activations, ((1,), (1,)))
    solve_flow(tiny, tiny.activations)


SOLVER = Solver(
    name="exact",
    summary="minimum-cost flow by shortest augmenting paths over servers",
    guarantee="optimal, with a certificate (bound == objective)",
    function=_solve,
    supports=frozenset({Feature.MIN_REPLICAS, Feature.RULES, Feature.LOAD_PRICE}),
)
