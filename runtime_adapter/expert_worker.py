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
from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.failure_detector import worker_heartbeat
from runtime_adapter.control.migration_executor import MigrationExecutor
from runtime_adapter.moe.call_handler import CallHandler, NcclCallHandler
from runtime_adapter.moe.compute import Compute
from runtime_adapter.moe.emulated_gpu import set_sharp_timers, wait_until
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.torch_private import limit_unsent_bytes
from runtime_adapter.transport.nccl_channel import (
    ChannelConfig,
    DataChannel,
    DataChannelBroken,
    connect_channels,
)
from runtime_adapter.transport.pair_groups import connect_pair, receive, send
from runtime_adapter.transport.parallel import run_in_parallel
from runtime_adapter.transport.rendezvous import FOREVER, Rendezvous
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue
from runtime_adapter.transport.tcp_store import join_store
from runtime_adapter.transport.wire_format import (
    FAILED,
    FINISHED,
    HEADER_BYTES,
    HEARTBEAT_TAG,
    Header,
)
from runtime_adapter.transport.wire_kernels import compile_unpacking
from runtime_adapter.weights.loader import Loader

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

    Hidden states on the wire have ``width`` numbers of ``dtype`` a token (``torch.uint8`` where
    nothing is computed); ``max_tokens`` is the longest step of any server, ``num_lanes`` the most
    lanes of any driver; ``threads`` of the CPU that a call may use. ``loader`` is given where
    experts move, ``channels`` where states do not travel by gloo.
    """

    rendezvous: Rendezvous
    placement: Placement
    model: ModelShape
    compute: Compute
    dtype: torch.dtype
    width: int
    max_tokens: int
    num_lanes: int
    rtt_s: float
    threads: int
    status: SharedStatus
    loader: Loader | None = None
    channels: ChannelConfig | None = None


def run_worker(config: WorkerConfig, ready: Any) -> None:
    """Serve until the process is ended; sends "", or what went wrong, to the pipe ``ready``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    threading.Thread(target=_exit_with_driver, daemon=True).start()
    torch.set_num_threads(config.threads)
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


def _exit_with_driver() -> None:
    """Exit when the driver dies, even during start-up."""
    driver = multiprocessing.parent_process()
    while driver is not None and os.getppid() == driver.pid:
        time.sleep(HEARTBEAT_INTERVAL_S)
    os._exit(1)


class ExpertWorker:
    """Threads that each answer one lane of one driver."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.rank = config.rendezvous.rank
        self.expert_map = ExpertMap(config.placement)
        config.compute.use(self.expert_map)
        self.store = join_store(config.rendezvous, host_it=False)
        self._send_queue = SendQueue(datetime.timedelta(seconds=config.rendezvous.timeout_s))

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
            channels = connect_channels(config.channels, rendezvous, pairs, config.num_lanes, 1)
        limit_unsent_bytes()
        for driver, group in zip(drivers, groups, strict=True):
            for lane in range(config.num_lanes):
                channel = channels.get((driver, self.rank, lane))
                arguments = (driver, group, lane, channel)
                threading.Thread(target=self._serve_lane, args=arguments, daemon=True).start()
            heartbeats = threading.Thread(
                target=self._receive_heartbeats, args=(driver, group), daemon=True
            )
            heartbeats.start()
        if config.loader is not None:
            config.loader.connect(rendezvous, self.expert_map)
            MigrationExecutor(
                self.rank, config.placement, config.loader, self.expert_map,
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
                self.store.set(worker_heartbeat(self.rank), str(heartbeats))
            time.sleep(HEARTBEAT_INTERVAL_S)

    def count_heartbeats(self) -> None:
        """Show this server's driver that the worker runs, also when the store is lost."""
        while True:
            self.config.status.heartbeats[self.rank] += 1
            time.sleep(HEARTBEAT_INTERVAL_S)

    def _receive_heartbeats(self, driver: int, group: Any) -> None:
        """Count the heartbeats of another driver until it is gone."""
        buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            while True:
                receive(group, buffer, 0, HEARTBEAT_TAG).wait(FOREVER)
                self.config.status.heartbeats[driver] += 1
        self.config.status.finished[driver] = True

    # --------------------------------------------------------------------------------------- calls

    def _serve_lane(self, driver: int, group: Any, lane: int, channel: DataChannel | None) -> None:
        set_sharp_timers()
        handler = self._handler(channel)
        try:
            with contextlib.suppress(RuntimeError):  # that driver is gone
                self._answer_calls(handler, group, lane)
        finally:
            self.config.status.finished[driver] = True
            handler.close()

    def _handler(self, channel: DataChannel | None) -> CallHandler:
        config = self.config
        arguments = (
            config.model, config.compute, self.expert_map, self.rank, config.max_tokens,
            config.dtype, config.width,
        )  # fmt: skip
        if channel is None or config.channels is None:
            return CallHandler(*arguments)
        return NcclCallHandler(*arguments, channel, config.channels.device)

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
                if header.kind == FINISHED:
                    return
                reply = handler.answer(header)
            except DataChannelBroken:
                raise
            except Exception as error:
                logging.getLogger(__name__).error("prism-runtime: %s", error)
                reply = handler.header_only(Header(FAILED))
            # not waited for: the driver calls again only after all of it has arrived
            if len(reply) < LONG_BYTES:
                sending = send(group, reply, 0, lane)
            else:
                sending = self._send_queue.put(group, reply, 0, lane)
