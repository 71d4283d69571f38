"""Which copies to load where replicas are missing, after a loss or a move that was abandoned."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, InputError
from prism_plan.instance import Instance
from prism_plan.migration.endpoints import in_server_order
from prism_plan.migration.repair_unequal import repair_unequal_sizes
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement, SolveReport
from prism_plan.printable_text import listed, quantity
from prism_plan.solvers.missing_replicas import ranked_weights, solve_with_missing
from prism_plan.solvers.packing import pack_on_gpus

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def repair_placement(
    held: Placement,
    instance: Instance,
    priority: npt.ArrayLike | None = None,
    *,
    partly: bool = False,
) -> Placement:
    """The placement with ``min_replicas`` copies of every expert that is reached by fewest loads.

    Parameters
    ----------
    held
        What the servers of the instance hold now, of some experts too few copies or none.
    instance
        The servers that are there: their capacities and rules, and ``min_replicas``; its
        activations are not used.
    priority
        Calls per second, [N, L, E]. Of the placements of fewest loads it is the one that drops
        copies of the fewest calls, and no copy without need.
    partly
        Where not every expert can have its replicas: cover as many experts as can be, then have as
        few replicas missing as can be, and only then count loads. :func:`missing_text` says what
        remains. An expert that somebody holds does not lose its last copy, unless the rules want
        so.

    Returns
    -------
    Placement
        Optimal; where experts differ in size within the tolerances of the integer program. A
        migration there (:func:`~prism_plan.migration.order.find_order.migration_plan`) loads
        experts without any holder first. Experts that stay on a server stay on their GPU, if it has
        the room.

    Raises
    ------
    InputError
        Other servers, GPUs or another model; ``priority`` has another shape, or is negative, NaN or
        infinite.
    Infeasible
        Not every expert can have its replicas (without ``partly``), or the pins do not fit.
    LimitReached
        The problem is too large for the exact flow, or the integer program has no result.
    """
    require_same_model(held.model, instance.model, source="what is held", other="the instance")
    held = in_server_order(held, instance.servers)
    gpus = [len(capacities) for capacities in held.gpu_capacity]
    if held.servers != instance.servers or gpus != list(map(len, instance.gpu_capacity)):
        raise InputError(
            f"{list(held.servers)[:4]} with {gpus[:4]} GPUs",
            place="what is held",
            expected="the servers and GPUs of the instance",
        )
    calls = _checked_priority(priority, instance)
    if instance.in_slots:
        local = _repair_equal_sizes(held.local, instance, calls, partly=partly)
        on_gpu = pack_on_gpus(instance, local, held)
    else:
        on_gpu = repair_unequal_sizes(held, instance, calls, partly=partly)
    return held.replace(
        gpu_capacity=instance.gpu_capacity,
        on_gpu=on_gpu,
        plan=SolveReport(
            "repair", objective="loads", termination="optimal", seed=held.plan.seed,
            min_replicas=instance.min_replicas,
        ),
    )  # fmt: skip


def missing_text(placement: Placement, instance: Instance) -> str:
    """One line on the experts that have fewer than ``min_replicas`` copies, empty if none has."""
    copies = placement.local.sum(axis=0).ravel()
    lines = []
    nowhere = np.flatnonzero(copies == 0).tolist()
    fewer = np.flatnonzero((copies > 0) & (copies < instance.min_replicas)).tolist()
    for pairs, what in (
        (nowhere, "nowhere"),
        (fewer, f"by fewer than {quantity(instance.min_replicas, 'server')}"),
    ):
        if pairs:
            names = listed(map(placement.model.pair_text, pairs))
            is_held = "is held" if len(pairs) == 1 else "are held"
            lines.append(f"{quantity(len(pairs), 'expert')} {is_held} {what}: {names}")
    return "; ".join(lines)


def _checked_priority(priority: npt.ArrayLike | None, instance: Instance) -> Floats:
    shape = instance.activations.shape
    calls = np.zeros(shape) if priority is None else np.asarray(priority, np.float64)
    if calls.shape != shape:
        raise InputError(f"shape {calls.shape}", place="priority", expected=f"{shape}")
    if not ((calls >= 0) & (calls < np.inf)).all():
        raise InputError(
            "a number that is negative or not finite", place="priority", expected="calls per second"
        )
    return calls


def _repair_equal_sizes(held: Bools, instance: Instance, calls: Floats, *, partly: bool) -> Bools:
    """What each server holds after the repair, bool [N, L, E], by one minimum-cost flow."""
    replicas = min(instance.min_replicas, instance.num_servers) if partly else instance.min_replicas
    wanted = instance.replace(min_replicas=replicas)
    price = np.full((replicas, *held.shape[1:]), np.inf)
    if not partly:
        load, most = ranked_weights(wanted, 2)
        return solve_with_missing(wanted, _values(held, calls, load, most), price)
    nowhere, missing, load, most = ranked_weights(wanted, 4)
    price[:-1] = missing
    value = _values(held, calls, load, most)
    price[-1] = np.where(held.any(axis=0), np.inf, nowhere)
    try:
        return solve_with_missing(wanted, value, price)
    except Infeasible:  # rules take the last copy of some expert, or the pins alone do not fit
        price[-1] = nowhere
        return solve_with_missing(wanted, value, price)


def _values(held: Bools, calls: Floats, load: float, most: float) -> Floats:
    """What a copy is worth: of those that are held the calls, from 1 to ``most``; others a load."""
    largest = float(calls.max(initial=0.0, where=held)) or 1.0
    return np.where(held, 1.0 + np.rint(calls / largest * (most - 1.0)), -load)
