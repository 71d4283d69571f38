"""``prism-plan simulate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.review_options import review_options
from prism_plan.cli.tables import format_option

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.placement import Placement
    from prism_plan.simulate.requests import Requests
    from prism_plan.simulation import SimulationOptions
    from prism_plan.trace import Trace


@click.command("simulate")
@click.argument("placements", nargs=-1, metavar="[P.json]...")
@click.option("--trace", required=True, metavar="T.parquet", help="Requests are sampled from it.")
@click.option("--cluster", required=True, metavar="C.toml", help="Servers, GPUs, links, arrivals.")
@click.option("--solvers", metavar="A,B,C", help="Plan with these too, and simulate the plans.")
@click.option(
    "--holdout",
    type=float,
    metavar="SHARE",
    help="Simulate with this share of each task's requests; --solvers plan on the others.",
)
@click.option("--offload", is_flag=True, help="Also the baseline without remote calls.")
@click.option(
    "--requests", type=int, metavar="N", help="Of each server with users; 100, in sweeps 20."
)
@click.option("--duration", type=float, metavar="S", help="Instead: all arrivals before this time.")
@click.option("--burst", default=1, show_default=True, metavar="B", help="Arrive at once.")
@click.option("--arrivals", metavar="F.jsonl", help="Fixed times instead of Poisson arrivals.")
@click.option("--phases", metavar="F.toml", help="Tasks that change after so many requests.")
@click.option(
    "--decode-tokens",
    default=32,
    show_default=True,
    metavar="N",
    help="Last tokens of a request that are decode steps, if the trace does not tell.",
)
@click.option(
    "--prompt-tokens",
    default=128,
    show_default=True,
    metavar="N",
    help="Of requests drawn from a counts-only trace.",
)
@click.option(
    "--route",
    type=click.Choice(["cover", "nearest", "spread"]),
    default="cover",
    show_default=True,
    help="Where a call goes that several servers could serve.",
)
@click.option("--calibration", metavar="F.json", help="Measured times instead of the cluster's.")
@review_options
@click.option("--min-replicas", default=1, show_default=True, metavar="R", help="Of --solvers.")
@click.option("--seed", default=0, show_default=True, help="Of requests, split and solvers.")
@click.option(
    "--engine",
    type=click.Choice(["compiled", "reference"]),
    default="compiled",
    show_default=True,
    help="The reference is plain Python: equal numbers, much slower.",
)
@click.option("--time-limit", type=float, metavar="S", help="Then a partial report is written.")
@click.option(
    "--sweep",
    "grid",
    multiple=True,
    metavar="KEY=V,V...",
    help="A run for each value of gpus, bandwidth_mbps, arrival_interval_s, memory_fraction, "
    "solver, seed; may be repeated. -o names a table, .parquet or .csv.",
)
@click.option(
    "--jobs",
    default=-1,
    show_default=True,
    metavar="N",
    help="Processes; -1: one a core.",
)
@click.option("--per-request", metavar="R.parquet", help="Also write one row a request.")
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-o", "--output", metavar="S.json", help="Write the report as JSON.")
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Simulate requests on a cluster under each placement: latency, traffic, migrations.

    All placements see the same arrivals and the same requests. Ctrl-C writes what is done, marked
    partial.
    """
    _require_sense(given)
    if given["grid"]:
        from prism_plan.cli.sweep import run_sweep

        ctx.exit(run_sweep(given))
    ctx.exit(_simulate(given))


def _require_sense(given: dict[str, Any]) -> None:
    """What is wrong whatever the files say."""
    from prism_plan.errors import InputError

    if given["jobs"] == 0 or given["jobs"] < -1:
        raise InputError(f"{given['jobs']}", source="--jobs", expected="-1, or 1 or more")
    if given["min_replicas"] < 1:
        raise InputError(
            f"{given['min_replicas']}", source="--min-replicas", expected="a whole number from 1"
        )
    for key in ("duration", "arrivals"):
        if given["requests"] is not None and given[key] is not None:
            raise InputError(
                f"{given['requests']} with --{key}, which says how many there are",
                source="--requests",
                remedy="leave one of the two out",
            )


