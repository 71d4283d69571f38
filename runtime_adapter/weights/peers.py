"""Experts that come from another server's memory instead of the checkpoint.

Every worker asks every other one over a pair of its own, a request at a time for each of its GPUs::

    header int32 [8] (detail is the pair)   ->   header int32 [8] | the expert's numbers, raw

What comes is a slot as it stands: gate and up, one below the other, and then down, in the dtype
that all servers of a run share.
"""

from __future__ import annotations

import datetime
import logging
import threading
from functools import partial
from typing import Any

import torch

from prism_plan.placement import Placement
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.transport.messages import (
    ANSWER,
    HEADER_BYTES,
    MISSING,
    WEIGHTS,
    Header,
    WireError,
    get_header,
    put_header,
)
from runtime_adapter.transport.parallel import in_parallel
from runtime_adapter.transport.rendezvous import (
    FOREVER,
    Rendezvous,
    RuntimeFailure,
    group,
    receive,
    send,
)
from runtime_adapter.weights.expert_store import Change, ExpertStore
from runtime_adapter.weights.loader import CheckpointLoader

#: Before the name of a pair of servers in the store.
PAIRS = "weights"


class PeerLoader:
    """Asks holders of an expert, this server first; reads the checkpoint when none has it.

    See :class:`~.agent.Loader`. Passed to the worker, where :meth:`connect` meets the others.
    """

    def __init__(self, checkpoint: CheckpointLoader, placement: Placement) -> None:
        self.checkpoint = checkpoint
        self.store = checkpoint.store
        self.gpus = [len(gpus) for gpus in placement.gpu_capacity]
        self._groups: dict[int, Any] = {}

    def connect(self, rendezvous: Rendezvous, table: ExpertMap) -> None:
        """Meet the other workers, and answer them from now on.

        Raises
        ------
        RuntimeFailure
            One of them is not there in time.
        """
        rank, self._table = rendezvous.rank, table
        self._me = rank
        self._timeout = datetime.timedelta(seconds=rendezvous.timeout_s)
        others = [n for n in range(rendezvous.world_size) if n != rank]
        jobs = [partial(group, rendezvous, rank, n, 0, PAIRS) for n in others]
        jobs += [partial(group, rendezvous, n, rank, 1, PAIRS) for n in others]
        made = in_parallel(jobs)
        self._groups = dict(zip(others, made[: len(others)], strict=True))
        # one at a time of each GPU, as it has one channel
        rooms = range(self.gpus[rank])
        self._rooms = [torch.empty(HEADER_BYTES + self._bytes, dtype=torch.uint8) for _ in rooms]
        for n, answering in zip(others, made[len(others) :], strict=True):
            for gpu in range(self.gpus[n]):
                threading.Thread(
                    target=give_weights, args=(self.store, answering, gpu), daemon=True
                ).start()

    @property
    def _bytes(self) -> int:
        return int(self.store.shape.numbers * self.store.dtype.itemsize)

    def load(self, pair: int, gpu: int) -> Change:
        """Get and enter an expert.

        Raises
        ------
        InputError
            No server gives it and the checkpoint cannot be read or lacks it, or the GPU has no
            free slot.
        """
        numbers = self._rooms[gpu][HEADER_BYTES:].view(self.store.dtype)
        if self.store.copy(pair, numbers):  # another GPU of this server has it
            return self.store.put(pair, gpu, self.store.parts(numbers))
        holders = [n for n in list(self._groups) if self._table.gpu_of[n, pair] >= 0]
        turn = pair % max(len(holders), 1)
        for n in holders[turn:] + holders[:turn]:
            if self._ask(n, pair, gpu):
                numbers = self._rooms[gpu][HEADER_BYTES:].view(self.store.dtype)
                return self.store.put(pair, gpu, self.store.parts(numbers))
        logging.getLogger(__name__).warning(
            "prism-runtime: no server gives %s; it is read from the checkpoint",
            self.store.shape.spec.pair_text(pair),
        )
        return self.checkpoint.load(pair, gpu)

    def _ask(self, n: int, pair: int, gpu: int) -> bool:
        question = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        put_header(question.numpy(), Header(WEIGHTS, detail=pair))
        room, made = self._rooms[gpu], self._groups.get(n)
        if made is None:
            return False
        try:
            receiving = receive(made, room, 1, gpu)
            send(made, question, 1, gpu).wait(self._timeout)
            receiving.wait(self._timeout)
        except RuntimeError:  # it is lost; what came of it may still be written to this room
            self._rooms[gpu] = torch.empty_like(room)
            self._groups.pop(n, None)
            return False
        header = get_header(room.numpy())
        return header.kind == ANSWER and header.detail == pair

    def drop(self, pair: int, gpu: int) -> None:
        """Free an expert's slot."""
        self.store.drop(pair, gpu)


def give_weights(store: ExpertStore, made: Any, lane: int) -> None:
    """Answer one GPU of one other server with experts that are here, until it is gone."""
    spec = store.shape.spec
    question = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    answer = torch.empty(
        HEADER_BYTES + store.shape.numbers * store.dtype.itemsize, dtype=torch.uint8
    )
    try:
        while True:
            receive(made, question, 0, lane).wait(FOREVER)
            header = get_header(question.numpy())
            if header.kind != WEIGHTS or header.detail >= spec.num_layers * spec.num_experts:
                raise WireError(f"a request for weights that does not fit {spec.name}: {header}")
            numbers = answer[HEADER_BYTES:].view(store.dtype)
            kind = ANSWER if store.copy(header.detail, numbers) else MISSING
            put_header(answer.numpy(), Header(kind, detail=header.detail))
            reply = answer if kind == ANSWER else answer[:HEADER_BYTES]
            send(made, reply, 0, lane).wait(FOREVER)
    except WireError as error:
        logging.getLogger(__name__).error("prism-runtime: %s", error)
    except (RuntimeError, RuntimeFailure):
        return  # that server is gone
