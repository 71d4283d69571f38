"""Watches the processes of a run from one server's driver, and reports those that end or hang.

Each server has a driver and a worker; the first one has the store and perhaps the scheduler too.
Heartbeats of other drivers come over their links, this server's worker's by shared memory, so both
are seen when the store is lost or hangs itself. Heartbeats of other workers and the scheduler come
through the store.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from runtime_adapter.control.failure_detector import (
    DRIVER_HEARTBEAT,
    HEARTBEAT_MARGIN_S,
    SCHEDULER_HEARTBEAT,
    WORKER_HEARTBEAT,
    FailureDetector,
)
from runtime_adapter.expert_worker import SharedStatus
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.pair_groups import send
from runtime_adapter.transport.rendezvous import FOREVER, Rendezvous, RuntimeFailure, ServerLost
from runtime_adapter.transport.tcp_store import join_store, put_json
from runtime_adapter.weights.expert_map import ExpertMap


class Watchdog:
    """Watches in threads from :meth:`start` to :meth:`stop`.

    ``report`` gets each line once. ``worker`` and ``scheduler`` are this server's processes, the
    latter None where it has none; ``migrating_run`` is whether the run has one.
    """

    def __init__(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, status: SharedStatus,
        store: dist.TCPStore, groups: dict[int, Any], worker: Any, scheduler: Any, *,
        migrating_run: bool, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._rendezvous = rendezvous
        self._expert_map = expert_map
        self._status = status
        self._store = store
        self._groups = groups
        self._worker = worker
        self._scheduler = scheduler
        self._migrating_run = migrating_run
        self._report = report
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._reported_losses: set[int] = set()
        self._hung_drivers: set[int] = set()  # their workers answer
        self._worker_alive = True
        self._store_reads = 0
        self.scheduler_responds = True
        self.store_responds = True
        self.started = False  # set when all servers have agreed on a start
        self.finishing = False  # set when this server has no more requests

    def start(self) -> None:
        """Start the threads."""
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._watch_store, daemon=True).start()
        for n in self._groups:
            threading.Thread(target=self._send_heartbeats, args=(n,), daemon=True).start()

    def stop(self) -> None:
        """End the threads."""
        self._stopped.set()

    @property
    def has_scheduler(self) -> bool:
        """Whether this server has a scheduler that has not ended."""
        return self._scheduler is not None

    @property
    def hang_timeout_s(self) -> float:
        """How long drivers, the scheduler and the store may be silent.

        Longer than workers may, so that of a server that hangs as a whole the worker is reported.
        """
        return self._rendezvous.timeout_s + HEARTBEAT_MARGIN_S

    @property
    def _interval_s(self) -> float:
        """Between two checks, and between two heartbeats."""
        return min(self._rendezvous.timeout_s / 4, 1.0)

    def _limit_s(self, heartbeat: object, timeout_s: float, *, started: bool = False) -> float:
        """How long a process may be silent; before its first heartbeat as long as it may join.

        After the start every process has run, also one that hangs before its first heartbeat.
        """
        if heartbeat or started:
            return timeout_s
        return max(timeout_s, self._rendezvous.rendezvous_timeout_s)

    def lose(self, lost: ServerLost) -> None:
        """Report that a server is lost, unless that server was reported before.

        The caller has marked it as lost in the expert map.
        """
        with self._lock:
            if lost.server in self._reported_losses:
                return
            self._reported_losses.add(lost.server)
        self._report(str(lost))

    def needed_by(self, n: int) -> bool:
        """Whether another server may still call this one's worker."""
        return not (
            self._expert_map.lost(n)
            or self._status.finished[n]
            or n in self._hung_drivers
            or not self._worker_alive
        )

    # --------------------------------------------------------------------------- without the store

    def _send_heartbeats(self, n: int) -> None:
        """Send this driver's heartbeats to another server, until one of the two ends."""
        message = torch.zeros(wire.HEADER_BYTES, dtype=torch.uint8)
        wire.put_header(message.numpy(), wire.Header(wire.HEARTBEAT))
        with contextlib.suppress(RuntimeError):
            while not self._stopped.is_set():
                send(self._groups[n], message, 1, wire.HEARTBEAT_TAG).wait(FOREVER)
                self._stopped.wait(self._interval_s)

    def _watch(self) -> None:
        detector = FailureDetector()
        while not self._stopped.wait(self._interval_s):
            self._check_scheduler_process()
            self._check_worker(detector)
            if self._worker_alive:  # the worker receives the others' heartbeats
                for n in self._groups:
                    self._check_driver(detector, n)
            if detector.silent_s("store", self._store_reads) > self.hang_timeout_s:
                self._report_hung_store()

    def _check_worker(self, detector: FailureDetector) -> None:
        """Without its worker this server is lost to the others."""
        if not self._worker_alive:
            return
        heartbeat = self._status.heartbeats[self._rendezvous.rank]
        if not self._worker.is_alive():
            self._worker_alive = False
            self._report("its worker has ended: the others take this server for lost")
        elif detector.silent_s(self._rendezvous.rank, heartbeat) > self.hang_timeout_s:
            self._worker_alive = False
            self._report(
                f"its worker has sent no heartbeat for {self.hang_timeout_s:g} s: the others take "
                "this server for lost"
            )

    def _check_driver(self, detector: FailureDetector, n: int) -> None:
        heartbeat, started = self._status.heartbeats[n], self.started
        limit_s = self._limit_s(heartbeat, self.hang_timeout_s, started=started)
        if (
            detector.silent_s((n, started), heartbeat) <= limit_s
            or n in self._hung_drivers
            or self._expert_map.lost(n)
            or self._status.finished[n]  # it needs no other server any more
        ):
            return
        self._hung_drivers.add(n)
        self._report(
            f"server {self._expert_map.servers[n]!r}: the process that serves its requests sent "
            f"no heartbeat for {self.hang_timeout_s:g} s; they are no longer waited for"
        )

    def _check_scheduler_process(self) -> None:
        if self._scheduler is None or self._scheduler.is_alive():
            return
        self._scheduler = None
        self.scheduler_responds = False
        self._report("the scheduler has ended: no more migrations")
        with contextlib.suppress(RuntimeFailure):
            put_json(self._store, "movable", False)  # for requests of moves from now on

    def _report_hung_store(self) -> None:
        """The worker of the store's server may answer all the same, so that server is not lost."""
        if not self.store_responds:
            return
        self.store_responds = False
        self._report(
            f"the store on {self._expert_map.servers[0]!r} does not answer for "
            f"{self.hang_timeout_s:g} s: no migrations and no log of other servers"
        )

    # --------------------------------------------------------------------------- through the store

    def _watch_store(self) -> None:
        """Send heartbeats to the store and read those of other workers and of the scheduler.

        A store that hangs blocks this thread, and so ``_store_reads`` stops counting.
        """
        detector = FailureDetector()
        try:
            store = join_store(self._rendezvous, host_it=False)
            while not self._stopped.wait(self._interval_s):
                self._store_reads += 1
                store.set(DRIVER_HEARTBEAT.format(self._rendezvous.rank), str(self._store_reads))
                for n in self._groups:
                    self._check_other_worker(detector, store, n)
                if self._migrating_run:
                    self._check_scheduler(detector, _read_heartbeat(store, SCHEDULER_HEARTBEAT))
        except (RuntimeError, RuntimeFailure):
            self._report_lost_store()

    def _check_other_worker(self, detector: FailureDetector, store: dist.TCPStore, n: int) -> None:
        heartbeat, started = _read_heartbeat(store, WORKER_HEARTBEAT.format(n)), self.started
        silent_s = detector.silent_s((n, started), heartbeat)
        # no server leaves before all have finished; until then a silent one has failed
        finished = self.finishing and store.check([f"finished/{n}"])
        limit_s = self._limit_s(heartbeat, self._rendezvous.timeout_s, started=started)
        if silent_s > limit_s and not finished and not self._expert_map.lost(n):
            self._expert_map.lose(n)
            reason = f"no heartbeat for {self._rendezvous.timeout_s:g} s"
            self.lose(ServerLost(n, self._expert_map.servers[n], reason))

    def _check_scheduler(self, detector: FailureDetector, heartbeat: bytes) -> None:
        """While the scheduler hangs no server waits for its migrations; it may recover."""
        silent_s = detector.silent_s(SCHEDULER_HEARTBEAT, heartbeat)
        responds = silent_s <= self._limit_s(heartbeat, self.hang_timeout_s)
        if self._rendezvous.rank == 0 and self._scheduler is None:
            return  # it has ended, which was reported
        if self.scheduler_responds and not responds and self._rendezvous.rank == 0:
            self._report(
                f"the scheduler has sent no heartbeat for {self.hang_timeout_s:g} s: no migrations "
                "until it does"
            )
        self.scheduler_responds = responds

    def _report_lost_store(self) -> None:
        if self._rendezvous.rank == 0 or self._stopped.is_set():
            return
        host = self._expert_map.servers[0]
        self.store_responds = False
        if self.finishing and self._status.finished[0]:
            return  # its server has left in good order; neither needs the other any more
        self._report(f"the store on {host!r} is lost: no migrations and no log of other servers")
        if not self._expert_map.lost(0):
            self._expert_map.lose(0)
            self.lose(ServerLost(0, host, "it hosts the store, which is gone"))


def _read_heartbeat(store: dist.TCPStore, key: str) -> bytes:
    """A heartbeat, empty before the first one."""
    return bytes(store.get(key)) if store.check([key]) else b""
