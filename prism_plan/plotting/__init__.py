"""Figures of traces, placements, comparisons and simulations.

This is the only package that imports matplotlib. Every function builds a
:class:`matplotlib.figure.Figure` of its own, without pyplot, so nothing is shown, kept open or
left changed. :func:`save` writes one as PNG, SVG or PDF, with the same bytes for the same figure.
Figures are 15 inches and 1500 pixels wide; :class:`FigureOptions` changes that, and the title. A
solver has the same colour in every figure (:data:`SOLVER_COLOURS`).
"""

from prism_plan.plotting.comparisons import comparison
from prism_plan.plotting.figure_options import FigureOptions
from prism_plan.plotting.output import METADATA, check_extension, save
from prism_plan.plotting.placements import MAX_SERVER_PANELS, placement_map
from prism_plan.plotting.simulations import (
    MAX_MOVE_LINES,
    MAX_RUNS,
    PAPER_LAYER_LATENCY,
    layer_latency,
    simulation_bars,
    simulation_cdf,
    simulation_timeline,
)
from prism_plan.plotting.solver_styles import (
    OTHER_COLOURS,
    SOLVER_COLOURS,
    SolverStyle,
    solver_styles,
)
from prism_plan.plotting.sweeps import sweep_figure
from prism_plan.plotting.traces import MAX_TASKS, entropy, heatmap

__all__ = [
    "MAX_MOVE_LINES",
    "MAX_RUNS",
    "MAX_SERVER_PANELS",
    "MAX_TASKS",
    "METADATA",
    "OTHER_COLOURS",
    "PAPER_LAYER_LATENCY",
    "SOLVER_COLOURS",
    "FigureOptions",
    "SolverStyle",
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
    "solver_styles",
    "sweep_figure",
]
