"""Executes placements: a Mixture-of-Experts checkpoint runs across servers, each with its experts.

Imports :mod:`prism_plan`, never the reverse. Needs the extra ``runtime`` (PyTorch, transformers 5).
"""

#: The program's name, which begins each line on standard error.
PROGRAM = "prism-runtime"
