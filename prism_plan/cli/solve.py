"""``prism-plan solve``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from prism_plan.cli.tables import format_option

if TYPE_CHECKING:
    from prism_plan.instance import Instance
    from prism_plan.placement import Placement

BACKENDS = click.Choice(["highs", "cbc"])


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
@click.option("--time-limit", type=float, metavar="S", help="Seconds for ilp; none by default.")
@click.option("--backend", type=BACKENDS, default="highs", show_default=True, help="Of ilp.")
@click.option(
    "--from",
    "near",
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
def command(
    trace: str,
    cluster: str,
    solver: str,
    min_replicas: int,
    time_limit: float | None,
    backend: str,
    near: str | None,
    load_price: float,
    seed: int,
    table_format: str,
    as_json: bool,
    output: str,
) -> None:
    """Plan which GPU holds which expert, for the tasks and servers of a cluster file."""
    from prism_plan.cli.console import deliver, load_trace, note
    from prism_plan.cli.inputs import blaming, load_cluster, trace_file, writable
    from prism_plan.instance import Instance
    from prism_plan.io.placement import dump_placement, read_placement
    from prism_plan.memory import unreserved
    from prism_plan.model import require_same_model
    from prism_plan.solvers.contract import Options
    from prism_plan.solvers.registry import get_solver
    from prism_plan.solvers.run import solve

    with blaming("--solver"):
        get_solver(solver)
    writable(output, trace, cluster, near)
    options = Options(
        seed=seed,
        time_limit_s=time_limit,
        backend="cbc" if backend == "cbc" else "highs",
        near=None if near is None else read_placement(near),
        load_price=load_price,
    )
    parsed, cluster_input = load_cluster(cluster)
    loaded = load_trace(trace)
    with blaming("--min-replicas" if min_replicas < 1 else cluster):
        instance = Instance.build(loaded, parsed, min_replicas=min_replicas)
    if options.near is not None:
        require_same_model(options.near.model, loaded.model, source=near, other=trace)
    inputs = {"trace": trace_file(loaded), "cluster": cluster_input}
    with blaming(cluster):
        placement = solve(instance, solver, options, inputs=inputs)
    deliver(output, dump_placement(placement))
    if reserved := unreserved(parsed, loaded.model):
        note(f"{cluster}: {reserved}")
    if placement.plan.termination == "time_limit":
        note("the time limit ended the search; the gap to the bound is in the file")
    _summary(placement, instance, output, as_json, table_format)


def _summary(
    placement: Placement, instance: Instance, output: str, as_json: bool, form: str
) -> None:
    from prism_plan.cli.console import note, percent, print_json
    from prism_plan.cli.tables import counts, print_table, shares, sizes, words
    from prism_plan.objective import remote_score

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
        "file": output,
        "solver": plan.solver,
        "termination": plan.termination,
        "remote_share": plan.remote_share,
        "bound": plan.bound,
        "runtime_s": plan.runtime_s,
        **dict(plan.extra),
        "servers": rows,
    }
    to_stderr = output == "-"
    if as_json and not to_stderr:
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
    print_table(columns, title=title, form=form, err=to_stderr)
    if "loads" in plan.extra:
        note(f"{plan.extra['loads']:,} experts are newly loaded (prism-plan diff tells which)")
