"""The runtime's command line."""

from __future__ import annotations

import multiprocessing.util
import os
import sys

import click

from prism_plan.cli.error_boundary import run_command
from prism_plan.cli.lazy_commands import lazy_group
from runtime_adapter import PROGRAM

#: Command: (module, its click command, help line). Modules load when called.
COMMANDS = {
    "serve": ("runtime_adapter.cli.serve", "A checkpoint on several servers."),
    "replay": ("runtime_adapter.cli.replay", "Recorded routing through the real machinery."),
    "move": ("runtime_adapter.cli.move", "Move a run's experts to another placement."),
    "store": ("runtime_adapter.cli.store", "The members, the log and the scheduler of a run."),
    "status": ("runtime_adapter.cli.status", "Servers of a run, and whether all is well."),
    "calibrate": ("runtime_adapter.cli.calibrate", "Measure the times that simulate reads."),
}


#: Defaults for PyTorch: it must not report a closed connection, which we do, in thirty lines; and
#: it looks up the name of every address that connects, which must be quick without a name service.
ENVIRONMENT = {"TORCH_CPP_LOG_LEVEL": "FATAL", "RES_OPTIONS": "timeout:1 attempts:1"}


@click.group(cls=lazy_group(COMMANDS), context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run placements: one launch for each server of the placement file.

    All servers of a run share a secret (--secret-file), by which they prove who they are. Nothing
    is encrypted: across networks of others use a tunnel such as WireGuard.

    Exit codes: 0 done; 1 some server is not up (status); 2 bad input; 3 infeasible; 4 out of
    memory; 5 another server, a port or the store failed, or requests did; 70 an internal error:
    please report its line (PRISM_PLAN_TRACEBACK=1 shows more); 130 interrupted.
    """


def run_and_exit(command: click.Command, name: str) -> None:
    """Run a command of the runtime and exit with its exit code; errors are one line."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    code = run_command(command, name, program=PROGRAM, extra="runtime")
    sys.stderr.flush()
    if "torch" in sys.modules:
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # or semaphores are reported as leaked
        os._exit(code)  # without waiting for threads that wait for other servers
    sys.exit(code)
