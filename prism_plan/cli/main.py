"""The group of commands of ``prism-plan``."""

from __future__ import annotations

import os

import click

from prism_plan import __version__
from prism_plan.cli.console import PROGRAM
from prism_plan.cli.error_boundary import run_command
from prism_plan.cli.lazy_commands import lazy_group

#: Command: (module with a click command ``command``, help line).
COMMANDS = {
    "profile": ("prism_plan.cli.profile", "Turn recordings of a model's routing into a trace."),
    "solve": ("prism_plan.cli.solve", "Plan which GPU holds which expert."),
    "compare": ("prism_plan.cli.compare", "Score solvers and existing placements side by side."),
    "simulate": ("prism_plan.cli.simulate", "Simulate placements: latency, traffic, migrations."),
    "check": ("prism_plan.cli.check", "Check files: valid? If not, where and why."),
    "gpus": ("prism_plan.cli.gpus", "Show the table of GPUs that cluster files can name."),
    "diff": ("prism_plan.cli.diff", "Show what moves between two placements."),
    "migrate": (
        "prism_plan.cli.migrate",
        "Plan the order of loads and drops between two placements.",
    ),
    "export": ("prism_plan.cli.export", "Write a plan for llama.cpp, vLLM, SGLang, TensorRT-LLM."),
    "export-verify": (
        "prism_plan.cli.export_verify",
        "Compare a log of llama.cpp with an export.",
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
    0 done, 2 bad input, 3 infeasible, 4 a limit was reached with no placement, 70 an internal
    error: please report its line (PRISM_PLAN_TRACEBACK=1 shows more), 130 interrupted.
    """


def run() -> int:
    """Run the command line and return its exit code; every error is one line on standard error."""
    shell = os.environ.get(COMPLETION_VARIABLE)
    if shell:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "prism-plan", COMPLETION_VARIABLE, shell)
    return run_command(
        cli, "prism-plan", program=PROGRAM, interrupted="interrupted; nothing was written"
    )
