"""Whether to move experts, and where to: the migration policies of docs/design.md, section 5."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, UnsupportedFeature, did_you_mean
from prism_plan.exact_sum import exact_sum
from prism_plan.execution_table import home_execution, moved_activations
from prism_plan.instance import MIN_CALLS, Instance
from prism_plan.migration.cost import MigrationCost, communication_s, migration_s
from prism_plan.migration.recent_requests import RecentRequests, requests_behind
from prism_plan.objective import remote_score
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_check import violations
from prism_plan.solvers.certificate import value_bound
from prism_plan.solvers.contract import Feature, Options
from prism_plan.solvers.exact import TOLERANCE, solve_flow
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.packing import pack_on_gpus
from prism_plan.solvers.registry import PATHS, SOLVER_NAMES, TABLE_SOLVERS, solvers_supporting
from prism_plan.solvers.run import solve

Floats = npt.NDArray[np.float64]

PolicyName = Literal["never", "prism", "partial"]
#: In the order of the documentation.
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
#: The solver whose reviews count seconds of requests, and not those of remote calls alone.
LATENCY = "latency"


@dataclass(frozen=True)
class Policy:
    """How migrations are decided; one policy serves any number of reviews.

    Parameters
    ----------
    kind
        ``"never"`` keeps the placement. ``"prism"`` adopts a solver's placement P' iff
        C(P') + T_mig < C(P). ``"partial"`` moves just those experts whose savings exceed the cost
        of loading them, and keeps the execution table.
    horizon_s
        Seconds over which remote calls, or requests, are counted: until the next review.
    cost
        Whether T_mig is the sum over all loads, as in the paper, or the maximum over GPUs.
    solver, seed
        The solver of the candidate of ``"prism"``; with ``+paths`` after its name the candidate has
        an execution table. With ``latency`` C is the expected latency of the requests, and the
        candidate is planned near the current placement, by what its loads cost. Where T_mig is not
        a sum over the experts of a server, ``"partial"`` compares what the solver, without
        ``+paths``, places for the execution table that it keeps.

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
        ):
            value = getattr(self, key)
            if value not in known:
                raise InputError(
                    f"{value!r}{did_you_mean(str(value), known)}",
                    parameter=key,
                    expected=f"one of {', '.join(known)}",
                )
        experts = str(self.solver).removesuffix(PATHS)
        if experts not in SOLVER_NAMES and self.solver != LATENCY:
            reason = did_you_mean(experts, (*SOLVER_NAMES, LATENCY))
            if experts == LATENCY:
                reason = " plans by itself where layers execute"
            elif experts in TABLE_SOLVERS:
                reason = " plans whole layers, whichever of their experts are called"
            raise InputError(
                f"{self.solver!r}{reason}",
                parameter="solver",
                expected=f"one of {', '.join(SOLVER_NAMES)}, one of them with {PATHS}, or "
                f"{LATENCY}",
            )
        if not 0 < self.horizon_s < math.inf:
            raise InputError(f"{self.horizon_s}", parameter="horizon_s", expected="seconds above 0")
        Options(seed=self.seed)


