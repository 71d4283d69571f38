"""A server of a run, in its driver process: its start, its barriers with the others, its end.

The driver starts the server's worker and, on the first server of a run whose experts move, the
scheduler; it connects to all other servers' workers.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

from prism_plan.cli.internal_errors import run_process
from prism_plan.errors import PrismError
from prism_plan.io.placement import placement_to_json
from runtime_adapter import PROGRAM
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_follower import LogFollower
from runtime_adapter.control.scheduler import run_scheduler
from runtime_adapter.expert_worker import SharedStatus, WorkerConfig, run_worker
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.router import Router
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.torch_private import limit_unsent_bytes
from runtime_adapter.transport import tcp_store
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.call_threads import run_in_parallel, run_with_timeout
from runtime_adapter.transport.connection import Connection, NcclConnection
from runtime_adapter.transport.nccl_channel import (
    DataChannel,
    card_id,
    connect_channels,
    require_own_card,
)
from runtime_adapter.transport.pair_groups import connect_pair, send
from runtime_adapter.transport.rendezvous import NameTaken, RuntimeFailure
from runtime_adapter.transport.send_queue import SendQueue
from runtime_adapter.watchdog import Watchdog
from runtime_adapter.weights.expert_map import ExpertMap

#: Upper bound of the tokens of a step that another server may announce.
MAX_TOKENS = 1 << 24


class LocalServer:
    """Starts this server's worker and connects to all other servers; ends them as a context.

    ``lanes`` are the dispatchers of the requests that run at once. ``report`` gets lines for this
    server's log.

    Raises
    ------
    RuntimeFailure
        A port is in use, a server is not there in time, the worker did not start.
    InputError
        The servers do not agree on what they run.
    """

    def __init__(self, config: ServerConfig, report: Callable[[str], None]) -> None:
        self.config = config
        self.rank = config.rendezvous.rank
        self.name = config.placement.servers[self.rank]
        self.report = report
        self.expert_map = ExpertMap(config.placement)
        config.compute.use(self.expert_map)
        self.counters = Counters(config.model.num_layers, config.model.num_experts)
        self.lanes: list[RemoteDispatcher] = []
        self._store: dist.TCPStore | None = None
        self._processes: list[Any] = []
        self._follower: LogFollower | None = None
        self._groups: dict[int, Any] = {}
        self._channels: dict[tuple[int, int, int], DataChannel] = {}
        self._status = SharedStatus.create(config.rendezvous.world_size)
        self._watchdog: Watchdog | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self._abort(error)
            self.close()
            raise
        return self

    def _abort(self, error: BaseException) -> None:
        """Tell the servers that wait for this one why it does not join."""
        if self._store is None or isinstance(error, NameTaken):
            return
        reason = error.message if isinstance(error, PrismError) else "it was stopped"
        with contextlib.suppress(RuntimeFailure):
            text = json.dumps(f"server {self.name!r} does not join: {reason}")
            # the first server that aborts gives the reason
            tcp_store.call_store(partial(self._store.compare_set, tcp_store.ABORTED, "", text))
            if self.rank == 0:
                time.sleep(0.2)  # the others read it from the store that this server hosts

    def __exit__(self, *error: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- start

    def _start(self) -> None:
        config, rendezvous = self.config, self.config.rendezvous
        self._store = store = tcp_store.join_store(rendezvous, host_it=self.rank == 0)
        tcp_store.require_same_run(store, rendezvous, config.facts, self.name)
        if self.rank == 0:
            tcp_store.put_json(store, "timeout", rendezvous.timeout_s)
            tcp_store.put_json(store, "movable", config.migration is not None)
        if config.channels is not None and config.channels.backend == "nccl":
            card = card_id(config.channels.device)
            require_own_card(store, rendezvous, card, self.expert_map.servers)
        worker, worker_ready = self._start_worker(self._agree_on_tokens(store))
        scheduler = None
        if config.migration is not None and self.rank == 0:
            scheduler = self._start_process(run_scheduler, config.migration.scheduler)
        others = rendezvous.other_ranks
        groups = run_in_parallel(
            [partial(connect_pair, rendezvous, self.rank, m, 0) for m in others]
        )
        self._connect_channels()
        self._wait_for_worker(worker_ready)
        self._groups = dict(zip(others, groups, strict=True))
        limit_unsent_bytes()
        self._watchdog = Watchdog(
            rendezvous, self.expert_map, self._status, store, self._groups, worker, scheduler,
            migrating_run=config.migration is not None, report=self.report,
        )  # fmt: skip
        self._create_lanes(store, self._watchdog)
        if config.migration is not None:
            self._follower = LogFollower(
                self.rank, config.placement, self.expert_map, config.compute, self.counters,
                self.lanes, EventLog(rendezvous, f"driver {self.rank}"), self.report,
            )  # fmt: skip
            self._follower.start()
        self._watchdog.start()

    def _start_process(self, function: Callable[..., None], *arguments: Any) -> Any:
        process = multiprocessing.get_context("spawn").Process(
            target=run_process, args=(PROGRAM, function, *arguments), daemon=True
        )
        process.start()
        self._processes.append(process)
        return process

    def _start_worker(self, max_tokens: int) -> tuple[Any, Any]:
        """Start the worker; returns its process, and the pipe that says when it is ready."""
        config = self.config
        ready, ready_of_worker = multiprocessing.get_context("spawn").Pipe()
        num_lanes = max(config.facts.get("lanes", [config.num_lanes]))
        worker_config = WorkerConfig(config, max_tokens, num_lanes, self._status)
        process = self._start_process(run_worker, worker_config, ready_of_worker)
        ready_of_worker.close()
        return process, ready

    def _connect_channels(self) -> None:
        """Connect the data channels to all other workers, where there are any, one by one."""
        config, rendezvous = self.config, self.config.rendezvous
        if config.channels is None:
            return
        pairs = [(self.rank, m) for m in rendezvous.other_ranks]
        job = partial(connect_channels, config.channels, rendezvous, pairs, config.num_lanes, 0)
        num_channels = max(len(pairs) * config.num_lanes, 1)
        try:
            self._channels = run_with_timeout(
                job, 2 * num_channels * rendezvous.rendezvous_timeout_s + tcp_store.STORE_TIMEOUT_S
            )
        except TimeoutError as error:
            raise RuntimeFailure(
                f"``transport`` {config.channels.backend}: the other servers' workers do not answer"
            ) from error

    def _wait_for_worker(self, ready: Any) -> None:
        timeout_s = self.config.rendezvous.rendezvous_timeout_s
        try:
            if not ready.poll(timeout_s):
                raise RuntimeFailure(
                    "its expert worker was not connected to all other servers within "
                    f"{timeout_s:g} s; see whether one of them hangs"
                )
            failure = ready.recv()
        except EOFError:
            raise RuntimeFailure("the worker ended while it was starting") from None
        if failure:
            raise RuntimeFailure(failure)

    def _agree_on_tokens(self, store: dist.TCPStore) -> int:
        """The longest step of any server, for which this server's worker allocates its buffers."""
        tcp_store.put_json(store, f"tokens/{self.rank}", self.config.max_tokens)
        ranks = range(self.config.rendezvous.world_size)
        max_tokens = max(self._wait_for_tokens(store, f"tokens/{n}", n) for n in ranks)
        tcp_store.put_json(store, f"buffer_tokens/{self.rank}", max_tokens)
        return max_tokens

    def _wait_for_tokens(self, store: dist.TCPStore, key: str, n: int) -> int:
        timeout_s = self.config.rendezvous.rendezvous_timeout_s
        name = f"server {self.expert_map.servers[n]!r}"
        return int(tcp_store.wait_for_number(store, key, timeout_s, MAX_TOKENS, name, whole=True))

    def _create_lanes(self, store: dist.TCPStore, watchdog: Watchdog) -> None:
        """Create a dispatcher for each lane, with connections to all other workers."""
        config = self.config
        timeout = datetime.timedelta(seconds=config.rendezvous.timeout_s)
        send_queue = SendQueue(timeout)
        buffers = {
            m: wire.MessageBuffer(
                self._wait_for_tokens(store, f"buffer_tokens/{m}", m), config.model.top_k
            )
            for m in self._groups
        }

        def connection(m: int, lane: int) -> Connection:
            group, channel = self._groups[m], self._channels.get((self.rank, m, lane))
            if channel is None:
                return Connection(group, lane, timeout, send_queue, buffers[m])
            return NcclConnection(group, lane, timeout, send_queue, buffers[m], channel)

        self.lanes = [
            RemoteDispatcher(
                config.model,
                Router(self.expert_map, self.rank, config.model, config.network, config.route),
                {m: connection(m, lane) for m in self._groups},
                config.compute,
                self.counters,
                timeout_s=config.rendezvous.timeout_s,
                rtt_s=config.rtt_s,
                on_lost=watchdog.lose,
            )
            for lane in range(config.num_lanes)
        ]

    # ----------------------------------------------------------------------------------- in the run

    def barrier(self, name: str) -> None:
        """Wait, through the store, until every server has called this with the same name.

        Raises
        ------
        RuntimeFailure
            Not all do so within the time to join.
        """
        assert self._store is not None
        tcp_store.put_json(self._store, f"{name}/{self.rank}", 1)
        timeout_s = self.config.rendezvous.rendezvous_timeout_s
        for n, server in enumerate(self.expert_map.servers):
            tcp_store.wait_for_json(self._store, f"{name}/{n}", timeout_s, f"server {server!r}")

    def agree_on_start(self, delay_s: float = 0.5) -> float:
        """A time of ``time.monotonic`` at which all servers of this machine begin."""
        assert self._store is not None
        assert self._watchdog is not None
        self.barrier("ready")
        if self.rank == 0:
            tcp_store.put_json(self._store, "start", time.time() + delay_s)
        timeout_s, latest_s = (
            self.config.rendezvous.rendezvous_timeout_s,
            time.time() + tcp_store.MAX_START_S,
        )
        start_s = tcp_store.wait_for_number(self._store, "start", timeout_s, latest_s, whole=False)
        self._watchdog.started = True
        return time.monotonic() + (start_s - time.time())

    def finish(self) -> None:
        """Announce that this server has no more requests, and answer others until they have none.

        It waits for another server as long as that one's driver sends heartbeats, and for a
        migration as long as the scheduler does, which abandons one that makes no progress.
        """
        assert self._store is not None
        assert self._watchdog is not None
        self._watchdog.finishing = True
        with contextlib.suppress(RuntimeFailure):  # the watchdog reports a lost store
            finished = partial(self._store.set, f"finished/{self.rank}", "1")
            tcp_store.call_store(finished, self._watchdog.hang_timeout_s)
        # workers are told over the links as well, which do not depend on the store
        message = torch.zeros(wire.HEADER_BYTES, dtype=torch.uint8)
        wire.put_header(message.numpy(), wire.Header(wire.FINISHED))
        for n, group in self._groups.items():
            if not self.expert_map.lost(n):
                with contextlib.suppress(RuntimeError):
                    send(group, message, 1, 0).wait(self.lanes[0].timeout)
        for n in self._groups:
            while self._watchdog.needed_by(n):
                time.sleep(0.02)
        while self.migrating:
            time.sleep(0.05)
        if self.rank == 0:
            time.sleep(0.5)  # the others read the last log entries from the store that is here
        self._watchdog.stop()

    @property
    def migrating(self) -> bool:
        """Whether a migration is in progress, as far as this server can learn its end."""
        return (
            self._follower is not None
            and self._follower.migrating
            and self._watchdog is not None
            and self._watchdog.scheduler_responds
            and self._watchdog.store_responds
            and not self.expert_map.lost(0)
        )

    def held_experts(self) -> list[dict[str, list[int]]]:
        """What this server's GPUs hold now, as a placement file has it."""
        shape = self.config.placement.on_gpu.shape
        held = self.config.placement.replace(on_gpu=self.expert_map.on_gpu().reshape(shape))
        gpus = placement_to_json(held)["servers"][self.rank]["gpus"]
        return [gpu["experts"] for gpu in gpus]

    def migrations(self) -> list[dict[str, Any]]:
        """The reviews' decisions, as in a simulation's report; of the first server."""
        store, watchdog = self._store, self._watchdog
        if store is None or watchdog is None or not watchdog.has_scheduler:
            return []
        if not store.check(["migrations"]):
            return []
        try:
            events = tcp_store.wait_for_json(
                store, "migrations", self.config.rendezvous.rendezvous_timeout_s
            )
        except RuntimeFailure as error:
            self.report(f"what the reviews decided is not known: {error}")
            return []
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            self.report("what the reviews decided is not known: the store holds something else")
            return []
        return events

    def close(self) -> None:
        """End the worker and the scheduler."""
        if self._watchdog is not None:
            self._watchdog.stop()
        for channel in self._channels.values():
            channel.close()
        for process in reversed(self._processes):
            if process.is_alive():
                process.terminate()
                process.join(5)
                if process.is_alive():
                    process.kill()
