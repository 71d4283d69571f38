"""Reads from the store what the log does not say: which drivers hang, and which have finished."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prism_plan.errors import PrismError
from runtime_adapter.control.run_state import RunState
from runtime_adapter.transport.failure_detector import HEARTBEAT_MARGIN_S, FailureDetector

#: How often the store is asked, and how long its answer is waited for.
CHECK_INTERVAL_S = 0.5
ANSWER_S = 2.0


class ServerMonitor:
    """Keeps ``begun``, ``start_s``, ``hung`` and ``all_finished`` of a run's state up to date."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._detector = FailureDetector(state.now)
        self._checked_s = -CHECK_INTERVAL_S

    def due(self) -> bool:
        """Whether the store should be asked again; true once an interval."""
        now = self._state.now()
        if now - self._checked_s < CHECK_INTERVAL_S:
            return False
        self._checked_s = now
        return True

    def check(self) -> Iterator[str]:
        """Ask the store; yields a line about each driver that hangs."""
        state = self._state
        try:
            status = state.log.client.status(ANSWER_S)
            begun_s, members = status["begun_s"], status["members"]
            if begun_s is not None and not state.begun:
                state.begun = True
                if state.start_s is None:
                    state.start_s = state.now() - float(begun_s)
            of_alive = [(n, members[n]) for n in state.alive]
        except (PrismError, LookupError, TypeError, ValueError):
            return  # the store is away
        state.all_finished = bool(of_alive) and all(
            member["info"].get("finished", False) for _, member in of_alive
        )
        for n, member in of_alive:
            if self._hangs(member):
                state.hung.add(n)
                yield state.hung_text(n)
            else:
                state.hung.discard(n)

    def _hangs(self, member: dict[str, Any]) -> bool:
        """Whether a server's worker is heard and its driver, once heard, is not any more."""
        timeout_s = self._state.config.timeout_s
        driver_s, worker_s = member["driver_silent_s"], member["worker_silent_s"]
        return (
            driver_s is not None
            and driver_s > timeout_s + HEARTBEAT_MARGIN_S
            and worker_s is not None
            and worker_s <= timeout_s
            and not member["info"].get("finished", False)
        )

    def unchanged_s(self, subject: object, value: object) -> float:
        """For how long any value that shows progress has not changed."""
        return self._detector.silent_s(subject, value)
