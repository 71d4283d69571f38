"""Evaluation of placements: comparison, simulation, sweeps, and their results as tables."""
