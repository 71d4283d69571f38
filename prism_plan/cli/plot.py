"""``prism-plan plot``."""

from __future__ import annotations

import click

OUTPUT = click.option(
    "-o", "--output", required=True, metavar="FILE.png", help="Figure to write: .png, .svg or .pdf."
)


@click.group("plot")
def command() -> None:
    """Draw traces, placements, comparisons and simulations."""


@command.command("heatmap")
@click.argument("trace", metavar="T.parquet")
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@OUTPUT
def heatmap(trace: str, tasks: tuple[str, ...], output: str) -> None:
    """Activation frequency of every expert, one panel a task (the paper's Fig. 2)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    plotting.check_extension(output)
    plotting.save(plotting.heatmap(load_trace(trace), tasks or None), output)


@command.command("entropy")
@click.argument("trace", metavar="T.parquet")
@OUTPUT
def entropy(trace: str, output: str) -> None:
    """Entropy of expert usage per layer, one line a task (the paper's Fig. 3)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    plotting.check_extension(output)
    plotting.save(plotting.entropy(load_trace(trace)), output)


@command.command("placement")
@click.argument("placement", metavar="P.json")
@OUTPUT
def placement_map(placement: str, output: str) -> None:
    """Which server and GPU holds which expert."""
    from prism_plan import plotting
    from prism_plan.placement_file import read_placement

    plotting.check_extension(output)
    plotting.save(plotting.placement_map(read_placement(placement)), output)


@command.command("comparison")
@click.argument("comparison", metavar="R.json")
@OUTPUT
def comparison(comparison: str, output: str) -> None:
    """Bars of a comparison written by ``prism-plan compare -o R.json``."""
    from prism_plan import plotting
    from prism_plan.comparison_file import read_comparison

    plotting.check_extension(output)
    values = read_comparison(comparison)
    title = f"{values['trace']} on {values['cluster']}"
    plotting.save(plotting.comparison(values["rows"], title), output)


def _draw_simulation(path: str, output: str, figure: str) -> None:
    from prism_plan import plotting
    from prism_plan.errors import InputError
    from prism_plan.simulation_file import read_simulation

    plotting.check_extension(output)
    report = read_simulation(path)
    try:
        drawn = getattr(plotting, figure)(report)
    except InputError as error:
        raise InputError(
            error.found, source=path, expected=error.expected, remedy=error.remedy
        ) from error
    plotting.save(drawn, output)


@command.command("cdf")
@click.argument("report", metavar="S.json")
@OUTPUT
def cdf(report: str, output: str) -> None:
    """How many requests took at most how long, one line a run of a simulation."""
    _draw_simulation(report, output, "simulation_cdf")


@command.command("timeline")
@click.argument("report", metavar="S.json")
@OUTPUT
def timeline(report: str, output: str) -> None:
    """Latency by time of arrival, one line a run, with migrations marked."""
    _draw_simulation(report, output, "simulation_timeline")


@command.command("layer-latency")
@click.argument("report", metavar="S.json")
@OUTPUT
def layer_latency(report: str, output: str) -> None:
    """Latency of a layer by the share of its experts that are remote, one line a run."""
    _draw_simulation(report, output, "layer_latency")


@command.command("latency")
@click.argument("report", metavar="S.json")
@OUTPUT
def latency(report: str, output: str) -> None:
    """Bars of mean, p95 and p99 latency, remote share and waiting share of each run."""
    _draw_simulation(report, output, "simulation_bars")


@command.command("sweep")
@click.argument("table", metavar="R.parquet")
@click.option("--x", "x", metavar="KEY", help="Condition along x, such as bandwidth_mbps.")
@click.option("--panels", metavar="KEY", help="Condition that has a panel for each value.")
@click.option("--solver", "solvers", multiple=True, help="Only this solver; may be repeated.")
@OUTPUT
def sweep(
    table: str, x: str | None, panels: str | None, solvers: tuple[str, ...], output: str
) -> None:
    """Mean latency over a sweep by bandwidth or another condition, one line a solver."""
    from pathlib import Path

    from prism_plan import plotting
    from prism_plan.errors import InputError
    from prism_plan.sweep_file import read_sweep

    plotting.check_extension(output)
    rows = read_sweep(table)
    try:
        figure = plotting.sweep_figure(
            rows, x=x, panels=panels, solvers=solvers or None, name=Path(table).name
        )
    except InputError as error:
        options = {"x": "--x", "panels": "--panels", "x and panels": "--x and --panels"}
        raise InputError(
            error.found,
            source=options.get(error.source, table),
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    plotting.save(figure, output)
