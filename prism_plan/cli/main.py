"""The group of commands, and the boundary where errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

import click
from click.shell_completion import shell_complete

from prism_plan import __version__
from prism_plan.cli.console import announce_compilation
from prism_plan.cli.lazy import lazy_group
from prism_plan.errors import PrismError

#: Command: (module with a click command ``command``, help line).
COMMANDS = {
    "profile": ("prism_plan.cli.profile", "Turn recordings of a model's routing into a trace."),
    "solve": ("prism_plan.cli.solve", "Plan which GPU holds which expert."),
    "compare": ("prism_plan.cli.compare", "Score solvers and existing placements side by side."),
    "simulate": ("prism_plan.cli.simulate", "Simulate placements: latency, traffic, migrations."),
    "check": ("prism_plan.cli.check", "Check files: valid? If not, where and why."),
    "diff": ("prism_plan.cli.diff", "Show what moves between two placements."),
    "migrate": (
        "prism_plan.cli.migrate",
        "Plan the order of loads and drops between two placements.",
    ),
    "plot": ("prism_plan.cli.plot", "Draw traces, placements and simulations."),
}


#: Set by shells that ask for completions; `_PRISM_PLAN_COMPLETE=bash_source prism-plan` prints the
#: script that makes bash ask (zsh and fish likewise).
COMPLETION_VARIABLE = "_PRISM_PLAN_COMPLETE"


@click.group(cls=lazy_group(COMMANDS), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prism-plan")
def cli() -> None:
    """Plan where each expert of a Mixture-of-Experts model goes on a few unequal servers.

    Data goes to standard output or the named file, messages to standard error. Exit codes:
    0 done, 2 bad input, 3 infeasible, 4 a limit was reached with no placement.
    """


def run() -> int:
    """Run the command line and return its exit code; every error is one line on standard error."""
    signal.signal(signal.SIGTERM, _terminate)
    for name, mode in (("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):  # an encoding that lacks a character is no error
            stream.reconfigure(errors="backslashreplace")
    shell = os.environ.get(COMPLETION_VARIABLE)
    if shell:
        return shell_complete(cli, {}, "prism-plan", COMPLETION_VARIABLE, shell)
    announce_compilation()
    try:
        try:
            # not cli.main(): on Ctrl-C and on a closed pipe it prints and exits in its own way
            with cli.make_context("prism-plan", sys.argv[1:]) as context:
                cli.invoke(context)
        finally:
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except PrismError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "prism-plan"
        message = " ".join(error.format_message().split()).rstrip(".")
        return _fail(f"{message}; see {path} --help", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; nothing was written", 130)
    except BrokenPipeError:
        _discard_stdout()  # the reader has had enough: no more, and no complaint
        return 0
    except MemoryError:
        return _fail("out of memory; use a smaller trace or cluster, or a larger machine", 4)
    except OSError as error:
        _discard_stdout()
        where = f"{error.filename}: " if error.filename else "standard output: "
        return _fail(f"{where}{(error.strerror or str(error)).lower()}", 2)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"prism-plan: {' '.join(message.split())}", file=sys.stderr)
    return code


def _discard_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt
