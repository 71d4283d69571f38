"""Options and output that the commands of the runtime share."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from prism_plan.cli import inputs
from prism_plan.cli.migration_options import ReviewOptions, review_options
from prism_plan.cli.options_dataclass import CommandOptions, add_options
from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import require_integer
from runtime_adapter import log_output
from runtime_adapter.log_output import log_info, log_warning

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from runtime_adapter.transport.rendezvous import Rendezvous
    from runtime_adapter.transport.secrets import RunSecret


def log_assumed_figures(path: str, cluster: Cluster, **uses: bool) -> None:
    """Log the figures that a command uses and the cluster file does not give.

    ``uses`` as in :func:`prism_plan.assumed_figures.assumed_texts`.
    """
    inputs.log_assumed_figures(path, cluster, log=log_info, **uses)


#: The longest time that may be given: twelve days.
MAX_SECONDS = 1e6

store_option = click.option(
    "--store",
    default="127.0.0.1:29400",
    show_default=True,
    metavar="HOST:PORT",
    help="Of the run; where nobody listens, the first server starts it there.",
)

#: Who may take part in a run; of every command that connects to one.
secret_options = add_options(
    click.option(
        "--secret-file",
        metavar="FILE",
        help="16 bytes or more that all servers share; readable by you alone.",
    ),
    click.option(
        "--insecure",
        is_flag=True,
        help="Without a secret, also on addresses that other machines reach.",
    ),
)

log_options = add_options(
    click.option(
        "--log-level",
        type=click.Choice(log_output.LEVELS),
        default="info",
        show_default=True,
        help="Least important lines that are written.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(log_output.FORMATS),
        default="text",
        show_default=True,
        help="json: an object a line.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class LogOptions(CommandOptions):
    """The values of :data:`log_options`."""

    log_level: log_output.Level
    log_format: log_output.Format

    def configure_log(self, server: str | None = None) -> None:
        """Write this process's lines in this way from now on."""
        log_output.configure(self.log_level, self.log_format, server)


@dataclass(frozen=True, kw_only=True)
class SecretOptions(LogOptions):
    """The values of :data:`secret_options`, of a command that has log options as well."""

    secret_file: str | None
    insecure: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.secret_file is not None:
            self.refuse("insecure", found="has no effect with ``secret_file``")

    def secret(self) -> RunSecret:
        """The secret of the run.

        Raises
        ------
        InputError
            The file cannot be used.
        """
        from runtime_adapter.transport.secrets import NO_SECRET, read_secret

        return NO_SECRET if self.secret_file is None else read_secret(self.secret_file)

    def require_secret_for(self, *hosts: str) -> None:
        """Without a secret, refuse addresses that others reach, and say that all may take part.

        Raises
        ------
        InputError
            An address is not of this machine alone, and ``insecure`` is not given.
        """
        from runtime_adapter.transport.interfaces import is_loopback

        if self.secret_file is not None:
            return
        for host in hosts:
            if not self.insecure and not is_loopback(host):
                raise InputError(
                    f"missing, and other machines may reach {host:.100}",
                    parameter="secret_file",
                    expected="a secret that all servers of the run share",
                    remedy="give ``insecure`` where nobody else reaches this network",
                )
        reached = " and ".join(dict.fromkeys(hosts))
        log_warning(
            f"NO SECRET: without --secret-file whoever reaches {reached} can take part in this "
            "run, and change it"
        )


#: Options of every command that joins a run as a server.
rendezvous_options = add_options(
    click.option("--server", required=True, metavar="NAME", help="This server's name."),
    store_option,
    click.option("--interface", default="lo", show_default=True, help="Interface of the links."),
    click.option(
        "--listen-port",
        default=0,
        show_default=True,
        metavar="PORT",
        help="Of this server's worker; 0: any that is free.",
    ),
    secret_options,
    click.option(
        "--timeout",
        "timeout_s",
        default=10.0,
        show_default=True,
        metavar="S",
        help="Seconds without an answer after which a server is not called any more.",
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
        "--request-timeout",
        "request_timeout_s",
        default=600.0,
        show_default=True,
        metavar="S",
        help="Longest wait of a request for servers that do not answer and are not given up.",
    ),
    click.option(
        "--rtt-ms", default=0.0, show_default=True, help="Artificial delay of every call."
    ),
    log_options,
)


