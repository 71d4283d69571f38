"""``prism-plan migrate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.command_options import TableOptions, options_as
from prism_plan.cli.tables import format_option
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.migration.plan import MigrationPlan
    from prism_plan.placement import Placement


@dataclass(frozen=True, kw_only=True)
class MigrateOptions(TableOptions):
    """What ``prism-plan migrate`` is given."""

    a: str
    b: str
    cluster: str
    output: str | None


@click.command("migrate")
@click.argument("a", metavar="A.json")
@click.argument("b", metavar="B.json")
@click.option("--cluster", required=True, metavar="C.toml", help="Servers, GPUs, load speeds.")
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("-o", "--output", metavar="M.json", help="Plan to write; - for stdout.")
@options_as(MigrateOptions)
def command(given: MigrateOptions) -> None:
    """Plan the order of loads and drops that leads from placement A to placement B.

    Every expert that A holds stays held by some GPU at every moment, and every GPU within its
    capacity: the slots of the cluster file where it gives them, else what B states. Exit code 3
    where there is no such order.
    """
    import numpy as np

    from prism_plan.cli.console import deliver, note
    from prism_plan.cli.inputs import blaming, load_cluster, note_assumed, writable
    from prism_plan.instance import rule_triples
    from prism_plan.io.migration import dump_migration
    from prism_plan.io.placement import read_identified_placement
    from prism_plan.migration.cost import gpu_load_gbs
    from prism_plan.migration.order.find_order import migration_plan
    from prism_plan.text import quantity

    names = (given.a, given.b)
    writable(given.output, *names, given.cluster)
    cluster, _ = load_cluster(given.cluster)
    before, before_file = read_identified_placement(given.a)
    after, after_file = read_identified_placement(given.b)
    _require_target(after, cluster, given.b, given.cluster)
    forbidden = np.zeros(after.local.shape, bool)
    with blaming(given.cluster):
        for place in rule_triples(cluster, after.model, "forbid"):
            forbidden[place] = True
    capacity = _capacity(after, cluster)
    with blaming(given.b):
        plan = migration_plan(
            before, after, gpu_capacity=capacity, forbidden=forbidden, names=names
        )
    load_gbs = gpu_load_gbs(cluster)
    plan = plan.replace(
        inputs={"from": before_file, "to": after_file},
        load_s=plan.load_seconds(load_gbs),
    )
    data = dump_migration(plan)
    if given.output is not None:
        deliver(given.output, data)
    note_assumed(given.cluster, cluster, loads=True)
    new = int((after.local.any(axis=0) & ~before.local.any(axis=0)).sum())
    if new:
        note(f"{quantity(new, 'expert')} held nowhere in {given.a}: missing until loaded")
    if plan.extra_loads:
        note(f"{quantity(plan.extra_loads, 'load')} of temporary copies that lead past full GPUs")
    if given.as_json and given.output != "-":
        deliver("-", data)
    else:
        _print(
            plan,
            plan.loading_s(load_gbs),
            f"{given.a} → {given.b}",
            form=given.table_format,
            err=given.output == "-",
        )


def _require_target(after: Placement, cluster: Cluster, path: str, cluster_path: str) -> None:
    """Refuse a target that the cluster cannot hold, or that leaves an expert out."""
    import numpy as np

    from prism_plan.check.report import against_cluster

    for problem in against_cluster(after, cluster)[:1]:
        raise InputError(problem, source=path, remedy=f"plan it for {cluster_path}")
    missing = np.flatnonzero(~after.local.any(axis=0))
    if missing.size:
        more = f" and {missing.size - 1:,} more are" if missing.size > 1 else " is"
        raise InputError(
            f"{after.model.pair_text(int(missing[0]))}{more} held nowhere",
            source=path,
            expected="every expert on some GPU",
        )


def _capacity(after: Placement, cluster: Cluster) -> tuple[tuple[int, ...], ...]:
    """Slots where the cluster gives them, else what the placement states."""
    if not after.model.equal_expert_bytes:
        return after.gpu_capacity
    return tuple(
        tuple(
            stated if gpu.slots is None else gpu.slots
            for stated, gpu in zip(capacities, server.gpus, strict=True)
        )
        for capacities, server in zip(after.gpu_capacity, cluster.servers, strict=True)
    )


def _print(
    plan: MigrationPlan, loading_s: list[float], title: str, *, form: str, err: bool
) -> None:
    from prism_plan.cli.console import print_line
    from prism_plan.cli.tables import counts, durations, print_table, sizes, words

    server_of_gpu = plan.server_of_gpu
    sums: list[dict[str, Any]] = [
        {"loads": 0, "drops": 0, "temporary": 0, "bytes": 0} for _ in plan.servers
    ]
    for step in plan.steps:
        row = sums[server_of_gpu[step.gpu]]
        row[step.kind + "s"] += 1
        if step.kind == "load":
            row["temporary"] += step.temporary
            row["bytes"] += plan.bytes_of(step)
    slowest = [
        max(loading_s[g] for g in range(len(loading_s)) if server_of_gpu[g] == n)
        for n in range(len(plan.servers))
    ]

    def of(key: str, total: int) -> list[int]:
        return [*(row[key] for row in sums), total]

    columns = [
        words("server", "server", [*plan.servers, "total"]),
        counts("loads", "loads", of("loads", plan.loads)),
        counts("drops", "drops", of("drops", plan.drops)),
        counts("temporary", "temporary", of("temporary", plan.extra_loads), rank=2),
        sizes("to load", "bytes_to_load", of("bytes", plan.moved_bytes), rank=1),
        durations("slowest GPU", "slowest_gpu_s", [*slowest, max(loading_s)]),
    ]
    print_table(columns, title=title, form=form, err=err)
    if plan.load_s is not None:
        together, in_turn = durations("", "", [plan.load_s.makespan_s, plan.load_s.sum_s]).cells
        print_line(
            f"loading takes {together} with all GPUs side by side, {in_turn} one after the other",
            err=err or form != "table",
        )
