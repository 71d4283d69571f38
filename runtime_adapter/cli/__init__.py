"""The command line of the runtime: the only part of the package that prints or exits."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import sys
from types import FrameType

import click

from prism_plan.cli.lazy import lazy_group
from prism_plan.errors import PrismError
from runtime_adapter.cli.options import note

#: Command: (module, its click command, help line). Modules load when called.
COMMANDS = {
    "serve": ("runtime_adapter.cli.serve", "A checkpoint on several servers."),
    "replay": ("runtime_adapter.cli.replay", "Recorded routing through the real machinery."),
    "move": ("runtime_adapter.cli.move", "Move a run's experts to another placement."),
    "calibrate": ("runtime_adapter.cli.calibrate", "Measure the times that simulate reads."),
}


#: For PyTorch, where the user says nothing else: a connection that closes is told in one line of
#: ours, not in thirty of its own; and it asks for the name of every address that connects, which
#: must not take long where there is no name service.
ENVIRONMENT = {"TORCH_CPP_LOG_LEVEL": "FATAL", "RES_OPTIONS": "timeout:1 attempts:1"}


@click.group(cls=lazy_group(COMMANDS), context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run placements: one launch for each server of the placement file.

    torch.distributed has no authentication and no encryption: run it on a private network only.
    Exit codes: 0 done, 2 bad input, 3 infeasible, 5 another server, a port or the store failed.
    """


def main() -> None:
    """Run the command line and leave with its exit code."""
    run_command(cli, "python -m runtime_adapter")


def run_command(command: click.Command, name: str) -> None:
    """Run a command and leave with its exit code; errors are one line."""
    signal.signal(signal.SIGTERM, _terminate)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    code = 0
    try:
        with command.make_context(name, sys.argv[1:]) as context:
            command.invoke(context)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except PrismError as error:
        note(str(error))
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError:
        note("no command; see --help")
        code = 2
    except click.ClickException as error:
        note(f"{error.format_message().rstrip('.')}; see --help")
        code = 2
    except (KeyboardInterrupt, click.Abort):
        note("interrupted")
        code = 130
    except ModuleNotFoundError as error:
        note(f"{error}; install the extra: pip install 'prism-plan[runtime]'")
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # semaphores, which would be told as leaked
        os._exit(code)  # without waiting for threads that wait for other servers
    sys.exit(code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
