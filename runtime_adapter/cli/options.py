"""Options that the commands share, and where their output goes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.command_options import CommandOptions
from prism_plan.cli.internal_errors import write_log_line
from prism_plan.cli.review_options import ReviewOptions, review_options
from prism_plan.errors import InputError, did_you_mean
from runtime_adapter import PROGRAM

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from runtime_adapter.transport.rendezvous import Rendezvous


def note(message: str) -> None:
    """A line to standard error."""
    write_log_line(PROGRAM, message)


def note_assumed(path: str, cluster: Cluster, **uses: bool) -> None:
    """Name the figures that a command uses and the cluster file does not give.

    ``uses`` as in :func:`prism_plan.check.assumed_figures.assumed_figures`.
    """
    from prism_plan.check.assumed_figures import assumed_figures

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
rendezvous_options = _options(
    click.option("--server", required=True, metavar="NAME", help="This server's name."),
    store_option,
    click.option("--interface", default="lo", show_default=True, help="Interface of the links."),
    click.option(
        "--timeout",
        "timeout_s",
        default=10.0,
        show_default=True,
        metavar="S",
        help="Then a server is lost.",
    ),
    click.option(
        "--join",
        "rendezvous_timeout_s",
        default=60.0,
        show_default=True,
        metavar="S",
        help="Then all must be there.",
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

#: Of those, what all servers of a run must be given alike.
MIGRATION_FACTS = (
    "migrate", "migrate_every_s", "statistics", "half_life_s", "horizon_s", "migration_cost",
    "migrate_solver", "movable",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MigrationOptions(ReviewOptions):
    """What :func:`migration_options` adds."""

    movable: bool
    placements_dir: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.moves:
            self.refuse("placements_dir", found="has no effect without ``migrate`` or ``movable``")

    @property
    def moves(self) -> bool:
        """Whether experts may move."""
        return self.movable or self.migrate != "never"


def address(text: str) -> tuple[str, int]:
    """Host and port of ``--store``.

    Raises
    ------
    InputError
        It is none.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{text!r:.60}", parameter="store", expected="HOST:PORT")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, kw_only=True)
class MeetingOptions(CommandOptions):
    """What :func:`rendezvous_options` adds."""

    server: str
    store: str
    interface: str
    timeout_s: float
    rendezvous_timeout_s: float
    rtt_ms: float

    def rendezvous(self, names: tuple[str, ...]) -> Rendezvous:
        """The rendezvous of servers of these names.

        Raises
        ------
        InputError
            The server is not one of them, or an option is out of range.
        """
        from runtime_adapter.transport.interfaces import require_interface
        from runtime_adapter.transport.rendezvous import Rendezvous

        if self.server not in names:
            raise InputError(
                f"unknown server {self.server!r:.60}{did_you_mean(self.server, names)}",
                parameter="server",
                expected=f"one of {', '.join(names)}",
            )
        host, port = address(self.store)
        require_seconds(self.timeout_s, "timeout_s")
        require_seconds(self.rendezvous_timeout_s, "rendezvous_timeout_s")
        if not 0 <= self.rtt_ms < 60_000:
            raise InputError(f"{self.rtt_ms}", parameter="rtt_ms", expected="0 to 60000")
        require_interface(self.interface, ipv4=":" not in host)
        return Rendezvous(
            world_size=len(names),
            rank=names.index(self.server),
            host=host,
            port=port,
            interface=self.interface,
            timeout_s=self.timeout_s,
            rendezvous_timeout_s=self.rendezvous_timeout_s,
        )


def require_seconds(value: float, parameter: str) -> None:
    """Refuse a time that is not above 0 and finite.

    Raises
    ------
    InputError
        Names the parameter.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{value}", parameter=parameter, expected="seconds above 0")


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
