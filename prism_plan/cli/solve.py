"""``prism-plan solve``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from prism_plan.cli.options_dataclass import TableOptions, options_as
from prism_plan.cli.tables import format_option

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.evaluate.user_figures import UserFigures
    from prism_plan.instance import Instance
    from prism_plan.placement import Placement
    from prism_plan.trace import Trace

#: What gains less is no faster in a short simulation.
FASTER = 0.02
BACKENDS = click.Choice(["highs", "cbc"])


@dataclass(frozen=True, kw_only=True)
class SolveOptions(TableOptions):
    """The options and arguments of ``prism-plan solve``."""

    trace: str
    cluster: str
    solver: str
    execution: Literal["home", "paths"]
    min_replicas: int
    time_limit_s: float | None
    backend: Literal["highs", "cbc"]
    reference: str | None
    load_price: float
    whole_layers: bool
    heads: tuple[str, ...]
    seed: int
    output: str


@click.command("solve")
@click.argument("trace", metavar="T.parquet")
@click.option("--cluster", required=True, metavar="C.toml", help="Servers, GPUs and links.")
@click.option(
    "--solver",
    default="latency",
    show_default=True,
    metavar="NAME",
    help="latency and pipeline plan experts and where layers execute; uniform, redundance, "
    "smartmoe, eplb, layer-partition, prism, ilp and exact place experts, for layers that execute "
    "at home.",
)
@click.option(
    "--execution",
    type=click.Choice(["home", "paths"]),
    default="home",
    show_default=True,
    help="Where layers execute: at the home server of each request, or along the fastest path over "
    "all servers (as NAME+paths in lists of solvers). Not for latency and pipeline.",
)
@click.option(
    "--min-replicas",
    default=1,
    show_default=True,
    metavar="R",
    help="Every expert on at least R servers (ilp, exact, latency).",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=float,
    metavar="S",
    help="Seconds for ilp, none by default; for latency, which by default stops by work.",
)
@click.option("--backend", type=BACKENDS, default="highs", show_default=True, help="Of ilp.")
@click.option(
    "--from",
    "reference",
    metavar="OLD.json",
    help="Plan near this placement (ilp, exact, latency): of equally good plans the one that loads "
    "least.",
)
@click.option(
    "--load-price",
    default=0.0,
    show_default=True,
    metavar="P",
    help="With --from: load an expert only if it saves more than P remote calls per second "
    "(or per unit of weight). For latency: seconds of a mean request that a GiB to load must save.",
)
@click.option(
    "--whole-layers",
    is_flag=True,
    help="Only plans in which servers hold and execute whole layers (latency, pipeline).",
)
@click.option(
    "--heads",
    multiple=True,
    metavar="NAME",
    help="Plan for the requests of these home servers alone; again for each (latency, pipeline).",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Of solvers that draw at random, and of the requests that a table is planned with.",
)
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option(
    "-o", "--output", required=True, metavar="P.json", help="Placement to write; - for stdout."
)
@options_as(SolveOptions)
def command(args: SolveOptions) -> None:
    """Plan which GPU holds which expert, for the tasks and servers of a cluster file."""
    from prism_plan.check.memory_report import missing_kv_reservation
    from prism_plan.cli.console import load_trace, log_info, write_output
    from prism_plan.cli.inputs import (
        error_parameter,
        error_source,
        load_cluster,
        log_assumed_figures,
        log_few_requests,
        require_writable_output,
        trace_identity,
    )
    from prism_plan.instance import Instance
    from prism_plan.io.placement import dump_placement, read_placement
    from prism_plan.model_spec import require_same_model
    from prism_plan.solvers.contract import Options
    from prism_plan.solvers.registry import PATHS, TABLE_SOLVERS, get_solver, plans_tables
    from prism_plan.solvers.run import solve

    name = args.solver
    if name in TABLE_SOLVERS:
        args.refuse("execution", found=f"solver {name!r} plans by itself where layers execute")
    if name.endswith(PATHS) and args.execution == "home":
        args.refuse("execution", found=f"solver {name!r} plans where layers execute")
    if args.execution == "paths":
        name = name.removesuffix(PATHS) + PATHS
    with error_parameter("solver"):
        get_solver(name)
    if name not in TABLE_SOLVERS:
        found = f"has no effect on solver {args.solver!r}, only on {' and '.join(TABLE_SOLVERS)}"
        args.refuse("whole_layers", "heads", found=found)
    if name.removesuffix(PATHS) not in ("ilp", "latency"):
        found = f"has no effect on solver {args.solver!r}, only on ilp and latency"
        args.refuse("time_limit_s", found=found)
    if name.removesuffix(PATHS) != "ilp":
        args.refuse("backend", found=f"has no effect on solver {args.solver!r}, only on ilp")
    require_writable_output(args.output, args.trace, args.cluster, args.reference)
    options = Options(
        seed=args.seed,
        time_limit_s=args.time_limit_s,
        backend=args.backend,
        reference=None if args.reference is None else read_placement(args.reference),
        load_price=args.load_price,
        whole_layers=args.whole_layers,
    )
    cluster, cluster_input = load_cluster(args.cluster)
    if args.heads:
        cluster = cluster.with_users_of(args.heads)
    trace = load_trace(args.trace)
    if options.reference is not None:
        require_same_model(
            options.reference.model, trace.model, source=args.reference, other=args.trace
        )
    inputs = {"trace": trace_identity(trace), "cluster": cluster_input}
    with error_source(args.cluster):
        instance = Instance.build(
            trace, cluster, min_replicas=args.min_replicas, reserve_kv=not plans_tables(name)
        )
        placement = solve(instance, name, options, inputs=inputs)
    if args.heads:
        heads = [server.name for server in cluster.servers if server.has_users]
        plan = dataclasses.replace(placement.plan, extra={**placement.plan.extra, "heads": heads})
        placement = placement.replace(plan=plan)
    write_output(args.output, dump_placement(placement))
    # of plans of experts nothing depends on how fast GPUs and links are
    if plans_tables(name):
        from prism_plan.latency.idle_time import planning_assumptions

        log_assumed_figures(args.cluster, cluster, compute=True, links=True)
        for text in planning_assumptions(cluster, trace):
            log_info(f"{args.cluster}: planned for {text}")
    if reserved := missing_kv_reservation(cluster, trace.model, placement.execution):
        log_info(f"{args.cluster}: {reserved}")
    figures = None
    if plans_tables(name):
        log_few_requests(trace, cluster, args.trace)
        figures = _user_figures(placement, cluster, trace, args.seed)
    if because := placement.plan.extra.get("at_home_because"):
        log_info(f"every layer executes at home: {because}")
    if placement.plan.termination == "time_limit":
        log_info("the time limit ended the search; the gap to the bound is in the file")
    _print_summary(placement, instance, args, figures)
    if figures is not None:
        _log_faster(figures, cluster, trace, args.seed)


def _user_figures(
    placement: Placement, cluster: Cluster, trace: Trace, seed: int
) -> UserFigures | None:
    """What the plan means for a user, where arrival rates are known."""
    from prism_plan.evaluate.user_figures import user_figures
    from prism_plan.token_rates import request_rates

    if request_rates(cluster) is None:
        return None
    return user_figures([("plan", placement)], cluster, trace, seed)["plan"]


def _log_faster(plan: UserFigures, cluster: Cluster, trace: Trace, seed: int) -> None:
    """Say where servers would be faster without calling each other."""
    from prism_plan.cli.console import log_info
    from prism_plan.evaluate.user_figures import without_plan

    for name, figures in without_plan(cluster, trace, seed).items():
        if figures.latency_s < (1 - FASTER) * plan.latency_s:
            log_info(
                f"faster without the plan: {name}, with experts from host memory (offload), "
                f"{figures.latency_s:.3g} s a request where the plan takes {plan.latency_s:.3g} s"
            )


def _print_summary(
    placement: Placement, instance: Instance, args: SolveOptions, figures: UserFigures | None
) -> None:
    from prism_plan.cli.console import log_info, percent, print_json
    from prism_plan.cli.plan_texts import latency_text, plan_texts
    from prism_plan.cli.tables import (
        count_column,
        print_table,
        share_column,
        size_column,
        text_column,
    )
    from prism_plan.execution_table import layers_by_server
    from prism_plan.objective import remote_score
    from prism_plan.printable_text import quantity

    plan = placement.plan
    local = placement.local
    score = remote_score(instance.activations, placement.local_to_execution)
    executed = layers_by_server(
        placement.execution_table, placement.model.moe_layers, score.calls > 0
    )
    rows = []
    for n, name in enumerate(placement.servers):
        slots = sum(placement.gpu_capacity[n])
        held = int(local[n].sum())
        rows.append(
            {
                "server": name,
                "capacity": slots,
                "experts": held,
                "remote_share": score.by_server[n],
                "calls": float(score.calls[n]),
                **({} if placement.execution is None else {"executes": executed[n]}),
            }
        )
    values = {
        "file": args.output,
        "solver": plan.solver,
        "termination": plan.termination,
        "remote_share": plan.remote_share,
        "bound": plan.bound,
        "runtime_s": plan.runtime_s,
        **dict(plan.extra),
        **({} if figures is None else {"user": dataclasses.asdict(figures)}),
        "servers": rows,
    }
    to_stderr = args.output == "-"
    if args.as_json and not to_stderr:
        print_json(values)
        return
    capacity = [sum(of_server) for of_server in placement.gpu_capacity]
    columns = [
        text_column("server", "server", placement.servers),
        count_column("slots", "slots", capacity)
        if instance.in_slots
        else size_column("capacity", "capacity_bytes", capacity),
        count_column("experts", "experts", [int(local[n].sum()) for n in range(len(capacity))]),
        share_column("remote share", "remote_share", score.by_server),
    ]
    if placement.execution is not None:
        columns.append(text_column("executes layers", "executes", executed))
    bound = "no bound" if plan.bound is None else f"bound {percent(plan.bound, 4)}"
    if "priced_bound" in plan.extra:
        bound = "in calls and loads together"
    title_latency = latency_text(placement, figures, instance.cluster)
    title = (
        f"{plan.solver}: {title_latency}{percent(plan.remote_share, 4)} of calls are remote "
        f"({plan.termination}, {bound}, {plan.runtime_s:.3f} s)"
    )
    print_table(columns, title=title, form=args.table_format, err=to_stderr)
    for text in plan_texts(placement, instance.cluster):
        log_info(text)
    if "loads" in plan.extra:
        log_info(f"{quantity(plan.extra['loads'], 'expert')} to load (prism-plan diff lists them)")
