"""``prism-plan migrate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.options_dataclass import TableOptions, options_as
from prism_plan.cli.tables import format_option
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.instance import Instance
    from prism_plan.migration.plan import MigrationPlan
    from prism_plan.model_spec import ModelSpec
    from prism_plan.placement import Placement


@dataclass(frozen=True, kw_only=True)
class MigrateOptions(TableOptions):
    """The options and arguments of ``prism-plan migrate``."""

    a: str
    b: str
    cluster: str
    model: str | None
    output: str | None


@click.command("migrate")
@click.argument("a", metavar="A.json")
@click.argument("b", metavar="B.json")
@click.option("--cluster", required=True, metavar="C.toml", help="Servers, GPUs, load speeds.")
@click.option(
    "--model",
    metavar="MODEL",
    help="Sizes of the KV cache, where layers execute elsewhere afterwards; as in profile.",
)
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("-o", "--output", metavar="M.json", help="Plan to write; - for stdout.")
@options_as(MigrateOptions)
def command(args: MigrateOptions) -> None:
    """Plan the order of loads and drops that leads from placement A to placement B.

    Every expert that A holds stays held by some GPU at every moment; where B was planned with
    ``--min-replicas`` R, by R servers, or as many as hold it in A or B if that is less. The plan
    says which experts have fewer for a while because no slot can be had. Every GPU stays within its
    capacity: the slots of the cluster file where it gives them, else what B states. Where layers
    execute elsewhere afterwards, that is what the KV caches of requests on A and on B leave. Exit
    code 3 where there is no such order.
    """
    from prism_plan.cli.console import log_info, write_output
    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        log_assumed_figures,
        require_writable_output,
    )
    from prism_plan.io.migration import dump_migration
    from prism_plan.io.placement import read_placement_and_identity
    from prism_plan.migration.cost import gpu_load_gbs
    from prism_plan.migration.endpoints import in_server_order
    from prism_plan.migration.replica_dips import dips_text
    from prism_plan.migration.staged import staged_migration
    from prism_plan.printable_text import quantity

    names = (args.a, args.b)
    require_writable_output(args.output, *names, args.cluster)
    cluster, _ = load_cluster(args.cluster)
    before, before_file = read_placement_and_identity(args.a)
    after, after_file = read_placement_and_identity(args.b)
    _require_target(after, cluster, args.b, args.cluster)
    before = in_server_order(before, after.servers)
    with error_source(args.cluster):
        limits, sizes = _limits(before, after, cluster, args)
    with error_source(args.b):
        plan = staged_migration(
            before, after, before.execution_table[None], limits, sizes, names=names
        )
    load_gbs = gpu_load_gbs(cluster)
    plan = plan.replace(
        inputs={"from": before_file, "to": after_file},
        load_s=plan.load_seconds(load_gbs),
    )
    data = dump_migration(plan)
    if args.output is not None:
        write_output(args.output, data)
    log_assumed_figures(args.cluster, cluster, loads=True)
    new = int((after.local.any(axis=0) & ~before.local.any(axis=0)).sum())
    if new:
        log_info(f"{quantity(new, 'expert')} held nowhere in {args.a}: missing until loaded")
    if plan.extra_loads:
        log_info(
            f"{quantity(plan.extra_loads, 'load')} of temporary copies that lead past full GPUs, "
            f"{quantity(plan.extra_bytes, 'byte')}"
        )
    if plan.dips:
        log_info(dips_text(plan))
    elif plan.min_replicas > 1:
        log_info(
            f"every expert stays on {plan.min_replicas} servers at every moment (on fewer where "
            f"{args.a} or {args.b} has fewer)"
        )
    if args.as_json and args.output != "-":
        write_output("-", data)
    else:
        _print_plan(
            plan,
            plan.loading_s(load_gbs),
            f"{args.a} → {args.b}",
            form=args.table_format,
            err=args.output == "-",
        )
        _print_change(plan, before, form=args.table_format, err=args.output == "-")


def _require_target(after: Placement, cluster: Cluster, path: str, cluster_path: str) -> None:
    """Refuse a target that the cluster cannot hold, or that leaves an expert out."""
    import numpy as np

    from prism_plan.check.report import cluster_mismatches

    for problem in cluster_mismatches(after, cluster)[:1]:
        raise InputError(problem, source=path, remedy=f"plan it for {cluster_path}")
    missing = np.flatnonzero(~after.local.any(axis=0))
    if missing.size:
        more = f" and {missing.size - 1:,} more are" if missing.size > 1 else " is"
        raise InputError(
            f"{after.model.pair_text(int(missing[0]))}{more} held nowhere",
            source=path,
            expected="every expert on some GPU",
        )


def _limits(
    before: Placement, after: Placement, cluster: Cluster, args: MigrateOptions
) -> tuple[Instance, ModelSpec | None]:
    """The rules and capacities that the move keeps, and the model's sizes where they are needed."""
    import numpy as np

    from prism_plan.cli.inputs import read_model_spec
    from prism_plan.instance import Instance
    from prism_plan.model_spec import require_same_model
    from prism_plan.placement_rules import rule_triples

    tables_differ = (
        before.servers == after.servers
        and before.model.num_layers == after.model.num_layers
        and bool((before.execution_table != after.execution_table).any())
    )
    moving = [s for s in cluster.servers if s.kv_tokens and tables_differ]
    if moving and any(s.gpus[s.dense_gpu].slots is None for s in cluster.servers):
        if args.model is None:
            raise InputError(
                f"{args.a} and {args.b} differ in where layers execute, and {args.cluster} has "
                f"kv_tokens of server {moving[0].name!r}",
                parameter="model",
                expected="the model, for the sizes of KV caches that move",
            )
        sizes = read_model_spec(args.model)
        require_same_model(after.model, sizes, source=args.b, other=args.model)
        return Instance.of_cluster(cluster, sizes, reserve_kv=False), sizes
    model = after.model
    limits = Instance(
        model=model,
        servers=after.servers,
        activations=np.zeros((after.num_servers, model.num_layers, model.num_experts)),
        gpu_capacity=_capacity(after, cluster),
        forbidden=tuple(rule_triples(cluster, model, "forbid")),
    )
    return limits, None


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


