"""Finds servers of a run that are lost or hang, for the scheduler."""

from __future__ import annotations

from collections.abc import Iterator

from runtime_adapter.control.failure_detector import (
    DRIVER_HEARTBEAT,
    HEARTBEAT_MARGIN_S,
    WORKER_HEARTBEAT,
    FailureDetector,
)
from runtime_adapter.control.run_state import RunState

#: How often heartbeats are read.
CHECK_INTERVAL_S = 0.25


class ServerMonitor:
    """Keeps ``alive``, ``hung`` and ``all_finished`` of a run's state up to date."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._detector = FailureDetector(state.now)
        self._checked_s = 0.0

    def due(self) -> bool:
        """Whether heartbeats should be read again; true once an interval."""
        now = self._state.now()
        if now - self._checked_s < CHECK_INTERVAL_S:
            return False
        self._checked_s = now
        return True

    def check(self) -> Iterator[str]:
        """Read all heartbeats; yields a line about each server that is newly lost, or hangs."""
        state = self._state
        state.all_finished = state.log.has(*(f"finished/{n}" for n in state.alive))
        timeout_s = state.config.rendezvous.timeout_s
        for n in list(state.alive):
            if self._silent_s(WORKER_HEARTBEAT.format(n)) > timeout_s:
                state.alive.remove(n)
                state.hung.discard(n)
                state.expert_map.lose(n)
                yield f"server {state.config.placement.servers[n]!r} is lost"
            elif state.log.has(DRIVER_HEARTBEAT.format(n)) and (
                self._silent_s(DRIVER_HEARTBEAT.format(n)) > timeout_s + HEARTBEAT_MARGIN_S
            ):
                state.hung.add(n)
                yield state.hung_text(n)
            else:
                state.hung.discard(n)

    def unchanged_s(self, subject: object, value: object) -> float:
        """For how long any other value that shows progress has not changed."""
        return self._detector.silent_s(subject, value)

    def _silent_s(self, key: str) -> float:
        log = self._state.log
        return self._detector.silent_s(key, log.get_bytes(key) if log.has(key) else b"")
