"""The command line of the runtime: the only part of the package that prints or exits."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its exit code; see :mod:`runtime_adapter.cli.main`."""
    try:
        from runtime_adapter import PROGRAM
        from runtime_adapter.cli.main import cli, run_and_exit

        run_and_exit(cli, PROGRAM)
    except KeyboardInterrupt:  # while modules are still being loaded
        print("prism-runtime: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
