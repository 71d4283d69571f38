"""The worker process of a server: answers the calls of all other servers."""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from prism_plan.errors import PrismError
from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.migration_executor import Loader, MigrationExecutor
from runtime_adapter.moe.compute import Batch, Compute
from runtime_adapter.moe.emulated_gpu import sharp_timers, wait_until
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.moe.routing import read_calls, warm_up_answers
from runtime_adapter.transport.messages import (
    ANSWER,
    CALL,
    FAILED,
    HEADER_BYTES,
    MISSING,
    OVER,
    SIGNS_LANE,
    Header,
    MessageBuffer,
    WireError,
    get_header,
    id_bits,
    put_header,
)
from runtime_adapter.transport.nccl_channel import (
    DataChannel,
    DataChannelBroken,
    DataChannels,
    make_channels,
)
from runtime_adapter.transport.parallel import in_parallel
from runtime_adapter.transport.rendezvous import (
    FOREVER,
    Rendezvous,
    group,
    join_store,
    receive,
    send,
)
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue, limit_unsent_bytes

#: Seconds between two signs of life.
HEARTBEAT_INTERVAL_S = 0.5
#: Views of calls of up to so many tokens are kept.
KEPT_TOKENS = 4


@dataclass(frozen=True, eq=False)
class WorkerConfig:
    """All that a worker needs to know; passed to it when it is started on the same machine.

    ``loader`` moves experts, where they move at all. ``states`` is the dtype of hidden states on
    the wire (``torch.uint8`` where nothing is computed), ``width`` their numbers a token,
    ``most_tokens`` the most of any server's step; ``threads`` of the CPU
    that a call may take. Shared with the driver of this server are ``over`` [N], which drivers have
    no more calls, and ``signs`` [N], signs of life of the other drivers and, at this server's own
    place, of this worker.
    """

    rendezvous: Rendezvous
    placement: Placement
    model: ModelShape
    compute: Compute
    states: torch.dtype
    width: int
    most_tokens: int
    lanes: int
    rtt_s: float
    threads: int
    over: Any
    signs: Any
    loader: Loader | None = None
    channels: DataChannels | None = None


