"""Placements evaluated: compared, simulated, swept over conditions; tables of results."""