@dataclass(frozen=True)
class Review:
    """What a review decided.

    ``target`` is the new placement, and ``moved_experts`` and ``moved_bytes`` are what the GPUs
    newly load: ``None`` and zero for ``"stay"``. The seconds are those of the best candidate,
    adopted or not: ``before_s`` is C(P) of the current placement, ``after_s`` that of the
    candidate, ``saving_s`` their difference, ``cost_s`` the candidate's T_mig. Of policies that
    keep the execution table C leaves out its messages; of solver ``latency`` it is the requests
    expected in the horizon times their mean latency.
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
    """Decide whether experts move, and whether layers execute elsewhere from now on.

    Parameters
    ----------
    policy
        How to decide.
    current
        The current placement.
    rates
        Estimated calls per second, [N, L, E]. Those below ``MIN_CALLS`` count as none.
    instance
        The problem's rules; its activations are replaced by ``rates``. Where it has a cluster and a
        trace, its capacities are replaced by what the KV caches of each execution table leave.
    call_s
        Expected seconds of a remote call of each server, [N].
    load_gbs
        Load bandwidth of each GPU, [G].

    Raises
    ------
    InputError
        Rates are negative or NaN, or the current placement breaks a constraint of the instance.
    UnsupportedFeature
        The policy or its solver does not support a feature of the instance, or policy ``prism`` has
        to do with an execution table and the instance has no cluster or no trace.
    Infeasible
        The KV caches of the candidate's table leave too little for all experts.
    """
    too_small = (rates > 0) & (rates < MIN_CALLS)  # left of old calls in a window
    costs = _CostModel(
        policy,
        current,
        instance.replace(activations=np.where(too_small, 0.0, rates)),
        call_s,
        load_gbs,
    )
    broken = violations(current, instance=costs.for_running_table)
    if broken:
        raise InputError(
            broken[0].message, place="current placement", expected="one that the cluster can hold"
        )
    if policy.kind == "partial":
        return _partial(costs)
    if policy.kind == "prism" and costs.before_s > 0:
        return _prism(costs)
    return costs.review("stay", current)


@dataclass(frozen=True, eq=False)
class _CostModel:
    """The current placement, and what the costs of moving away from it depend on."""

    policy: Policy
    current: Placement
    instance: Instance
    call_s: Floats
    load_gbs: Floats

    @functools.cached_property
    def requests(self) -> RecentRequests:
        """The requests behind the calls."""
        instance = self.instance
        if instance.cluster is None or instance.trace is None:
            raise UnsupportedFeature(
                "reviews of execution tables need the links of a cluster and the steps of a trace; "
                "build the instance with Instance.build(trace, cluster)"
            )
        return requests_behind(
            instance.activations, instance.cluster, instance.trace, self.current.on_gpu,
            self.policy.seed,
        )  # fmt: skip

    @functools.cached_property
    def counts_latency(self) -> bool:
        """Whether C is the expected latency of requests."""
        return self.policy.kind == "prism" and self.policy.solver == LATENCY

    @functools.cached_property
    def latency_problem(self) -> LatencyProblem:
        """By which the latency of a recent request is expected."""
        instance, recent = self.instance, self.requests.cluster
        assert instance.trace is not None  # that of `requests`
        return LatencyProblem(instance, recent, instance.trace, self.policy.seed)

    @functools.cached_property
    def requests_in_horizon(self) -> float:
        """How many requests of all homes are expected within the horizon."""
        return float(self.requests.arrivals.sum()) * self.policy.horizon_s

    @functools.cached_property
    def before_s(self) -> float:
        """C(P) of the current placement."""
        return self._running_s(self.current)

    @functools.cached_property
    def for_running_table(self) -> Instance:
        """The problem of placing experts for the running table: its capacities, moved activations.

        With every layer at home activations are those of the homes.
        """
        instance = self.beside(self.current.execution_table)
        if self.current.execution is None:
            return instance
        moved = moved_activations(instance.activations, self.current.execution)
        return instance.replace(activations=moved)

    def beside(self, table: npt.NDArray[np.int32]) -> Instance:
        """The problem with what the KV caches of an execution table [N, L] leave of each GPU."""
        instance = self.instance
        if instance.trace is None:
            return instance
        return instance.with_execution(table, instance.trace.model)

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        return self.instance.model.expert_bytes_by_layer

    def total_s(self, target: Placement) -> float:
        """C(P') + T_mig(P -> P')."""
        return self._running_s(target) + self._migration_s(target)

    def review(self, decision: Literal["move", "stay"], candidate: Placement) -> Review:
        """What is reported of a decision on a candidate."""
        move = decision == "move"
        loads = (candidate.on_gpu & ~self.current.on_gpu & move).sum(axis=(0, 2)).tolist()
        before_s, after_s = self.before_s, self._running_s(candidate)
        return Review(
            decision=decision,
            target=candidate if move else None,
            moved_experts=sum(loads),
            moved_bytes=sum(n * size for n, size in zip(loads, self.expert_bytes, strict=True)),
            saving_s=before_s - after_s,
            cost_s=self._migration_s(candidate),
            before_s=before_s,
            after_s=after_s,
        )

    def _running_s(self, placement: Placement) -> float:
        """C(P): seconds within the horizon that a placement costs while it runs."""
        if self.counts_latency:
            if not self.requests_in_horizon:
                return 0.0
            return self.requests_in_horizon * self.latency_problem.expected(placement).mean_s
        rates, execution = self.instance.activations, placement.execution
        horizon_s, local = self.policy.horizon_s, placement.local_to_execution
        calls_s = communication_s(rates, local, self.call_s, horizon_s, execution)
        if execution is None or self.policy.kind != "prism":
            return calls_s  # the others keep the table, and with it the messages
        return calls_s + self.requests.messages_s(execution, horizon_s)

    def _migration_s(self, target: Placement) -> float:
        loads = target.on_gpu & ~self.current.on_gpu
        return migration_s(loads, self.expert_bytes, self.load_gbs, self.policy.cost)


# ----------------------------------------------------------------------------------------- prism


def _prism(costs: _CostModel) -> Review:
    if costs.policy.solver == LATENCY:
        candidate = _fast_candidate(costs)
    elif costs.policy.solver.endswith(PATHS):  # a table for what is asked for now
        if not costs.requests.arrivals.any():
            return costs.review("stay", costs.current)  # no task of the trace makes these calls
        instance = costs.instance.replace(cluster=costs.requests.cluster)
        candidate = _solver_candidate(costs, instance, costs.policy.solver)
    else:
        shape = (costs.instance.num_servers, costs.instance.model.num_layers)
        instance = costs.beside(home_execution(*shape))
        candidate = _solver_candidate(costs, instance, costs.policy.solver)
    if costs.total_s(candidate) < costs.before_s:
        return costs.review("move", candidate)
    return costs.review("stay", candidate)


def _fast_candidate(costs: _CostModel) -> Placement:
    """The plan of least latency for recent requests, whose loads cost what T_mig counts for them.

    A GiB that loads in t seconds is worth it where the requests of the horizon gain more than t
    together. Where GPUs differ the mean of them is the price, and where they load in parallel it is
    shared by all.
    """
    gpus = len(costs.load_gbs)
    seconds_a_gib = float((2**30 / (costs.load_gbs * 1e9)).mean())
    if costs.policy.cost == "max":
        seconds_a_gib /= gpus
    options = Options(
        seed=costs.policy.seed,
        reference=costs.current,
        load_price=seconds_a_gib / costs.requests_in_horizon,
    )
    instance = costs.instance.replace(cluster=costs.requests.cluster)
    return solve(instance, LATENCY, options, inputs=costs.current.inputs)


def _solver_candidate(costs: _CostModel, instance: Instance, solver: str) -> Placement:
    """The solver's placement for an instance, on GPUs as close to the current one as possible."""
    options = Options(seed=costs.policy.seed)
    candidate = solve(instance, solver, options, inputs=costs.current.inputs)
    if not instance.in_slots:
        return candidate  # only the solver's own packing is known to fit
    instance = instance.replace(gpu_capacity=candidate.gpu_capacity)  # what its table leaves
    return candidate.replace(on_gpu=pack_on_gpus(instance, candidate.local, costs.current))


