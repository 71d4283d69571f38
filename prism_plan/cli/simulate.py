"""``prism-plan simulate``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.command_options import TableOptions, options_as
from prism_plan.cli.review_options import ReviewOptions, review_options
from prism_plan.cli.tables import format_option
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.evaluate.simulation import EngineName, SimulationOptions
    from prism_plan.placement import Placement
    from prism_plan.simulate.requests import Requests
    from prism_plan.simulate.routing_policies import Route
    from prism_plan.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(ReviewOptions, TableOptions):
    """The options and arguments of ``prism-plan simulate``."""

    placements: tuple[str, ...]
    trace: str
    cluster: str
    solvers: str | None
    holdout: float | None
    offload: bool
    requests_per_server: int | None
    duration_s: float | None
    burst: int
    arrivals: str | None
    schedule: str | None
    decode_tokens: int
    prompt_tokens: int
    route: Route
    calibration: str | None
    min_replicas: int
    seed: int
    engine: EngineName
    time_limit_s: float | None
    grid: tuple[str, ...]
    jobs: int
    per_request: str | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs == 0 or self.jobs < -1:
            raise InputError(f"{self.jobs}", parameter="jobs", expected="-1, or 1 or more")
        for name in ("duration_s", "arrivals"):
            if getattr(self, name) is not None:
                self.refuse(
                    "requests_per_server",
                    found=f"{self.requests_per_server} with ``{name}``, which says how many "
                    "there are",
                    remedy="leave one of the two out",
                )
        if self.grid:
            alone = ("placements", "arrivals", "schedule", "duration_s", "per_request")
            self.refuse(
                *alone, "time_limit_s", "as_json", "table_format", found="not in a sweep (``grid``)"
            )
        else:
            self.refuse("jobs", found="has no effect without ``grid``")
            if self.solvers is None:
                self.refuse("min_replicas", found="has no effect without ``solvers``")
        if self.per_request is not None:
            self._require_table()

    def _require_table(self) -> None:
        """The table of requests is a Parquet file, and another one than the report."""
        assert self.per_request is not None
        if os.path.splitext(self.per_request)[1].lower() != ".parquet":
            raise InputError(
                f"{self.per_request!r:.60}",
                parameter="per_request",
                expected="the name of a .parquet file",
            )
        if self.output is not None and os.path.realpath(self.output) == os.path.realpath(
            self.per_request
        ):
            raise InputError(
                "the report and the table would be one file",
                parameter="per_request",
                place=self.per_request,
                remedy="give the name of another file",
            )

    def simulation_options(self) -> SimulationOptions:
        """How to simulate.

        Raises
        ------
        InputError
            A value is out of range, or the calibration cannot be read.
        """
        from prism_plan.io.calibration import read_calibration

        return self.simulation(
            route=self.route,
            calibration=None if self.calibration is None else read_calibration(self.calibration),
            engine=self.engine,
            time_limit_s=self.time_limit_s,
            seed=self.seed,
        )


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
    "--requests",
    "requests_per_server",
    type=int,
    metavar="N",
    help="Of each server with users; 100, in sweeps 20.",
)
@click.option(
    "--duration",
    "duration_s",
    type=float,
    metavar="S",
    help="Instead: all arrivals before this time.",
)
@click.option("--burst", default=1, show_default=True, metavar="B", help="Arrive at once.")
@click.option("--arrivals", metavar="F.jsonl", help="Fixed times instead of Poisson arrivals.")
@click.option(
    "--phases", "schedule", metavar="F.toml", help="Tasks that change after so many requests."
)
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
@click.option(
    "--time-limit",
    "time_limit_s",
    type=float,
    metavar="S",
    help="Then a partial report is written.",
)
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
@options_as(SimulateOptions)
def command(args: SimulateOptions) -> int:
    """Simulate requests on a cluster under each placement: latency, traffic, migrations.

    All placements see the same arrivals and the same requests. Ctrl-C writes what is done, marked
    partial.
    """
    if args.grid:
        from prism_plan.cli.sweep import run_sweep

        return run_sweep(args)
    return _simulate(args)


def _simulate(args: SimulateOptions) -> int:
    from prism_plan.cli.console import load_trace, log_info, print_json, progress, write_output
    from prism_plan.cli.inputs import (
        error_source,
        load_cluster,
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
    trace = load_trace(args.trace)
    log_planned_on_scored_requests(existing, trace, args.holdout)
    planned, scored = trace, trace
    if args.holdout is not None:
        planned, scored = trace.split(args.holdout, args.seed)
    with error_source(args.cluster):
        requests = _sample_requests(scored, cluster, args)
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
    for text in values["notes"]:
        log_info(text)
    if result.partial:
        done = sum(run["finished"] for run in values["runs"])
        log_info(
            f"ended early: {len(values['runs'])} of {len(placements)} placements, {done:,} requests"
            + (f"; {args.output} is marked partial" if args.output not in (None, "-") else "")
        )
    return 130 if result.interrupted else 0


def log_assumed_simulation_figures(
    path: str, cluster: Cluster, options: SimulationOptions, offload: Sequence[bool]
) -> None:
    """Name the figures that a simulation uses and neither cluster nor calibration gives.

    ``offload`` says of each placement whether it is the baseline, which uses no links.
    """
    from prism_plan.cli.inputs import log_assumed_figures

    calibration = options.calibration
    log_assumed_figures(
        path,
        cluster if calibration is None else calibration.with_links(cluster),
        compute=calibration is None,
        loads=any(offload) or options.migrate != "never",
        links=not all(offload),
    )


def _utf8_path(path: str) -> str:
    """A path as UTF-8 can hold it."""
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
    from prism_plan.evaluate.simulation import offload_placement
    from prism_plan.instance import Instance
    from prism_plan.placement import OFFLOAD
    from prism_plan.solvers import Options, solve

    if not names and not args.offload:
        return []
    instance = Instance.build(trace, cluster, min_replicas=args.min_replicas)
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
        text_column,
    )
    from prism_plan.text import quantity

    runs = values["runs"]

    def of(key: str, part: str | None = None) -> list[Any]:
        return [run[key] if part is None else run[key][part] for run in runs]

    names = [run["placement"] + (" (partial)" if run["partial"] else "") for run in runs]
    sent = [run["bytes_sent"] / run["requests"] if run["requests"] else None for run in runs]
    columns = [
        text_column("placement", "placement", names),
        duration_column("mean", "latency_mean_s", of("latency_s", "mean")),
        duration_column("p95", "latency_p95_s", of("latency_s", "p95"), rank=1),
        duration_column("p99", "latency_p99_s", of("latency_s", "p99"), rank=4),
        duration_column("ttft", "ttft_mean_s", of("ttft_s", "mean"), rank=2),
        duration_column("tpot", "tpot_mean_s", of("tpot_s", "mean"), rank=2),
        share_column("remote", "remote_share", of("remote_share"), digits=1, rank=5),
        share_column("waiting", "waiting_share", of("waiting_share"), digits=1, rank=6),
        number_column("dest.", "destinations", of("destinations"), rank=7),
        size_column("sent", "bytes_sent_per_request", sent, rank=8),
        share_column("busiest", "busiest", of("busiest"), digits=0, rank=3),
    ]
    number = runs[0]["requests"] if runs else 0
    place = f"{values['trace']['name']} on {values['cluster']['name']}"
    title = f"{place}: {quantity(number, 'request')}; 'sent' is of one request"
    print_table(columns, title=title, form=form, err=err)
    if values["migrate"] != "never":
        _print_migrations(values, form=form, err=err)


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
