"""Groups of commands whose modules load when they are called, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click

from prism_plan.errors import did_you_mean


def lazy_group(commands: Mapping[str, tuple[str, str]]) -> type[click.Group]:
    """A group of ``commands``: name -> (module with a click command ``command``, help line)."""

    class LazyGroup(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(commands)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in commands:
                return None
            found: click.Command = import_module(commands[cmd_name][0]).command
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
