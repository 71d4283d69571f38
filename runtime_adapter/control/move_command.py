"""Requests a move of experts from a running cluster: the work of the command `move`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from runtime_adapter.control.event_log import EventLog, StoreLost
from runtime_adapter.control.failure_detector import (
    HEARTBEAT_MARGIN_S,
    SCHEDULER_HEARTBEAT,
    FailureDetector,
)
from runtime_adapter.control.log_entries import MoveFinished, MoveRequested
from runtime_adapter.transport.rendezvous import Rendezvous, RuntimeFailure
from runtime_adapter.transport.tcp_store import call_store, wait_for_json, wait_for_number

#: How often the scheduler's heartbeat is read.
POLL_INTERVAL_S = 1.0
#: A scheduler without a heartbeat yet may still be starting, for so long.
MAX_STARTUP_S = 120.0


def request_move(
    rendezvous: Rendezvous, placement: Any, report: Callable[[str], None] = lambda text: None
) -> tuple[int, str]:
    """Ask a run to move its experts to a placement and wait for the end; returns code and text.

    ``placement`` is the parsed JSON of a placement file. The code is the command's exit code: 0
    if the experts were moved, otherwise the text says why not. ``report`` gets one line, about
    the first entry of the log that is skipped as invalid.

    Raises
    ------
    RuntimeFailure
        There is no run, it does not move experts, it ended meanwhile, its store or its scheduler
        hangs or is gone. Some experts may have moved.
    """
    move = uuid.uuid4().hex
    log = EventLog(rendezvous, f"move {move}")
    log.expect(None, report)
    join_s = rendezvous.rendezvous_timeout_s
    try:
        if wait_for_json(log.store, "movable", join_s) is not True:
            raise RuntimeFailure(
                f"``store`` {rendezvous.host}:{rendezvous.port}: a run that moves no experts; "
                "start its servers with `movable`"
            )
        timeout_s = wait_for_number(log.store, "timeout", join_s, 1e9, whole=False)
        silence_limit_s = timeout_s + HEARTBEAT_MARGIN_S
        call_store(partial(log.put, f"move/{move}", placement))
        log.follow()
        call_store(partial(log.append, MoveRequested(move)))
        detector = FailureDetector()
        observed_s = time.monotonic()
        while True:
            entry = log.next(POLL_INTERVAL_S)
            if isinstance(entry, MoveFinished) and entry.move == move:
                return entry.code, entry.text
            if time.monotonic() < observed_s + POLL_INTERVAL_S:
                continue
            observed_s = time.monotonic()
            heartbeat, running = call_store(partial(_observe_scheduler, log), silence_limit_s)
            limit_s = silence_limit_s if heartbeat else MAX_STARTUP_S
            if not running:
                raise RuntimeFailure(
                    "the scheduler of the run has ended; some experts may have moved"
                )
            if detector.silent_s(SCHEDULER_HEARTBEAT, heartbeat) > limit_s:
                raise RuntimeFailure(
                    f"the scheduler of the run has sent no heartbeat for {limit_s:g} s; the run "
                    "continues, and some experts may have moved"
                )
    except StoreLost as error:
        raise RuntimeFailure("the run ended before the move did") from error


def _observe_scheduler(log: EventLog) -> tuple[bytes, bool]:
    """The scheduler's heartbeat, and whether its process runs as far as its server knows."""
    started = log.has(SCHEDULER_HEARTBEAT)
    heartbeat = log.get_bytes(SCHEDULER_HEARTBEAT) if started else b""
    return heartbeat, log.get("movable") is True
