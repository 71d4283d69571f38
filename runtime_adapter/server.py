"""A server of a run, in its driver process: its start, its place among the others, its end.

The driver starts the server's worker and, on the first server, the store where there is none. It
pings all other servers' workers, tells the store whom it suspects, and follows the log.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from prism_plan.errors import PrismError
from prism_plan.io.json import parse_json
from prism_plan.io.placement import placement_to_json
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_follower import LogFollower, older_incarnation
from runtime_adapter.control.store.client import StoreClient
from runtime_adapter.joining import Joining
from runtime_adapter.leaving import Leaving
from runtime_adapter.local_processes import LocalProcesses
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.router import Router
from runtime_adapter.peer_table import PeerTable
from runtime_adapter.request_counts import RequestCounts
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.shared_status import SharedStatus
from runtime_adapter.spans.path_requests import PathRequests
from runtime_adapter.spans.span_server import SpanServer
from runtime_adapter.spans.span_work import SpanWork
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.connection import Connection, NcclConnection
from runtime_adapter.transport.failure_detector import HEARTBEAT_MARGIN_S
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.transport.send_queue import SendQueue
from runtime_adapter.weights.expert_map import ExpertMap

#: Between two heartbeats of the driver, at most.
HEARTBEAT_INTERVAL_S = 0.5
#: The log may take so long to tell where the others are, once all have joined.
FIRST_ADDRESSES_S = 1.0
#: Others get so long to read from a store that ends with this server why it does not join.
READ_S = 1.5


class LocalServer:
    """Takes part in a run as one of its servers, as a context.

    ``lanes`` are the dispatchers of the requests that run at once; ``requests`` counts them.
    ``report`` gets lines for this server's log. ``fill`` loads the experts that the placement gives
    this server; it is called where the run begins. A server that joins a run that has begun
    (``joined_later``) has none, and gets what it needs by a migration. ``work`` computes layers
    that execute here for requests of other homes; without it none do.

    Raises
    ------
    RuntimeFailure
        A port is in use, there is no store, or the worker did not start.
    NameTaken
        The run has a server of that name, which is alive.
    InputError
        The servers do not agree on what they run.
    """

    def __init__(
        self, config: ServerConfig, report: Callable[[str], None],
        fill: Callable[[], None] = lambda: None, work: SpanWork | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.rank = config.rendezvous.rank
        self.name = config.name
        self.report = report
        self.expert_map = ExpertMap(config.placement)
        self.counters = Counters(config.model.num_layers, config.model.num_experts)
        self.requests = RequestCounts()
        self.lanes: list[RemoteDispatcher] = []
        self.joined_later = False
        self._fill = fill
        self._client = StoreClient(config.store_address, f"driver {self.rank}")
        self._log = EventLog(config.store_address, f"driver {self.rank}")
        self._peers = PeerTable(config, self.expert_map, report)
        self._status = SharedStatus.create()
        self._joining = Joining(config, self._client, report)
        self._processes = LocalProcesses(
            config, self._status, lambda: self._peers.incarnation, report, self._accept
        )
        self._send_queue = SendQueue()
        self.path_requests = PathRequests(config, self._peers, self.expert_map, self.counters)
        self.spans: SpanServer | None = None
        if work is not None:
            self.spans = self.path_requests.spans = SpanServer(
                config, self._peers, work, self._lanes_of_homes(), self._create_dispatcher,
                self.path_requests.deliver, report, self._send_queue,
            )  # fmt: skip
        self._follower: LogFollower | None = None
        self._finished = False
        self._has_store = True
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self._stopped.set()  # the last heartbeat is to be that which says why
            if self._joining.tell_why_not(error) and self._processes.has_store:
                time.sleep(READ_S)
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- start

    def _start(self) -> None:
        config = self.config
        if self.rank == 0:
            self._processes.start_store()
        self.joined_later = begun = self._joining.start_run()
        threading.Thread(target=self._send_heartbeats, daemon=True, name="heartbeats").start()
        if begun:
            self.expert_map.set_up(self.rank, ())
            self.report("the run has begun: this server joins without experts, and gets its own")
        else:
            self._fill()
        config.compute.use(self.expert_map)
        if config.channels is not None and config.channels.backend == "nccl":
            self._joining.require_own_card(begun)
        older = older_incarnation(self._client, self.rank)
        self._processes.start_worker()
        self.lanes = [
            self._create_dispatcher(lane, config.max_tokens, self.counters)
            for lane in range(config.num_lanes)
        ]
        self._follower = LogFollower(
            self.rank, config.placement, self.expert_map, config.compute, self.counters,
            self._all_dispatchers, self._log, self.report, self._peers, older,
            self.path_requests.begin_table, self._take_called,
        )  # fmt: skip
        self._follower.start()
        self._peers.watch()
        self._processes.watch()
        if self.spans is not None:
            self.spans.start()

    def _lanes_of_homes(self) -> list[int]:
        """The number of lanes of each server."""
        servers = self.config.rendezvous.world_size
        lanes: list[int] = self.config.facts.get("lanes", [self.config.num_lanes] * servers)
        return lanes

    def _accept(self, connection: socket.socket, server: str) -> None:
        if self.spans is None:
            connection.close()
        else:
            self.spans.accept(connection, server)

    def _all_dispatchers(self) -> list[RemoteDispatcher]:
        return [*self.lanes, *(self.spans.dispatchers if self.spans is not None else ())]

    def _take_called(self) -> npt.NDArray[np.int64]:
        """Calls of experts since the last time, by home, of whose requests spans execute here."""
        model = self.config.model
        called = np.zeros(
            (self.config.rendezvous.world_size, model.num_layers, model.num_experts), np.int64
        )
        called[self.rank] = self.counters.take_called()
        if self.spans is not None:
            called += self.spans.take_called()
        return called

    def _create_dispatcher(
        self, lane: int, max_tokens: int, counters: Counters
    ) -> RemoteDispatcher:
        """Create the dispatcher of a lane, with connections to all other workers."""
        config = self.config
        buffer = wire.MessageBuffer(max_tokens, config.model.top_k)
        limit_s = config.request_timeout_s

        def connection(n: int) -> Connection:
            peer = self._peers.peers[n]
            if config.channels is None:
                return Connection(peer, lane, self._send_queue, buffer, limit_s)
            interface = config.rendezvous.interface
            return NcclConnection(
                peer, lane, self._send_queue, buffer, limit_s, config.channels, interface
            )

        return RemoteDispatcher(
            config.model,
            Router(self.expert_map, self.rank, config.model, config.network, config.route),
            {n: connection(n) for n in self._peers.peers},
            config.compute,
            counters,
            request_timeout_s=limit_s,
            rtt_s=config.rtt_s,
        )

    # -------------------------------------------------------------------------------- in the run

    def agree_on_start(self) -> float:
        """:meth:`runtime_adapter.joining.Joining.agree_on_start` of this server.

        On return the other servers' addresses are known here, unless they are not there.
        """
        try:
            begin_s = self._joining.agree_on_start(self._status)
        except RuntimeFailure:
            if self._processes.has_store:
                self._peers.close()  # those that end meanwhile are nothing to tell
                time.sleep(READ_S)
            raise
        deadline = time.monotonic() + FIRST_ADDRESSES_S
        for n in self._peers.peers:
            self._peers.wait_for_address(n, max(deadline - time.monotonic(), 0.0))
        return begin_s

    def _send_heartbeats(self) -> None:
        """Tell the store that this driver lives, whom it suspects and what it does."""
        interval_s = min(self.config.rendezvous.timeout_s / 4, HEARTBEAT_INTERVAL_S)
        limit_s = self.config.rendezvous.timeout_s + HEARTBEAT_MARGIN_S
        answered_s, responds = time.monotonic(), True
        while not self._stopped.wait(interval_s):
            try:
                self._client.heartbeat(
                    self.rank,
                    self._peers.incarnation,
                    "driver",
                    timeout_s=limit_s,
                    suspects=self._peers.silent,
                    requests=self.requests.to_json(),
                    finished=self._finished,
                    error=self.requests.last_error[:400],
                )
            except PrismError as error:
                if (
                    responds
                    and not self._processes.leaving
                    and time.monotonic() - answered_s > limit_s
                ):
                    responds = False
                    self.report(
                        f"no store: {error.message}; nothing moves until it answers, and who is "
                        "lost is not agreed"
                    )
            else:
                answered_s = time.monotonic()
                if not responds:
                    responds = True
                    self.report("the store answers again")

    # ---------------------------------------------------------------------------------------- end

    def finish(self) -> None:
        """Announce that this server has no more requests, and answer others until they have none.

        See :meth:`runtime_adapter.leaving.Leaving.wait_for_others`.
        """
        self._status.finished[0] = True
        self._finished = True
        leaving = Leaving(
            self.config, self._client, self._peers, self.report, lambda: self.migrating
        )
        self._has_store = leaving.wait_for_others(self._stopped)
        self._processes.leaving = True

    @property
    def migrating(self) -> bool:
        """Whether a migration is in progress, as far as this server knows."""
        return self._follower is not None and self._follower.migrating

    def lost_servers(self) -> list[str]:
        """Names of the servers that are lost now; not those that have left in good order."""
        return self._peers.lost_names

    def held_experts(self) -> list[dict[str, list[int]]]:
        """What this server's GPUs hold now, as a placement file has it."""
        shape = self.config.placement.on_gpu.shape
        held = self.config.placement.replace(on_gpu=self.expert_map.on_gpu().reshape(shape))
        gpus = placement_to_json(held)["servers"][self.rank]["gpus"]
        return [gpu["experts"] for gpu in gpus]

    def migrations(self) -> list[dict[str, Any]]:
        """The reviews' decisions, as in a simulation's report; of the first server."""
        if self.rank != 0 or self.config.migration.scheduler is None or not self._has_store:
            return []
        try:
            if not self._client.has(["migrations"], 5.0):
                return []
            text = self._client.get("migrations", 10.0).decode()
            events = parse_json(text, "the run's store: migrations")
        except (PrismError, UnicodeDecodeError) as error:
            self.report(f"what the reviews decided is not known: {error}")
            return []
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            self.report("what the reviews decided is not known: the store holds something else")
            return []
        return events

    def close(self) -> None:
        """End the worker, and the store where this server has started it."""
        self._stopped.set()
        self._processes.stop_watching()
        if self.spans is not None:
            self.spans.close()
        self._log.close()
        self._peers.close()
        self._client.close()
        self._processes.close()
