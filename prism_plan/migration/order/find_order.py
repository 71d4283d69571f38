"""Find an order of loads and drops that leads from one placement to another."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, InputError
from prism_plan.input_limits import MAX_REPLICAS, require_integer
from prism_plan.migration.endpoints import NAMES, Capacity, Endpoints, match_placements
from prism_plan.migration.order.greedy import GreedyScheduler
from prism_plan.migration.order.unequal_sizes import Attempts, relieve_stuck_gpu
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.replica_dips import with_dips
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement


def migration_plan(
    a: Placement,
    b: Placement,
    *,
    gpu_capacity: Capacity | None = None,
    forbidden: npt.ArrayLike | None = None,
    priority: npt.ArrayLike | None = None,
    min_replicas: int | None = None,
    names: tuple[str, str] = NAMES,
) -> MigrationPlan:
    """The migration steps that lead from ``a`` to ``b``.

    Servers are matched by name and come in the order of ``b``. ``gpu_capacity`` is as in
    :class:`~prism_plan.instance.Instance`, by default that of ``b``. ``forbidden`` bool [N, L, E]
    says where no temporary copy may go. Loads of high ``priority`` come first: calls per second,
    [G, J] or [N, L, E]; ties go to the lowest index. Experts that nobody holds yet come before
    all others where that leaves room to move the rest, then those that too few servers hold.
    ``names`` are what errors call the two.

    In every order of the steps that their needs allow, each expert is held by ``min_replicas``
    servers at every moment (by default the number that ``b`` was planned with), or by as many as
    hold it at first or in the end, if that is less. Where that is not possible the ``dips`` of the
    plan say which experts have fewer copies for a while, and during which steps; one copy is left
    always.

    Where experts are of one size, and nothing is forbidden, an order is found if one exists, and
    one without dips if that exists and no expert is without a holder at first. A group of GPUs that
    wait for each other costs at most two extra loads where ``min_replicas`` is 1, and never more
    than there are GPUs. Where sizes differ or places are forbidden, the search may fail, or have
    dips, though an order without exists.

    Raises
    ------
    InputError
        See :func:`~prism_plan.migration.endpoints.match_placements`; a shape is wrong, a priority
        is NaN, ``min_replicas`` is below 1.
    Infeasible
        No order exists, or none was found; says which and why.
    """
    replicas = b.plan.min_replicas if min_replicas is None else min_replicas
    require_integer(replicas, 1, MAX_REPLICAS, "min_replicas")
    ends = match_placements(a, b, gpu_capacity, names)
    allowed = ~_by_gpu(ends, forbidden, "forbidden", bool) | ends.final
    called = _by_gpu(ends, priority, "priority", np.float64)
    at_most = min(replicas, len(ends.servers))
    for kept in range(at_most, 0, -1):  # fewer are kept only where no order was found
        scheduler = GreedyScheduler(ends, allowed, called, at_most, kept)
        try:
            _schedule(scheduler)
            break
        except Infeasible:
            if kept == 1:
                raise
    plan = MigrationPlan(ends.model, ends.servers, ends.gpus, tuple(scheduler.state.steps))
    plan = plan.replace(steps=_topological(plan), min_replicas=replicas)
    return with_dips(plan, ends)


def _by_gpu(ends: Endpoints, array: npt.ArrayLike | None, name: str, dtype: Any) -> Any:
    """Values for each GPU and pair [G, J], from those or from [N, L, E]."""
    gpus, pairs = ends.initial.shape
    if array is None:
        return np.zeros((gpus, pairs), dtype)
    values = np.asarray(array, dtype)
    by_server = (len(ends.servers), ends.model.num_layers, ends.model.num_experts)
    if values.shape == by_server:
        values = values.reshape(len(ends.servers), pairs).repeat(ends.gpus, axis=0)
    if values.shape != (gpus, pairs):
        raise InputError(
            f"shape {values.shape}", place=name, expected=f"{by_server} or {(gpus, pairs)}"
        )
    if np.isnan(values).any():
        raise InputError("NaN", place=name, expected="numbers")
    return values


def _schedule(scheduler: GreedyScheduler) -> None:
    """Schedule all loads and drops: greedy first, then what is left stuck."""
    from prism_plan.migration.order.cycles import rotate_cycles  # imports networkx, which is slow

    ends = scheduler.ends
    new = ends.final & ~ends.initial
    first_copies = new & ~ends.initial.any(axis=0)
    last_loads = first_copies if _slack_after_first_copies(ends) < 1 else np.zeros_like(new)
    scheduler.add_loads(new & ~last_loads)
    tried: Attempts = set()
    while scheduler.has_pending_loads():
        if ends.model.equal_expert_bytes:
            rotate_cycles(scheduler)
        else:
            relieve_stuck_gpu(scheduler, tried)
        scheduler.load_while_possible()
    # every other expert is at its target, so all pending drops are droppable
    scheduler.add_loads(last_loads)
    assert not scheduler.has_pending_loads(), "a load without a drop that makes room for it"
    scheduler.drop_rest()


def _slack_after_first_copies(ends: Endpoints) -> int:
    """Free slots and duplicates once all experts that nobody held have their first copy.

    Their loads use up slack for good; if nothing is left, they have to come last. Where sizes
    differ no such promise can be made, and they come first.
    """
    if not ends.model.equal_expert_bytes:
        return 1
    return int(ends.capacity.sum()) - int(ends.final.any(axis=0).sum())


def _topological(plan: MigrationPlan) -> tuple[MigrationStep, ...]:
    """The steps, sorted topologically (the earliest scheduled first), with needs renumbered."""
    import networkx as nx

    order = list(nx.lexicographical_topological_sort(plan.graph()))  # raises where there is a cycle
    new_index = {old: new for new, old in enumerate(order)}
    return tuple(
        MigrationStep(
            step.kind,
            step.gpu,
            step.pair,
            tuple(sorted(new_index[need] for need in step.needs)),
            step.temporary,
        )
        for step in (plan.steps[index] for index in order)
    )
