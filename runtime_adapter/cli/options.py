"""Options and output that the commands of the runtime share."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli import inputs
from prism_plan.cli.internal_errors import write_log_line
from prism_plan.cli.migration_options import ReviewOptions, review_options
from prism_plan.cli.options_dataclass import CommandOptions, add_options
from prism_plan.errors import InputError, did_you_mean
from runtime_adapter import PROGRAM

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from runtime_adapter.transport.rendezvous import Rendezvous


def log_info(message: str) -> None:
    """Write a line to standard error."""
    write_log_line(PROGRAM, message)


def log_assumed_figures(path: str, cluster: Cluster, **uses: bool) -> None:
    """Log the figures that a command uses and the cluster file does not give.

    ``uses`` as in :func:`prism_plan.assumed_figures.assumed_texts`.
    """
    inputs.log_assumed_figures(path, cluster, log=log_info, **uses)


store_option = click.option(
    "--store",
    default="127.0.0.1:29400",
    show_default=True,
    metavar="HOST:PORT",
    help="Rendezvous address; the first server listens there.",
)

#: Options of every command that joins a run as a server.
rendezvous_options = add_options(
    click.option("--server", required=True, metavar="NAME", help="This server's name."),
    store_option,
    click.option("--interface", default="lo", show_default=True, help="Interface of the links."),
    click.option(
        "--timeout",
        "timeout_s",
        default=10.0,
        show_default=True,
        metavar="S",
        help="Seconds without an answer after which a server is lost.",
    ),
    click.option(
        "--join",
        "rendezvous_timeout_s",
        default=60.0,
        show_default=True,
        metavar="S",
        help="Seconds within which all servers must join.",
    ),
    click.option(
        "--rtt-ms", default=0.0, show_default=True, help="Artificial delay of every call."
    ),
)


#: Options of the commands that serve: whether experts move, as in `prism-plan simulate`.
migration_options = add_options(
    review_options,
    click.option("--movable", is_flag=True, help="Accept the command move, also without reviews."),
    click.option(
        "--placements-dir",
        metavar="DIR",
        help="Of the first server: write placement-K.json after every move.",
    ),
)

#: Those of them that must be equal on all servers of a run.
MIGRATION_FACTS = (
    "migrate", "migrate_every_s", "statistics", "half_life_s", "horizon_s", "migration_cost",
    "migrate_solver", "movable",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MigrationOptions(ReviewOptions):
    """The values of :data:`migration_options`."""

    movable: bool
    placements_dir: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.migrate_solver.endswith("+paths"):
            raise InputError(
                f"{self.migrate_solver!r:.60} plans where layers execute",
                parameter="migrate_solver",
                expected="a solver of experts alone: the runtime does not execute tables yet",
            )
        if not self.migrates:
            self.refuse("placements_dir", found="has no effect without ``migrate`` or ``movable``")

    @property
    def migrates(self) -> bool:
        """Whether experts may move."""
        return self.movable or self.migrate != "never"


def address(text: str) -> tuple[str, int]:
    """Parse the host and port of ``--store``.

    Raises
    ------
    InputError
        It is not HOST:PORT.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{text!r:.60}", parameter="store", expected="HOST:PORT")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, kw_only=True)
class RendezvousOptions(CommandOptions):
    """The values of :data:`rendezvous_options`."""

    server: str
    store: str
    interface: str
    timeout_s: float
    rendezvous_timeout_s: float
    rtt_ms: float

    def rendezvous(self, names: tuple[str, ...]) -> Rendezvous:
        """The rendezvous of a run with servers of these names.

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
def open_jsonl(path: str | None) -> Iterator[Callable[[Any], None]]:
    """Open a file, or standard output, for one JSON value a line, each written at once."""
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
