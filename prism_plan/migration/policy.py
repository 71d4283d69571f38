"""Whether to move experts, and where to: the migration policies of DESIGN section 5."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, UnsupportedFeature, did_you_mean
from prism_plan.instance import MIN_CALLS, Instance
from prism_plan.migration.cost import MigrationCost, communication_s, migration_s
from prism_plan.objective import remote_score
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_check import violations
from prism_plan.solvers.certificate import value_bound
from prism_plan.solvers.contract import Feature, Options
from prism_plan.solvers.exact import TOLERANCE, solve_flow
from prism_plan.solvers.packing import pack_on_gpus
from prism_plan.solvers.registry import SOLVER_NAMES, solvers_supporting
from prism_plan.solvers.run import solve

Floats = npt.NDArray[np.float64]

PolicyName = Literal["never", "prism", "partial"]
#: In the order of the documentation.
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True)
class Policy:
    """How migrations are decided. Frozen: one policy serves any number of reviews.

    Parameters
    ----------
    kind
        ``"never"`` stays. ``"prism"`` adopts the plan P' of a solver iff C(P') + T_mig < C(P).
        ``"partial"`` makes the best move of all, of as many experts as pay for being loaded.
    horizon_s
        Seconds over which remote calls are counted: until the next review.
    cost
        Whether T_mig is the sum over all loads, as in the paper, or the maximum over GPUs.
    solver, seed
        What plans the candidate of ``"prism"``. Where T_mig is not a sum over the experts of a
        server, ``"partial"`` weighs that candidate too.

    Raises
    ------
    InputError
        A value is out of range.
    """

    kind: PolicyName
    horizon_s: float
    cost: MigrationCost = "sum"
    solver: str = "prism"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, known in (
            ("kind", POLICY_NAMES),
            ("cost", get_args(MigrationCost)),
            ("solver", SOLVER_NAMES),
        ):
            value = getattr(self, key)
            if value not in known:
                raise InputError(
                    f"{value!r}{did_you_mean(str(value), known)}",
                    parameter=key,
                    expected=f"one of {', '.join(known)}",
                )
        if not 0 < self.horizon_s < math.inf:
            raise InputError(
                f"{self.horizon_s}",
                parameter="horizon_s",
                expected="seconds above 0",
            )
        Options(seed=self.seed)


@dataclass(frozen=True)
class Review:
    """What a review decided.

    ``target`` is where to, and ``moved_experts`` and ``moved_bytes`` what the GPUs newly load:
    ``None`` and zero when staying. The seconds are of the move that was weighed, adopted or not:
    C(P) ``before_s`` and ``after_s`` it, ``saving_s`` their difference, ``cost_s`` its T_mig.
    """

    decision: Literal["move", "stay"]
    target: Placement | None
    moved_experts: int
    moved_bytes: int
    saving_s: float
    cost_s: float
    before_s: float
    after_s: float


def review(
    policy: Policy,
    current: Placement,
    rates: Floats,
    instance: Instance,
    call_s: Floats,
    load_gbs: Floats,
) -> Review:
    """Decide whether experts move.

    Parameters
    ----------
    policy
        How to decide.
    current
        The standing placement.
    rates
        Estimated calls per second, [N, L, E]. Those too small to plan with count as none.
    instance
        The problem's capacities and rules; its activations are replaced by ``rates``.
    call_s
        Expected seconds of a remote call of each server, [N].
    load_gbs
        Load bandwidth of each GPU, [G].

    Raises
    ------
    InputError
        Rates that are no rates, or a standing placement that breaks a constraint of the instance.
    UnsupportedFeature
        The policy or its solver has no rule for what the instance asks.
    """
    faint = (rates > 0) & (rates < MIN_CALLS)  # what a window has left of old calls
    weighing = _Weighing(
        policy,
        current,
        instance.replace(activations=np.where(faint, 0.0, rates)),
        call_s,
        load_gbs,
    )
    broken = violations(current, instance=weighing.instance)
    if broken:
        raise InputError(
            broken[0].message,
            place="standing placement",
            expected="one that the cluster can hold",
        )
    if policy.kind == "partial":
        return _partial(weighing)
    if policy.kind == "prism" and weighing.before_s > 0:
        return _adopt_if_it_pays(weighing)
    return weighing.stay(current)


@dataclass(frozen=True, eq=False)
class _Weighing:
    """A standing placement and all that a move away from it is weighed by."""

    policy: Policy
    current: Placement
    instance: Instance
    call_s: Floats
    load_gbs: Floats

    @property
    def before_s(self) -> float:
        return self._communication_s(self.current)

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        return self.instance.model.expert_bytes_by_layer

    def total_s(self, target: Placement) -> float:
        """C(P') + T_mig(P -> P')."""
        return self._communication_s(target) + self._migration_s(target)

    def move(self, target: Placement) -> Review:
        loads = target.on_gpu & ~self.current.on_gpu
        of_layer = loads.sum(axis=(0, 2)).tolist()
        moved_bytes = sum(n * size for n, size in zip(of_layer, self.expert_bytes, strict=True))
        return self._review("move", target, int(loads.sum()), moved_bytes)

    def stay(self, weighed: Placement) -> Review:
        return self._review("stay", weighed, 0, 0)

    def _review(
        self, decision: Literal["move", "stay"], weighed: Placement, experts: int, moved_bytes: int
    ) -> Review:
        before_s, after_s = self.before_s, self._communication_s(weighed)
        return Review(
            decision=decision,
            target=weighed if decision == "move" else None,
            moved_experts=experts,
            moved_bytes=moved_bytes,
            saving_s=before_s - after_s,
            cost_s=self._migration_s(weighed),
            before_s=before_s,
            after_s=after_s,
        )

    def _communication_s(self, placement: Placement) -> float:
        rates = self.instance.activations
        return communication_s(rates, placement.local, self.call_s, self.policy.horizon_s)

    def _migration_s(self, target: Placement) -> float:
        loads = target.on_gpu & ~self.current.on_gpu
        return migration_s(loads, self.expert_bytes, self.load_gbs, self.policy.cost)


# ----------------------------------------------------------------------------------------- prism


def _adopt_if_it_pays(weighing: _Weighing) -> Review:
    candidate = _solver_candidate(weighing)
    if weighing.total_s(candidate) < weighing.before_s:
        return weighing.move(candidate)
    return weighing.stay(candidate)


def _solver_candidate(weighing: _Weighing) -> Placement:
    """The solver's plan for the recent rates, on GPUs near what stands."""
    policy, instance = weighing.policy, weighing.instance
    options = Options(seed=policy.seed)
    candidate = solve(instance, policy.solver, options, inputs=weighing.current.inputs)
    if not instance.in_slots:
        return candidate  # where experts differ in size the solver's own packing is the one known
    return candidate.replace(on_gpu=pack_on_gpus(instance, candidate.local, weighing.current))


