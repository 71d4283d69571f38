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
    from prism_plan.evaluate.simulation_options import EngineName, SimulationOptions
    from prism_plan.placement import Placement
    from prism_plan.simulate.requests import Requests
    from prism_plan.simulate.routing_policies import Route
    from prism_plan.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(ReviewOptions, TableOptions):
    """What ``prism-plan simulate`` is given."""

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
def command(given: SimulateOptions) -> int:
    """Simulate requests on a cluster under each placement: latency, traffic, migrations.

    All placements see the same arrivals and the same requests. Ctrl-C writes what is done, marked
    partial.
    """
    if given.grid:
        from prism_plan.cli.sweep import run_sweep

        return run_sweep(given)
    return _simulate(given)


def _simulate(given: SimulateOptions) -> int:
    from prism_plan.cli.console import deliver, load_trace, note, print_json, progress
    from prism_plan.cli.inputs import (
        blaming,
        load_cluster,
        note_seen_requests,
        solver_names,
        trace_file,
        writable,
    )
    from prism_plan.evaluate.request_table import write_request_table
    from prism_plan.evaluate.simulation import dump_report, simulate_placements
    from prism_plan.io.placement import read_placement
    from prism_plan.placement import OFFLOAD

    files = (given.trace, given.cluster, given.arrivals, given.schedule, given.calibration,
             *given.placements)  # fmt: skip
    names = solver_names(given.solvers) or []
    if not given.placements and not names and not given.offload:
        raise InputError(
            "nothing to simulate",
            source="simulate",
            expected="placement files, ``solvers`` or ``offload``",
        )
    writable(given.output, *files)
    writable(given.per_request, *files)
    options = given.simulation_options()
    cluster, cluster_input = load_cluster(given.cluster)
    existing = [(_as_text(path), read_placement(path)) for path in given.placements]
    trace = load_trace(given.trace)
    note_seen_requests(existing, trace, given.holdout)
    planned, scored = trace, trace
    if given.holdout is not None:
        planned, scored = trace.split(given.holdout, given.seed)
    with blaming(given.cluster):
        requests = _requests(scored, cluster, given)
        placements = existing + _planned(planned, cluster, names, given)
    with (
        progress(len(placements) * len(requests), "requests") as update,
        blaming(given.cluster),
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
    if given.holdout is not None:
        values["trace"]["holdout"] = given.holdout
    if given.per_request is not None and result.runs:
        write_request_table(given.per_request, result)
    if given.output is not None:
        deliver(given.output, dump_report(values))
    if given.as_json and given.output != "-":
        print_json(values)
    else:
        _print(values, form=given.table_format, err=given.output == "-")
    offload = [placement.plan.solver == OFFLOAD for _, placement in placements]
    note_simulated(given.cluster, cluster, options, offload)
    for text in values["notes"]:
        note(text)
    if result.partial:
        done = sum(run["finished"] for run in values["runs"])
        note(
            f"ended early: {len(values['runs'])} of {len(placements)} placements, {done:,} requests"
            + (f"; {given.output} is marked partial" if given.output not in (None, "-") else "")
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
    return os.fsencode(path).decode("utf-8", "replace")


def _requests(trace: Trace, cluster: Cluster, given: SimulateOptions) -> Requests:
    from prism_plan.io.arrivals import read_arrivals
    from prism_plan.io.phases import read_schedule
    from prism_plan.simulate.sampling import sample_requests

    return sample_requests(
        trace,
        cluster,
        requests_per_server=100 if given.requests_per_server is None else given.requests_per_server,
        duration_s=given.duration_s,
        burst=given.burst,
        schedule=None if given.schedule is None else read_schedule(given.schedule),
        arrivals=None if given.arrivals is None else read_arrivals(given.arrivals),
        decode_tokens=given.decode_tokens,
        prompt_tokens=given.prompt_tokens,
        seed=given.seed,
    )


def _planned(
    trace: Trace, cluster: Cluster, names: list[str], given: SimulateOptions
) -> list[tuple[str, Placement]]:
    from prism_plan.evaluate.offload_baseline import offload_placement
    from prism_plan.instance import Instance
    from prism_plan.placement import OFFLOAD
    from prism_plan.solvers import Options, solve

    if not names and not given.offload:
        return []
    instance = Instance.build(trace, cluster, min_replicas=given.min_replicas)
    options = Options(seed=given.seed)
    found = [(name, solve(instance, name, options)) for name in names]
    if given.offload:
        found.append((OFFLOAD, offload_placement(instance)))
    return found


def _print(values: dict[str, Any], *, form: str, err: bool) -> None:
    from prism_plan.cli.tables import durations, numbers, print_table, shares, sizes, words
    from prism_plan.text import quantity

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
    title = f"{place}: {quantity(number, 'request')}; 'sent' is of one request"
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
