"""Options that the commands share, and where their output goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.review_options import review_options
from prism_plan.errors import did_you_mean
from prism_plan.faults import say
from runtime_adapter import PROGRAM

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster


def note(message: str) -> None:
    """A line to standard error."""
    say(PROGRAM, message)


def note_assumed(path: str, cluster: Cluster, **uses: bool) -> None:
    """Name the figures that a command uses and the cluster file does not give.

    ``uses`` as in :func:`prism_plan.assumed.assumed_figures`.
    """
    from prism_plan.assumed import assumed_figures

    text = assumed_figures(cluster, **uses)
    if text:
        note(f"{path}: {text}")


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


store_option = click.option(
    "--store",
    default="127.0.0.1:29400",
    show_default=True,
    metavar="HOST:PORT",
    help="Address on the first server where all servers meet; it alone listens there.",
)

#: Options of every command that meets other servers.
meeting_options = _options(
    click.option("--server", required=True, metavar="NAME", help="This server's name."),
    store_option,
    click.option("--interface", default="lo", show_default=True, help="Interface of the links."),
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


#: Options of the commands that serve: whether experts move, as in `prism-plan simulate`.
migration_options = _options(
    review_options,
    click.option("--movable", is_flag=True, help="Follow the command move, even without reviews."),
    click.option(
        "--placements-dir",
        metavar="DIR",
        help="Of the first server: write placement-K.json after every move.",
    ),
)

#: What `prism-plan simulate` asks for besides, and a run has no use for.
NOT_SIMULATED = {"calibration": None, "engine": "compiled", "time_limit": None}

#: Of those, what all servers of a run must be given alike.
MIGRATION_FACTS = (
    "migrate", "migrate_every", "statistics", "half_life", "horizon", "migration_cost",
    "migrate_solver", "movable",
)  # fmt: skip


def address(text: str) -> tuple[str, int]:
    """Host and port of ``--store``.

    Raises
    ------
    InputError
        It is none.
    """
    from prism_plan.errors import InputError

    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{text!r:.60}", source="--store", expected="HOST:PORT")
    return host.strip("[]"), int(port)


def meeting_of(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The meeting that the options describe, for servers of these names.

    Raises
    ------
    InputError
        The server is not one of them, or an option is out of range.
    """
    import math

    from prism_plan.errors import InputError
    from runtime_adapter.interfaces import require_interface
    from runtime_adapter.links import Meeting

    if given["server"] not in names:
        raise InputError(
            f"unknown server {given['server']!r:.60}{did_you_mean(given['server'], names)}",
            source="--server",
            expected=f"one of {', '.join(names)}",
        )
    host, port = address(given["store"])
    for option in ("timeout", "join"):
        if not 0 < given[option] < math.inf:
            raise InputError(f"{given[option]}", source=f"--{option}", expected="seconds above 0")
    if not 0 <= given["rtt_ms"] < 60_000:
        raise InputError(f"{given['rtt_ms']}", source="--rtt-ms", expected="0 to 60000")
    require_interface(given["interface"], ipv4=":" not in host)
    return Meeting(
        servers=len(names),
        me=names.index(given["server"]),
        host=host,
        port=port,
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
