"""The requests of a simulation, sampled from a trace by a cluster's users."""

from __future__ import annotations

from prism_plan.simulate.requests import Prompts, Requests

__all__ = ["Prompts", "Requests"]