def simulation_options(given: dict[str, Any]) -> SimulationOptions:
    """How to simulate, from the options of the command."""
    import math

    from prism_plan.errors import InputError
    from prism_plan.io.calibration import read_calibration
    from prism_plan.simulation import SimulationOptions

    half_life_s = given["half_life"]
    if given["statistics"] == "cumulative":
        if half_life_s is not None:
            raise InputError(
                f"{half_life_s:g} with cumulative statistics",
                source="--half-life",
                remedy="leave one of the two out",
            )
        half_life_s = math.inf
    elif half_life_s is not None and not math.isfinite(half_life_s):
        raise InputError(f"{half_life_s}", source="--half-life", expected="seconds above 0")
    calibration = given["calibration"]
    return SimulationOptions(
        route=given["route"],
        migrate=given["migrate"],
        migrate_every_s=given["migrate_every"],
        half_life_s=half_life_s,
        horizon_s=given["horizon"],
        migration_cost=given["migration_cost"],
        migrate_solver=given["migrate_solver"],
        calibration=None if calibration is None else read_calibration(calibration),
        engine=given["engine"],
        time_limit_s=given["time_limit"],
        seed=given["seed"],
    )


def solver_names(text: str | None) -> list[str]:
    """The solvers of a list with commas."""
    from prism_plan.cli.inputs import blaming
    from prism_plan.solvers.registry import get_solver

    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    with blaming("--solvers"):
        for name in names:
            get_solver(name)
    return names


def _simulate(given: dict[str, Any]) -> int:
    from prism_plan.cli.console import deliver, load_trace, note, print_json, progress
    from prism_plan.cli.inputs import (
        blaming,
        load_cluster,
        note_seen_requests,
        trace_file,
        writable,
    )
    from prism_plan.errors import InputError
    from prism_plan.io.placement import read_placement
    from prism_plan.placement import OFFLOAD
    from prism_plan.request_table import write_request_table
    from prism_plan.simulation import dump_report, simulate_placements

    paths = given["placements"]
    files = (given["trace"], given["cluster"], given["arrivals"], given["phases"],
             given["calibration"], *paths)  # fmt: skip
    names = solver_names(given["solvers"])
    if not paths and not names and not given["offload"]:
        raise InputError(
            "nothing to simulate",
            source="simulate",
            expected="placement files, --solvers or --offload",
        )
    writable(given["output"], *files)
    if given["per_request"] == "-":
        raise InputError("-", source="--per-request", expected="the name of a file")
    writable(given["per_request"], *files)
    _require_two_files(given["output"], given["per_request"])
    options = simulation_options(given)
    cluster, cluster_input = load_cluster(given["cluster"])
    existing = [(_as_text(path), read_placement(path)) for path in paths]
    trace = load_trace(given["trace"])
    note_seen_requests(existing, trace, given["holdout"])
    planned, scored = trace, trace
    if given["holdout"] is not None:
        planned, scored = trace.split(given["holdout"], given["seed"])
    with blaming(given["cluster"]):
        requests = _requests(scored, cluster, given)
        placements = existing + _planned(planned, cluster, names, given)
    with (
        progress(len(placements) * len(requests), "requests") as update,
        blaming(given["cluster"]),
    ):
        order = {name: at for at, (name, _) in enumerate(placements)}
        result = simulate_placements(
            placements,
            requests,
            scored,
            cluster,
            options,
            inputs={"trace": trace_file(trace), "cluster": cluster_input},
            progress=lambda name, done, total: update(name, order[name] * total + done),
        )
    values = result.to_json()
    if given["holdout"] is not None:
        values["trace"]["holdout"] = given["holdout"]
    output = given["output"]
    if given["per_request"] is not None and result.runs:
        write_request_table(given["per_request"], result)
    if output is not None:
        deliver(output, dump_report(values))
    if given["as_json"] and output != "-":
        print_json(values)
    else:
        _print(values, form=given["table_format"], err=output == "-")
    offload = [placement.plan.solver == OFFLOAD for _, placement in placements]
    note_simulated(given["cluster"], cluster, options, offload)
    for text in values["notes"]:
        note(text)
    if result.partial:
        done = sum(run["finished"] for run in values["runs"])
        note(
            f"ended early: {len(values['runs'])} of {len(placements)} placements, {done:,} requests"
            + (f"; {output} is marked partial" if output not in (None, "-") else "")
        )
    return 130 if result.interrupted else 0


def note_simulated(
    path: str, cluster: Cluster, options: SimulationOptions, offload: Sequence[bool]
) -> None:
    """Name the figures that a simulation uses and neither cluster nor calibration gives.

    ``offload`` says of each placement whether it is the baseline, which uses no links.
    """
    from prism_plan.cli.inputs import note_assumed

    calibration = options.calibration
    note_assumed(
        path,
        cluster if calibration is None else calibration.with_links(cluster),
        compute=calibration is None,
        loads=any(offload) or options.migrate != "never",
        links=not all(offload),
    )


def _as_text(path: str) -> str:
    """A path as UTF-8 can hold it."""
    import os

    return os.fsencode(path).decode("utf-8", "replace")


