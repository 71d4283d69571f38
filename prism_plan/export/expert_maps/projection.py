"""The best expert map of equal slots, under the replica rule of the engine that is to run it.

Where SGLang's nodes are the servers, a call stays on its server if any rank of it has the expert:
then the exact flow with layer caps is the best map, of any number of ranks. Other rules are a small
integer programme a layer, with a column for each expert and set of ranks that hold it; where all
sets are too many, some are left out, and the flow's optimum is still a bound.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.errors import UnsupportedFeature
from prism_plan.export.expert_maps.equal_slots import EqualSlots
from prism_plan.export.expert_maps.replica_rules import local_share, nodes_of, remote_share
from prism_plan.instance import Instance
from prism_plan.io.export import MapEngine
from prism_plan.model_spec import ModelShape
from prism_plan.solvers.eplb import balanced_packing, replicate_experts
from prism_plan.solvers.run import solve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Columns of a layer's integer programme: experts times sets of ranks.
MAX_COLUMNS = 1 << 15
#: Ranks of which pairs are looked at; a map of SGLang's has no such limit.
MAX_RANKS = 32


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """``physical`` int64 [L, R, S]: the expert in each slot. ``bound`` is a proven lower bound.

    ``share`` of calls go to another server by the engine's replica rule.
    """

    physical: Ints
    share: float
    bound: float


def project(engine: MapEngine, shape: EqualSlots, calls: Floats) -> ExpertMap:
    """The expert map with the fewest calls to other servers; ``calls`` [N, L, E].

    It is proven best where ``share`` equals ``bound``: always for SGLang with equally many ranks on
    every server, otherwise where all sets of ranks are looked at.

    Raises
    ------
    UnsupportedFeature
        There are more ranks than pairs of them can be looked at.
    """
    servers = np.array(shape.ranks)
    if engine == "sglang" and (nodes_of(shape.ranks) == servers).all():
        physical, kept = _by_flow(shape, calls)
    else:
        physical, kept = _by_sets(engine, shape, calls)
    total = float(calls[np.unique(servers)].sum())
    share = remote_share(engine, physical, shape.ranks, calls)
    bound = 1.0 - kept / total if total else 0.0
    return ExpertMap(physical, share, min(max(bound, 0.0), share))


# ------------------------------------------------------------------------------------------- flow


def local_with_equal_slots(shape: EqualSlots, calls: Floats) -> npt.NDArray[np.bool_]:
    """Which server holds which expert in the best map where a server finds each copy that it has.

    ``calls`` [N, L, E] of the servers with ranks, in order; returns bool [N, L, E], every slot used
    unless a server has all experts. It is solver ``exact`` with layer caps.
    """
    servers, layers, experts = calls.shape
    slots = [shape.slots * len(shape.of_server(server)) for server in sorted(set(shape.ranks))]
    instance = Instance(
        ModelShape("map", tuple(range(layers)), experts, 1, 1),
        tuple(str(server) for server in range(servers)),
        calls,
        tuple((layers * own,) for own in slots),
        layer_caps=tuple(min(own, experts) for own in slots),
    )
    return solve(instance, "exact").local


def _by_flow(shape: EqualSlots, calls: Floats) -> tuple[Ints, float]:
    """The best map where a server finds each copy that it has, and the calls that stay then."""
    groups = [shape.of_server(server) for server in sorted(set(shape.ranks))]
    value = calls[sorted(set(shape.ranks))]
    local = local_with_equal_slots(shape, value)
    physical = np.zeros((calls.shape[1], len(shape.ranks), shape.slots), np.int64)
    for own, ranks in zip(local, groups, strict=True):
        for layer, held in enumerate(own):
            listed = np.resize(np.flatnonzero(held), shape.slots * len(ranks))
            physical[layer, ranks] = np.sort(listed.reshape(len(ranks), shape.slots))
    return physical, float(value[local].sum())


# ------------------------------------------------------------------------------ integer programmes


def _by_sets(engine: MapEngine, shape: EqualSlots, calls: Floats) -> tuple[Ints, float]:
    """The best map of the sets that are looked at, and a bound on what stays under any map."""
    experts, layers = calls.shape[2], calls.shape[1]
    sets, every = _sets_of_ranks(len(shape.ranks), experts)
    servers = np.array(shape.ranks)
    of_rank = np.bincount(servers, minlength=len(calls))
    kept = np.array([local_share(engine, holders, shape.ranks) for holders in sets])  # [sets, R]
    physical = np.zeros((layers, len(shape.ranks), shape.slots), np.int64)
    stays = 0.0
    for layer in range(layers):
        per_rank = calls[servers, layer] / of_rank[servers][:, None]  # [R, E]
        value = per_rank.T @ kept.T  # [E, sets]
        chosen, bound = _best_sets(value, sets, shape, 1e-6 if every else 1e-4)
        stays += bound
        _fill(physical[layer], chosen, sets)
    # no rule keeps a call on a server that has no copy
    return physical, stays if every else _by_flow(shape, calls)[1]


def _sets_of_ranks(ranks: int, experts: int) -> tuple[list[tuple[int, ...]], bool]:
    """Sets of ranks that may hold an expert, and whether these are all sets.

    Raises
    ------
    UnsupportedFeature
        Even pairs are too many.
    """
    if ranks > MAX_RANKS:
        raise UnsupportedFeature(
            f"expert maps are planned for {MAX_RANKS} ranks at most, and there are {ranks}; "
            "SGLang's with equally many GPUs a server have no limit"
        )
    every = ((1 << ranks) - 1) * experts <= MAX_COLUMNS
    sizes = range(1, ranks + 1) if every else sorted({1, 2, ranks})
    found = [one for size in sizes for one in itertools.combinations(range(ranks), size)]
    return found, every


def _best_sets(
    value: Floats, sets: list[tuple[int, ...]], shape: EqualSlots, gap: float
) -> tuple[Ints, float]:
    """The holder set of each expert [E], and an upper bound on the value of any choice of these.

    ``gap``: how far, relatively, the choice may be from the best one.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron, vstack

    experts, number = value.shape
    holds = np.array([[rank in one for one in sets] for rank in range(len(shape.ranks))], float)
    once = kron(csr_array(np.eye(experts)), csr_array(np.ones((1, number))))
    full = kron(csr_array(np.ones((1, experts))), csr_array(holds))
    limits = np.concatenate([np.ones(experts), np.full(len(shape.ranks), shape.slots)])
    scale = max(float(value.max()), 1e-300)
    result = milp(
        -value.ravel() / scale,
        constraints=LinearConstraint(vstack([once, full]).tocsc(), limits, limits),
        integrality=np.ones(value.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap},
    )
    if result.x is None:
        raise UnsupportedFeature(f"no expert map was found: {result.message}")
    chosen = np.asarray(result.x).reshape(value.shape).argmax(axis=1)
    return chosen, -float(result.mip_dual_bound) * scale


def _fill(slots: Ints, chosen: Ints, sets: list[tuple[int, ...]]) -> None:
    """Write the experts of each rank, ascending."""
    for rank in range(len(slots)):
        slots[rank] = [expert for expert, one in enumerate(chosen) if rank in sets[one]]


def engines_own(shape: EqualSlots, calls: Floats, engine: MapEngine) -> ExpertMap:
    """The map that an engine makes by itself for these calls: DeepSeek's EPLB, blind to servers."""
    layers = calls.shape[1]
    load = calls.sum(axis=0)
    physical = np.zeros((layers, len(shape.ranks), shape.slots), np.int64)
    for layer in range(layers):
        experts, replicas = replicate_experts(load[layer], shape.physical)
        weight = (load[layer] / replicas)[experts]
        pack, place = balanced_packing(weight, [shape.slots] * len(shape.ranks))
        physical[layer, pack, place] = experts
    share = remote_share(engine, physical, shape.ranks, calls)
    return ExpertMap(physical, share, 0.0)