def _print_plan(
    plan: MigrationPlan, loading_s: list[float], title: str, *, form: str, err: bool
) -> None:
    from prism_plan.cli.console import print_line
    from prism_plan.cli.tables import (
        count_column,
        duration_column,
        print_table,
        size_column,
        text_column,
    )

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
        text_column("server", "server", [*plan.servers, "total"]),
        count_column("loads", "loads", of("loads", plan.loads)),
        count_column("drops", "drops", of("drops", plan.drops)),
        count_column("temporary", "temporary", of("temporary", plan.extra_loads), rank=2),
        size_column("to load", "bytes_to_load", of("bytes", plan.moved_bytes), rank=1),
        duration_column("slowest GPU", "slowest_gpu_s", [*slowest, max(loading_s)]),
    ]
    print_table(columns, title=title, form=form, err=err)
    if plan.load_s is not None:
        together, in_turn = duration_column(
            "", "", [plan.load_s.makespan_s, plan.load_s.sum_s]
        ).cells
        print_line(
            f"loading takes {together} with all GPUs side by side, {in_turn} one after the other",
            err=err or form != "table",
        )


def _print_change(plan: MigrationPlan, before: Placement, *, form: str, err: bool) -> None:
    """Print for whom layers execute elsewhere afterwards, when that begins, and what waits."""
    from prism_plan.cli.console import print_line
    from prism_plan.printable_text import listed, quantity

    change = plan.change
    if change is None:
        return
    homes = [
        name
        for name, old, new in zip(
            plan.servers, before.execution_table, change.execution, strict=True
        )
        if (old != new).any()
    ]
    begins = "at once"
    if change.begins_after:
        begins = f"when the first {quantity(change.begins_after, 'step')} are complete"
    line = f"where layers execute changes for requests of {listed(homes)}: for new ones {begins}"
    waiting = len(plan.steps) - change.waits_from
    if waiting:
        line += (
            f"; the last {quantity(waiting, 'step')} wait until all requests that began before "
            "have ended"
        )
    print_line(line, err=err or form != "table")
