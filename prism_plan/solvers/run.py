"""Solve an instance: check its feasibility, search, pack onto GPUs, check and score the result."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from prism_plan.assumed_figures import assumed_texts
from prism_plan.errors import UnsupportedFeature
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.model_spec import require_same_model
from prism_plan.objective import remote_score
from prism_plan.placement import InputFile, Placement, SolveReport
from prism_plan.placement_check import violations
from prism_plan.solvers.contract import Feature, Options, SolverResult
from prism_plan.solvers.packing import pack_on_gpus, reference_local
from prism_plan.solvers.registry import (
    ALL_SOLVERS,
    SOLVER_NAMES,
    get_solver,
    plans_tables,
    solvers_supporting,
)


def solve(
    instance: Instance,
    solver: str = "exact",
    options: Options | None = None,
    *,
    inputs: Mapping[str, InputFile] | None = None,
) -> Placement:
    """Plan a placement with the solver of that name.

    The remote share in the result is recomputed from the placement, and so is its feasibility.

    Raises
    ------
    InputError
        No such solver; ``options.reference`` is of another model.
    UnsupportedFeature
        The solver does not support what the instance requires.
    Infeasible
        No placement satisfies the instance.
    LimitReached
        The time limit ended the search with no placement.
    """
    options = options or Options()
    chosen = get_solver(solver)
    if options.reference is not None:
        require_same_model(
            options.reference.model,
            instance.model,
            source="the placement to stay near",
            other="trace",
        )
    required = required_features(instance, options)
    if unsupported := required - chosen.supports:
        among = SOLVER_NAMES if instance.trace is None else ALL_SOLVERS
        alternatives = solvers_supporting(required, among) or ["none"]
        raise UnsupportedFeature(
            f"solver {solver!r} does not support {' and '.join(sorted(unsupported))}; "
            f"supported by: {', '.join(alternatives)}"
        )
    if plans_tables(solver) and instance.trace is not None:  # caches lie where its table says
        instance = instance.without_kv(instance.trace.model)
    require_feasible(instance)
    begin = time.perf_counter()
    result = chosen(instance, options)
    runtime_s = time.perf_counter() - begin
    if result.gpu_capacity is not None:
        instance = instance.replace(gpu_capacity=result.gpu_capacity)
    on_gpu = result.on_gpu
    if on_gpu is None:
        on_gpu = pack_on_gpus(instance, result.local, options.reference)
    placement = Placement(
        model=instance.model,
        servers=instance.servers,
        gpu_capacity=instance.gpu_capacity,
        on_gpu=on_gpu,
        plan=SolveReport(solver),
        inputs=dict(inputs or {}),
        execution=result.execution,
        **_of_cluster(instance, result),
    )
    plan = _report(instance, solver, options, result, placement, runtime_s)
    placement = placement.replace(plan=plan)
    if broken := violations(placement, instance=instance):
        raise AssertionError(f"solver {solver!r} broke a constraint: {broken[0].message}")
    return placement


def required_features(instance: Instance, options: Options) -> frozenset[Feature]:
    """The features that a solver has to support for this instance and these options."""
    required = {
        Feature.MIN_REPLICAS: instance.min_replicas > 1,
        Feature.RULES: instance.has_rules,
        Feature.LOAD_PRICE: options.reference is not None,
        Feature.UNEQUAL_BYTES: not instance.in_slots,
    }
    return frozenset(feature for feature in required if required[feature])


def _of_cluster(instance: Instance, result: SolverResult) -> dict[str, Any]:
    """What a runtime needs to know of the cluster where layers execute elsewhere."""
    if result.execution is None or instance.cluster is None:
        return {}
    servers = instance.cluster.servers
    return {
        "kv_tokens": {server.name: server.kv_tokens for server in servers if server.kv_tokens},
        "execute_at_home": tuple(server.name for server in servers if server.execute_at_home),
    }


def _report(
    instance: Instance, solver: str, options: Options, result: SolverResult, placement: Placement,
    runtime_s: float,
) -> SolveReport:  # fmt: skip
    score = remote_score(instance.activations, placement.local_to_execution)
    calls = math.fsum(score.calls)
    extra = dict(result.extra)
    bound = None if result.bound is None or calls == 0 else result.bound / calls
    assumed: tuple[str, ...] = ()
    if result.execution is not None and instance.cluster is not None:
        assumed = assumed_texts(instance.cluster, compute=True, links=True)
        if instance.trace is not None:
            from prism_plan.latency.idle_time import planning_assumptions  # imports the simulator

            assumed += planning_assumptions(instance.cluster, instance.trace)
    termination = result.termination
    if placement.execution is not None:  # the bound is that of plans that execute at home
        bound, termination = None, "heuristic"
    elif termination == "optimal":  # proven: the two differ by rounding alone
        bound = score.share
    objective = result.objective
    if options.reference is not None:
        loads = int((result.local & ~reference_local(instance, options.reference)).sum())
        extra |= {"load_price": options.load_price, "loads": loads}
        if result.objective == "latency":
            extra["load_price_unit"] = "seconds of a mean request a GiB"
        elif options.load_price > 0:  # the bound is then one on both terms together
            objective = "remote + load_price·loads"
            extra["priced_objective"] = math.fsum(score.remote) + options.load_price * loads
            extra["priced_bound"] = result.bound
            bound = None
    return SolveReport(
        solver=solver,
        objective=objective,
        remote_share=score.share,
        bound=bound,
        termination=termination,
        seed=options.seed,
        runtime_s=runtime_s if result.runtime_s is None else result.runtime_s,
        min_replicas=instance.min_replicas,
        assumed=assumed,
        extra=extra,
    )
