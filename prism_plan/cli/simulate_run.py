"""What ``prism-plan simulate`` does without ``--sweep``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.cli.simulate_options import SimulateOptions
    from prism_plan.cluster import Cluster
    from prism_plan.placement import Placement
    from prism_plan.simulate.requests import Requests
    from prism_plan.trace import Trace


def run_simulations(args: SimulateOptions) -> int:
    """Simulate every placement, print the results and write the report; gives the exit code."""
    from prism_plan.cli.console import load_trace, log_info, print_json, progress, write_output
    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        log_assumed_simulation_figures,
        log_few_requests,
        log_planned_on_scored_requests,
        parse_solver_names,
        require_writable_output,
        trace_identity,
    )
    from prism_plan.evaluate.request_table import write_request_table
    from prism_plan.evaluate.simulation import dump_report, simulate_placements
    from prism_plan.io.placement import read_placement
    from prism_plan.placement import OFFLOAD

    files = (args.trace, args.cluster, args.arrivals, args.schedule, args.calibration,
             *args.placements)  # fmt: skip
    names = parse_solver_names(args.solvers) or []
    if not args.placements and not names and not args.offload:
        raise InputError(
            "nothing to simulate",
            source="simulate",
            expected="placement files, ``solvers`` or ``offload``",
        )
    require_writable_output(args.output, *files)
    require_writable_output(args.per_request, *files)
    options = args.simulation_options()
    cluster, cluster_input = load_cluster(args.cluster)
    existing = [(_utf8_path(path), read_placement(path)) for path in args.placements]
    trace = load_trace(args.trace, keep_tokens=True)
    log_planned_on_scored_requests(existing, trace, args.holdout)
    planned, scored = trace, trace
    if args.holdout is not None:
        planned, scored = trace.split(args.holdout, args.seed)
    with error_source(args.cluster):
        requests = _sample_requests(scored, cluster, args)
    args.refuse_unused(trace)  # after values out of range
    with error_source(args.cluster):
        placements = existing + _plan_placements(planned, cluster, names, args)
    with (
        progress(len(placements) * len(requests), "requests") as update,
        error_source(args.cluster),
    ):
        order = {name: at for at, (name, _) in enumerate(placements)}
        result = simulate_placements(
            placements,
            requests,
            scored,
            cluster,
            options,
            planned_on=planned,
            inputs={"trace": trace_identity(trace), "cluster": cluster_input},
            progress=lambda name, done, total: update(name, order[name] * total + done),
        )
    values = result.to_json()
    if args.holdout is not None:
        values["trace"]["holdout"] = args.holdout
    if args.per_request is not None and result.runs:
        write_request_table(args.per_request, result)
    if args.output is not None:
        write_output(args.output, dump_report(values))
    if args.as_json and args.output != "-":
        print_json(values)
    else:
        _print_runs(values, form=args.table_format, err=args.output == "-")
    offload = [placement.plan.solver == OFFLOAD for _, placement in placements]
    log_assumed_simulation_figures(args.cluster, cluster, options, offload)
    if args.arrivals is None and args.schedule is None:  # else the tasks are not the cluster's
        log_few_requests(scored, cluster, args.trace)
    for text in values["notes"]:
        log_info(text)
    if result.partial:
        done = sum(run["finished"] for run in values["runs"])
        log_info(
            f"ended early: {len(values['runs'])} of {len(placements)} placements, {done:,} requests"
            + (f"; {args.output} is marked partial" if args.output not in (None, "-") else "")
        )
    return 130 if result.interrupted else 0


def _utf8_path(path: str) -> str:
    """A path as text that UTF-8 can encode."""
    return os.fsencode(path).decode("utf-8", "replace")


def _sample_requests(trace: Trace, cluster: Cluster, args: SimulateOptions) -> Requests:
    from prism_plan.io.arrivals import read_arrivals
    from prism_plan.io.phases import read_schedule
    from prism_plan.simulate.sampling import sample_requests

    return sample_requests(
        trace,
        cluster,
        requests_per_server=100 if args.requests_per_server is None else args.requests_per_server,
        duration_s=args.duration_s,
        burst=args.burst,
        schedule=None if args.schedule is None else read_schedule(args.schedule),
        arrivals=None if args.arrivals is None else read_arrivals(args.arrivals),
        decode_tokens=args.decode_tokens,
        prompt_tokens=args.prompt_tokens,
        seed=args.seed,
    )


def _plan_placements(
    trace: Trace, cluster: Cluster, names: list[str], args: SimulateOptions
) -> list[tuple[str, Placement]]:
    from prism_plan.evaluate.offload_baseline import offload_placement
    from prism_plan.instance import Instance
    from prism_plan.placement import OFFLOAD
    from prism_plan.solvers import Options, plans_tables, solve

    if not names and not args.offload:
        return []
    at_home = args.offload or not all(map(plans_tables, names))
    instance = Instance.build(trace, cluster, min_replicas=args.min_replicas, reserve_kv=at_home)
    options = Options(seed=args.seed)
    found = [(name, solve(instance, name, options)) for name in names]
    if args.offload:
        found.append((OFFLOAD, offload_placement(instance)))
    return found


def _print_runs(values: dict[str, Any], *, form: str, err: bool) -> None:
    from prism_plan.cli.tables import (
        duration_column,
        number_column,
        print_table,
        share_column,
        size_column,
        speed_column,
        text_column,
    )
    from prism_plan.printable_text import quantity

    runs = values["runs"]

    def of(key: str, part: str | None = None) -> list[Any]:
        return [run[key] if part is None else run[key][part] for run in runs]

    names = [run["placement"] + (" (partial)" if run["partial"] else "") for run in runs]
    # of a run that ended early nothing is known of the requests that it did not come to
    sent = [run["bytes_sent"] / run["finished"] if run["finished"] else None for run in runs]
    columns = [
        text_column("placement", "placement", names),
        duration_column("mean", "latency_mean_s", of("latency_s", "mean")),
        duration_column("ttft", "ttft_mean_s", of("ttft_s", "mean"), rank=1),
        speed_column("tok/s", "user_tokens_per_s", of("user_tokens_per_s"), rank=1),
        duration_column("p95", "latency_p95_s", of("latency_s", "p95"), rank=2),
        duration_column("p99", "latency_p99_s", of("latency_s", "p99"), rank=4),
        # says the same as tok/s, in seconds
        duration_column("tpot", "tpot_mean_s", of("tpot_s", "mean"), rank=9),
        share_column("remote", "remote_share", of("remote_share"), digits=1, rank=5),
        share_column("waiting", "waiting_share", of("waiting_share"), digits=1, rank=6),
        number_column("dest.", "destinations", of("destinations"), rank=7),
        size_column("sent", "bytes_sent_per_request", sent, rank=8),
        share_column("busiest", "busiest", of("busiest"), digits=0, rank=3),
    ]
    number = runs[0]["requests"] if runs else 0
    place = f"{values['trace']['name']} on {values['cluster']['name']}"
    finished = " that is finished" if any(run["partial"] for run in runs) else ""
    title = f"{place}: {quantity(number, 'request')}; 'sent' is per request{finished}"
    print_table(columns, title=title, form=form, err=err)
    if values["migrate"] != "never":
        _print_migrations(values, form=form, err=err)
    if "losses" in values and runs:
        _print_losses(values, form=form, err=err)


def _print_migrations(values: dict[str, Any], *, form: str, err: bool) -> None:
    from prism_plan.cli.tables import (
        count_column,
        duration_column,
        print_table,
        size_column,
        text_column,
    )

    runs = values["runs"]
    moves = [[r for r in run["migrations"] if r["decision"] == "move"] for run in runs]

    def total(key: str) -> list[Any]:
        return [sum(move[key] for move in of_run) for of_run in moves]

    columns = [
        text_column("placement", "placement", [run["placement"] for run in runs]),
        count_column("reviews", "reviews", [len(run["migrations"]) for run in runs]),
        count_column("moves", "moves", [len(of_run) for of_run in moves]),
        count_column("experts", "moved_experts", total("moved_experts"), rank=1),
        size_column("bytes", "moved_bytes", total("moved_bytes"), rank=2),
        duration_column("expected saving", "saving_s", total("saving_s"), rank=1),
        duration_column("cost", "cost_s", total("cost_s"), rank=1),
    ]
    title = f"Migrations by policy {values['migrate']}"
    if form == "csv":  # a second table begins after a blank line
        click.echo(err=err)
    print_table(columns, title=title, form=form, err=err)


def _print_losses(values: dict[str, Any], *, form: str, err: bool) -> None:
    from prism_plan.cli.tables import count_column, duration_column, print_table, text_column
    from prism_plan.simulate.loss_report import WHEN

    rows = [
        (run["placement"], when, run["losses"][when]) for run in values["runs"] for when in WHEN
    ]
    parts = [part for _, _, part in rows]
    columns = [
        text_column("placement", "placement", [name for name, _, _ in rows]),
        text_column("loss", "when", [when for _, when, _ in rows]),
        count_column("requests", "requests", [part["requests"] for part in parts]),
        duration_column("mean", "latency_mean_s", [part["latency_s"]["mean"] for part in parts]),
        duration_column("p99", "latency_p99_s", [part["latency_s"]["p99"] for part in parts]),
        duration_column("ttft", "ttft_mean_s", [part["ttft_s"]["mean"] for part in parts], rank=1),
        duration_column(
            "ttft p99", "ttft_p99_s", [part["ttft_s"]["p99"] for part in parts], rank=2
        ),
    ]
    if form == "csv":  # each further table begins after a blank line
        click.echo(err=err)
    title = "Requests before, during and after losses"
    print_table(columns, title=title, form=form, err=err)
    losses = [(run["placement"], run["losses"]) for run in values["runs"]]
    counts = (
        ("lost", "lost_requests", 0),
        ("failed", "failed_requests", 0),
        ("restarted", "restarted_requests", 1),
        ("calls again", "repeated_calls", 2),
        ("not served", "not_served", 3),
    )
    columns = [
        text_column("placement", "placement", [name for name, _ in losses]),
        *(
            count_column(title, key, [of_run[key] for _, of_run in losses], rank=rank)
            for title, key, rank in counts
        ),
        duration_column(
            "repaired at",
            "repaired_at_s",
            [_repaired_s(of_run["servers"]) for _, of_run in losses],
            rank=1,
        ),
    ]
    if form == "csv":
        click.echo(err=err)
    print_table(columns, title="Lost servers", form=form, err=err)


def _repaired_s(servers: list[dict[str, Any]]) -> float | None:
    """When the last migration was complete that a loss needs, if all of them were."""
    ends = [
        server["repaired_s" if server["return_s"] is None else "restored_s"] for server in servers
    ]
    return None if None in ends else max(ends)
