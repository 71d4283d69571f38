"""`solve`: check, search, pack, recompute."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from prism_plan.errors import UnsupportedFeature
from prism_plan.feasibility import require_feasible
from prism_plan.instance import Instance
from prism_plan.model import require_same_model
from prism_plan.objective import remote_score
from prism_plan.placement import InputFile, Placement, Plan
from prism_plan.placement_check import violations
from prism_plan.solvers.contract import Answer, Options, Rule
from prism_plan.solvers.packing import pack_on_gpus, standing_local
from prism_plan.solvers.registry import get_solver, solvers_supporting


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
        No such solver; ``options.near`` is of another model.
    UnsupportedFeature
        The solver has no rule for what the instance asks.
    Infeasible
        No placement satisfies the instance.
    LimitReached
        The time limit ended the search with no placement.
    """
    options = options or Options()
    chosen = get_solver(solver)
    if options.near is not None:
        require_same_model(
            options.near.model, instance.model, source="the placement to stay near", other="trace"
        )
    asked = rules_asked(instance, options)
    if not asked <= chosen.knows:
        able = solvers_supporting(asked) or ["none"]
        lacking = " and ".join(sorted(asked - chosen.knows))
        raise UnsupportedFeature(
            f"solver {solver!r} has no rule for {lacking}; solvers that have: {', '.join(able)}"
        )
    require_feasible(instance)
    begin = time.perf_counter()
    answer = chosen(instance, options)
    runtime_s = time.perf_counter() - begin
    on_gpu = answer.on_gpu
    if on_gpu is None:
        on_gpu = pack_on_gpus(instance, answer.local, options.near)
    placement = Placement(
        model=instance.model,
        servers=instance.servers,
        gpu_capacity=instance.gpu_capacity,
        on_gpu=on_gpu,
        plan=_plan(instance, solver, options, answer, runtime_s),
        inputs=dict(inputs or {}),
    )
    broken = violations(placement, instance=instance)
    if broken:
        raise AssertionError(f"solver {solver!r} broke a constraint: {broken[0].message}")
    return placement


def rules_asked(instance: Instance, options: Options) -> frozenset[Rule]:
    """The parts of the problem that a solver needs a rule for."""
    asked = {
        Rule.MIN_REPLICAS: instance.min_replicas > 1,
        Rule.RULES: instance.has_rules,
        Rule.LOAD_PRICE: options.near is not None,
        Rule.UNEQUAL_BYTES: not instance.in_slots,
    }
    return frozenset(rule for rule, wanted in asked.items() if wanted)


def _plan(
    instance: Instance, solver: str, options: Options, answer: Answer, runtime_s: float
) -> Plan:
    score = remote_score(instance.activations, answer.local)
    calls = math.fsum(score.calls)
    extra = dict(answer.extra)
    bound = None if answer.bound is None or calls == 0 else answer.bound / calls
    if answer.termination == "optimal":  # proven: the two differ by rounding alone
        bound = score.share
    objective = "remote"
    if options.near is not None:
        loads = int((answer.local & ~standing_local(instance, options.near)).sum())
        extra |= {"load_price": options.load_price, "loads": loads}
        if options.load_price > 0:  # the bound is then one on both terms together
            objective = "remote + load_price·loads"
            extra["priced_objective"] = math.fsum(score.remote) + options.load_price * loads
            extra["priced_bound"] = answer.bound
            bound = None
    return Plan(
        solver=solver,
        objective=objective,
        remote_share=score.share,
        bound=bound,
        termination=answer.termination,
        seed=options.seed,
        runtime_s=runtime_s if answer.runtime_s is None else answer.runtime_s,
        min_replicas=instance.min_replicas,
        extra=extra,
    )
