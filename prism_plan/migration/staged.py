"""The steps of a move whose execution table changes too, in stages that memory allows.

While requests run on several tables, the KV cache that a server keeps for a home is bounded by the
table with the most of the home's layers there (docs/design.md, sections 5 and 10). The experts of a
move need not fit beside that: then the new table begins when enough was dropped, or the last steps
wait until no request runs on an older table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible
from prism_plan.execution_table import TableChange, moved_activations
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import require_feasible
from prism_plan.migration.endpoints import NAMES, Capacity, match_placements
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.replica_dips import with_dips
from prism_plan.migration_step import MigrationStep
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.placement_check import violations
from prism_plan.solvers.exact import solve_flow
from prism_plan.solvers.missing_replicas import ranked_weights, solve_with_missing
from prism_plan.solvers.packing import pack_on_gpus

Tables = npt.NDArray[np.int32]


def staged_migration(
    current: Placement,
    target: Placement,
    tables_in_use: Tables,
    instance: Instance,
    model: ModelSpec | None,
    *,
    rates: npt.NDArray[np.float64] | None = None,
    min_replicas: int | None = None,
    names: tuple[str, str] = NAMES,
) -> MigrationPlan:
    """The migration steps from one placement to another, and when the table of the target begins.

    The plan has a ``change`` where the target's table is not the only one of ``tables_in_use``
    int32 [tables, N, L], which ``current`` has to fit beside. ``instance`` has the rules; ``model``
    has the sizes of KV caches, ``None`` where none is kept and every table leaves its capacities.
    ``rates`` [N, L, E] are the calls per second of each home, by which loads are ordered.
    ``min_replicas`` are kept where that is possible, and ``names`` are what errors call the two
    placements, as in :func:`~prism_plan.migration.order.find_order.migration_plan`.

    Each stage keeps every GPU within what the tables of that time leave of it:

    1. Everything fits beside the old and the new tables: the steps and the table begin at once.
    2. The target does not: the table begins at once, all steps wait for requests on older tables.
    3. The current placement does not: the table begins when all steps are complete.
    4. Neither does: steps to a placement between them, which does, then the table; the other steps
       wait for requests on older tables. That placement keeps as many replicas as there is
       room for, up to ``min_replicas``, and then costs the fewest loads on the way.

    Raises
    ------
    Infeasible
        No order of the steps was found; a GPU cannot hold the KV caches of both tables, or no
        placement of all experts fits beside them.
    """
    new = target.execution_table
    priority = None if rates is None else moved_activations(rates, new)
    forbidden = instance.mask(instance.forbidden)
    replicas = target.plan.min_replicas if min_replicas is None else min_replicas

    def ordered(a: Placement, b: Placement, limits: Instance) -> MigrationPlan:
        return migration_plan(
            a, b, gpu_capacity=limits.gpu_capacity, forbidden=forbidden, priority=priority,
            min_replicas=replicas, names=names,
        )  # fmt: skip

    after = _beside(instance, new[None], model)
    same_servers = tables_in_use.shape[1:] == new.shape  # if not, ordering them says so
    if not same_servers or (tables_in_use == new).all():
        return ordered(current, target, after)
    during = _beside(instance, np.concatenate([tables_in_use, new[None]]), model)
    if not _excess(current, during):
        fits = not _excess(target, during)
        plan = ordered(current, target, during if fits else after)
        return plan.replace(change=TableChange(new, 0, len(plan.steps) if fits else 0))
    before = _beside(instance, tables_in_use, model)
    if not _excess(target, during):
        plan = ordered(current, target, before)
        return plan.replace(change=TableChange(new, len(plan.steps), len(plan.steps)))
    between = _between(current, target, during, replicas)
    first = ordered(current, between, before)
    second = ordered(between, target, after)
    at = len(first.steps)
    later = tuple(
        MigrationStep(step.kind, step.gpu, step.pair, tuple(need + at for need in step.needs),
                      step.temporary)
        for step in second.steps
    )  # fmt: skip
    joined = first.replace(steps=first.steps + later, change=TableChange(new, at, at))
    return with_dips(joined, match_placements(current, target, _unlimited(target)))


def _beside(instance: Instance, tables: Tables, model: ModelSpec | None) -> Instance:
    """The problem with what is left of each GPU while requests run on any of the tables."""
    return instance if model is None else instance.with_execution(tables, model)


def _unlimited(placement: Placement) -> Capacity:
    """Room for everything on each GPU."""
    everything = sum(placement.model.expert_bytes_by_layer) * placement.model.num_experts
    return [[everything] * len(gpus) for gpus in placement.gpu_capacity]


def _between(
    current: Placement, target: Placement, limits: Instance, min_replicas: int
) -> Placement:
    """A placement within the limits, over which a move costs the fewest loads.

    Of the replicas that both placements have, up to ``min_replicas`` of each expert, it has as many
    as it can. An expert that both placements have on a server and this one has not is loaded again;
    one that neither has costs a load; one of the target costs the same load now or later.
    """
    if not limits.in_slots:
        raise Infeasible(
            "neither placement fits beside the KV caches of both execution tables, and experts "
            "differ in size",
            shortfall=max(_excess(current, limits), 1),
            unit="bytes",
            remedy="move experts first, and the table when requests on the old one have ended",
        )
    had, will_have = current.local, target.local
    value = (had & will_have).astype(float) - ~(had | will_have)
    kept = np.minimum(had.sum(axis=0), will_have.sum(axis=0)).clip(1, min_replicas)
    if (kept == 1).all():
        one = limits.replace(min_replicas=1)
        require_feasible(one)
        local, _, _ = solve_flow(one, value, had)
    else:
        several = limits.replace(min_replicas=int(kept.max()))
        missing, load = ranked_weights(several, 2)
        number = np.arange(1, several.min_replicas + 1)[:, None, None]  # of missing replicas
        price = np.where(number > several.min_replicas - kept, missing, 0.0)
        price[-1] = np.inf  # some server holds every expert
        local = solve_with_missing(several, value * load, price)
    return current.replace(
        on_gpu=pack_on_gpus(limits, local, current), gpu_capacity=limits.gpu_capacity
    )


def _excess(placement: Placement, limits: Instance) -> int:
    """By how much the experts of GPUs exceed the limits, in their unit."""
    placed = placement.replace(gpu_capacity=limits.gpu_capacity)
    return sum(v.amount for v in violations(placed) if v.constraint == "capacity")
