"""The command line of the runtime: the only part of the package that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FrameType
from typing import Any

import click

from prism_plan.errors import PrismError, did_you_mean

#: Command: (module, its click command, help line). Modules load when called.
COMMANDS = {
    "replay": ("runtime_adapter.commands.replay", "Recorded routing through the real machinery."),
    "calibrate": ("runtime_adapter.commands.calibrate", "Measure the times that simulate reads."),
}


class LazyGroup(click.Group):
    """Loads a command's module only when it runs, so that ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            ctx.fail(f"unknown command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run placements: one launch for each server of the placement file.

    torch.distributed has no authentication and no encryption: run it on a private network only.
    Exit codes: 0 done, 2 bad input, 3 infeasible, 5 another server, a port or the store failed.
    """


def note(message: str) -> None:
    """A line to standard error."""
    print(f"prism-runtime: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


#: Options of every command that meets other servers.
meeting_options = _options(
    click.option("--server", required=True, metavar="NAME", help="This server's name."),
    click.option(
        "--store",
        default="127.0.0.1:29400",
        show_default=True,
        metavar="HOST:PORT",
        help="Address on the first server where all servers meet; it alone listens there.",
    ),
    click.option(
        "--interface", default="lo", show_default=True, help="Network interface of links."
    ),
    click.option(
        "--timeout", default=10.0, show_default=True, metavar="S", help="Then a server is lost."
    ),
    click.option(
        "--join", default=60.0, show_default=True, metavar="S", help="Then all must be there."
    ),
    click.option(
        "--rtt-ms", default=0.0, show_default=True, help="Added to every call, where wanted."
    ),
)


def meeting_of(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The meeting that the options describe, for servers of these names.

    Raises
    ------
    InputError
        The server is not one of them, or an option is out of range.
    """
    import math

    from prism_plan.errors import InputError
    from runtime_adapter.links import Meeting

    if given["server"] not in names:
        raise InputError(
            f"unknown server {given['server']!r:.60}{did_you_mean(given['server'], names)}",
            source="--server",
            expected=f"one of {', '.join(names)}",
        )
    host, colon, port = given["store"].rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{given['store']!r:.60}", source="--store", expected="HOST:PORT")
    for option in ("timeout", "join"):
        if not 0 < given[option] < math.inf:
            raise InputError(f"{given[option]}", source=f"--{option}", expected="seconds above 0")
    if not 0 <= given["rtt_ms"] < 60_000:
        raise InputError(f"{given['rtt_ms']}", source="--rtt-ms", expected="0 to 60000")
    return Meeting(
        servers=len(names),
        me=names.index(given["server"]),
        host=host.strip("[]"),
        port=int(port),
        interface=given["interface"],
        timeout_s=given["timeout"],
        join_s=given["join"],
    )


@contextlib.contextmanager
def jsonl(path: str | None) -> Iterator[Callable[[Any], None]]:
    """Writes one JSON value a line, each at once, to a file or standard output."""
    from prism_plan.errors import OutputError

    if path is None or path == "-":

        def write(values: Any) -> None:
            print(json.dumps(values, allow_nan=False), flush=True)

        yield write
        return
    try:
        with open(path, "w", encoding="utf-8") as stream:

            def write(values: Any) -> None:
                stream.write(json.dumps(values, allow_nan=False) + "\n")
                stream.flush()

            yield write
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def main() -> None:
    """Run the command line and leave with its exit code; errors are one line."""
    signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        with cli.make_context("python -m runtime_adapter", sys.argv[1:]) as context:
            cli.invoke(context)
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
        os._exit(code)  # without waiting for threads that wait for other servers
    sys.exit(code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