#: Options of the commands that serve: whether experts move, as in `prism-plan simulate`.
migration_options = add_options(
    review_options,
    click.option("--movable", is_flag=True, help="Accept the command move, also without reviews."),
    click.option(
        "--placements-dir",
        metavar="DIR",
        help="Of the first server, where it starts the store: write placement-K.json after a move.",
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

    @property
    def migrates(self) -> bool:
        """Whether experts move also where no server was lost."""
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
        raise InputError(
            f"{text!r:.60}", parameter="store", expected="HOST:PORT, a port from 1 to 65535"
        )
    return host.strip("[]"), int(port)


@dataclass(frozen=True, kw_only=True)
class RendezvousOptions(SecretOptions):
    """The values of :data:`rendezvous_options`."""

    server: str
    store: str
    interface: str
    listen_port: int
    timeout_s: float
    rendezvous_timeout_s: float
    request_timeout_s: float
    rtt_ms: float

    def rendezvous(self, names: tuple[str, ...]) -> Rendezvous:
        """The rendezvous of a run with servers of these names; from now on lines name this one.

        Raises
        ------
        InputError
            The server is not one of them, or an option is out of range; addresses that others
            reach have no secret.
        """
        from runtime_adapter.transport.interfaces import address_of, require_interface
        from runtime_adapter.transport.rendezvous import Rendezvous

        self.configure_log(self.server)
        if self.server not in names:
            raise InputError(
                f"unknown server {self.server!r:.60}{did_you_mean(self.server, names)}",
                parameter="server",
                expected=f"one of {', '.join(names)}",
            )
        host, port = address(self.store)
        for name in ("timeout_s", "rendezvous_timeout_s", "request_timeout_s"):
            require_seconds(getattr(self, name), name)
        require_integer(self.listen_port, 0, 65535, "listen_port")
        if not 0 <= self.rtt_ms < 60_000:
            raise InputError(f"{self.rtt_ms}", parameter="rtt_ms", expected="0 to 60000")
        require_interface(self.interface)
        self.require_secret_for(host, address_of(self.interface))
        return Rendezvous(
            world_size=len(names),
            rank=names.index(self.server),
            host=host,
            port=port,
            interface=self.interface,
            timeout_s=self.timeout_s,
            rendezvous_timeout_s=self.rendezvous_timeout_s,
            secret=self.secret(),
            listen_port=self.listen_port,
        )


def require_seconds(value: float, parameter: str) -> None:
    """Refuse a time that is not above 0, or longer than anybody waits.

    Raises
    ------
    InputError
        Names the parameter.
    """
    if not 0 < value <= MAX_SECONDS:
        raise InputError(
            f"{value}",
            parameter=parameter,
            expected=f"seconds above 0, at most {MAX_SECONDS:,.0f}",
        )


@contextlib.contextmanager
def open_jsonl(path: str | None, *, append: bool = False) -> Iterator[Callable[[Any], None]]:
    """Open a file, or standard output, for one JSON value a line, each written at once.

    With ``append`` what stands in the file is kept, but for a last line that was cut.
    """
    from prism_plan.errors import OutputError

    if path is None or path == "-":

        def write(values: Any) -> None:
            print(json.dumps(values, allow_nan=False), flush=True)

        yield write
        return

    def fail(error: OSError) -> NoReturn:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error

    try:
        stream = open(path, "r+b" if append and os.path.exists(path) else "wb", buffering=0)  # noqa: SIM115
    except OSError as error:
        fail(error)
    with stream:
        if append:
            _seek_last_line(stream)

        def write(values: Any) -> None:
            line = json.dumps(values, allow_nan=False).encode() + b"\n"
            try:
                while line:
                    line = line[stream.write(line) :]
            except OSError as error:
                fail(error)

        yield write


def _seek_last_line(stream: IO[bytes]) -> None:
    """Go to the end of a file's last complete line, and cut what follows."""
    end = 0
    if stream.readable():
        for line in stream:
            if line.endswith(b"\n"):
                end += len(line)
    stream.seek(end)
    stream.truncate()
