"""How a server leaves its run: not before the others have no more need of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from prism_plan.errors import PrismError
from runtime_adapter.control.store.client import StoreClient
from runtime_adapter.peer_table import PeerTable
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.transport.failure_detector import HEARTBEAT_MARGIN_S

#: Between two questions to the store.
POLL_INTERVAL_S = 0.1
#: The store gets so long for an answer, and for the last word.
ANSWER_TIMEOUT_S, LEAVE_TIMEOUT_S = 5.0, 2.0
#: A scheduler that is silent for so long beyond the timeout is not waited for at the end: it is
#: started again within that time.
SCHEDULER_MARGIN_S = 30.0


class Leaving:
    """Waits until one server may leave; ``report`` gets lines for its log.

    ``migrating`` says whether a migration is in progress, as far as this server knows.
    """

    def __init__(
        self, config: ServerConfig, client: StoreClient, peers: PeerTable,
        report: Callable[[str], None], migrating: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._rank = config.rendezvous.rank
        self._limit_s = config.rendezvous.timeout_s + HEARTBEAT_MARGIN_S
        self._request_timeout_s = config.request_timeout_s
        self._client = client
        self._peers = peers
        self._report = report
        self._migrating = migrating
        self._hung: set[int] = set()

    def wait_for_others(self, stopped: threading.Event) -> bool:
        """Wait for the others, and tell the store; returns whether there is one.

        These are every other server that is not down, and a migration in progress, as the store has
        it. Without a store the other servers say by themselves whether they have finished; who says
        nothing is not waited for beyond the timeout.
        """
        answered_s = time.monotonic()
        while True:
            try:
                status = self._client.status(min(self._limit_s, ANSWER_TIMEOUT_S))
            except PrismError:
                silent_s = time.monotonic() - answered_s
                if silent_s > self._request_timeout_s or (
                    silent_s > self._limit_s and not self._peers_need_this_server()
                ):
                    return False
            else:
                answered_s = time.monotonic()
                if self._may_leave(status):
                    break
            stopped.wait(POLL_INTERVAL_S)
        with contextlib.suppress(PrismError):
            self._client.leave(self._rank, self._peers.incarnation, LEAVE_TIMEOUT_S)
        return True

    def _peers_need_this_server(self) -> bool:
        return any(peer.usable and not peer.finished for peer in self._peers.peers.values())

    def _may_leave(self, status: dict[str, Any]) -> bool:
        for n, member in enumerate(status["members"]):
            if n == self._rank or member["state"] in ("down", "left"):
                continue
            if member["info"].get("finished"):
                continue
            driver_silent_s = member["driver_silent_s"]
            absent = member["state"] == "absent" and member["since_s"] > self._limit_s
            if absent and not self._peers.peers[n].usable:
                continue
            if driver_silent_s is not None and driver_silent_s > self._limit_s:
                self._note_hung(n, member)
                continue
            return False
        scheduler_silent_s = status["scheduler"]["silent_s"]
        return not (
            self._migrating()
            and scheduler_silent_s is not None
            and scheduler_silent_s < self._limit_s + SCHEDULER_MARGIN_S
        )

    def _note_hung(self, n: int, member: dict[str, Any]) -> None:
        if n not in self._hung and member["state"] == "up":
            self._hung.add(n)
            self._report(
                f"server {member['name']!r}: the process that serves its requests sent no "
                f"heartbeat for {self._limit_s:g} s; they are no longer waited for"
            )
