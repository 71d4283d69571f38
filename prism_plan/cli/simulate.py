"""``prism-plan simulate``."""

from __future__ import annotations

import click

from prism_plan.cli.migration_options import review_options
from prism_plan.cli.options_dataclass import options_as
from prism_plan.cli.simulate_options import SimulateOptions
from prism_plan.cli.tables import format_option


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
    help="Of each server with users, which count alike whatever their arrival rates; 100, in "
    "sweeps 20.",
)
@click.option(
    "--duration",
    "duration_s",
    type=float,
    metavar="S",
    help="Instead: all arrivals before this time.",
)
@click.option(
    "--burst", default=1, show_default=True, metavar="B", help="Requests that arrive together."
)
@click.option("--arrivals", metavar="F.jsonl", help="Fixed times instead of Poisson arrivals.")
@click.option(
    "--phases", "schedule", metavar="F.toml", help="Tasks that change after so many requests."
)
@click.option(
    "--decode-tokens",
    default=32,
    show_default=True,
    metavar="N",
    help="Last tokens of a request that are decode steps, if the trace has no phases.",
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
    help="Routing policy for experts that several servers hold.",
)
@click.option("--calibration", metavar="F.json", help="Measured times instead of the cluster's.")
@review_options
@click.option(
    "--lose",
    multiple=True,
    metavar="NAME@SECONDS[:RETURN]",
    help="This server stops at a time and comes back at another one; may be repeated.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default=10.0,
    show_default=True,
    metavar="S",
    help="After a loss until the other servers know.",
)
@click.option(
    "--request-timeout",
    "request_timeout_s",
    default=60.0,
    show_default=True,
    metavar="S",
    help="For which a request waits for an expert that no server holds.",
)
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
@click.option(
    "--backend",
    type=click.Choice(["processes", "dask", "ray"]),
    default="processes",
    show_default=True,
    help="What runs a sweep; dask and ray are extras of these names.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Of a running Dask or Ray cluster, which shares the trace's file system.",
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
    from prism_plan.cli.simulate_run import run_simulations

    return run_simulations(args)
