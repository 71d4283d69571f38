"""``prism-plan plot``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.figure_options import figure_options

if TYPE_CHECKING:
    from prism_plan.errors import InputError
    from prism_plan.plotting import FigureOptions


@click.group("plot")
def command() -> None:
    """Draw traces, placements, comparisons and simulations."""
    # figures go to files; a backend that the user's shell names for windows is not needed
    os.environ["MPLBACKEND"] = "agg"


@command.command("heatmap")
@click.argument("trace", metavar="T.parquet")
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@figure_options
def heatmap(trace: str, tasks: tuple[str, ...], output: str, options: FigureOptions) -> None:
    """Activation frequency of every expert, one panel a task (the paper's Fig. 2)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    plotting.save(plotting.heatmap(load_trace(trace), tasks or None, options=options), output)


@command.command("entropy")
@click.argument("trace", metavar="T.parquet")
@figure_options
def entropy(trace: str, output: str, options: FigureOptions) -> None:
    """Entropy of expert usage per layer, one line a task (the paper's Fig. 3)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    plotting.save(plotting.entropy(load_trace(trace), options=options), output)


@command.command("placement")
@click.argument("placement", metavar="P.json")
@figure_options
def placement_map(placement: str, output: str, options: FigureOptions) -> None:
    """Which server and GPU holds which expert."""
    from prism_plan import plotting
    from prism_plan.io.placement import read_placement

    plotting.save(plotting.placement_map(read_placement(placement), options=options), output)


@command.command("comparison")
@click.argument("comparison", metavar="R.json")
@figure_options
def comparison(comparison: str, output: str, options: FigureOptions) -> None:
    """Bars of a comparison written by ``prism-plan compare -o R.json``."""
    from prism_plan import plotting
    from prism_plan.io.comparison import read_comparison

    values = read_comparison(comparison)
    title = f"{values['trace']} on {values['cluster']}"
    plotting.save(plotting.comparison(values["rows"], title, options=options), output)


def _draw_simulation(
    path: str, output: str, options: FigureOptions, figure: str, **given: Any
) -> None:
    from prism_plan import plotting
    from prism_plan.errors import InputError
    from prism_plan.io.simulation import read_simulation

    report = read_simulation(path)
    try:
        drawn = getattr(plotting, figure)(report, options=options, **given)
    except InputError as error:
        raise _told(error, path, {}, ("simulation",)) from error
    plotting.save(drawn, output)


def _told(
    error: InputError, path: str, options: Mapping[str, str], of_file: tuple[str, ...]
) -> InputError:
    """The error of a figure, told to come from the file or from the option it is about."""
    source = path if error.source in of_file else options.get(error.source, error.source)
    return type(error)(error.found, source=source, expected=error.expected, remedy=error.remedy)


@command.command("cdf")
@click.argument("report", metavar="S.json")
@figure_options
def cdf(report: str, output: str, options: FigureOptions) -> None:
    """How many requests took at most how long, one line a run of a simulation."""
    _draw_simulation(report, output, options, "simulation_cdf")


@command.command("timeline")
@click.argument("report", metavar="S.json")
@figure_options
def timeline(report: str, output: str, options: FigureOptions) -> None:
    """Latency by time of arrival, one line a run, with phases and moves of experts marked."""
    _draw_simulation(report, output, options, "simulation_timeline")


@command.command("layer-latency")
@click.argument("report", metavar="S.json")
@click.option("--paper", is_flag=True, help="Also a line at what the paper reports at most, 8.30.")
@figure_options
def layer_latency(report: str, paper: bool, output: str, options: FigureOptions) -> None:
    """Latency of a layer by the share of its experts that are remote, one line a run."""
    _draw_simulation(report, output, options, "layer_latency", paper=paper)


@command.command("latency")
@click.argument("report", metavar="S.json")
@figure_options
def latency(report: str, output: str, options: FigureOptions) -> None:
    """Bars of mean, p95 and p99 latency, remote share and waiting share of each run."""
    _draw_simulation(report, output, options, "simulation_bars")


@command.command("sweep")
@click.argument("table", metavar="R.parquet")
@click.option("--x", "x", metavar="KEY", help="Condition along x, such as bandwidth_mbps.")
@click.option("--panels", metavar="KEY", help="Condition that has a panel for each value.")
@click.option("--solver", "solvers", multiple=True, help="Only this solver; may be repeated.")
@figure_options
def sweep(
    table: str,
    x: str | None,
    panels: str | None,
    solvers: tuple[str, ...],
    output: str,
    options: FigureOptions,
) -> None:
    """Mean latency over a sweep by bandwidth or another condition, one line a solver."""
    from pathlib import Path

    from prism_plan import plotting
    from prism_plan.errors import InputError
    from prism_plan.io.sweep import read_sweep

    rows = read_sweep(table)
    name = Path(table).name
    try:
        figure = plotting.sweep_figure(
            rows, x=x, panels=panels, solvers=solvers or None, name=name, options=options
        )
    except InputError as error:
        names = {"x": "--x", "panels": "--panels", "x and panels": "--x and --panels"}
        raise _told(error, table, names, ("sweep", name)) from error
    plotting.save(figure, output)