def run_worker(config: WorkerConfig, ready: Any) -> None:
    """Serve until the process is ended. ``ready`` (a pipe) is sent "" or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    torch.set_num_threads(config.threads)
    try:
        worker = Worker(config)
        worker.connect()
    except PrismError as error:
        ready.send(error.message)
        os._exit(1)  # not by returning; see run_scheduler
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        ready.send(f"its worker failed: {text:.300}; please report it")
        os._exit(1)
    threading.Thread(target=worker.show_life, daemon=True).start()
    ready.send("")
    while True:
        worker.beat()
        time.sleep(HEARTBEAT_INTERVAL_S)


def _end_with_the_driver() -> None:
    """A driver that was killed takes its worker along, also one that is still starting."""
    driver = multiprocessing.parent_process()
    while driver is not None and os.getppid() == driver.pid:
        time.sleep(HEARTBEAT_INTERVAL_S)
    os._exit(1)


class Worker:
    """Threads that each answer one lane of one driver."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.rank = config.rendezvous.rank
        self.table = ExpertMap(config.placement)
        if hasattr(config.compute, "table"):
            config.compute.table = self.table
        self.store = join_store(config.rendezvous, host_it=False)
        self._send_queue = SendQueue(datetime.timedelta(seconds=config.rendezvous.timeout_s))
        self._beats = 0

    def connect(self) -> None:
        """Meet every other driver and begin to answer it."""
        warm_up_answers()
        drivers = [n for n in range(self.config.rendezvous.world_size) if n != self.rank]
        groups = in_parallel(
            [partial(group, self.config.rendezvous, n, self.rank, 1) for n in drivers]
        )
        channels = {}
        if self.config.channels is not None:
            pairs = [(n, self.rank) for n in drivers]
            channels = make_channels(
                self.config.channels, self.config.rendezvous, pairs, self.config.lanes, 1
            )
        limit_unsent_bytes()
        for driver, made in zip(drivers, groups, strict=True):
            for lane in range(self.config.lanes):
                channel = channels.get((driver, self.rank, lane))
                thread = threading.Thread(
                    target=self._answer_all, args=(driver, made, lane, channel), daemon=True
                )
                thread.start()
            threading.Thread(target=self._hear_signs, args=(driver, made), daemon=True).start()
        if self.config.loader is not None:
            self.config.loader.connect(self.config.rendezvous, self.table)
            MigrationExecutor(
                self.rank, self.config.placement, self.config.loader, self.table,
                EventLog(self.config.rendezvous, f"worker {self.rank}"),
                self.config.rendezvous.timeout_s,
            ).start()  # fmt: skip

    def beat(self) -> None:
        """Tell the others that this server is alive."""
        self._beats += 1
        try:
            self.store.set(f"beat/{self.rank}", str(self._beats))
        except RuntimeError:
            return  # the store's host is gone; calls are answered all the same

    def show_life(self) -> None:
        """Tell this server's driver that the worker lives, whatever becomes of the store."""
        while True:
            self.config.signs[self.rank] += 1
            time.sleep(HEARTBEAT_INTERVAL_S)

    def _hear_signs(self, driver: int, made: Any) -> None:
        """Note the signs of life of another driver until it is gone."""
        room = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            while True:
                receive(made, room, 0, SIGNS_LANE).wait(FOREVER)
                self.config.signs[driver] += 1
        self.config.over[driver] = True

    def _answer_all(self, driver: int, made: Any, lane: int, channel: DataChannel | None) -> None:
        sharp_timers()
        if channel is None:
            desk = CallHandler(self.config, self.table, self.rank)
        else:
            desk = NcclCallHandler(self.config, self.table, self.rank, channel)
        try:
            with contextlib.suppress(RuntimeError):  # that driver is gone
                self._answer_calls(desk, made, lane)
        finally:
            self.config.over[driver] = True
            desk.close()

    def _answer_calls(self, desk: CallHandler, made: Any, lane: int) -> None:
        """Until the driver has no more; RuntimeError if it is gone."""
        rtt_s = self.config.rtt_s
        sending: Any = None  # gloo needs what it has not sent yet
        while True:
            receive(made, desk.room, 0, lane).wait(FOREVER)
            del sending
            if rtt_s:
                wait_until(time.monotonic() + rtt_s / 2)
            try:
                header = get_header(desk.raw)
                if header.kind == OVER:
                    return
                reply = desk.answer(header)
            except DataChannelBroken:
                raise
            except Exception as error:
                logging.getLogger(__name__).error("prism-runtime: %s", error)
                reply = desk.brief(Header(FAILED))
            # the driver calls again only after all of it has come, so nobody waits for it here
            if len(reply) < LONG_BYTES:
                sending = send(made, reply, 0, lane)
            else:
                sending = self._send_queue.put(made, reply, 0, lane)


