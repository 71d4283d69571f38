"""Groups of commands whose modules load when they are called, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click
from click.shell_completion import CompletionItem

from prism_plan.errors import did_you_mean


class FileName(click.types.StringParamType):
    """The name of a file or folder, taken as it is; shells complete it."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class SolverNames(click.types.StringParamType):
    """Names of solvers, separated by commas; shells complete the last one."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from prism_plan.solvers.registry import ALL_SOLVERS

        before, comma, last = incomplete.rpartition(",")
        return [
            CompletionItem(f"{before}{comma}{name}")
            for name in ALL_SOLVERS
            if name.startswith(last)
        ]


#: A parameter whose metavar has an extension, or is one of these words, names a file.
FILE_WORDS = ("DIR", "FILE", "SOURCE", "CHECKPOINT")
SOLVER_OPTIONS = ("--solver", "--solvers", "--migrate-solver")


def add_completions(command: click.Command) -> None:
    """Add shell completion to a command and its subcommands; without arguments they print help."""
    for parameter in command.params:
        metavar = (parameter.metavar or "").strip("[].")
        if set(SOLVER_OPTIONS) & set(parameter.opts) and parameter.type is click.STRING:
            parameter.type = SolverNames()
        elif parameter.type is click.STRING and ("." in metavar or metavar in FILE_WORDS):
            parameter.type = FileName()
    if any(parameter.required for parameter in command.params):
        command.no_args_is_help = True
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            add_completions(inner)


def lazy_group(commands: Mapping[str, tuple[str, str]]) -> type[click.Group]:
    """A group of ``commands``: name -> (module with a click command ``command``, help line)."""

    class LazyGroup(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(commands)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in commands:
                return None
            found: click.Command = import_module(commands[cmd_name][0]).command
            add_completions(found)
            return found

        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            if args and args[0] not in commands:
                ctx.fail(f"unknown command {args[0]!r}{did_you_mean(args[0], commands)}")
            return super().resolve_command(ctx, args)

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])

    return LazyGroup
