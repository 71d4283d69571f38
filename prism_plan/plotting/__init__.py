"""Figures of traces, placements and comparisons; the only package that imports matplotlib.

Every function builds a :class:`matplotlib.figure.Figure` of its own, without pyplot, so nothing
is shown, kept open or left changed. :func:`save` writes one as PNG, SVG or PDF, with the same
bytes for the same figure. Figures are 1500 pixels wide.
"""

from prism_plan.plotting.comparisons import comparison
from prism_plan.plotting.output import METADATA, check_extension, save
from prism_plan.plotting.placements import MAX_SERVER_PANELS, placement_map
from prism_plan.plotting.traces import MAX_TASKS, entropy, heatmap

__all__ = [
    "MAX_SERVER_PANELS",
    "MAX_TASKS",
    "METADATA",
    "check_extension",
    "comparison",
    "entropy",
    "heatmap",
    "placement_map",
    "save",
]