# --------------------------------------------------------------------------------------- partial


def _partial(costs: _CostModel) -> Review:
    """The move of least C(P') + T_mig that keeps the execution table.

    A copy on a server saves the calls of the layers that execute there, so experts are planned for
    the moved activations. Where a load costs the same on all GPUs of a server and T_mig is a sum,
    that total is linear in what each server holds, and one minimum-cost flow finds its optimum.
    Else the flows of several prices, and the candidate of policy ``prism``, are compared by their
    true totals: never worse than either policy, but not proven optimal. Where GPUs load in parallel
    only the slowest one costs time, so the prices range from that of a load by itself down to
    nothing; where the GPUs of a server differ, some flows load on the fastest ones alone.
    """
    if not costs.instance.in_slots:
        solvers = solvers_supporting(frozenset({Feature.UNEQUAL_BYTES}))
        raise UnsupportedFeature(
            f"migration policy 'partial' does not support {Feature.UNEQUAL_BYTES}; use policy "
            f"'prism' with a solver that has: {', '.join(solvers)}"
        )
    best = min(_candidates(costs), key=costs.total_s, default=costs.current)
    before_s = costs.before_s
    if before_s - costs.total_s(best) > TOLERANCE * before_s:  # more than rounding
        return costs.review("move", best)
    return costs.review("stay", best)


