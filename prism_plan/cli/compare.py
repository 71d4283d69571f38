"""``prism-plan compare``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from prism_plan.cli.options_dataclass import TableOptions, options_as
from prism_plan.cli.solve import BACKENDS
from prism_plan.cli.tables import format_option

if TYPE_CHECKING:
    from prism_plan.cli.tables import Column
    from prism_plan.evaluate.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class CompareOptions(TableOptions):
    """The options and arguments of ``prism-plan compare``."""

    trace: str
    placements: tuple[str, ...]
    cluster: str
    solvers: str | None
    holdout: float | None
    min_replicas: int
    requests_per_server: int
    time_limit_s: float | None
    backend: Literal["highs", "cbc"]
    seed: int
    output: str | None


@click.command("compare")
@click.argument("trace", metavar="T.parquet")
@click.argument("placements", nargs=-1, metavar="[P.json]...")
@click.option("--cluster", required=True, metavar="C.toml", help="Servers, GPUs and links.")
@click.option("--solvers", metavar="A,B,C", help="Solvers to compare; '' for none.")
@click.option(
    "--holdout",
    type=float,
    metavar="SHARE",
    help="Score on this share of each task's requests, plan on the others.",
)
@click.option("--min-replicas", default=1, show_default=True, metavar="R")
@click.option(
    "--requests",
    "requests_per_server",
    type=int,
    default=20,
    show_default=True,
    metavar="N",
    help="Simulated requests of each server, the same for all, for latencies; 0: none. Homes count "
    "alike, whatever their arrival rates.",
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
    "--seed",
    default=0,
    show_default=True,
    help="Of the split, of solvers that draw or simulate, and of the simulated requests.",
)
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.option("-o", "--output", metavar="R.json", help="Also write the comparison as JSON.")
@options_as(CompareOptions)
def command(args: CompareOptions) -> None:
    """Score solvers, and placements that exist, side by side on the same requests.

    Remote share, waiting share and destinations are recomputed from each placement; the worst
    server stands beside the sum over all. Latencies are those of short simulations on requests that
    are the same for all placements.
    """
    import json

    from prism_plan.cli.console import load_trace, log_info, print_json, progress, write_output
    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
        log_assumed_figures,
        log_planned_on_scored_requests,
        parse_solver_names,
        require_writable_output,
    )
    from prism_plan.errors import InputError
    from prism_plan.evaluate.comparison import DEFAULT_SOLVERS, compare
    from prism_plan.input_limits import require_integer
    from prism_plan.io.placement import read_placement
    from prism_plan.simulate.poisson_arrivals import MAX_REQUESTS
    from prism_plan.solvers.contract import Options

    names = parse_solver_names(args.solvers)
    if names == [] and not args.placements:
        raise InputError("no solver and no placement", parameter="solvers", expected="one at least")
    if names is not None and "ilp" not in names:
        args.refuse("backend", found="has no effect without solver ilp")
    require_integer(args.requests_per_server, 0, MAX_REQUESTS, "requests_per_server")
    require_writable_output(args.output, args.trace, args.cluster, *args.placements)
    options = Options(seed=args.seed, time_limit_s=args.time_limit_s, backend=args.backend)
    cluster, _ = load_cluster(args.cluster)
    existing = [(path, read_placement(path)) for path in args.placements]
    trace = load_trace(args.trace, keep_tokens=True)
    log_planned_on_scored_requests(existing, trace, args.holdout)
    total = len(DEFAULT_SOLVERS if names is None else names) + len(existing)
    done = -1

    with progress(total, "placements") as update:

        def report_progress(name: str) -> None:
            nonlocal done
            done += 1
            update(name, done)

        with error_source(args.cluster):
            result = compare(
                trace,
                cluster,
                solvers=names,
                placements=existing,
                holdout=args.holdout,
                min_replicas=args.min_replicas,
                options=options,
                requests_per_server=args.requests_per_server,
                progress=report_progress,
            )
    if result.simulated_requests is not None:
        log_assumed_figures(args.cluster, cluster, compute=True, links=True)
    if result.few_requests:
        log_info(f"{args.trace}: {result.few_requests}")
    values = result.to_json()
    if args.output is not None:
        write_output(args.output, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    if args.as_json and args.output != "-":
        print_json(values)
    else:
        _print(result, values, args)


def _print(result: Comparison, values: dict[str, Any], args: CompareOptions) -> None:
    from prism_plan.cli.console import log_info
    from prism_plan.cli.tables import (
        duration_column,
        number_column,
        print_table,
        share_column,
        speed_column,
        text_column,
    )

    rows = [row for row in values["rows"] if row["remote_share"] is not None]

    def of(key: str) -> list[Any]:
        return [row[key] for row in rows]

    names = [
        row["name"] + (f" ({row['violations']} violations)" if row["violations"] else "")
        for row in rows
    ]
    simulated = result.simulated_requests is not None
    columns = [text_column("placement", "placement", names)]
    if simulated:
        columns += [
            duration_column("mean", "latency_mean_s", of("latency_mean_s")),
            duration_column("ttft", "ttft_mean_s", of("ttft_mean_s"), rank=3),
            speed_column("tok/s", "user_tokens_per_s", of("user_tokens_per_s"), rank=3),
            _above_best("latency_above_best", of("latency_mean_s")),
            text_column("95 % interval", "interval", [_interval_text(row) for row in rows], rank=2),
            duration_column("p95", "latency_p95_s", of("latency_p95_s"), rank=2),
        ]
    columns.append(share_column("remote", "remote_share", of("remote_share")))
    if result.holdout is not None:
        columns.append(share_column("as planned", "planned_share", of("planned_share"), rank=3))
    if not simulated:
        columns.append(_above_best("above_best", of("remote_share")))
    columns += [
        share_column("worst", "worst_server_share", of("worst_server_share"), rank=4),
        text_column("worst server", "worst_server", of("worst_server"), rank=5),
        share_column("waiting", "waiting_share", of("waiting_share"), rank=1),
        share_column("worst waiting", "worst_waiting_share", of("worst_waiting_share"), rank=6),
        number_column("dest.", "destinations", of("destinations"), rank=1),
        duration_column("solved in", "runtime_s", of("runtime_s"), rank=7),
    ]
    title = f"{result.trace} on {result.cluster}"
    if result.holdout is not None:
        title += (
            f": planned on {result.planned_requests} requests, scored on {result.scored_requests}"
        )
    print_table(columns, title=title, form=args.table_format, err=args.output == "-")
    for row in values["rows"]:
        if row["note"]:
            log_info(f"{row['name']}: {row['note']}")
        if (row["destinations_method"] or "exact") != "exact":
            log_info(f"{row['name']}: destinations are {row['destinations_method']}")
    if result.kind == "counts":
        log_info("counts-only trace: waiting share and destinations need one token by token")
    if simulated and result.kind == "counts":
        log_info("latencies are those of drawn prompts, whose tokens call experts independently")
    if not simulated and args.requests_per_server:
        log_info("no latencies: a server with tasks has no arrival_interval_s")


def _interval_text(row: dict[str, Any]) -> str:
    """By how much a row is slower than the best one, as far as the simulations can tell."""
    low, high = row["latency_above_best_low"], row["latency_above_best_high"]
    if low is None:
        return ""
    if low <= 0 <= high:
        return "no significant difference"
    return f"{low:+.1%} to {high:+.1%}"


def _above_best(key: str, values: list[float | None]) -> Column:
    """By how much each value is above the least one; empty where that is 0."""
    from prism_plan.cli.tables import excess_column

    best = min((value for value in values if value is not None), default=0.0)
    if best == 0:
        above = [0.0 if value == 0 else None for value in values]
    else:
        above = [None if value is None else value / best - 1 for value in values]
    return excess_column("vs best", key, above, rank=2)
