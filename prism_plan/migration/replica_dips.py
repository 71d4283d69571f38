"""Which experts have fewer copies than are wanted during a migration, and during which steps."""

from __future__ import annotations

import dataclasses

from prism_plan.migration.endpoints import Endpoints
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration_step import ReplicaDip
from prism_plan.printable_text import listed, quantity


def with_dips(plan: MigrationPlan, ends: Endpoints) -> MigrationPlan:
    """The plan with its dips, which hold in every order that the needs of its steps allow.

    A drop relies on as many of the copies that are left as are wanted, so it leaves in no order
    fewer than in that of the steps. Where a drop leaves too few, the load that restores the wanted
    number also waits for the other loads of the expert since then: once it is complete there are
    enough copies, whatever else was done meanwhile.
    """
    wanted = ends.kept_replicas(plan.min_replicas).tolist()
    server = ends.server_of_gpu.tolist()
    on_server = ends.on_servers(ends.initial)
    num_servers = (on_server > 0).sum(axis=0).tolist()
    open_drops: dict[int, list[tuple[int, int]]] = {}  # by pair: (step, servers that it leaves)
    loads_since: dict[int, list[int]] = {}
    dips, steps = [], list(plan.steps)
    for index, step in enumerate(plan.steps):
        j, n = step.pair, server[step.gpu]
        before = on_server[n, j] > 0
        on_server[n, j] += 1 if step.kind == "load" else -1
        num_servers[j] += int(on_server[n, j] > 0) - int(before)
        if step.kind == "drop":
            if num_servers[j] < wanted[j] and before and not on_server[n, j]:
                open_drops.setdefault(j, []).append((index, num_servers[j]))
        elif j in open_drops:
            loads_since.setdefault(j, []).append(index)
            if num_servers[j] >= wanted[j]:
                needs = {*step.needs, *loads_since.pop(j)[:-1]}
                steps[index] = dataclasses.replace(step, needs=tuple(sorted(needs)))
                for drop, copies in open_drops.pop(j):
                    dips.append(ReplicaDip(j, wanted[j], copies, drop, index))
    dips.sort(key=lambda dip: dip.drop)
    return plan.replace(steps=tuple(steps), dips=tuple(dips))


def dips_text(plan: MigrationPlan) -> str:
    """One line on the dips of a plan for messages, empty if it has none."""
    if not plan.dips:
        return ""
    lowest: dict[int, int] = {}
    for dip in plan.dips:
        lowest[dip.pair] = min(dip.copies, lowest.get(dip.pair, dip.copies))
    names = listed(
        f"{plan.model.pair_text(pair)} ({quantity(left, 'copy', 'copies')} left)"
        for pair, left in sorted(lowest.items())
    )
    have = "has" if len(lowest) == 1 else "have"
    return (
        f"{quantity(len(lowest), 'expert')} {have} fewer than {plan.min_replicas} copies for a "
        f"while, for no order was found that loads before it drops: {names}"
    )
