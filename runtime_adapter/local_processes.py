"""The processes that a server's driver starts, and starts again if they die: its worker, its store.

The store is started by the first server of a run where nobody listens at the store's address.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prism_plan.cli.internal_errors import run_process
from runtime_adapter import PROGRAM
from runtime_adapter.own_store import OwnStore, somebody_listens
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.shared_status import SharedStatus
from runtime_adapter.transport.handed_sockets import receive_handed, socket_pair
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.worker_process import WorkerConfig, run_worker

#: Between two looks at whether they live.
WATCH_INTERVAL_S = 0.5
#: A worker may take so long to start, whatever the time to join: PyTorch loads slowly at times.
WORKER_START_S = 60.0
#: A process that dies more often is not started again.
MAX_DEATHS, DEATHS_WITHIN_S = 5, 60.0
#: Until the port of a store that has ended is free.
PORT_FREE_S = 1.0
#: A store that this server started gets so long to notice that all have left.
STORE_END_S = 3.0


class LocalProcesses:
    """Worker and store of one server; ``report`` gets a line about each that dies.

    ``accept`` gets connections of the worker's port that are for this process, with the name of the
    server that dialled each.

    ``incarnation`` gives the server's last one, 0 if it has not joined yet. With ``leaving`` the
    run is over for this server, and a store that ends is not started again.
    """

    def __init__(
        self, config: ServerConfig, status: SharedStatus, incarnation: Callable[[], int],
        report: Callable[[str], None], accept: Callable[[socket.socket, str], None],
    ) -> None:  # fmt: skip
        self.leaving = False
        self._config = config
        self._status = status
        self._incarnation = incarnation
        self._report = report
        self._accept = accept
        self._own_store: OwnStore | None = None
        self._worker: Any = None
        self._stopped = threading.Event()

    @property
    def has_store(self) -> bool:
        """Whether this server has started the run's store."""
        return self._own_store is not None

    def start_store(self) -> None:
        """Start the store where nobody listens at its address; raises RuntimeFailure."""
        if not somebody_listens(self._config.store_address):
            self._own_store = OwnStore(self._config)
            self._own_store.wait_until_listening()

    def start_worker(self) -> None:
        """Start the worker and wait until it listens; raises RuntimeFailure where it does not."""
        config = self._config
        context = multiprocessing.get_context("spawn")
        ready, ready_of_worker = context.Pipe()
        from_worker, to_driver = socket_pair()
        max_lanes = max(config.facts.get("lanes", [config.num_lanes]))
        worker_config = WorkerConfig(config, self._status, max_lanes, self._incarnation())
        self._worker = context.Process(
            target=run_process,
            args=(PROGRAM, run_worker, worker_config, ready_of_worker, to_driver),
            daemon=True,
        )
        self._worker.start()
        ready_of_worker.close()
        to_driver.close()
        threading.Thread(
            target=receive_handed, args=(from_worker, self._accept), daemon=True, name="connections"
        ).start()
        timeout_s = max(config.rendezvous.rendezvous_timeout_s, WORKER_START_S)
        try:
            if not ready.poll(timeout_s):
                raise RuntimeFailure(f"its expert worker did not start within {timeout_s:g} s")
            failure = ready.recv()
        except EOFError:
            raise RuntimeFailure("the worker ended while it was starting") from None
        finally:
            ready.close()
        if failure:
            raise RuntimeFailure(failure)

    def watch(self) -> None:
        """Start those that die again, from now on."""
        threading.Thread(target=self._watch, daemon=True, name="processes").start()

    def _watch(self) -> None:
        deaths: dict[str, deque[float]] = {}

        def may_start(name: str) -> bool:
            times = deaths.setdefault(name, deque(maxlen=MAX_DEATHS))
            now = time.monotonic()
            often = len(times) == MAX_DEATHS and now - times[0] < DEATHS_WITHIN_S
            times.append(now)
            if often:
                self._report(
                    f"{name} has ended, as it did {MAX_DEATHS} times within {DEATHS_WITHIN_S:g} "
                    "s: it is not started again"
                )
            else:
                self._report(f"{name} has ended; it is started again")
            return not often

        watches_worker, watches_store = True, self._own_store is not None
        while not self._stopped.is_set() and (watches_worker or watches_store):
            multiprocessing.connection.wait([self._worker.sentinel], WATCH_INTERVAL_S)
            if self._stopped.is_set():
                return
            if watches_worker and not self._worker.is_alive():
                watches_worker = may_start("its worker")
                if watches_worker:
                    try:
                        self.start_worker()
                    except RuntimeFailure as error:
                        self._report(f"its worker did not start: {error.message}")
            elif not watches_worker:
                self._stopped.wait(WATCH_INTERVAL_S)
            if watches_store and self._own_store is not None and self._own_store.ended:
                if self.leaving:
                    return
                watches_store = may_start("its store")
                if watches_store:
                    self._stopped.wait(PORT_FREE_S)
                    self._own_store = OwnStore(self._config)

    def stop_watching(self) -> None:
        """Who dies from now on is not started again."""
        self._stopped.set()

    def close(self) -> None:
        """End the worker, and the store where this server has started it."""
        self.stop_watching()
        worker = self._worker
        if worker is not None and worker.is_alive():
            worker.terminate()
            worker.join(5)
            if worker.is_alive():
                worker.kill()
        if self._own_store is not None:
            self._own_store.close(STORE_END_S if self.leaving else 0.0)
