"""How the servers of a run find each other, and the errors of a run's parts that fail."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from prism_plan.errors import InputError, PrismError
from runtime_adapter.transport.secrets import NO_SECRET, RunSecret

#: An idle worker waits for the next call without a limit; its driver ends it.
FOREVER = datetime.timedelta(days=3650)


class RuntimeFailure(PrismError):
    """Something outside of this server failed: a port, a server, the store."""

    exit_code = 5


class NameTaken(InputError):
    """A server of that name is in the run already."""


class ServerLost(RuntimeFailure):
    """Another server no longer answers."""

    def __init__(self, server: int, name: str, reason: str) -> None:
        self.server = server
        super().__init__(f"server {name!r} is lost: {reason}")


class RequestTimeout(RuntimeFailure):
    """A step of a request has waited for other servers as long as it may."""

    def __init__(self, limit_s: float, waits_for: str) -> None:
        super().__init__(
            f"a step has waited for {limit_s:g} s (``request_timeout_s``): {waits_for}"
        )


@dataclass(frozen=True)
class Rendezvous:
    """Addresses and time limits by which the servers of a run find each other.

    ``host`` and ``port`` are of the store, which rank 0 starts where nobody listens; ``interface``
    is the network interface that connections use, ``listen_port`` where this server's worker is
    called (0: any port). A server that does not answer within ``timeout_s`` is not called any more;
    all servers have to be there within ``rendezvous_timeout_s``. Whoever has the ``secret`` can
    take part.
    """

    world_size: int
    rank: int
    host: str = "127.0.0.1"
    port: int = 29400
    interface: str = "lo"
    timeout_s: float = 10.0
    rendezvous_timeout_s: float = 60.0
    secret: RunSecret = NO_SECRET
    listen_port: int = 0

    @property
    def other_ranks(self) -> list[int]:
        """All ranks but this server's."""
        return [n for n in range(self.world_size) if n != self.rank]
