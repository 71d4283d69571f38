"""The driver's side of a layer: split a step's calls, send, compute the local ones, add up."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.errors import PrismError
from prism_plan.model import ModelShape
from runtime_adapter.moe.compute import Batch, Compute
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.emulated_gpu import wait_until
from runtime_adapter.moe.placed_experts import sum_dtype
from runtime_adapter.moe.routing import Router, pack_calls, take_calls, tally
from runtime_adapter.transport.connection import Connection
from runtime_adapter.transport.messages import (
    ANSWER,
    CALL,
    MISSING,
    Header,
    call_bytes,
    id_bits,
    refuse_weights,
    require_tokens,
)
from runtime_adapter.transport.rendezvous import RuntimeFailure, ServerLost

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: A call that finds its expert moved is sent again so often before the request fails.
MAX_RETRIES = 50


@dataclass(eq=False, slots=True)
class _PendingCall:
    """A call that is under way; ``rows`` of its tokens, None where they are all of the step's."""

    server: int
    tokens: int
    rows: Ints | None
    out_bytes: int
    back_bytes: int
    went: bool


class Dispatcher:
    """Runs the experts of a layer for one lane of one driver.

    ``lines``, all of one kind, lead to the other servers' workers; each has one call under way, so
    a driver that serves several requests at once has a dispatcher for each. ``rtt_s`` is added to
    every call, half on each way, where the network does not do it. ``on_lost`` is told of a server
    that does not answer within ``timeout_s``; its calls then go to other holders.
    """

    def __init__(
        self,
        model: ModelShape,
        router: Router,
        lines: Mapping[int, Connection],
        compute: Compute,
        counters: Counters,
        *,
        timeout_s: float = 10.0,
        rtt_s: float = 0.0,
        on_lost: Callable[[ServerLost], None] = lambda lost: None,
    ) -> None:
        self.model = model
        self.router = router
        self.lines = lines
        self.compute = compute
        self.counters = counters
        self.timeout = datetime.timedelta(seconds=timeout_s)
        self.rtt_s = rtt_s
        self.on_lost = on_lost
        self.request = 0
        #: Begun and ended layers together, so odd inside of ``layer``: see follow.py.
        self.passes = 0
        self.layer = 0
        self._bits = id_bits(model.num_experts)
        self._sent = np.zeros((len(router.table.servers), 2), np.int64)
        self._carried = next(iter(lines.values())).carried if lines else Connection.carried
        rooms = [line.room.tokens for line in lines.values()]
        #: The longest step that may go to other servers, in tokens.
        self.max_tokens = min(rooms, default=sys.maxsize)

    def run(self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats) -> torch.Tensor:
        """Σ over each token's experts of weight x expert(hidden), [T, H].

        ``hidden`` [T, H], ``experts`` [T, K] ids, ``weights`` [T, K] of a layer position.

        Raises
        ------
        ExpertsLost
            An expert is held only by servers that are lost.
        RuntimeFailure
            A server answers, but keeps saying that it does not have the expert.
        StepTooLong
            Other servers have no room for so many tokens; none of them has been sent anything.
        """
        require_tokens(self.request, len(hidden), self.max_tokens)
        self.layer = layer
        self.passes += 1
        try:
            return self._run(
                layer, hidden, np.ascontiguousarray(experts), np.ascontiguousarray(weights)
            )
        finally:
            self.passes += 1

    def _run(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats
    ) -> torch.Tensor:
        sums, failed = self._round(layer, hidden, experts, weights, first=True)
        retries = 0
        while failed is not None and failed.any():
            still = np.zeros_like(failed)
            # a column at a time, so that no retry has more tokens than the step: servers have room
            # for so many, and not for a row of each call
            for k in np.flatnonzero(failed.any(axis=0)):
                token = np.flatnonzero(failed[:, k])
                rows = torch.from_numpy(token)
                again, missing = self._round(
                    layer, hidden[rows], experts[token, k, None], weights[token, k, None]
                )
                sums.index_add_(0, rows.to(sums.device), again)
                if missing is not None:
                    still[token, k] = missing[:, 0]
            failed = still
            if failed.any():
                retries += 1
                self.counters.count(retries=1)
                if retries > MAX_RETRIES:
                    raise RuntimeFailure(
                        f"layer {self.model.moe_layers[layer]}: holders of an expert keep saying "
                        "that they do not have it"
                    )
                time.sleep(0.02)  # the log of a move is on its way
        return sums.to(hidden.dtype)

    def _round(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats, *,
        first: bool = False,
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_] | None]:  # fmt: skip
        """Send all calls once; returns what came back, and which calls [T, K] did not."""
        rank = self.router.rank
        place = self.router.place(layer, experts, self.request)
        remote, waiting, destinations = tally(place, rank, self._sent)
        under = self._send_all(layer, hidden, experts, weights, place) if remote else []
        sent_s = time.perf_counter()
        counted = {
            "messages": len(under),
            "out_bytes": sum(call.out_bytes for call in under),
            "back_bytes": sum(call.back_bytes for call in under),
        }
        if first:
            self.counters.count_calls(layer, experts)
            counted |= {
                "calls": place.size,
                "remote_calls": remote,
                "steps": len(place),
                "waiting": waiting,
                "destinations": destinations,
            }
        self.counters.count(**counted)  # while the others compute
        sums: torch.Tensor | None = None
        failed = None
        try:
            if remote < place.size:
                batch = self._own(layer, hidden, experts, weights, place, place.size - remote)
                sums = self.compute.partial_sums(batch)
            computed_s = time.perf_counter()
            while under:
                call = under.pop(0)
                if not self._await(call):
                    calls = place == call.server
                    failed = calls if failed is None else failed | calls
                elif hidden.dtype.is_floating_point:  # bytes stand for states in a replay
                    sums = self._add(call, sums, hidden, bool(under))
        except BaseException:
            self._await_all(under)
            raise
        if remote and self.rtt_s:
            wait_until(time.monotonic() + self.rtt_s / 2)
        self.counters.count(
            compute_us=round(1e6 * (computed_s - sent_s)),
            waiting_us=round(1e6 * (time.perf_counter() - computed_s)),
        )
        if sums is None:
            sums = torch.zeros_like(hidden)
        return sums, failed

    def _own(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats,
        place: npt.NDArray[np.int32], calls: int,
    ) -> Batch:  # fmt: skip
        """The calls that this server computes for itself."""
        token, ids = np.empty(calls, np.int64), np.empty(calls, np.int64)
        kept = np.empty(calls, np.float32)
        take_calls(place, self.router.rank, experts, weights, token, ids, kept)
        return Batch(layer, hidden, token, ids, kept)

    def _send_all(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats,
        place: npt.NDArray[np.int32],
    ) -> list[_PendingCall]:  # fmt: skip
        states = self._carried(hidden)
        bits_of_weights = weights.view(np.uint32)
        under: list[_PendingCall] = []
        step_tokens, token_bytes = len(hidden), hidden.shape[1] * hidden.element_size()
        for server, (tokens, calls) in enumerate(self._sent.tolist()):
            if not tokens:
                continue
            line = self.lines[server]
            rows: Ints | None = np.empty(tokens, np.int64)
            try:
                words = line.words(tokens, calls, token_bytes)
                if not pack_calls(place, server, experts, bits_of_weights, self._bits, rows, words):
                    refuse_weights()
            except PrismError:
                self._await_all(under)
                raise
            if tokens == step_tokens:
                rows = None
            went = True
            try:
                line.send(Header(CALL, tokens, calls, layer, self.request), states, rows)
            except RuntimeError as error:
                went = False
                self._lose(server, error)
            payload = call_bytes(tokens, calls, token_bytes)
            under.append(_PendingCall(server, tokens, rows, payload, tokens * token_bytes, went))
        return under

    def _await(self, call: _PendingCall) -> bool:
        """Wait for an answer; False if there is none, or the expert is not there."""
        if not call.went:
            return False
        line = self.lines[call.server]
        try:
            header = line.answer()
        except RuntimeError as error:
            line.forget()
            self._lose(call.server, error)
            return False
        if header.kind == MISSING:
            return False
        if header.kind != ANSWER or header.tokens != call.tokens:
            name = self.router.table.servers[call.server]
            raise RuntimeFailure(f"server {name!r} could not compute a call; see its messages")
        return True

    def _await_all(self, under: list[_PendingCall]) -> None:
        """Let no answer of a step that failed be there when the next one asks."""
        for call in under:
            with contextlib.suppress(PrismError):
                self._await(call)

    def _add(
        self, call: _PendingCall, sums: torch.Tensor | None, hidden: torch.Tensor, more: bool
    ) -> torch.Tensor:
        """The sums with an answer added; ``more`` says that other answers may follow."""
        found = self.lines[call.server].sums(hidden.dtype, hidden.shape[1])
        wide = sum_dtype(hidden.dtype)
        if call.rows is None:
            if sums is None:  # a copy, for its memory is used again; of all there is, as it came
                return found.to(hidden.device, wide if more else hidden.dtype, copy=True)
            sums += found.to(sums.device) if sums.is_cuda else found
            return sums
        if sums is None:
            sums = torch.zeros_like(hidden, dtype=wide)
        rows = torch.from_numpy(call.rows).to(sums.device)
        sums.index_add_(0, rows, found.to(device=sums.device, dtype=sums.dtype))
        return sums

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
