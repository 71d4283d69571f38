"""Loads experts from the memory of another server that holds them, instead of the checkpoint.

Every worker asks every other one over a pair of its own, one request at a time for each of its
GPUs::

    header int32 [8] (detail is the pair)   ->   header int32 [8] | the expert's weights, raw

The weights are a slot's memory: gate and up, one below the other, and then down, in the dtype that
all servers of a run share.
"""

from __future__ import annotations

import datetime
import logging
import threading
from functools import partial
from typing import Any

import torch

from prism_plan.placement import Placement
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.call_threads import run_in_parallel
from runtime_adapter.transport.pair_groups import connect_pair, receive, send
from runtime_adapter.transport.rendezvous import FOREVER, Rendezvous, RuntimeFailure
from runtime_adapter.weights.checkpoint_loader import CheckpointLoader
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change, ExpertStore

#: Prefix of the pairs for weights in the store.
PAIRS = "weights"


class PeerLoader:
    """A :class:`~.loader_interface.Loader` that copies experts from the servers that hold them.

    This server's other GPUs come first; the checkpoint is read when no server has the expert.
    """

    def __init__(self, checkpoint: CheckpointLoader, placement: Placement) -> None:
        self.checkpoint = checkpoint
        self.store = checkpoint.store
        self.num_gpus = [len(gpus) for gpus in placement.gpu_capacity]
        self._groups: dict[int, Any] = {}

    def connect(self, rendezvous: Rendezvous, expert_map: ExpertMap) -> None:
        """Connect to the other workers, and answer their requests from now on.

        Raises
        ------
        RuntimeFailure
            One of them is not there in time.
        """
        rank, self._expert_map = rendezvous.rank, expert_map
        self._timeout = datetime.timedelta(seconds=rendezvous.timeout_s)
        others = rendezvous.other_ranks
        jobs = [partial(connect_pair, rendezvous, rank, n, 0, PAIRS) for n in others]
        jobs += [partial(connect_pair, rendezvous, n, rank, 1, PAIRS) for n in others]
        groups = run_in_parallel(jobs)
        self._groups = dict(zip(others, groups[: len(others)], strict=True))
        # a GPU has one load channel, and so one answer at a time
        answer_bytes = wire.HEADER_BYTES + self.store.expert_bytes
        self._buffers = [
            torch.empty(answer_bytes, dtype=torch.uint8) for _ in range(self.num_gpus[rank])
        ]
        for n, group in zip(others, groups[len(others) :], strict=True):
            for gpu in range(self.num_gpus[n]):
                threading.Thread(
                    target=answer_weight_requests, args=(self.store, group, gpu), daemon=True
                ).start()

    def load(self, pair: int, gpu: int) -> Change:
        """Copy an expert from a holder into a free slot.

        Raises
        ------
        InputError
            No server gives it and the checkpoint cannot be read or lacks it, or the GPU has no
            free slot.
        """
        weights = self._buffers[gpu][wire.HEADER_BYTES :].view(self.store.dtype)
        if self.store.copy(pair, weights):  # another GPU of this server has it
            return self.store.put(pair, gpu, self.store.parts(weights))
        holders = [n for n in list(self._groups) if self._expert_map.gpu_of[n, pair] >= 0]
        first = pair % max(len(holders), 1)
        for n in holders[first:] + holders[:first]:
            if self._request(n, pair, gpu):
                weights = self._buffers[gpu][wire.HEADER_BYTES :].view(self.store.dtype)
                return self.store.put(pair, gpu, self.store.parts(weights))
        logging.getLogger(__name__).warning(
            "prism-runtime: no server gives %s; it is read from the checkpoint",
            self.store.shape.spec.pair_text(pair),
        )
        return self.checkpoint.load(pair, gpu)

    def _request(self, n: int, pair: int, gpu: int) -> bool:
        """Ask a server for an expert; returns whether the GPU's buffer now has its weights."""
        request = torch.empty(wire.HEADER_BYTES, dtype=torch.uint8)
        wire.put_header(request.numpy(), wire.Header(wire.WEIGHTS, detail=pair))
        buffer, group = self._buffers[gpu], self._groups.get(n)
        if group is None:
            return False
        try:
            receiving = receive(group, buffer, 1, gpu)
            send(group, request, 1, gpu).wait(self._timeout)
            receiving.wait(self._timeout)
        except RuntimeError:  # the server is lost; its answer may still be written to this buffer
            self._buffers[gpu] = torch.empty_like(buffer)
            self._groups.pop(n, None)
            return False
        header = wire.get_header(buffer.numpy())
        return header.kind == wire.ANSWER and header.detail == pair

    def drop(self, pair: int, gpu: int) -> None:
        self.store.drop(pair, gpu)


def answer_weight_requests(store: ExpertStore, group: Any, tag: int) -> None:
    """Answer the requests of one GPU of one other server, until that server is gone."""
    spec = store.shape.spec
    request = torch.empty(wire.HEADER_BYTES, dtype=torch.uint8)
    answer = torch.empty(wire.HEADER_BYTES + store.expert_bytes, dtype=torch.uint8)
    try:
        while True:
            receive(group, request, 0, tag).wait(FOREVER)
            header = wire.get_header(request.numpy())
            if header.kind != wire.WEIGHTS or header.detail >= spec.num_layers * spec.num_experts:
                raise wire.WireError(
                    f"a request for weights that does not fit {spec.name}: {header}"
                )
            weights = answer[wire.HEADER_BYTES :].view(store.dtype)
            kind = wire.ANSWER if store.copy(header.detail, weights) else wire.MISSING
            wire.put_header(answer.numpy(), wire.Header(kind, detail=header.detail))
            reply = answer if kind == wire.ANSWER else answer[: wire.HEADER_BYTES]
            send(group, reply, 0, tag).wait(FOREVER)
    except wire.WireError as error:
        logging.getLogger(__name__).error("prism-runtime: %s", error)
    except (RuntimeError, RuntimeFailure):
        return  # that server is gone
