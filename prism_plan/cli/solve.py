"""``prism-plan solve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from prism_plan.cli.command_options import TableOptions, options_as
from prism_plan.cli.tables import format_option

if TYPE_CHECKING:
    from prism_plan.instance import Instance
    from prism_plan.placement import Placement

BACKENDS = click.Choice(["highs", "cbc"])


@dataclass(frozen=True, kw_only=True)
class SolveOptions(TableOptions):
    """What ``prism-plan solve`` is given."""

    trace: str
    cluster: str
    solver: str
    min_replicas: int
    time_limit_s: float | None
    backend: Literal["highs", "cbc"]
    reference: str | None
    load_price: float
    seed: int
    output: str


@click.command("solve")
@click.argument("trace", metavar="T.parquet")
@click.option("--cluster", required=True, metavar="C.toml", help="Servers, GPUs and links.")
@click.option(
    "--solver",
    default="exact",
    show_default=True,
    metavar="NAME",
    help="uniform, redundance, smartmoe, eplb, layer-partition, prism, ilp or exact.",
)
@click.option(
    "--min-replicas",
    default=1,
    show_default=True,
    metavar="R",
    help="Every expert on at least R servers (ilp, exact).",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=float,
    metavar="S",
    help="Seconds for ilp; none by default.",
)
@click.option("--backend", type=BACKENDS, default="highs", show_default=True, help="Of ilp.")
@click.option(
    "--from",
    "reference",
    metavar="OLD.json",
    help="Plan near this placement (ilp, exact): of equally good plans the one that loads least.",
)
@click.option(
    "--load-price",
    default=0.0,
    show_default=True,
    metavar="P",
    help="With --from: load an expert only if it saves more than P remote calls per second "
    "(or per unit of weight).",
)
@click.option("--seed", default=0, show_default=True, help="Of solvers that draw at random.")
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option(
    "-o", "--output", required=True, metavar="P.json", help="Placement to write; - for stdout."
)
@options_as(SolveOptions)
def command(given: SolveOptions) -> None:
    """Plan which GPU holds which expert, for the tasks and servers of a cluster file."""
    from prism_plan.check.gpu_memory import unreserved
    from prism_plan.cli.console import deliver, load_trace, note
    from prism_plan.cli.inputs import about, blaming, load_cluster, trace_file, writable
    from prism_plan.instance import Instance
    from prism_plan.io.placement import dump_placement, read_placement
    from prism_plan.model import require_same_model
    from prism_plan.solvers.contract import Options
    from prism_plan.solvers.registry import get_solver
    from prism_plan.solvers.run import solve

    with about("solver"):
        get_solver(given.solver)
    if given.solver != "ilp":
        given.refuse("backend", found=f"has no effect on solver {given.solver!r}, only on ilp")
    writable(given.output, given.trace, given.cluster, given.reference)
    options = Options(
        seed=given.seed,
        time_limit_s=given.time_limit_s,
        backend=given.backend,
        reference=None if given.reference is None else read_placement(given.reference),
        load_price=given.load_price,
    )
    cluster, cluster_input = load_cluster(given.cluster)
    trace = load_trace(given.trace)
    if options.reference is not None:
        require_same_model(
            options.reference.model, trace.model, source=given.reference, other=given.trace
        )
    inputs = {"trace": trace_file(trace), "cluster": cluster_input}
    with blaming(given.cluster):
        instance = Instance.build(trace, cluster, min_replicas=given.min_replicas)
        placement = solve(instance, given.solver, options, inputs=inputs)
    deliver(given.output, dump_placement(placement))
    if reserved := unreserved(cluster, trace.model):
        note(f"{given.cluster}: {reserved}")
    if placement.plan.termination == "time_limit":
        note("the time limit ended the search; the gap to the bound is in the file")
    _summary(placement, instance, given)


def _summary(placement: Placement, instance: Instance, given: SolveOptions) -> None:
    from prism_plan.cli.console import note, percent, print_json
    from prism_plan.cli.tables import counts, print_table, shares, sizes, words
    from prism_plan.objective import remote_score
    from prism_plan.text import quantity

    plan = placement.plan
    local = placement.local
    score = remote_score(instance.activations, local)
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
            }
        )
    values = {
        "file": given.output,
        "solver": plan.solver,
        "termination": plan.termination,
        "remote_share": plan.remote_share,
        "bound": plan.bound,
        "runtime_s": plan.runtime_s,
        **dict(plan.extra),
        "servers": rows,
    }
    to_stderr = given.output == "-"
    if given.as_json and not to_stderr:
        print_json(values)
        return
    capacity = [sum(of_server) for of_server in placement.gpu_capacity]
    columns = [
        words("server", "server", placement.servers),
        counts("slots", "slots", capacity)
        if instance.in_slots
        else sizes("capacity", "capacity_bytes", capacity),
        counts("experts", "experts", [int(local[n].sum()) for n in range(len(capacity))]),
        shares("remote share", "remote_share", score.by_server),
    ]
    bound = "no bound" if plan.bound is None else f"bound {percent(plan.bound, 4)}"
    if "priced_bound" in plan.extra:
        bound = "in calls and loads together"
    title = (
        f"{plan.solver}: {percent(plan.remote_share, 4)} of calls are remote "
        f"({plan.termination}, {bound}, {plan.runtime_s:.3f} s)"
    )
    print_table(columns, title=title, form=given.table_format, err=to_stderr)
    if "loads" in plan.extra:
        note(
            f"{quantity(plan.extra['loads'], 'expert')} to load anew (prism-plan diff tells which)"
        )
