"""Loads experts from the memory of another server that holds them, instead of the checkpoint.

A worker asks another one over a connection for each of its GPUs, one request at a time::

    header int32 [8] (detail is the pair)   ->   header int32 [8] | the expert's weights, raw

The weights are a slot's memory: gate and up, one below the other, and then down, in the dtype that
all servers of a run share.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Mapping

import numpy as np
import torch

from prism_plan.placement import Placement
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.handshake import HandshakeFailed
from runtime_adapter.transport.peer import ConnectionLost, Peer
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.transport.socket_io import receive_exactly, receive_into, send_all
from runtime_adapter.weights.checkpoint_loader import CheckpointLoader
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change, ExpertStore

#: No server of a run is asked more quickly for a connection.
DIAL_S = 2.0
#: A server that does not answer, and is not taken for lost, is asked again for so long: its machine
#: may be busy.
ASK_S = 5.0
#: Between two such attempts.
RETRY_S = 0.05


class PeerLoader:
    """A :class:`~.loader_interface.Loader` that copies experts from the servers that hold them.

    This server's other GPUs come first; the checkpoint is read when no server has the expert.
    """

    def __init__(self, checkpoint: CheckpointLoader, placement: Placement) -> None:
        self.checkpoint = checkpoint
        self.store = checkpoint.store
        self.num_gpus = [len(gpus) for gpus in placement.gpu_capacity]
        self._peers: Mapping[int, Peer] = {}
        self._sockets: dict[tuple[int, int], socket.socket] = {}  # by server and own GPU

    def connect(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, peers: Mapping[int, Peer]
    ) -> None:
        """Note whom to ask; connections are made when they are needed."""
        self._expert_map, self._peers = expert_map, peers
        self._timeout_s = rendezvous.timeout_s
        # a GPU has one load channel, and so one answer at a time
        self._buffers = [
            torch.empty(self.store.expert_bytes, dtype=torch.uint8)
            for _ in range(self.num_gpus[rendezvous.rank])
        ]

    def load(self, pair: int, gpu: int) -> Change:
        """Copy an expert from a holder into a free slot.

        Raises
        ------
        InputError
            No server gives it and the checkpoint cannot be read or lacks it, or the GPU has no
            free slot.
        """
        weights = self._buffers[gpu].view(self.store.dtype)
        if self.store.copy(pair, weights):  # another GPU of this server has it
            return self.store.put(pair, gpu, self.store.parts(weights))
        holders = [n for n in self._peers if self._expert_map.gpu_of[n, pair] >= 0]
        first = pair % max(len(holders), 1)
        holders = holders[first:] + holders[:first]
        deadline = time.monotonic() + min(ASK_S, self._timeout_s)
        while holders:
            for n in list(holders):
                given = self._request(n, pair, gpu)
                if given:
                    return self.store.put(pair, gpu, self.store.parts(weights))
                if given is False or not self._peers[n].usable or time.monotonic() > deadline:
                    holders.remove(n)
            time.sleep(RETRY_S if holders else 0.0)  # a busy machine may not answer at once
        logging.getLogger(__name__).warning(
            "no server gives %s; it is read from the checkpoint",
            self.store.shape.spec.pair_text(pair),
        )
        return self.checkpoint.load(pair, gpu)

    def _request(self, n: int, pair: int, gpu: int) -> bool | None:
        """Ask a server for an expert; returns whether the GPU's buffer now has its weights.

        None where the server does not answer. One that sends nothing for the time limit is asked no
        further.
        """
        kept = self._sockets.pop((n, gpu), None)
        for connection in (kept, None) if kept is not None else (None,):
            # one that was kept may have been closed since, which says nothing of the server
            try:
                if connection is None:
                    connection, _ = self._peers[n].dial("weights", gpu, timeout_s=DIAL_S)
                    connection.settimeout(self._timeout_s)
            except (OSError, HandshakeFailed, ConnectionLost):
                return None
            try:
                found = _ask(connection, pair, memoryview(self._buffers[gpu].numpy()))
            except (OSError, wire.WireError):
                connection.close()
                continue
            self._sockets[n, gpu] = connection
            return found
        return None

    def drop(self, pair: int, gpu: int) -> None:
        self.store.drop(pair, gpu)

    def held(self) -> list[tuple[int, int, int]]:
        return self.store.held()

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def _ask(connection: socket.socket, pair: int, weights: memoryview) -> bool:
    """Fill ``weights`` with an expert's; False if the other server does not have it."""
    request = np.zeros(wire.HEADER_BYTES, np.uint8)
    wire.put_header(request, wire.Header(wire.WEIGHTS, detail=pair))
    connection.sendall(request.data)
    answer = np.frombuffer(receive_exactly(connection, wire.HEADER_BYTES), np.uint8)
    header = wire.get_header(answer)
    if header.kind == wire.MISSING:
        return False
    if header.kind != wire.ANSWER or header.detail != pair:
        raise wire.WireError(f"no answer to a request for weights: {header}")
    receive_into(connection, weights)
    return True


def answer_weight_requests(store: ExpertStore, connection: socket.socket) -> None:
    """Answer the requests of one GPU of another server, until that one closes the connection.

    The socket's waits must have no limit.
    """
    spec = store.shape.spec
    pairs = spec.num_layers * spec.num_experts
    answer = torch.empty(wire.HEADER_BYTES + store.expert_bytes, dtype=torch.uint8)
    raw = answer.numpy()
    try:
        with contextlib.suppress(OSError):
            while True:
                request = receive_exactly(connection, wire.HEADER_BYTES)
                header = wire.get_header(np.frombuffer(request, np.uint8))
                if header.kind != wire.WEIGHTS or header.detail >= pairs:
                    raise wire.WireError(
                        f"a request for weights that does not fit {spec.name}: {header}"
                    )
                weights = answer[wire.HEADER_BYTES :].view(store.dtype)
                kind = wire.ANSWER if store.copy(header.detail, weights) else wire.MISSING
                wire.put_header(raw, wire.Header(kind, detail=header.detail))
                size = len(raw) if kind == wire.ANSWER else wire.HEADER_BYTES
                send_all(connection, memoryview(raw)[:size])
    except wire.WireError as error:
        logging.getLogger(__name__).error("%s", error)
