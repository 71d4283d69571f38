"""What the entries of a log have led to: who is up, who holds what, which migrations are open.

A reader that begins in the middle of the log gets it as a snapshot instead of the entries before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from runtime_adapter.control import log_entries
from runtime_adapter.control.log_entries import LogEntry

#: Experts on GPUs that a snapshot can carry, copies counted, and of those on one server's GPUs.
MAX_HELD, MAX_HELD_BY_SERVER = 150_000, 100_000
#: Migrations that are open at the same time; there is one, and some that a restart left behind.
MAX_OPEN_PLANS = 1_000


@dataclass(frozen=True)
class LoggedMember:
    """A server as the log knows it; ``state`` is "absent", "up", "down" or "left"."""

    state: str = "absent"
    incarnation: int = 0
    address: tuple[str, int] | None = None


class LogState:
    """The state after an entry of a log.

    ``servers`` are the names of the run's servers, ``gpus`` the number of GPUs of each. ``number``
    is that of the last entry, -1 at the beginning. ``held`` has the slot of each (GPU, pair) of
    servers that are up, GPUs counted over all servers.
    """

    def __init__(self, servers: Sequence[str], gpus: Sequence[int]) -> None:
        self.servers = tuple(servers)
        self.server_of_gpu = [n for n, count in enumerate(gpus) for _ in range(count)]
        self.number = -1
        self.members = [LoggedMember() for _ in servers]
        self.held: list[dict[tuple[int, int], int]] = [{} for _ in servers]
        self.open_plans: dict[int, None] = {}  # in the order in which they were started
        #: The execution table that began last, None where it is the first placement's.
        self.execution: list[list[int]] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogState) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_held(self) -> int:
        """Experts on GPUs, copies counted."""
        return sum(map(len, self.held))

    def apply(self, entry: LogEntry) -> None:
        """Apply the next entry; entries that change none of this only count."""
        self.number += 1
        match entry:
            case log_entries.ServerJoined():
                self.members[entry.server] = LoggedMember(
                    "up", entry.incarnation, (entry.host, entry.port)
                )
                self.held[entry.server] = {
                    (expert.gpu, expert.pair): expert.slot for expert in entry.experts
                }
            case log_entries.ServerDown():
                self._end(entry.server, entry.incarnation, "down")
            case log_entries.ServerLeft():
                self._end(entry.server, entry.incarnation, "left")
            case log_entries.ExpertsLoaded():
                for change in entry.experts:
                    server = self.server_of_gpu[change.gpu]
                    if self.members[server].state == "up":
                        self.held[server][change.gpu, change.pair] = change.slot
            case log_entries.DropsAnnounced():
                for change in entry.experts:
                    self.held[self.server_of_gpu[change.gpu]].pop((change.gpu, change.pair), None)
            case log_entries.MigrationStarted():
                self.open_plans[entry.plan] = None
                while len(self.open_plans) > MAX_OPEN_PLANS:
                    del self.open_plans[next(iter(self.open_plans))]
            case log_entries.MigrationFinished():
                self.open_plans.pop(entry.plan, None)
            case log_entries.TableBegan():
                self.execution = entry.execution

    def _end(self, server: int, incarnation: int, state: str) -> None:
        member = self.members[server]
        if incarnation >= member.incarnation:
            self.members[server] = replace(member, state=state, incarnation=incarnation)
            self.held[server] = {}

    def snapshot(self) -> dict[str, Any]:
        """The state as JSON values.

        They are ``number``, ``members``, ``held``, ``open_plans`` and ``execution``.
        """
        return {
            "number": self.number,
            "members": [
                {
                    "name": name,
                    "state": member.state,
                    "incarnation": member.incarnation,
                    "address": None if member.address is None else list(member.address),
                    "experts": len(held),
                }
                for name, member, held in zip(self.servers, self.members, self.held, strict=True)
            ],
            "held": [
                [server, gpu, pair, slot]
                for server, held in enumerate(self.held)
                for (gpu, pair), slot in held.items()
            ],
            "open_plans": list(self.open_plans),
            "execution": self.execution,
        }

    @classmethod
    def from_snapshot(cls, gpus: Sequence[int], snapshot: dict[str, Any]) -> Self:
        """The state that :meth:`snapshot` was taken of."""
        state = cls([member["name"] for member in snapshot["members"]], gpus)
        state.number = snapshot["number"]
        state.members = [
            LoggedMember(
                member["state"],
                member["incarnation"],
                None if member["address"] is None else (member["address"][0], member["address"][1]),
            )
            for member in snapshot["members"]
        ]
        for server, gpu, pair, slot in snapshot["held"]:
            state.held[server][gpu, pair] = slot
        state.open_plans = dict.fromkeys(snapshot["open_plans"])
        state.execution = snapshot["execution"]
        return state
