"""A migration plan replayed step by step: the oracle of the tests of its order."""

from __future__ import annotations

from prism_plan.migration.plan import Capacity, MigrationPlan, endpoints
from prism_plan.placement import Placement


def check_plan(
    plan: MigrationPlan, a: Placement, b: Placement, *, gpu_capacity: Capacity | None = None
) -> list[str]:
    """Replay the steps in their order; what is wrong, empty if nothing is.

    Every step finds what it needs, no expert of ``a`` is ever without a copy, no GPU is ever over
    its capacity, and the end is ``b``.

    Raises
    ------
    InputError
        As :func:`endpoints`.
    """
    ends = endpoints(a, b, gpu_capacity)
    held = ends.had.copy()
    copies = held.sum(axis=0)
    used = held @ ends.size
    problems = []
    for index, step in enumerate(plan.steps):
        g, j = step.gpu, step.pair
        what = f"step {index}, {step.kind} of {ends.model.pair_text(j)} on {ends.gpu_text(g)}"
        if any(not 0 <= need < index for need in step.needs):
            problems.append(f"{what}: needs a step that is not before it")
        change = 1 if step.kind == "load" else -1
        if held[g, j] == (change > 0):
            problems.append(f"{what}: it is {'already' if change > 0 else 'not'} there")
            continue
        held[g, j] = change > 0
        copies[j] += change
        used[g] += change * ends.size[j]
        if not copies[j]:
            problems.append(f"{what}: no copy is left")
        if used[g] > ends.capacity[g]:
            problems.append(f"{what}: over the capacity by {used[g] - ends.capacity[g]:,}")
    wrong = int((held != ends.has).sum())
    if wrong:
        problems.append(f"the end differs from the second placement in {wrong:,} places")
    return problems