def _require_two_files(output: str | None, per_request: str | None) -> None:
    import os

    from prism_plan.errors import InputError

    if output is None or per_request is None:
        return
    if os.path.realpath(output) == os.path.realpath(per_request):
        raise InputError(
            "the report and the table would be one file",
            source="--per-request",
            place=per_request,
            remedy="give the name of another file",
        )


def _requests(trace: Trace, cluster: Cluster, given: dict[str, Any]) -> Requests:
    from prism_plan.io.arrivals import read_arrivals
    from prism_plan.io.phases import read_schedule
    from prism_plan.simulate.workload import sample_requests

    arrivals, phases = given["arrivals"], given["phases"]
    return sample_requests(
        trace,
        cluster,
        requests_per_server=100 if given["requests"] is None else given["requests"],
        duration_s=given["duration"],
        burst=given["burst"],
        schedule=None if phases is None else read_schedule(phases),
        arrivals=None if arrivals is None else read_arrivals(arrivals),
        decode_tokens=given["decode_tokens"],
        prompt_tokens=given["prompt_tokens"],
        seed=given["seed"],
    )


def _planned(
    trace: Trace, cluster: Cluster, names: list[str], given: dict[str, Any]
) -> list[tuple[str, Placement]]:
    from prism_plan.instance import Instance
    from prism_plan.placement import OFFLOAD
    from prism_plan.simulation import offload_placement
    from prism_plan.solvers import Options, solve

    if not names and not given["offload"]:
        return []
    instance = Instance.build(trace, cluster, min_replicas=given["min_replicas"])
    options = Options(seed=given["seed"])
    found = [(name, solve(instance, name, options)) for name in names]
    if given["offload"]:
        found.append((OFFLOAD, offload_placement(instance)))
    return found


def _print(values: dict[str, Any], *, form: str, err: bool) -> None:
    from prism_plan.cli.tables import durations, numbers, print_table, shares, sizes, words

    runs = values["runs"]

    def of(key: str, part: str | None = None) -> list[Any]:
        return [run[key] if part is None else run[key][part] for run in runs]

    names = [run["placement"] + (" (partial)" if run["partial"] else "") for run in runs]
    sent = [run["bytes_sent"] / run["requests"] if run["requests"] else None for run in runs]
    columns = [
        words("placement", "placement", names),
        durations("mean", "latency_mean_s", of("latency_s", "mean")),
        durations("p95", "latency_p95_s", of("latency_s", "p95"), rank=1),
        durations("p99", "latency_p99_s", of("latency_s", "p99"), rank=4),
        durations("ttft", "ttft_mean_s", of("ttft_s", "mean"), rank=2),
        durations("tpot", "tpot_mean_s", of("tpot_s", "mean"), rank=2),
        shares("remote", "remote_share", of("remote_share"), digits=1, rank=5),
        shares("waiting", "waiting_share", of("waiting_share"), digits=1, rank=6),
        numbers("dest.", "destinations", of("destinations"), rank=7),
        sizes("sent", "bytes_sent_per_request", sent, rank=8),
        shares("busiest", "busiest", of("busiest"), digits=0, rank=3),
    ]
    number = runs[0]["requests"] if runs else 0
    place = f"{values['trace']['name']} on {values['cluster']['name']}"
    title = f"{place}: {number:,} requests; 'sent' is of one request"
    print_table(columns, title=title, form=form, err=err)
    if values["migrate"] != "never":
        _print_migrations(values, form=form, err=err)


def _print_migrations(values: dict[str, Any], *, form: str, err: bool) -> None:
    from prism_plan.cli.tables import counts, durations, print_table, sizes, words

    runs = values["runs"]
    moves = [[r for r in run["migrations"] if r["decision"] == "move"] for run in runs]

    def total(key: str) -> list[Any]:
        return [sum(move[key] for move in of_run) for of_run in moves]

    columns = [
        words("placement", "placement", [run["placement"] for run in runs]),
        counts("reviews", "reviews", [len(run["migrations"]) for run in runs]),
        counts("moves", "moves", [len(of_run) for of_run in moves]),
        counts("experts", "moved_experts", total("moved_experts"), rank=1),
        sizes("bytes", "moved_bytes", total("moved_bytes"), rank=2),
        durations("expected saving", "saving_s", total("saving_s"), rank=1),
        durations("cost", "cost_s", total("cost_s"), rank=1),
    ]
    title = f"Migrations by policy {values['migrate']}"
    if form == "csv":  # a second table begins after a blank line
        click.echo(err=err)
    print_table(columns, title=title, form=form, err=err)
