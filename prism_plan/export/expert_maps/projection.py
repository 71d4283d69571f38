"""The best expert map of equal slots, under the replica rule of the engine that is to run it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.errors import UnsupportedFeature
from prism_plan.export.expert_maps.equal_slots import EqualSlots
from prism_plan.export.expert_maps.replica_rules import local_share, remote_share
from prism_plan.io.export import MapEngine
from prism_plan.solvers.eplb import balanced_packing, replicate_experts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Holder sets of so many ranks are enumerated.
MAX_RANKS = 8


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """``physical`` int64 [L, R, S]: the expert in each slot. ``bound`` is a proven lower bound.

    ``share`` of calls go to another server by the engine's replica rule.
    """

    physical: Ints
    share: float
    bound: float


def project(engine: MapEngine, shape: EqualSlots, calls: Floats) -> ExpertMap:
    """The expert map with the fewest calls to other servers, layer by layer; ``calls`` [N, L, E].

    An integer programme for each layer: a column for each expert and set of ranks that hold it,
    every expert once, every rank full.

    Raises
    ------
    UnsupportedFeature
        There are more ranks than sets of them can be enumerated.
    """
    if len(shape.ranks) > MAX_RANKS:
        raise UnsupportedFeature(
            f"expert maps are planned for {MAX_RANKS} ranks at most, and there are "
            f"{len(shape.ranks)}"
        )
    sets = [
        holders
        for size in range(1, len(shape.ranks) + 1)
        for holders in itertools.combinations(range(len(shape.ranks)), size)
    ]
    servers = np.array(shape.ranks)
    of_rank = np.bincount(servers, minlength=len(calls))
    kept = np.array([local_share(engine, holders, shape.ranks) for holders in sets])  # [sets, R]
    layers = calls.shape[1]
    physical = np.zeros((layers, len(shape.ranks), shape.slots), np.int64)
    stays = 0.0
    for layer in range(layers):
        per_rank = calls[servers, layer] / of_rank[servers][:, None]  # [R, E]
        value = per_rank.T @ kept.T  # [E, sets]
        chosen, bound = _best_sets(value, sets, shape)
        stays += bound
        _fill(physical[layer], chosen, sets)
    total = float(calls[np.unique(servers)].sum())
    return ExpertMap(
        physical=physical,
        share=remote_share(engine, physical, shape.ranks, calls),
        bound=max(1.0 - stays / total, 0.0) if total else 0.0,
    )


def _best_sets(value: Floats, sets: list[tuple[int, ...]], shape: EqualSlots) -> tuple[Ints, float]:
    """The holder set of each expert [E], and an upper bound on the value of any choice."""
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
        options={"mip_rel_gap": 1e-6},
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
