"""``prism-plan plot``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.command_options import options_as
from prism_plan.cli.figure_options import PlotOptions, figure_options

if TYPE_CHECKING:
    from prism_plan.plotting import FigureOptions


@click.group("plot")
def command() -> None:
    """Draw traces, placements, comparisons and simulations."""
    # figures go to files; a backend that the user's shell names for windows is not needed
    os.environ["MPLBACKEND"] = "agg"


@dataclass(frozen=True, kw_only=True)
class HeatmapOptions(PlotOptions):
    """What ``prism-plan plot heatmap`` is given."""

    tasks: tuple[str, ...]


@command.command("heatmap")
@click.argument("file", metavar="T.parquet")
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@figure_options
@options_as(HeatmapOptions)
def heatmap(given: HeatmapOptions) -> None:
    """Activation frequency of every expert, one panel a task (the paper's Fig. 2)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    def figure(options: FigureOptions) -> Any:
        return plotting.heatmap(load_trace(given.file), given.tasks or None, options=options)

    given.draw(figure)


@command.command("entropy")
@click.argument("file", metavar="T.parquet")
@figure_options
@options_as(PlotOptions)
def entropy(given: PlotOptions) -> None:
    """Entropy of expert usage per layer, one line a task (the paper's Fig. 3)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    given.draw(lambda options: plotting.entropy(load_trace(given.file), options=options))


@command.command("placement")
@click.argument("file", metavar="P.json")
@figure_options
@options_as(PlotOptions)
def placement_map(given: PlotOptions) -> None:
    """Which server and GPU holds which expert."""
    from prism_plan import plotting
    from prism_plan.io.placement import read_placement

    given.draw(lambda options: plotting.placement_map(read_placement(given.file), options=options))


@command.command("comparison")
@click.argument("file", metavar="R.json")
@figure_options
@options_as(PlotOptions)
def comparison(given: PlotOptions) -> None:
    """Bars of a comparison written by ``prism-plan compare -o R.json``."""
    from prism_plan import plotting
    from prism_plan.io.comparison import read_comparison

    def figure(options: FigureOptions) -> Any:
        values = read_comparison(given.file)
        title = f"{values['trace']} on {values['cluster']}"
        return plotting.comparison(values["rows"], title, options=options)

    given.draw(figure)


def _draw_simulation(given: PlotOptions, name: str, **how: Any) -> None:
    from prism_plan import plotting
    from prism_plan.io.simulation import read_simulation

    def figure(options: FigureOptions) -> Any:
        return getattr(plotting, name)(read_simulation(given.file), options=options, **how)

    given.draw(figure)


@command.command("cdf")
@click.argument("file", metavar="S.json")
@figure_options
@options_as(PlotOptions)
def cdf(given: PlotOptions) -> None:
    """How many requests took at most how long, one line a run of a simulation."""
    _draw_simulation(given, "simulation_cdf")


@command.command("timeline")
@click.argument("file", metavar="S.json")
@figure_options
@options_as(PlotOptions)
def timeline(given: PlotOptions) -> None:
    """Latency by time of arrival, one line a run, with phases and moves of experts marked."""
    _draw_simulation(given, "simulation_timeline")


@dataclass(frozen=True, kw_only=True)
class LayerLatencyOptions(PlotOptions):
    """What ``prism-plan plot layer-latency`` is given."""

    paper: bool


@command.command("layer-latency")
@click.argument("file", metavar="S.json")
@click.option("--paper", is_flag=True, help="Also a line at what the paper reports at most, 8.30.")
@figure_options
@options_as(LayerLatencyOptions)
def layer_latency(given: LayerLatencyOptions) -> None:
    """Latency of a layer by the share of its experts that are remote, one line a run."""
    _draw_simulation(given, "layer_latency", paper=given.paper)


@command.command("latency")
@click.argument("file", metavar="S.json")
@figure_options
@options_as(PlotOptions)
def latency(given: PlotOptions) -> None:
    """Bars of mean, p95 and p99 latency, remote share and waiting share of each run."""
    _draw_simulation(given, "simulation_bars")


@dataclass(frozen=True, kw_only=True)
class SweepPlotOptions(PlotOptions):
    """What ``prism-plan plot sweep`` is given."""

    x: str | None
    panels: str | None
    solvers: tuple[str, ...]


@command.command("sweep")
@click.argument("file", metavar="R.parquet")
@click.option("--x", "x", metavar="KEY", help="Condition along x, such as bandwidth_mbps.")
@click.option("--panels", metavar="KEY", help="Condition that has a panel for each value.")
@click.option("--solver", "solvers", multiple=True, help="Only this solver; may be repeated.")
@figure_options
@options_as(SweepPlotOptions)
def sweep(given: SweepPlotOptions) -> None:
    """Mean latency over a sweep by bandwidth or another condition, one line a solver."""
    from prism_plan import plotting
    from prism_plan.io.sweep import read_sweep

    def figure(options: FigureOptions) -> Any:
        return plotting.sweep_figure(
            read_sweep(given.file),
            x=given.x,
            panels=given.panels,
            solvers=given.solvers or None,
            name=os.path.basename(given.file),
            options=options,
        )

    given.draw(figure)
