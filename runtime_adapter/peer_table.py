"""The other servers of a run, as one process of a server sees them and as the log has them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from runtime_adapter.server_config import ServerConfig
from runtime_adapter.transport.peer import Peer
from runtime_adapter.weights.expert_map import ExpertMap

#: Between two looks whether a server's address is known.
ADDRESS_POLL_S = 0.01

Address = tuple[str, int]


class PeerTable:
    """A :class:`Peer` for each other server, by rank; whoever follows the log keeps it up to date.

    Where peers are to be watched (:meth:`watch`), those that do not answer are suspect in
    ``expert_map``. ``report`` gets a line about each that goes or comes.
    """

    def __init__(
        self, config: ServerConfig, expert_map: ExpertMap,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        rendezvous = config.rendezvous
        self._rank = rendezvous.rank
        self._timeout_s = rendezvous.timeout_s
        self._servers = config.placement.servers
        self._expert_map = expert_map
        self._report = report
        self._down: set[int] = set()
        #: Of this server's worker, 0 before it has joined.
        self.incarnation = 0
        self.peers = {
            n: Peer(
                config.name,
                self._servers[n],
                rendezvous.secret,
                rendezvous.timeout_s,
                partial(self._suspect, n),
                partial(self._unsuspect, n),
            )
            for n in rendezvous.other_ranks
        }

    def watch(self) -> None:
        """Begin to ping all servers that have an address."""
        for peer in self.peers.values():
            peer.start()

    def close(self) -> None:
        """End the pings."""
        for peer in self.peers.values():
            peer.close()

    @property
    def silent(self) -> list[int]:
        """The servers that do not answer this one, or are down as the log has it."""
        return [n for n, peer in self.peers.items() if peer.suspect or self._expert_map.lost(n)]

    def wait_for_address(self, n: int, limit_s: float | None = None) -> None:
        """Wait until the log has said where a server is, which it may be about to at the start.

        No longer than ``limit_s``, or the timeout, and not for one that is suspect or down.
        """
        limit_s = self._timeout_s if limit_s is None else limit_s
        peer, deadline = self.peers[n], time.monotonic() + limit_s
        while not (peer.usable or peer.suspect or n in self._down):
            if time.monotonic() > deadline:
                return
            time.sleep(ADDRESS_POLL_S)

    def is_down(self, n: int) -> bool:
        """Whether the log says that a server is down, or it has left."""
        return n in self._down

    @property
    def lost_names(self) -> list[str]:
        """Names of the servers that are down, or do not answer although they have not finished."""
        return [
            self._servers[n]
            for n, peer in self.peers.items()
            if n in self._down or (peer.suspect and not peer.finished)
        ]

    def _suspect(self, n: int, reason: str) -> None:
        self._expert_map.suspect(n)
        if not self.peers[n].finished:  # it may have left
            self._report(f"server {self._servers[n]!r} is suspect: {reason}")

    def _unsuspect(self, n: int) -> None:
        self._expert_map.unsuspect(n)
        if self.peers[n].usable:  # not where it is down, or has left
            self._report(f"server {self._servers[n]!r} answers again")

    # --------------------------------------------------------------------------- what the log says

    def joined(self, server: int, incarnation: int, address: Address) -> None:
        """A server is up, and its worker answers at an address."""
        if server == self._rank:
            self.incarnation = max(self.incarnation, incarnation)
            return
        if server in self._down:
            self._down.discard(server)
            self._report(f"server {self._servers[server]!r} has joined again")
        self.peers[server].set_address(address, incarnation)

    def down(self, server: int, incarnation: int, reason: str) -> None:
        """An incarnation of a server is not used any more."""
        if server == self._rank:
            return
        if server not in self._down:  # a log that begins anew says it once more
            self._report(f"server {self._servers[server]!r} is down: {reason}")
        self._down.add(server)
        self.peers[server].set_address(None, incarnation)

    def left(self, server: int) -> None:
        """A server has left in good order."""
        if server != self._rank:
            self.peers[server].set_address(None, 0)