# --------------------------------------------------------------------------------------- partial


def _partial(weighing: _Weighing) -> Review:
    """The move of least C(P') + T_mig.

    Where a load costs the same on all GPUs of a server and T_mig is a sum, that total is linear in
    what each server holds, and one flow finds its least. Else a few flows and the plan of policy
    ``prism`` are weighed by their true totals: never worse than either policy, but perhaps not the
    least. Of loads side by side only the longest row costs time, so those flows go by prices from
    that of a load by itself down to nothing; of unequal GPUs some load on the fastest alone.
    """
    if not weighing.instance.in_slots:
        able = solvers_supporting(frozenset({Feature.UNEQUAL_BYTES}))
        raise UnsupportedFeature(
            f"migration policy 'partial' has no rule for {Feature.UNEQUAL_BYTES}; use policy "
            f"'prism' with a solver that has: {', '.join(able)}"
        )
    best = min(_moves(weighing), key=weighing.total_s, default=weighing.current)
    before_s = weighing.before_s
    if before_s - weighing.total_s(best) > TOLERANCE * before_s:  # more than rounding
        return weighing.move(best)
    return weighing.stay(best)


def _moves(weighing: _Weighing) -> Iterator[Placement]:
    """The moves that policy ``partial`` weighs; the first one is optimal where it is the only."""
    if weighing.before_s == 0:
        return
    instance, size_gb = weighing.instance, weighing.expert_bytes[0] * 1e-9
    gpus = [weighing.load_gbs[weighing.current.gpus_of(n)] for n in range(instance.num_servers)]
    slowest_s = np.array([size_gb / gbs.min() for gbs in gpus])
    fastest_s = np.array([size_gb / gbs.max() for gbs in gpus])
    equal = bool((slowest_s == fastest_s).all())
    linear = equal and weighing.policy.cost == "sum"
    yield _flow(weighing, instance, slowest_s, exact=linear)
    if linear:
        return
    scales = [1.0]
    if weighing.policy.cost == "max":
        halvings = math.ceil(math.log2(max(len(weighing.load_gbs), 2)))
        scales = [*(0.5**i for i in range(1 if equal else 0, halvings + 1)), 0.0]
    for scale in scales:
        yield _flow(weighing, instance, fastest_s * scale)
        if not equal:
            yield _flow(weighing, _slower_gpus_kept(weighing), fastest_s * scale)
    with contextlib.suppress(UnsupportedFeature):  # then policy `prism` could not move at all
        yield _solver_candidate(weighing)


def _slower_gpus_kept(weighing: _Weighing) -> Instance:
    """The instance in which only the fastest loading GPUs of each server load and drop."""
    instance, current = weighing.instance, weighing.current
    pinned, capacity = list(instance.pinned), []
    for n, slots in enumerate(instance.gpu_capacity):
        gpus = current.gpus_of(n)
        room = list(slots)
        for at, g in enumerate(gpus):
            if weighing.load_gbs[g] < weighing.load_gbs[gpus].max():
                held = current.on_gpu[g]
                room[at] = int(held.sum())
                pinned += [(n, int(layer), int(e)) for layer, e in np.argwhere(held)]
        capacity.append(tuple(room))
    return instance.replace(pinned=tuple(pinned), gpu_capacity=tuple(capacity))


def _flow(
    weighing: _Weighing, instance: Instance, price_s: Floats, *, exact: bool = False
) -> Placement:
    """The least communication plus ``price_s`` [N] for each expert that a server newly loads.

    ``instance`` is that of the weighing or one of fewer placements; ``exact`` says that the price
    is what a load truly costs.
    """
    current = weighing.current
    value = instance.activations * (weighing.call_s * weighing.policy.horizon_s)[:, None, None]
    held = current.local
    value -= price_s[:, None, None] * ~held
    local, prices, _ = solve_flow(instance, value, held)
    least = math.fsum(value[local])
    gap = value_bound(instance, value, prices) - least
    proven = exact and gap <= TOLERANCE * float(np.abs(value[local]).sum())
    plan = SolveReport(
        solver="partial",
        objective="communication_s + migration_s",
        remote_share=remote_score(instance.activations, local).share,
        termination="optimal" if proven else "heuristic",
        seed=weighing.policy.seed,
        min_replicas=instance.min_replicas,
    )
    return Placement(
        model=instance.model,
        servers=instance.servers,
        gpu_capacity=weighing.instance.gpu_capacity,
        on_gpu=pack_on_gpus(instance, local, current),
        plan=plan,
        inputs=current.inputs,
    )
