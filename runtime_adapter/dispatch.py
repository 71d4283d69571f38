"""The front's side of a layer: split a step's calls, send, compute the local ones, add up."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.model import ModelShape
from runtime_adapter.clock import wait_until
from runtime_adapter.compute import Batch, Compute, sums_in
from runtime_adapter.counters import Counters
from runtime_adapter.links import RuntimeFailure, ServerLost, receive, send
from runtime_adapter.routing import Router
from runtime_adapter.wire import (
    ANSWER,
    CALL,
    HEADER_BYTES,
    MISSING,
    Header,
    call_bytes,
    get_header,
    id_bits,
    pack_words,
    put_header,
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: A call that finds its expert moved is sent again so often before the request fails.
MOST_RETRIES = 50


@dataclass(eq=False)
class _Under:
    """A call that is under way."""

    server: int
    rows: Ints
    calls: npt.NDArray[np.bool_]
    answer: torch.Tensor
    sending: Any
    receiving: Any
    message: torch.Tensor
    states: torch.dtype


class Dispatcher:
    """Runs the experts of a layer for one lane of one front.

    ``groups`` are the process groups to the other servers' workers; a ``lane`` has one call under
    way to each of them, so a front that serves several requests at once has a dispatcher for each.
    ``rtt_s`` is added to every call, half on each way, where the network does not do it.
    ``on_lost`` is told of a server that does not answer; its calls then go to other holders.
    """

    def __init__(
        self,
        model: ModelShape,
        router: Router,
        groups: Mapping[int, Any],
        compute: Compute,
        counters: Counters,
        *,
        lane: int = 0,
        timeout_s: float = 10.0,
        rtt_s: float = 0.0,
        on_lost: Callable[[ServerLost], None] = lambda lost: None,
    ) -> None:
        self.model = model
        self.router = router
        self.groups = groups
        self.compute = compute
        self.counters = counters
        self.lane = lane
        self.timeout = datetime.timedelta(seconds=timeout_s)
        self.rtt_s = rtt_s
        self.on_lost = on_lost
        self.request = 0
        #: Begun and ended layers together, so odd inside of one: see follow.py.
        self.passes = 0
        self._bits = id_bits(model.num_experts)

    def run(self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats) -> torch.Tensor:
        """Σ over each token's experts of weight x expert(hidden), [T, H].

        ``hidden`` [T, H], ``experts`` [T, K] ids, ``weights`` [T, K] of a layer position.

        Raises
        ------
        ExpertsLost
            An expert is held only by servers that are lost.
        RuntimeFailure
            A server answers, but keeps saying that it does not have the expert.
        """
        self.passes += 1
        try:
            return self._run(layer, hidden, experts, weights)
        finally:
            self.passes += 1

    def _run(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats
    ) -> torch.Tensor:
        self.counters.count_calls(layer, experts)
        sums, failed = self._round(layer, hidden, experts, weights, first=True)
        retries = 0
        while failed is not None and failed.any():
            # one row for each call that is still wanting
            token, k = np.nonzero(failed)
            rows = torch.from_numpy(token)
            again, missing = self._round(
                layer, hidden[rows], experts[token, k][:, None], weights[token, k][:, None]
            )
            sums.index_add_(0, rows.to(sums.device), again)
            failed = np.zeros_like(failed)
            if missing is not None:
                failed[token[missing[:, 0]], k[missing[:, 0]]] = True
                retries += 1
                self.counters.count(retries=1)
                if retries > MOST_RETRIES:
                    raise RuntimeFailure(
                        f"layer {self.model.moe_layers[layer]}: holders of an expert keep saying "
                        "that they do not have it"
                    )
                time.sleep(0.02)  # the news of a move is on its way
        return sums.to(hidden.dtype)

    def _round(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats, *,
        first: bool = False,
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_] | None]:  # fmt: skip
        """Send all calls once; returns what came back, and which calls [T, K] did not."""
        me = self.router.me
        place = self.router.place(layer, experts, self.request)
        remote = place != me
        if first:
            self._count_steps(place, remote)
        under = [
            self._send(layer, int(m), hidden, experts, weights, place == m)
            for m in (np.unique(place[remote]) if remote.any() else ())
        ]
        sent_s = time.perf_counter()
        sums = torch.zeros_like(hidden, dtype=sums_in(hidden.dtype))
        local = ~remote
        if local.any():
            token, k = np.nonzero(local)
            sums += self.compute.partial_sums(
                Batch(layer, hidden, token, experts[token, k], weights[token, k])
            )
        computed_s = time.perf_counter()
        failed = None
        for call in under:
            if not self._receive(call, sums):
                failed = call.calls if failed is None else failed | call.calls
        if under and self.rtt_s:
            wait_until(time.monotonic() + self.rtt_s / 2)
        self.counters.count(
            compute_us=round(1e6 * (computed_s - sent_s)),
            waiting_us=round(1e6 * (time.perf_counter() - computed_s)),
        )
        return sums, failed

    def _count_steps(self, place: npt.NDArray[np.int32], remote: npt.NDArray[np.bool_]) -> None:
        tokens, top_k = place.shape
        destinations = 0
        if remote.any():
            ordered = np.sort(np.where(remote, place, -1), axis=1)
            new = np.ones_like(ordered, bool)
            new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
            destinations = int((new & (ordered >= 0)).sum())
        self.counters.count(
            calls=tokens * top_k,
            remote_calls=int(remote.sum()),
            steps=tokens,
            waiting=int(remote.any(axis=1).sum()),
            destinations=destinations,
        )

    def _send(
        self, layer: int, server: int, hidden: torch.Tensor, experts: Ints, weights: Floats,
        calls: npt.NDArray[np.bool_],
    ) -> _Under:  # fmt: skip
        token, k = np.nonzero(calls)
        last = np.ones(len(token), bool)
        last[:-1] = token[1:] != token[:-1]
        rows = token[last]
        states = hidden[torch.from_numpy(rows)].contiguous().cpu().view(torch.uint8).reshape(-1)
        token_bytes = len(states) // len(rows)
        payload = call_bytes(len(rows), len(token), token_bytes)
        message = torch.empty(HEADER_BYTES + payload, dtype=torch.uint8)
        raw = message.numpy()
        put_header(raw, Header(CALL, len(rows), len(token), layer, self.request))
        words = pack_words(experts[token, k], weights[token, k], last, self._bits)
        upto = HEADER_BYTES + 4 * len(words)
        raw[HEADER_BYTES:upto] = words.view(np.uint8)
        message[upto:] = states
        answer = torch.empty(HEADER_BYTES + len(states), dtype=torch.uint8)
        group = self.groups[server]
        try:
            receiving = receive(group, answer, 1, self.lane)
            sending = send(group, message, 1, self.lane)
        except RuntimeError as error:
            receiving = sending = None
            self._lose(server, error)
        self.counters.count(messages=1, out_bytes=payload, back_bytes=len(states))
        return _Under(server, rows, calls, answer, sending, receiving, message, hidden.dtype)

    def _receive(self, call: _Under, sums: torch.Tensor) -> bool:
        """Add an answer to the sums; False if there is none."""
        if call.receiving is None:
            return False
        try:
            call.sending.wait(self.timeout)
            call.receiving.wait(self.timeout)
        except RuntimeError as error:
            self._lose(call.server, error)
            return False
        header = get_header(call.answer.numpy())
        if header.kind == MISSING:
            return False
        if header.kind != ANSWER or header.tokens != len(call.rows):
            name = self.router.table.servers[call.server]
            raise RuntimeFailure(f"server {name!r} could not compute a call; see its messages")
        found = call.answer[HEADER_BYTES:].view(call.states).reshape(len(call.rows), -1)
        rows = torch.from_numpy(call.rows).to(sums.device)
        sums.index_add_(0, rows, found.to(device=sums.device, dtype=sums.dtype))
        return True

    def _lose(self, server: int, error: Exception) -> None:
        table = self.router.table
        if table.lost(server):
            return
        table.lose(server)
        reason = str(error).splitlines()[0]
        if "imed out" in reason or "timeout" in reason.lower():
            reason = f"no answer within {self.timeout.total_seconds():g} s"
        else:
            reason = "the connection was closed"
        self.on_lost(ServerLost(server, table.servers[server], reason))
