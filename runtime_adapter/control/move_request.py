"""Asking a run to move its experts: for whoever is not one of its servers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from runtime_adapter.control.event_log import BEAT, EventLog, StoreLost
from runtime_adapter.control.liveness import BEAT_GRACE_S, SignsOfLife
from runtime_adapter.transport.rendezvous import (
    Rendezvous,
    RuntimeFailure,
    ask_store,
    get,
    get_number,
)

#: Between two looks at whether the scheduler lives.
POLL_INTERVAL_S = 1.0
#: A scheduler that has given no sign of life yet may still be starting.
START_S = 120.0


def ask(
    rendezvous: Rendezvous, placement: Any, report: Callable[[str], None] = lambda text: None
) -> tuple[int, str]:
    """Ask for a placement (its JSON), wait until that is over: exit code and what happened.

    ``report`` is told of entries of the log that are skipped.

    Raises
    ------
    RuntimeFailure
        There is no run, it does not move experts, it ended meanwhile, its store or its scheduler
        hangs or is gone.
    """
    name = uuid.uuid4().hex
    log = EventLog(rendezvous, f"move {name}")
    log.expect(None, report)
    try:
        if get(log.store, "movable", rendezvous.rendezvous_timeout_s) is not True:
            raise RuntimeFailure(
                f"``store`` {rendezvous.host}:{rendezvous.port}: a run that moves no experts; "
                "start its servers with `movable`"
            )
        timeout_s = get_number(
            log.store, "timeout", rendezvous.rendezvous_timeout_s, 1e9, whole=False
        )
        ask_store(partial(log.put, f"move/{name}", placement))
        log.follow()
        ask_store(partial(log.tell, "move", move=name))
        signs = SignsOfLife()
        looked_s = time.monotonic()
        while True:
            entry = log.next(POLL_INTERVAL_S)
            if entry is not None and entry.what == "moved" and entry["move"] == name:
                return int(entry["code"]), str(entry["text"])
            if time.monotonic() < looked_s + POLL_INTERVAL_S:
                continue
            looked_s = time.monotonic()
            sign, there = ask_store(partial(_look, log), timeout_s + BEAT_GRACE_S)
            limit_s = timeout_s + BEAT_GRACE_S if sign else START_S
            if not there:
                raise RuntimeFailure(
                    "the scheduler of the run has ended; some experts may have moved"
                )
            if signs.silent_s(BEAT, sign) > limit_s:
                raise RuntimeFailure(
                    f"the scheduler of the run gives no sign of life for {limit_s:g} s; the run "
                    "goes on, and some experts may have moved"
                )
    except StoreLost as error:
        raise RuntimeFailure("the run ended before the move did") from error


def _look(log: EventLog) -> tuple[bytes, bool]:
    """The scheduler's last sign of life, and whether there is one as far as its server knows."""
    beat = log.get_bytes(BEAT) if log.there(BEAT) else b""
    return beat, log.get("movable") is True
