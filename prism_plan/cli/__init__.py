"""The command line: the only part of the package that prints or exits."""

import os
import sys


def main() -> None:
    """Run the command line; see :mod:`prism_plan.cli.main`."""
    try:
        from prism_plan.cli.main import run

        code = run()
    except KeyboardInterrupt:  # while modules are still being loaded
        print("prism-plan: interrupted; nothing was written", file=sys.stderr)
        code = 130
    if code == 130:
        # without waiting for the thread of a solver that is slow to notice it
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