class CallHandler:
    """Where one lane of one driver is answered: its call and the answer, and views of both."""

    def __init__(self, config: WorkerConfig, table: ExpertMap, rank: int) -> None:
        model, token_bytes = config.model, self._token_bytes(config)
        calls = config.most_tokens * model.top_k
        self.config = config
        self._limits = MessageBuffer(config.most_tokens, model.top_k)
        self.room = torch.empty(self._limits.call_bytes(token_bytes), dtype=torch.uint8)
        self.raw = self.room.numpy()
        self._reply = torch.empty(self._limits.answer_bytes(token_bytes), dtype=torch.uint8)
        self._reply_raw = self._reply.numpy()
        self._words = self.raw[HEADER_BYTES : HEADER_BYTES + 4 * calls].view(np.uint32)
        self._held = table.gpu_of[rank]
        self._bits = id_bits(model.num_experts)
        # compiled code fills these; a batch is of their beginning
        self._experts, self._token = np.empty(calls, np.int64), np.empty(calls, np.int64)
        self._weights = np.empty(calls, np.float32)
        self._weight_bits = self._weights.view(np.uint32)
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _token_bytes(self, config: WorkerConfig) -> int:
        """Of a token's states in a message."""
        size: int = config.width * config.states.itemsize
        return size

    def answer(self, header: Header) -> torch.Tensor:
        """What the call in ``room`` is answered with, written to memory that is used again.

        Raises
        ------
        WireError
            The call does not fit the model.
        """
        model = self.config.model
        tokens, calls, layer = header.tokens, header.calls, header.detail
        fits = self._limits.fits(tokens, calls)
        if header.kind != CALL or layer >= model.num_layers or not fits:
            raise WireError(f"a call that does not fit {model.name}: {header}")
        hidden, reply, sums = self._seen(tokens, calls)
        first = layer * model.num_experts
        experts, token, weights = self._experts[:calls], self._token[:calls], self._weights[:calls]
        named, lacking = read_calls(
            self._words[:calls], self._bits, first, self._held, experts,
            self._weight_bits[:calls], token,
        )  # fmt: skip
        if named != tokens or token[-1] != tokens - 1 or lacking >= model.num_experts:
            raise WireError(f"a call that does not fit {model.name}: {header}")
        if lacking >= 0:
            return self.brief(Header(MISSING, detail=first + int(lacking)))
        sums.copy_(self.config.compute.partial_sums(Batch(layer, hidden, token, experts, weights)))
        self._send(sums)
        put_header(self._reply_raw, Header(ANSWER, tokens, calls, layer))
        return reply

    def brief(self, header: Header) -> torch.Tensor:
        """An answer of nothing but a header."""
        put_header(self._reply_raw, header)
        return self._reply[:HEADER_BYTES]

    def _seen(self, tokens: int, calls: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The call's hidden states, the reply and its states; those of short calls are kept."""
        found = self._views.get((tokens, calls))
        if found is None:
            upto, size = HEADER_BYTES + 4 * calls, tokens * self._token_bytes(self.config)
            shape = (tokens, self.config.width)
            hidden = self.room[upto : upto + size].view(self.config.states).view(shape)
            reply = self._reply[: HEADER_BYTES + size]
            found = hidden, reply, reply[HEADER_BYTES:].view(self.config.states).view(shape)
            if tokens <= KEPT_TOKENS:
                self._views[tokens, calls] = found
        return found

    def _send(self, sums: torch.Tensor) -> None:
        """They are in the reply."""

    def close(self) -> None:
        """The driver is gone, or has no more calls."""


class NcclCallHandler(CallHandler):
    """A desk to which the states come over a channel, and leave over it; see channels.py.

    Raises DataChannelBroken where the driver is gone or silent.
    """

    def __init__(
        self, config: WorkerConfig, table: ExpertMap, rank: int, channel: DataChannel
    ) -> None:
        super().__init__(config, table, rank)
        assert config.channels is not None
        self._channel = channel
        shape = (config.most_tokens, config.width)
        self._hidden = torch.empty(shape, dtype=config.states, device=config.channels.device)
        self._sums = torch.empty_like(self._hidden)

    def _token_bytes(self, config: WorkerConfig) -> int:
        return 0

    def answer(self, header: Header) -> torch.Tensor:
        """What the call is answered with; its states are taken from the channel in any case."""
        try:
            return super().answer(header)
        except WireError:
            self._channel.close()  # states of who knows what size are on their way
            raise

    def _seen(self, tokens: int, calls: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self._hidden[:tokens]
        self._channel.receive(hidden)
        return hidden, self._reply[:HEADER_BYTES], self._sums[:tokens]

    def close(self) -> None:
        self._channel.close()

    def _send(self, sums: torch.Tensor) -> None:
        self._queued = self._channel.send(sums)
