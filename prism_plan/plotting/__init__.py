"""Figures of traces, placements, comparisons and simulations.

This is the only package that imports matplotlib. Every function builds a
:class:`matplotlib.figure.Figure` of its own, without pyplot, so nothing is shown, kept open or
left changed. :func:`save` writes one as PNG, SVG or PDF, with the same bytes for the same figure.
Figures are 1500 pixels wide.
"""

from prism_plan.plotting.comparisons import comparison
from prism_plan.plotting.output import METADATA, check_extension, save
from prism_plan.plotting.placements import MAX_SERVER_PANELS, placement_map
from prism_plan.plotting.simulations import (
    MAX_RUNS,
    PAPER_LAYER_LATENCY,
    layer_latency,
    simulation_bars,
    simulation_cdf,
    simulation_timeline,
)
from prism_plan.plotting.sweeps import sweep_figure
from prism_plan.plotting.traces import MAX_TASKS, entropy, heatmap

__all__ = [
    "MAX_RUNS",
    "MAX_SERVER_PANELS",
    "MAX_TASKS",
    "METADATA",
    "PAPER_LAYER_LATENCY",
    "check_extension",
    "comparison",
    "entropy",
    "heatmap",
    "layer_latency",
    "placement_map",
    "save",
    "simulation_bars",
    "simulation_cdf",
    "simulation_timeline",
    "sweep_figure",
]
