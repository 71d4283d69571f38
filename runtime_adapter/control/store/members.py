"""Signs of life of a run's members: who was heard when, and who says that whom does not answer.

A member is lost if its worker has been silent for the run's timeout *and* another member, which is
heard, gets no answer from it either. So a store that is cut off from all of them loses nobody, and
neither does a member that is cut off from the store alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_plan.errors import InputError
from runtime_adapter.control.store.log_state import LogState
from runtime_adapter.control.store.messages import count_in, list_in, text_in

#: The most that counts of one gap between observations: a store that was stopped itself, or its
#: machine, has seen no silence meanwhile.
MAX_GAP_S = 0.5
MAX_REQUESTS = 1 << 40
MAX_ERROR = 400


class ObservedClock:
    """Seconds for which this process has watched: those of a pause of its own count little."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = now()
        self._seconds = 0.0

    def __call__(self) -> float:
        now = self._now()
        self._seconds += min(max(now - self._last, 0.0), MAX_GAP_S)
        self._last = now
        return self._seconds


@dataclass
class _Signs:
    """Signs of life of one server; times by the clock of :class:`Members`, ``None`` for never."""

    worker_s: float | None = None
    driver_s: float | None = None
    state_since_s: float = 0.0
    state: str = "absent"
    info: dict[str, Any] = field(default_factory=dict)


class Members:
    """Signs of life of all servers of a run; ``now`` is an :class:`ObservedClock`."""

    def __init__(self, servers: Sequence[str], timeout_s: float, now: Callable[[], float]) -> None:
        self._servers = servers
        self._timeout_s = timeout_s
        self._now = now
        self._signs = [_Signs(state_since_s=now()) for _ in servers]

    def hear_worker(self, server: int) -> None:
        """The current incarnation of a server's worker lives."""
        self._signs[server].worker_s = self._now()

    def hear_driver(self, server: int, info: dict[str, Any]) -> None:
        """A server's driver lives, and says this."""
        self._signs[server].driver_s = self._now()
        self._signs[server].info = info

    def worker_silent_s(self, server: int) -> float | None:
        """Seconds since a server's worker was heard."""
        return self._since(self._signs[server].worker_s)

    def alive(self, server: int, within_s: float | None = None) -> bool:
        """Whether worker or driver was heard within a time, the run's timeout by default."""
        limit_s = self._timeout_s if within_s is None else within_s
        signs = self._signs[server]
        return any(
            time_s is not None and self._now() - time_s <= limit_s
            for time_s in (signs.worker_s, signs.driver_s)
        )

    def lost(self, state: LogState, begun: bool) -> Iterator[tuple[int, str]]:
        """Servers that are lost now, each with the reason.

        Also those that were up before the store was restarted, if the run has ``begun``, and have
        not joined since.
        """
        for server, member in enumerate(state.members):
            if member.state == "up":
                silent_s = self._since(self._signs[server].worker_s)
                is_silent = silent_s is not None and silent_s > self._timeout_s
                found = f"no heartbeat for {silent_s or 0.0:.1f} s"
            else:
                absent_s = self._now() - self._signs[server].state_since_s
                is_silent = member.state == "absent" and begun and absent_s > 2 * self._timeout_s
                found = "it has not joined since the store was restarted"
            if is_silent and (witnesses := self._witnesses(server, state)):
                names = " and ".join(repr(self._servers[n]) for n in witnesses[:3])
                yield server, f"{found}, and no answer to {names}"

    def _witnesses(self, server: int, state: LogState) -> list[int]:
        """Other members that are up and heard, and get no answer from a server."""
        return [
            n
            for n, signs in enumerate(self._signs)
            if n != server
            and state.members[n].state == "up"
            and signs.driver_s is not None
            and self._now() - signs.driver_s <= self._timeout_s
            and server in signs.info.get("suspects", ())
        ]

    def note_states(self, state: LogState) -> None:
        """Remember since when each server is in its state, and forget silence before it joined."""
        for signs, member in zip(self._signs, state.members, strict=True):
            if signs.state != member.state:
                signs.state, signs.state_since_s = member.state, self._now()

    def describe(self, server: int) -> dict[str, Any]:
        """What the store says of a server beside what the log does."""
        signs = self._signs[server]
        is_joining = signs.state == "absent" and self.alive(server)
        return {
            **({"state": "joining"} if is_joining else {}),
            "since_s": self._now() - signs.state_since_s,
            "worker_silent_s": self._since(signs.worker_s),
            "driver_silent_s": self._since(signs.driver_s),
            "info": signs.info,
        }

    def _since(self, time_s: float | None) -> float | None:
        return None if time_s is None else self._now() - time_s


def read_driver_info(values: Any, num_servers: int) -> dict[str, Any]:
    """Check what a driver says with its heartbeat.

    Raises
    ------
    InputError
        A value is out of range.
    """
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60}", place="info", expected="an object")
    info: dict[str, Any] = {}
    if "suspects" in values:
        suspects = list_in(values, "suspects", num_servers)
        if not all(type(n) is int and 0 <= n < num_servers for n in suspects):
            raise InputError(f"{suspects!r:.60}", place="suspects", expected="servers of the run")
        info["suspects"] = suspects
    if "requests" in values:
        requests = values["requests"]
        if not isinstance(requests, dict):
            raise InputError(f"{requests!r:.60}", place="requests", expected="an object")
        info["requests"] = {
            name: count_in(requests, name, MAX_REQUESTS) for name in ("running", "done", "failed")
        }
    if "finished" in values:
        if type(values["finished"]) is not bool:
            raise InputError(f"{values['finished']!r:.60}", place="finished", expected="a boolean")
        info["finished"] = values["finished"]
    if values.get("error") is not None:
        info["error"] = text_in(values, "error", MAX_ERROR * 10, empty=True)[:MAX_ERROR]
    return info
