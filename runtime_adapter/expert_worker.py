"""The worker process of a server: answers the calls of all other servers."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch

from prism_plan.errors import PrismError
from runtime_adapter.call_handler import CallHandler, NcclCallHandler
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.failure_detector import WORKER_HEARTBEAT
from runtime_adapter.control.migration_executor import MigrationExecutor
from runtime_adapter.moe.emulated_gpu import set_sharp_timers, wait_until
from runtime_adapter.server_config import ServerConfig
from runtime_adapter.torch_private import limit_unsent_bytes
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.call_threads import exit_with_parent, run_in_parallel
from runtime_adapter.transport.nccl_channel import DataChannel, DataChannelBroken, connect_channels
from runtime_adapter.transport.pair_groups import connect_pair, receive, send
from runtime_adapter.transport.rendezvous import FOREVER
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue
from runtime_adapter.transport.tcp_store import join_store
from runtime_adapter.transport.wire_kernels import compile_unpacking
from runtime_adapter.weights.expert_map import ExpertMap

HEARTBEAT_INTERVAL_S = 0.5


@dataclass(frozen=True, eq=False)
class SharedStatus:
    """Memory that the worker and the driver of a server share.

    ``finished`` [N] are drivers that make no more calls, or are gone; ``heartbeats`` [N] count
    those of the other drivers and, at this server's own place, of the worker.
    """

    finished: Any
    heartbeats: Any

    @classmethod
    def create(cls, world_size: int) -> Self:
        """All zero."""
        context = multiprocessing.get_context("spawn")
        return cls(
            context.Array(ctypes.c_bool, world_size, lock=False),
            context.Array(ctypes.c_int64, world_size, lock=False),
        )


@dataclass(frozen=True, eq=False)
class WorkerConfig:
    """What a worker needs to know; pickled to it when it is started.

    ``max_tokens`` is the longest step of any server, ``num_lanes`` the most lanes of any driver.
    """

    server: ServerConfig
    max_tokens: int
    num_lanes: int
    status: SharedStatus


def run_worker(config: WorkerConfig, ready: Any) -> None:
    """Serve until the process is ended; sends "", or what went wrong, to the pipe ``ready``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    exit_with_parent()
    torch.set_num_threads(config.server.threads)
    try:
        worker = ExpertWorker(config)
        worker.connect()
    except PrismError as error:
        ready.send(error.message)
        os._exit(1)  # not by returning; see run_scheduler
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        ready.send(f"its worker failed: {text:.300}; please report it")
        os._exit(1)
    threading.Thread(target=worker.count_heartbeats, daemon=True).start()
    ready.send("")
    worker.send_heartbeats()


class ExpertWorker:
    """Threads that each answer one lane of one driver."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config.server
        self.max_tokens, self.num_lanes = config.max_tokens, config.num_lanes
        self.status = config.status
        self.rank = self.config.rendezvous.rank
        self.expert_map = ExpertMap(self.config.placement)
        self.config.compute.use(self.expert_map)
        self.store = join_store(self.config.rendezvous, host_it=False)
        timeout = datetime.timedelta(seconds=self.config.rendezvous.timeout_s)
        self._send_queue = SendQueue(timeout)

    def connect(self) -> None:
        """Connect to every other driver and begin to answer it."""
        config, rendezvous = self.config, self.config.rendezvous
        compile_unpacking()
        drivers = rendezvous.other_ranks
        groups = run_in_parallel(
            [partial(connect_pair, rendezvous, n, self.rank, 1) for n in drivers]
        )
        channels = {}
        if config.channels is not None:
            pairs = [(n, self.rank) for n in drivers]
            channels = connect_channels(config.channels, rendezvous, pairs, self.num_lanes, 1)
        limit_unsent_bytes()
        for driver, group in zip(drivers, groups, strict=True):
            for lane in range(self.num_lanes):
                channel = channels.get((driver, self.rank, lane))
                arguments = (driver, group, lane, channel)
                threading.Thread(target=self._serve_lane, args=arguments, daemon=True).start()
            heartbeats = threading.Thread(
                target=self._receive_heartbeats, args=(driver, group), daemon=True
            )
            heartbeats.start()
        if config.migration is not None:
            loader = config.migration.loader
            loader.connect(rendezvous, self.expert_map)
            MigrationExecutor(
                self.rank, config.placement, loader, self.expert_map,
                EventLog(rendezvous, f"worker {self.rank}"), rendezvous.timeout_s,
            ).start()  # fmt: skip

    # ---------------------------------------------------------------------------------- heartbeats

    def send_heartbeats(self) -> None:
        """Show the other servers, through the store, that this worker runs; never returns."""
        heartbeats = 0
        while True:
            heartbeats += 1
            with contextlib.suppress(
                RuntimeError
            ):  # without a store calls are answered all the same
                self.store.set(WORKER_HEARTBEAT.format(self.rank), str(heartbeats))
            time.sleep(HEARTBEAT_INTERVAL_S)

    def count_heartbeats(self) -> None:
        """Show this server's driver that the worker runs, also when the store is lost."""
        while True:
            self.status.heartbeats[self.rank] += 1
            time.sleep(HEARTBEAT_INTERVAL_S)

    def _receive_heartbeats(self, driver: int, group: Any) -> None:
        """Count the heartbeats of another driver until it is gone."""
        buffer = torch.empty(wire.HEADER_BYTES, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            while True:
                receive(group, buffer, 0, wire.HEARTBEAT_TAG).wait(FOREVER)
                self.status.heartbeats[driver] += 1
        self.status.finished[driver] = True

    # --------------------------------------------------------------------------------------- calls

    def _serve_lane(self, driver: int, group: Any, lane: int, channel: DataChannel | None) -> None:
        set_sharp_timers()
        if channel is None:
            handler = CallHandler(self.config, self.max_tokens, self.expert_map)
        else:
            handler = NcclCallHandler(self.config, self.max_tokens, self.expert_map, channel)
        try:
            with contextlib.suppress(RuntimeError):  # that driver is gone
                self._answer_calls(handler, group, lane)
        finally:
            self.status.finished[driver] = True
            handler.close()

    def _answer_calls(self, handler: CallHandler, group: Any, lane: int) -> None:
        """Answer until the driver makes no more calls; RuntimeError if it is gone."""
        rtt_s = self.config.rtt_s
        sending: Any = None  # gloo needs a message's memory until it is sent
        while True:
            receive(group, handler.buffer, 0, lane).wait(FOREVER)
            del sending
            if rtt_s:
                wait_until(time.monotonic() + rtt_s / 2)
            try:
                header = handler.header()
                if header.kind == wire.FINISHED:
                    return
                reply = handler.answer(header)
            except DataChannelBroken:
                raise
            except Exception as error:
                logging.getLogger(__name__).error("prism-runtime: %s", error)
                reply = handler.header_only(wire.Header(wire.FAILED))
            # not waited for: the driver calls again only after all of it has arrived
            if len(reply) < LONG_BYTES:
                sending = send(group, reply, 0, lane)
            else:
                sending = self._send_queue.put(group, reply, 0, lane)