def _candidates(costs: _CostModel) -> Iterator[Placement]:
    """The placements that policy ``partial`` compares; a single one is optimal."""
    if costs.before_s == 0:
        return
    instance, size_gb = costs.for_running_table, costs.expert_bytes[0] * 1e-9
    gpus = [costs.load_gbs[costs.current.gpus_of(n)] for n in range(instance.num_servers)]
    slowest_s = np.array([size_gb / gbs.min() for gbs in gpus])
    fastest_s = np.array([size_gb / gbs.max() for gbs in gpus])
    equal_gpus = bool((slowest_s == fastest_s).all())
    linear = equal_gpus and costs.policy.cost == "sum"
    yield _flow(costs, instance, slowest_s, exact=linear)
    if linear:
        return
    scales = [1.0]
    if costs.policy.cost == "max":
        halvings = math.ceil(math.log2(max(len(costs.load_gbs), 2)))
        scales = [*(0.5**i for i in range(1 if equal_gpus else 0, halvings + 1)), 0.0]
    for scale in scales:
        yield _flow(costs, instance, fastest_s * scale)
        if not equal_gpus:
            yield _flow(costs, _only_fastest_gpus_load(costs, instance), fastest_s * scale)
    with contextlib.suppress(UnsupportedFeature):  # policy `prism` has no candidate then
        candidate = _solver_candidate(costs, instance, costs.policy.solver.removesuffix(PATHS))
        yield _with_running_table(costs, candidate)


def _with_running_table(costs: _CostModel, experts: Placement) -> Placement:
    """A placement of experts with the table that running and new requests keep."""
    current = costs.current
    return experts.replace(
        execution=current.execution,
        kv_tokens=current.kv_tokens,
        execute_at_home=current.execute_at_home,
    )


def _only_fastest_gpus_load(costs: _CostModel, instance: Instance) -> Instance:
    """The instance in which the other GPUs of each server keep exactly what they hold."""
    current = costs.current
    pinned, capacity = list(instance.pinned), []
    for n, slots in enumerate(instance.gpu_capacity):
        gpus = current.gpus_of(n)
        room = list(slots)
        for at, g in enumerate(gpus):
            if costs.load_gbs[g] < costs.load_gbs[gpus].max():
                held = current.on_gpu[g]
                room[at] = int(held.sum())
                pinned += [(n, int(layer), int(e)) for layer, e in np.argwhere(held)]
        capacity.append(tuple(room))
    return instance.replace(pinned=tuple(pinned), gpu_capacity=tuple(capacity))


def _flow(
    costs: _CostModel, instance: Instance, price_s: Floats, *, exact: bool = False
) -> Placement:
    """The placement of least C(P') plus ``price_s`` [N] for each expert that a server newly loads.

    ``instance`` is that for the running table or more constrained; ``exact`` says that the price is
    the true cost of a load.
    """
    current = costs.current
    value = instance.activations * (costs.call_s * costs.policy.horizon_s)[:, None, None]
    value -= price_s[:, None, None] * ~current.local
    local, prices, _ = solve_flow(instance, value, current.local)
    gap = value_bound(instance, value, prices) - exact_sum(value[local])
    proven = exact and gap <= TOLERANCE * float(np.abs(value[local]).sum())
    plan = SolveReport(
        solver="partial",
        objective="communication_s + migration_s",
        remote_share=remote_score(instance.activations, local).share,
        termination="optimal" if proven else "heuristic",
        seed=costs.policy.seed,
        min_replicas=instance.min_replicas,
    )
    experts = Placement(
        model=instance.model,
        servers=instance.servers,
        gpu_capacity=costs.for_running_table.gpu_capacity,
        on_gpu=pack_on_gpus(instance, local, current),
        plan=plan,
        inputs=current.inputs,
    )
    return _with_running_table(costs, experts)
