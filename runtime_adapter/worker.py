"""The worker process of a server: answers the calls of all other servers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from runtime_adapter.agent import Agent, Loader
from runtime_adapter.changes import News
from runtime_adapter.clock import sharp_timers, wait_until
from runtime_adapter.compute import Batch, Compute
from runtime_adapter.links import FOREVER, Meeting, RuntimeFailure, group, join_store, receive, send
from runtime_adapter.table import HolderTable
from runtime_adapter.wire import (
    ANSWER,
    CALL,
    FAILED,
    HEADER_BYTES,
    MISSING,
    OVER,
    Header,
    WireError,
    get_header,
    id_bits,
    most_bytes,
    put_header,
    unpack_words,
)

#: Seconds between two signs of life.
BEAT_S = 0.5


@dataclass(frozen=True, eq=False)
class WorkerConfig:
    """All that a worker needs to know; passed to it when it is started on the same machine.

    ``loader`` moves experts, where they move at all. ``states`` is the dtype of hidden states on
    the wire (``torch.uint8`` where nothing is computed), ``width`` their numbers a token,
    ``most_tokens`` the most of any server's step; ``threads`` of the CPU
    that a call may take. ``over`` [N] is shared with the front: which fronts have no more calls.
    """

    meeting: Meeting
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
    loader: Loader | None = None


def run_worker(config: WorkerConfig, ready: Any) -> None:
    """Serve until the process is ended. ``ready`` (a pipe) is sent "" or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front ends it
    threading.Thread(target=_end_with_the_front, daemon=True).start()
    torch.set_num_threads(config.threads)
    try:
        worker = Worker(config)
        worker.connect()
    except RuntimeFailure as error:
        ready.send(str(error))
        return
    ready.send("")
    while True:
        worker.beat()
        time.sleep(BEAT_S)


def _end_with_the_front() -> None:
    """A front that was killed takes its worker along, also one that is still starting."""
    front = multiprocessing.parent_process()
    while front is not None and os.getppid() == front.pid:
        time.sleep(BEAT_S)
    os._exit(1)


class Worker:
    """Threads that each answer one lane of one front."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.me = config.meeting.me
        self.table = HolderTable(config.placement)
        if hasattr(config.compute, "table"):
            config.compute.table = self.table
        self.store = join_store(config.meeting, host_it=False)
        self._bits = id_bits(config.model.num_experts)
        self._spare_ids = config.model.num_experts < 1 << self._bits
        self._beats = 0

    def connect(self) -> None:
        """Meet every other front and begin to answer it."""
        fronts = [n for n in range(self.config.meeting.servers) if n != self.me]
        groups = in_parallel(
            [partial(group, self.store, self.config.meeting, n, self.me, 1) for n in fronts]
        )
        for front, made in zip(fronts, groups, strict=True):
            for lane in range(self.config.lanes):
                thread = threading.Thread(
                    target=self._answer_all, args=(front, made, lane), daemon=True
                )
                thread.start()

        if self.config.loader is not None:
            Agent(
                self.me, self.config.placement, self.config.loader, self.table,
                News(self.config.meeting, f"worker {self.me}"), self.config.meeting.timeout_s,
            ).start()  # fmt: skip

    def beat(self) -> None:
        """Tell the others that this server is alive."""
        self._beats += 1
        try:
            self.store.set(f"beat/{self.me}", str(self._beats))
        except RuntimeError:
            return  # the store's host is gone; calls are answered all the same

    def _answer_all(self, front: int, made: Any, lane: int) -> None:
        sharp_timers()
        config = self.config
        token_bytes = config.width * config.states.itemsize
        room = torch.empty(
            most_bytes(config.most_tokens, config.model.top_k, token_bytes), dtype=torch.uint8
        )
        answer = torch.empty(HEADER_BYTES + config.most_tokens * token_bytes, dtype=torch.uint8)
        sending: Any = None  # gloo needs what it has not sent yet
        while True:
            try:
                receive(made, room, 0, lane).wait(FOREVER)
                del sending
            except RuntimeError:
                config.over[front] = True  # that front is gone
                return
            arrived_s = time.monotonic()
            if config.rtt_s:
                wait_until(arrived_s + config.rtt_s / 2)
            try:
                if get_header(room.numpy()).kind == OVER:
                    config.over[front] = True
                    return
                reply = self._answer(room, answer)
            except Exception as error:
                logging.getLogger(__name__).error("prism-runtime: %s", error)
                put_header(answer.numpy(), Header(FAILED))
                reply = answer[:HEADER_BYTES]
            try:
                # the front calls again only after all of it has come, so nobody waits for it here
                sending = send(made, reply, 0, lane)
            except RuntimeError:
                config.over[front] = True
                return

    def _answer(self, room: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """What a call in ``room`` is answered with, written to the beginning of ``answer``."""
        config = self.config
        raw = room.numpy()
        header = get_header(raw)
        layers = config.model.num_layers
        fits = header.tokens <= header.calls <= header.tokens * config.model.top_k
        if header.kind != CALL or header.detail >= layers or not header.tokens or not fits:
            raise WireError(f"a call that does not fit {config.model.name}: {header}")
        upto = HEADER_BYTES + 4 * header.calls
        words = raw[HEADER_BYTES:upto].view(np.uint32)
        experts, weights, token = unpack_words(words, self._bits)
        unknown = self._spare_ids and int(experts.max()) >= config.model.num_experts
        if unknown or token[-1] != header.tokens - 1:
            raise WireError(f"a call that does not fit {config.model.name}: {header}")
        pairs = header.detail * config.model.num_experts + experts
        lacking = self.table.gpu_of[self.me].take(pairs) < 0
        if lacking.any():
            put_header(answer.numpy(), Header(MISSING, detail=int(pairs[lacking.argmax()])))
            return answer[:HEADER_BYTES]
        shape, size = (header.tokens, config.width), header.tokens * config.width
        size *= config.states.itemsize
        hidden = room[upto : upto + size].view(config.states).view(shape)
        sums = config.compute.partial_sums(Batch(header.detail, hidden, token, experts, weights))
        put_header(answer.numpy(), Header(ANSWER, header.tokens, header.calls, header.detail))
        reply = answer[: HEADER_BYTES + size]
        reply[HEADER_BYTES:].view(config.states).view(shape).copy_(sums)
        return reply


def in_parallel(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run all at once, so that no two wait for each other; raises the first error."""
    found: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            found[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
