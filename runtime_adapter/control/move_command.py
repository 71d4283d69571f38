"""Requests a move of experts from a running cluster: the work of the command `move`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from prism_plan.errors import PrismError
from runtime_adapter.control.event_log import (
    EventLog,
    NewLog,
    StoreRestartedError,
    StoreUnavailable,
)
from runtime_adapter.control.log_entries import MoveFinished, MoveRequested, SchedulerStarted
from runtime_adapter.control.store.client import StoreAddress
from runtime_adapter.transport.call_threads import run_with_timeout
from runtime_adapter.transport.failure_detector import HEARTBEAT_MARGIN_S
from runtime_adapter.transport.rendezvous import RuntimeFailure

#: How often the store is asked whether the scheduler lives.
POLL_INTERVAL_S = 1.0
#: A scheduler, or a store, that has died is started again within so long.
RESTART_S = 30.0
#: A scheduler without a sign of life yet may still be starting, for so long.
MAX_STARTUP_S = 120.0

T = TypeVar("T")


def request_move(
    address: StoreAddress, placement: Any, join_s: float,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[int, str]:  # fmt: skip
    """Ask a run to move its experts to a placement and wait for the end; returns code and text.

    ``placement`` is the parsed JSON of a placement file. The code is the command's exit code: 0
    if the experts were moved, otherwise the text says why not. The store has to answer within
    ``join_s``. ``report`` gets one line, about the first entry of the log that is skipped as
    invalid.

    Raises
    ------
    RuntimeFailure
        There is no run, it does not move experts, its store or its scheduler hangs, is gone or was
        restarted. Some experts may have moved.
    """
    move = uuid.uuid4().hex
    log = EventLog(address, f"move {move}")
    log.expect(None, report)
    try:
        timeout_s = _require_movable_run(log, address, join_s)
        log.follow()
        _take_log(log, join_s, address)
        limit_s = timeout_s + HEARTBEAT_MARGIN_S + RESTART_S
        _wait_for(partial(log.put, f"move/{move}", placement), limit_s)
        number = _wait_for(partial(log.append, MoveRequested(move)), limit_s)
        return _wait_for_end(log, move, number, limit_s)
    except StoreRestartedError as error:
        raise _store_restarted() from error
    finally:
        log.close()


def _store_restarted() -> RuntimeFailure:
    return RuntimeFailure("the store of the run was restarted; some experts may have moved")


def _wait_for(operation: Callable[[], T], limit_s: float) -> T:
    """Do what waits for the store, with a time limit."""
    try:
        return run_with_timeout(operation, limit_s)
    except TimeoutError as error:
        raise RuntimeFailure(
            f"the store of the run does not answer within {limit_s:g} s"
        ) from error


def _require_movable_run(log: EventLog, address: StoreAddress, join_s: float) -> float:
    """The timeout of the run; raises RuntimeFailure where its experts do not move."""
    deadline = time.monotonic() + join_s
    while True:
        try:
            run = log.client.run(max(deadline - time.monotonic(), 0.1))["run"]
        except StoreUnavailable as error:
            raise RuntimeFailure(
                f"``store`` {address}: {error.message}; start the store, or the first server, or "
                "check the address"
            ) from error
        if run is not None:
            break
        if time.monotonic() > deadline:
            raise RuntimeFailure(
                f"``store`` {address}: no run within {join_s:g} s; start its servers"
            )
        time.sleep(0.1)
    if run.get("movable") is not True:
        raise RuntimeFailure(
            f"``store`` {address}: a run that moves no experts; start its servers with `movable`"
        )
    return float(run["timeout_s"])


def _take_log(log: EventLog, join_s: float, address: StoreAddress) -> None:
    """Wait until the log begins, so that what is written belongs to it."""
    deadline = time.monotonic() + max(join_s, 1.0)
    while not isinstance(log.next(POLL_INTERVAL_S), NewLog):
        if time.monotonic() > deadline:
            raise RuntimeFailure(f"``store`` {address}: no log within {join_s:g} s")


def _wait_for_end(log: EventLog, move: str, number: int, limit_s: float) -> tuple[int, str]:
    observed_s = answered_s = time.monotonic()
    while True:
        entry = log.next(POLL_INTERVAL_S)
        now = time.monotonic()
        match entry:
            case MoveFinished() if entry.move == move:
                return entry.code, entry.text
            case NewLog():
                raise _store_restarted()
            case SchedulerStarted() if entry.number > number:
                # the one before may have taken the request with it
                number = _wait_for(partial(log.append, MoveRequested(move)), limit_s)
        if log.responds:
            answered_s = now
        elif now - answered_s > limit_s:
            raise RuntimeFailure(
                f"the store of the run has not answered for {limit_s:g} s; the run may continue, "
                "and some experts may have moved"
            )
        if now >= observed_s + POLL_INTERVAL_S:
            observed_s = now
            _require_scheduler(log, limit_s)


def _require_scheduler(log: EventLog, limit_s: float) -> None:
    """Raise RuntimeFailure if the store has not heard of the scheduler for too long."""
    try:
        status = log.client.status(POLL_INTERVAL_S)
    except PrismError:
        return  # the store is away
    silent_s, begun_s = status["scheduler"]["silent_s"], status["begun_s"] or 0.0
    if silent_s is None:
        silent_s, limit_s = begun_s, MAX_STARTUP_S
    if silent_s > limit_s:
        raise RuntimeFailure(
            f"the scheduler of the run has sent no heartbeat for {limit_s:g} s; the run "
            "continues, and some experts may have moved"
        )
