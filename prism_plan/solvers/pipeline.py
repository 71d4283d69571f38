"""Pipelines of contiguous whole layers, planned with where they execute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible
from prism_plan.execution_table import home_execution, moved_activations, spans
from prism_plan.expert_capacity import capacity_with_kv, kv_bytes
from prism_plan.instance import Instance
from prism_plan.latency.idle_time import IdleMeasure, request_weights
from prism_plan.placement import Placement, SolveReport
from prism_plan.printable_text import quantity
from prism_plan.solvers.busy_servers import queues_matter, simulated_s
from prism_plan.solvers.contract import (
    Feature,
    Options,
    Solver,
    SolverResult,
    cluster_and_trace,
)
from prism_plan.solvers.packing import expected_load
from prism_plan.solvers.pipeline_groups import Group, Groups, Members, Partition
from prism_plan.solvers.pipeline_memory import RunMemory, deal_out
from prism_plan.solvers.pipeline_order import best_pipeline, pipeline_s
from prism_plan.token_rates import request_rates
from prism_plan.trace import Trace

#: As :func:`deal_out`.
Deal = Callable[
    [Sequence[int], Sequence[int], Instance, npt.NDArray[np.float64]], npt.NDArray[np.bool_]
]


class PipelineProblem:
    """What every group's plan is made from.

    ``deal`` distributes a server's layers over its GPUs, as :func:`deal_out` does by default.
    """

    def __init__(
        self, instance: Instance, cluster: Cluster, trace: Trace, seed: int, deal: Deal = deal_out
    ) -> None:
        self.instance, self.cluster, self.trace, self.seed = instance, cluster, trace, seed
        self._deal = deal
        self.measure = IdleMeasure(trace.model, cluster, trace, seed)
        self.at_home = np.array([server.execute_at_home for server in cluster.servers])
        self.memory = RunMemory(instance, cluster, trace.model)
        holdings = [self._holding(m) for m in range(cluster.num_servers)]
        self.idle = self.measure.idle_time(np.logical_or.reduce(holdings))
        self.weights = request_weights(self.idle, cluster)
        self.called_s = self._called_layers(holdings)

    def groups(self, load: float) -> Groups:
        """The groups that can be made of the cluster's servers, for so many requests per second."""
        idle = self.idle
        distance_s = idle.latency_s + idle.token_bytes * idle.seconds_per_byte
        return Groups(
            self.cluster.num_servers, lambda members: self._plan_group(members, load), distance_s
        )

    def _plan_group(self, members: Members, load: float) -> Group | None:
        chosen = np.zeros(len(self.weights))
        chosen[sorted(members)] = self.weights[sorted(members)]
        request = self.idle.of_homes(np.where(self.at_home, 0.0, chosen))
        for home in np.flatnonzero(self.at_home & (chosen > 0)):
            request.layer_s[:] += chosen[home] * self.called_s[int(home)]
        # weights are shares of all requests: seconds times the rate of all are shares of time
        row = best_pipeline(request, self.memory.fits_until(sorted(members)), load)
        return None if row is None else Group(members, row, pipeline_s(request, row, load))

    def _holding(self, server: int) -> npt.NDArray[np.bool_]:
        """Every layer on one server, dealt out as if its GPUs had the room, bool [G, L, E]."""
        model = self.instance.model
        room = self.instance.gpu_capacity[server]
        size = self.instance.expert_size
        needed = int(size.sum()) * model.num_experts + len(room) * int(size.max())
        enough = [slots * -(-needed // max(sum(room), 1)) for slots in room]
        if sum(room) == 0:
            enough[0] = needed
        gpus = [len(server.gpus) for server in self.cluster.servers]
        first = sum(gpus[:server])
        held = np.zeros((sum(gpus), model.num_layers, model.num_experts), bool)
        load = self.instance.activations.sum(axis=0)
        held[first : first + gpus[server]] = self._deal(
            enough, range(model.num_layers), self.instance, load
        )
        return held

    def _called_layers(
        self, holdings: list[npt.NDArray[np.bool_]]
    ) -> dict[int, npt.NDArray[np.float64]]:
        """Of homes that execute everything: seconds of layer l held by server m, [L, N]."""
        homes = np.flatnonzero(self.at_home & self.idle.has_users)
        if not len(homes):
            return {}
        # [holders, T, L, homes]
        found = np.array([self.measure.layer_s(held, homes.tolist()) for held in holdings])
        return {
            int(home): np.einsum("t,mtl->lm", self.idle.shares[home], found[..., number])
            for number, home in enumerate(homes)
        }


def _solve(instance: Instance, options: Options) -> SolverResult:
    cluster, trace = cluster_and_trace(instance, "pipeline")
    problem = PipelineProblem(instance, cluster, trace, options.seed)
    partitions = problem.groups(0.0).candidates()
    if not partitions:
        raise _no_pipeline(problem)
    named = {quantity(len(groups), "group"): groups for groups in partitions}
    plans = {name: placed_groups(problem, groups) for name, groups in named.items()}
    chosen = next(iter(plans))
    idle = problem.measure.idle_time(plans[chosen].on_gpu)
    extra: dict[str, Any] = {}
    if (rates := request_rates(cluster)) is not None and queues_matter(
        idle, plans[chosen], cluster
    ):
        for groups in problem.groups(float(rates.sum())).candidates():
            name = f"{quantity(len(groups), 'group')} for the load"
            named[name], plans[name] = groups, placed_groups(problem, groups)
        samples = simulated_s(plans, cluster, trace, options.seed)
        means = {name: mean(seconds) for name, seconds in samples.items()}
        chosen = min(means, key=means.__getitem__)
        idle = problem.measure.idle_time(plans[chosen].on_gpu)
        extra |= {"simulated_s": means, "simulated_latency_s": means[chosen]}
    plan = plans[chosen]
    extra["expected_latency_s"] = float(problem.weights @ idle.of_table(plan.execution_table))
    extra["groups"] = [
        [instance.servers[run.server] for run in spans(group.row)] for group in named[chosen]
    ]
    return SolverResult.of_plan(plan, extra)


def placed_groups(problem: PipelineProblem, groups: Partition) -> Placement:
    """The experts and the table of some groups."""
    instance, model = problem.instance, problem.trace.model
    table = home_execution(instance.num_servers, model.num_layers)
    owned: list[list[int]] = [[] for _ in instance.servers]
    for group in groups:
        for home in group.members:
            if not problem.at_home[home]:
                table[home] = group.row
        for layer, server in enumerate(group.row.tolist()):
            owned[server].append(layer)
    capacity = capacity_with_kv(problem.cluster, model, kv_bytes(problem.cluster, model, table))
    local = np.zeros(instance.activations.shape, bool)
    for server, layers in enumerate(owned):
        local[server, layers] = True
    load = expected_load(moved_activations(instance.activations, table), local)
    on_gpu = [
        deal_out(room, layers, instance, load[server])
        for server, (room, layers) in enumerate(zip(capacity, owned, strict=True))
    ]
    return Placement(
        instance.model, instance.servers, capacity, np.concatenate(on_gpu),
        SolveReport("pipeline"), execution=table,
    )  # fmt: skip


def _no_pipeline(problem: PipelineProblem) -> Infeasible:
    """Why no order of servers holds every layer whole."""
    runs = problem.memory.fits_until(range(problem.cluster.num_servers))
    layers = runs.shape[1]
    held = int((runs - np.arange(layers)).max(axis=1).sum())
    whole = quantity(held, "whole layer")
    cached = " beside the KV caches" if any(s.kv_tokens for s in problem.cluster.servers) else ""
    cause = f"they hold {whole}{cached}"
    if held >= layers:  # layers of unequal size, or runs that leave gaps
        cause = f"runs of contiguous layers do not fill them{cached}"
    return Infeasible(
        f"pipeline: no order of servers holds all {layers} layers: {cause}",
        shortfall=max(layers - held, 1),
        unit="layers",
        remedy="add memory, lower kv_tokens, or use a solver that splits layers",
    )


SOLVER = Solver(
    name="pipeline",
    summary="contiguous whole layers, each executed by the server that holds it",
    guarantee="the least idle time of all pipelines and groups up to six servers",
    function=_solve,
    supports=frozenset({Feature.UNEQUAL_BYTES}),
)
