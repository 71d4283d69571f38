"""``prism-plan plot``."""

from __future__ import annotations

import click

OUTPUT = click.option(
    "-o", "--output", required=True, metavar="FILE.png", help="Figure to write: .png, .svg or .pdf."
)


@click.group("plot")
def command() -> None:
    """Draw traces, placements and comparisons."""


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
