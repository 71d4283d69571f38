"""The command line: the only part of the package that prints or exits."""

from prism_plan.cli.main import main

__all__ = ["main"]
