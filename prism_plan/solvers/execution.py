"""Solvers of experts with the best execution table for what they place: ``NAME+paths``.

The table is the best for a request on its own. Where servers would be busy, all homes may have
chosen the same one: there short simulations of the trace decide between that table, one in which
homes pay for the waiting that they cause to others, and the solver's plan with layers at home.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible
from prism_plan.execution_table import home_execution
from prism_plan.expert_capacity import capacity_with_kv, gpu_capacity, kv_bytes
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.latency.idle_time import IdleMeasure, IdleTime, request_weights
from prism_plan.placement import Placement, SolveReport
from prism_plan.solvers.busy_servers import queues_matter, simulated_s
from prism_plan.solvers.contract import Options, Solver, SolverResult, cluster_and_trace
from prism_plan.solvers.packing import pack_on_gpus
from prism_plan.solvers.paths import shortest_paths, tolled_paths
from prism_plan.token_rates import request_rates
from prism_plan.trace import Trace

#: KV caches lie where layers execute, so that slots depend on the table: plan, count, plan again.
MAX_ROUNDS = 10
#: A table that is simulated has to be faster than home by this share in each of the samples: less
#: is noise.
MIN_GAIN = 0.05
#: Key of a plan that executes at home, though a table was asked for: the reason.
AT_HOME_BECAUSE = "at_home_because"

Capacity = tuple[tuple[int, ...], ...]


def with_paths(solver: Solver, name: str) -> Solver:
    """The solver, under another name, with the execution table of least idle time for its plan.

    Capacities are those of the cluster, with KV caches where the table has them; those of the
    instance, which count them at home, are not used. Where no table fits or pays, the result is the
    solver's own, with every layer at home.
    """

    def plan(instance: Instance, options: Options) -> SolverResult:
        cluster, trace = cluster_and_trace(instance, name)
        return TablePlanner(solver, instance, cluster, trace, options).best()

    return dataclasses.replace(solver, name=name, function=plan)


@dataclass(frozen=True, eq=False)
class Placed:
    """What the solver placed with these capacities, and a table for it."""

    result: SolverResult
    plan: Placement


class TablePlanner:
    """Plans of a solver of experts with and without a table, and the choice between them."""

    def __init__(
        self, solver: Solver, instance: Instance, cluster: Cluster, trace: Trace, options: Options
    ) -> None:
        self._solver, self._instance, self._options = solver, instance, options
        self._cluster, self._trace = cluster, trace
        self._measure = IdleMeasure(trace.model, cluster, trace, options.seed)
        self._at_home = np.array([server.execute_at_home for server in cluster.servers])
        self._known: dict[Capacity, tuple[SolverResult, npt.NDArray[np.bool_]]] = {}

    def best(self) -> SolverResult:
        """The plan with the best table, or the one at home."""
        try:
            placed, idle = self.with_table()
        except Infeasible as error:
            home = self.with_home()
            if home is None:
                raise
            return self._result(
                home, {AT_HOME_BECAUSE: f"no table fits beside its KV caches: {error}"}
            )
        home = self.with_home()
        if home is not None and placed.plan.execution is None:
            because = "no table is faster for a request on its own"
            return self._result(home, {AT_HOME_BECAUSE: because})
        if not queues_matter(idle, placed.plan, self._cluster):
            return self._result(placed, {})
        return self._fastest(placed, idle, home)

    def _fastest(self, placed: Placed, idle: IdleTime, home: Placed | None) -> SolverResult:
        """The candidate that is fastest in short simulations."""
        candidates = {"paths": placed}
        rates = request_rates(self._cluster)
        assert rates is not None  # or queues would not matter
        tolled = self.if_it_fits(placed, tolled_paths(idle, rates, self._at_home))
        if tolled is not None:
            candidates["paths with tolls"] = tolled
        if home is not None:
            candidates["home"] = home
        samples = simulated_s(
            {name: candidate.plan for name, candidate in candidates.items()},
            self._cluster, self._trace, self._options.seed,
        )  # fmt: skip
        means = {name: mean(seconds) for name, seconds in samples.items()}
        note: dict[str, Any] = {"simulated_s": means}
        best = min(means, key=means.__getitem__)
        if best != "home" and home is not None and not _gains(samples, best):
            best = "home"
        if best == "home":
            note[AT_HOME_BECAUSE] = f"no table gained {MIN_GAIN:.0%} in short simulations"
        return self._result(candidates[best], {**note, "simulated_latency_s": means[best]})

    def with_table(self) -> tuple[Placed, IdleTime]:
        """Place, find the table, count what its caches leave, and place again until both fit."""
        cluster, model = self._cluster, self._trace.model
        reserved = [0] * cluster.num_servers  # for KV caches; it only grows from round to round
        capacity = capacity_with_kv(cluster, model, reserved)
        lacking = 0
        for _ in range(MAX_ROUNDS):
            result, on_gpu = self._place(capacity)
            idle = self._measure.idle_time(on_gpu)
            table = shortest_paths(idle, self._at_home)
            needed = kv_bytes(cluster, model, table)
            reserved = [max(before, now) for before, now in zip(reserved, needed, strict=True)]
            left = capacity_with_kv(cluster, model, reserved)
            lacking = sum(
                max(used - now, 0)
                for gpus, used_gpus in zip(left, capacity, strict=True)
                for now, used in zip(gpus, used_gpus, strict=True)
            )
            if lacking == 0:
                own = capacity_with_kv(cluster, model, needed)
                return self._placed(result, on_gpu, table, own), idle
            capacity = left
        raise Infeasible(
            f"KV caches and experts do not fit together after {MAX_ROUNDS} rounds of planning",
            shortfall=lacking,
            unit="slots" if self._instance.in_slots else "bytes",
            remedy="lower kv_tokens, or plan with every layer at home",
        )

    def with_home(self) -> Placed | None:
        """The solver's plan with every layer at home; ``None`` where there is none."""
        try:
            capacity = gpu_capacity(self._cluster, self._trace.model)
            result, on_gpu = self._place(capacity)
        except Infeasible:
            return None
        table = home_execution(self._cluster.num_servers, self._trace.model.num_layers)
        return self._placed(result, on_gpu, table, capacity)

    def if_it_fits(self, placed: Placed, table: npt.NDArray[np.int32]) -> Placed | None:
        """The same experts with another table, where its KV caches leave enough for them."""
        model, on_gpu = self._trace.model, placed.plan.on_gpu
        try:
            needed = kv_bytes(self._cluster, model, table)
            capacity = capacity_with_kv(self._cluster, model, needed)
        except Infeasible:
            return None
        held = on_gpu.sum(axis=2) @ self._instance.expert_size
        if (held > [slots for gpus in capacity for slots in gpus]).any():
            return None
        return self._placed(placed.result, on_gpu, table, capacity)

    def _placed(
        self, result: SolverResult, on_gpu: npt.NDArray[np.bool_], table: npt.NDArray[np.int32],
        capacity: Capacity,
    ) -> Placed:  # fmt: skip
        report = SolveReport(self._solver.name)
        instance = self._instance
        plan = Placement(
            instance.model, instance.servers, capacity, on_gpu, report, execution=table
        )
        return Placed(result, plan)

    def _place(self, capacity: Capacity) -> tuple[SolverResult, npt.NDArray[np.bool_]]:
        """What the solver places on GPUs of these capacities; each is planned once."""
        if capacity not in self._known:
            instance = self._instance.replace(gpu_capacity=capacity)
            require_feasible(instance)  # caches may leave too little for all experts
            result = self._solver(instance, self._options)
            on_gpu = result.on_gpu
            if on_gpu is None:
                on_gpu = pack_on_gpus(instance, result.local, self._options.reference)
            self._known[capacity] = result, on_gpu
        return self._known[capacity]

    def _result(self, placed: Placed, note: Mapping[str, Any]) -> SolverResult:
        idle = self._measure.idle_time(placed.plan.on_gpu)
        seconds = idle.of_table(placed.plan.execution_table)
        expected_s = float(request_weights(idle, self._cluster) @ seconds)
        return dataclasses.replace(
            placed.result,
            on_gpu=placed.plan.on_gpu,
            execution=placed.plan.execution_table,
            gpu_capacity=placed.plan.gpu_capacity,
            extra={**placed.result.extra, "expected_latency_s": expected_s, **note},
            runtime_s=None,  # of all rounds and tables, not of the last search
        )


def _gains(samples: Mapping[str, list[float]], name: str) -> bool:
    """Whether a candidate is faster than home by :data:`MIN_GAIN` in each of the samples."""
    pairs = zip(samples[name], samples["home"], strict=True)
    return all(seconds <= (1 - MIN_GAIN) * home for seconds, home in pairs)
