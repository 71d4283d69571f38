"""Who is told that servers come and go, as the log says it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from runtime_adapter.control.log_entries import HeldExpert, NewLog


class Members(Protocol):
    """What a process does when servers, its own one too, come and go; called by one thread."""

    def joined(self, server: int, incarnation: int, address: tuple[str, int]) -> None:
        """A server is up, and its worker answers at an address."""

    def down(self, server: int, incarnation: int, reason: str) -> None:
        """A server is not used any more, until it joins anew."""

    def left(self, server: int) -> None:
        """A server has left in good order."""


class NoMembers:
    """A :class:`Members` that does nothing."""

    def joined(self, server: int, incarnation: int, address: tuple[str, int]) -> None:
        """Nothing."""

    def down(self, server: int, incarnation: int, reason: str) -> None:
        """Nothing."""

    def left(self, server: int) -> None:
        """Nothing."""


class MemberStates:
    """Who is up in the log that is followed, with the incarnation of each server.

    A server that a new log does not know yet, for it has not joined there, keeps the state that it
    had before: it may well be up, and the store was restarted.
    """

    def __init__(self, num_servers: int, members: Members) -> None:
        self.incarnations = [0] * num_servers
        self.up: set[int] = set()
        self._members = members

    def begin(self, new: NewLog) -> tuple[dict[int, list[HeldExpert]], list[int]]:
        """Take over what a new log begins with.

        Returns
        -------
        tuple
            What each server that is up holds, and the servers that are down or have left; those in
            neither have not joined yet.
        """
        up: dict[int, list[HeldExpert]] = {}
        down: list[int] = []
        self.up = set()
        for server, member in enumerate(new.members[: len(self.incarnations)]):
            self.incarnations[server] = int(member["incarnation"])
            match member["state"]:
                case "up":
                    host, port = member["address"]
                    up[server] = []
                    self.join(server, self.incarnations[server], (str(host), int(port)))
                case "down":
                    down.append(server)
                    self._members.down(server, self.incarnations[server], "it was lost before")
                case "left":
                    down.append(server)
                    self._members.left(server)
        for server, gpu, pair, slot in new.held:
            if server in up:
                up[server].append(HeldExpert(gpu, pair, slot))
        return up, down

    def join(self, server: int, incarnation: int, address: tuple[str, int]) -> None:
        """A server has joined."""
        self.incarnations[server] = incarnation
        self.up.add(server)
        self._members.joined(server, incarnation, address)

    def end(self, server: int, incarnation: int, reason: str | None) -> bool:
        """A server is down for a reason, or has left (``None``); false if that is long past."""
        if incarnation < self.incarnations[server]:
            return False
        self.incarnations[server] = incarnation
        self.up.discard(server)
        if reason is None:
            self._members.left(server)
        else:
            self._members.down(server, incarnation, reason)
        return True


def pairs_of(held: Iterable[HeldExpert]) -> list[tuple[int, int]]:
    """(GPU, pair) of each expert."""
    return [(expert.gpu, expert.pair) for expert in held]
