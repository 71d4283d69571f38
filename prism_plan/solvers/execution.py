"""Solvers of experts with the best execution table for what they place: ``NAME+paths``.

The table is the best for a request on its own. Where servers would be busy, all homes may have
chosen the same one: there a short simulation of the trace decides between that table, one in which
homes pay for the waiting that they cause to others, and home.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, UnsupportedFeature
from prism_plan.execution_table import executes_at_home, home_execution
from prism_plan.expert_capacity import capacity_with_kv, kv_bytes
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.solvers.busy_servers import Candidate, queues_matter, simulated_s
from prism_plan.solvers.contract import Options, Solver, SolverResult
from prism_plan.solvers.idle_time import idle_time, request_weights
from prism_plan.solvers.packing import pack_on_gpus
from prism_plan.solvers.paths import shortest_paths, tolled_paths
from prism_plan.trace import Trace

#: KV caches lie where layers execute, so that slots depend on the table: plan, count, plan again.
MAX_ROUNDS = 10
#: A table that is simulated has to be faster than home by this share: less is noise of the sample.
MIN_GAIN = 0.05


def with_paths(solver: Solver) -> Solver:
    """The solver, followed by the execution table of least idle time for its placement.

    Capacities are those of the cluster, with KV caches where the table has them; those of the
    instance, which count them at home, are not used.
    """

    def plan(instance: Instance, options: Options) -> SolverResult:
        cluster, trace = _cluster_and_trace(instance, solver.name)
        reserved = [0] * cluster.num_servers  # for KV caches; it only grows from round to round
        instance = instance.replace(gpu_capacity=capacity_with_kv(cluster, trace.model, reserved))
        short = 0
        for _ in range(MAX_ROUNDS):
            result = solver(instance, options)
            on_gpu = result.on_gpu
            if on_gpu is None:
                on_gpu = pack_on_gpus(instance, result.local, options.reference)
            table, note = _best_table(instance, cluster, trace, on_gpu, options.seed)
            needed = kv_bytes(cluster, trace.model, table)
            reserved = [max(before, now) for before, now in zip(reserved, needed, strict=True)]
            capacity = capacity_with_kv(cluster, trace.model, reserved)
            short = sum(
                max(used - now, 0)
                for gpus, used_gpus in zip(capacity, instance.gpu_capacity, strict=True)
                for now, used in zip(gpus, used_gpus, strict=True)
            )
            if short == 0:
                return dataclasses.replace(
                    result,
                    on_gpu=on_gpu,
                    execution=table,
                    gpu_capacity=instance.gpu_capacity,
                    extra={**result.extra, **note},
                    runtime_s=None,  # of all rounds and tables, not of the last search
                )
            instance = instance.replace(gpu_capacity=capacity)
            require_feasible(instance)  # caches may leave too little for all experts
        raise Infeasible(
            f"KV caches and experts do not fit together after {MAX_ROUNDS} rounds of planning",
            shortfall=short,
            unit="slots" if instance.in_slots else "bytes",
            remedy="lower kv_tokens, or plan with every layer at home",
        )

    return dataclasses.replace(solver, name=f"{solver.name}+paths", function=plan)


def _cluster_and_trace(instance: Instance, name: str) -> tuple[Cluster, Trace]:
    if instance.cluster is None or instance.trace is None:
        raise UnsupportedFeature(
            f"solver '{name}+paths' needs the links of a cluster and the steps of a trace; build "
            "the instance with Instance.build(trace, cluster)"
        )
    return instance.cluster, instance.trace


def _best_table(
    instance: Instance, cluster: Cluster, trace: Trace, on_gpu: npt.NDArray[np.bool_], seed: int
) -> tuple[npt.NDArray[np.int32], dict[str, Any]]:
    """The table, and what is to be said of it in the plan."""
    at_home = np.array([server.execute_at_home for server in cluster.servers])
    idle = idle_time(on_gpu, trace.model, cluster, trace, seed)
    table = shortest_paths(idle, at_home)
    weights = request_weights(idle, cluster)

    def note(chosen: npt.NDArray[np.int32], **more: Any) -> dict[str, Any]:
        return {"expected_latency_s": float(weights @ idle.of_table(chosen)), **more}

    if executes_at_home(table) or not queues_matter(
        idle, Candidate(on_gpu, table, instance.gpu_capacity), cluster
    ):
        return table, note(table)
    rates = np.array([1 / (s.arrival_interval_s or np.inf) for s in cluster.servers])
    tables = {
        "paths": table,
        "paths with tolls": tolled_paths(idle, rates, at_home),
        "home": home_execution(*table.shape),
    }
    means = simulated_s(
        {key: Candidate(on_gpu, x, instance.gpu_capacity) for key, x in tables.items()},
        instance, cluster, trace, seed,
    )  # fmt: skip
    best = min(means, key=means.__getitem__)
    if means[best] > (1 - MIN_GAIN) * means["home"]:
        best = "home"
    return tables[best], note(tables[best], simulated_s=means)
