"""``prism-plan plot``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.figure_options import PlotOptions, figure_options
from prism_plan.cli.options_dataclass import options_as

if TYPE_CHECKING:
    from prism_plan.plotting import FigureOptions


@click.group("plot")
def command() -> None:
    """Draw traces, placements, comparisons and simulations."""
    # figures go to files; a backend that the user's shell names for windows is not needed
    os.environ["MPLBACKEND"] = "agg"


@dataclass(frozen=True, kw_only=True)
class HeatmapOptions(PlotOptions):
    """The options and arguments of ``prism-plan plot heatmap``."""

    tasks: tuple[str, ...]


@command.command("heatmap")
@click.argument("file", metavar="T.parquet")
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@figure_options
@options_as(HeatmapOptions)
def heatmap(args: HeatmapOptions) -> None:
    """Activation frequency of every expert, one panel a task (the paper's Fig. 2)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    def figure(options: FigureOptions) -> Any:
        return plotting.heatmap(load_trace(args.file), args.tasks or None, options=options)

    args.draw(figure)


@command.command("entropy")
@click.argument("file", metavar="T.parquet")
@figure_options
@options_as(PlotOptions)
def entropy(args: PlotOptions) -> None:
    """Entropy of expert usage per layer, one line a task (the paper's Fig. 3)."""
    from prism_plan import plotting
    from prism_plan.cli.console import load_trace

    args.draw(lambda options: plotting.entropy(load_trace(args.file), options=options))


@command.command("placement")
@click.argument("file", metavar="P.json")
@figure_options
@options_as(PlotOptions)
def placement_map(args: PlotOptions) -> None:
    """Which server and GPU holds which expert, and which server executes which layer."""
    from prism_plan import plotting
    from prism_plan.io.placement import read_placement

    args.draw(lambda options: plotting.placement_map(read_placement(args.file), options=options))


@command.command("comparison")
@click.argument("file", metavar="R.json")
@figure_options
@options_as(PlotOptions)
def comparison(args: PlotOptions) -> None:
    """Bars of a comparison written by ``prism-plan compare -o R.json``."""
    from prism_plan import plotting
    from prism_plan.io.comparison import read_comparison

    def figure(options: FigureOptions) -> Any:
        values = read_comparison(args.file)
        title = f"{values['trace']} on {values['cluster']}"
        return plotting.comparison(values["rows"], title, options=options)

    args.draw(figure)


def _draw_simulation(args: PlotOptions, name: str, **how: Any) -> None:
    from prism_plan import plotting
    from prism_plan.io.simulation import read_simulation

    def figure(options: FigureOptions) -> Any:
        return getattr(plotting, name)(read_simulation(args.file), options=options, **how)

    args.draw(figure)


@command.command("cdf")
@click.argument("file", metavar="S.json")
@figure_options
@options_as(PlotOptions)
def cdf(args: PlotOptions) -> None:
    """How many requests took at most how long, one line a run of a simulation."""
    _draw_simulation(args, "simulation_cdf")


@command.command("timeline")
@click.argument("file", metavar="S.json")
@figure_options
@options_as(PlotOptions)
def timeline(args: PlotOptions) -> None:
    """Latency by time of arrival, one line a run, with phases and moves of experts marked."""
    _draw_simulation(args, "simulation_timeline")


@dataclass(frozen=True, kw_only=True)
class LayerLatencyOptions(PlotOptions):
    """The options and arguments of ``prism-plan plot layer-latency``."""

    paper: bool


@command.command("layer-latency")
@click.argument("file", metavar="S.json")
@click.option("--paper", is_flag=True, help="Also a line at what the paper reports at most, 8.30.")
@figure_options
@options_as(LayerLatencyOptions)
def layer_latency(args: LayerLatencyOptions) -> None:
    """Latency of a layer by the share of its experts that are remote, one line a run."""
    _draw_simulation(args, "layer_latency", paper=args.paper)


@command.command("latency")
@click.argument("file", metavar="S.json")
@figure_options
@options_as(PlotOptions)
def latency(args: PlotOptions) -> None:
    """Bars of mean, p95 and p99 latency, remote share and waiting share of each run."""
    _draw_simulation(args, "simulation_bars")


@dataclass(frozen=True, kw_only=True)
class SweepPlotOptions(PlotOptions):
    """The options and arguments of ``prism-plan plot sweep``."""

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
def sweep(args: SweepPlotOptions) -> None:
    """Mean latency over a sweep by bandwidth or another condition, one line a solver."""
    from prism_plan import plotting
    from prism_plan.io.sweep import read_sweep

    def figure(options: FigureOptions) -> Any:
        return plotting.sweep_figure(
            read_sweep(args.file),
            x=args.x,
            panels=args.panels,
            solvers=args.solvers or None,
            name=os.path.basename(args.file),
            options=options,
        )

    args.draw(figure)
