"""The signs of life that a worker sends to the store for its server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from prism_plan.errors import PrismError
from runtime_adapter.control.store.client import StoreClient


def send_heartbeats(
    client: StoreClient, server: int, incarnation: Callable[[], int],
    on_answer: Callable[[int, str], None], interval_s: float, ended: threading.Event,
) -> None:  # fmt: skip
    """Send heartbeats until ``ended`` is set; none while ``incarnation`` is 0: it has not joined.

    ``on_answer`` gets the incarnation of each one and what the store says of it: "up", "down"
    (also by a store that was restarted), "replaced" or "left". A store that is away is no error.
    """
    while not ended.wait(interval_s):
        current = incarnation()
        if current == 0:
            continue
        with contextlib.suppress(PrismError):
            answer = client.heartbeat(server, current, "worker", max(4 * interval_s, 1.0))
            on_answer(current, str(answer.get("state")))
