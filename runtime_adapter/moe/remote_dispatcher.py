"""The driver's side of a MoE layer: sends a step's calls, computes its own, adds up the answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.errors import PrismError
from prism_plan.model_spec import ModelShape
from runtime_adapter.moe.compute import Batch, Compute
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.emulated_gpu import wait_until
from runtime_adapter.moe.placed_experts import sum_dtype
from runtime_adapter.moe.router import (
    ExpertsLost,
    HoldersSilent,
    Router,
    count_destinations,
    select_calls,
)
from runtime_adapter.transport import wire_format as wire
from runtime_adapter.transport.connection import Connection
from runtime_adapter.transport.rendezvous import RequestTimeout, RuntimeFailure, ServerLost
from runtime_adapter.transport.wire_kernels import pack_calls

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: For how long calls are sent again whose holders say that they do not have the expert.
MAX_MISSING_S = 60.0
#: Between two attempts of a step's calls; grows up to the second value.
RETRY_S, MAX_RETRY_S = 0.02, 0.5
#: Waits for a server to answer again are this long at most before the holders are looked at anew.
WAIT_SLICE_S = 0.5


@dataclass(eq=False, slots=True)
class _PendingCall:
    """A call without an answer yet; ``rows`` of its tokens, None if they are all of the step's."""

    server: int
    tokens: int
    rows: Ints | None
    out_bytes: int
    back_bytes: int
    sent: bool


class _Waits:
    """What a step has waited for, and the servers that it tries to do without.

    ``avoided``, the longest first, have not answered or did not have an expert; ``missing_s`` is
    when one first lacked an expert.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.avoided: list[int] = []
        self.pauses = 0
        self.missing_s: float | None = None
        self._began_s: float | None = None

    def began(self, now: float) -> float:
        """The time at which the waiting has begun, which may be now."""
        if self._began_s is None:
            self._began_s = now
        return self._began_s

    def failed(self, server: int, *, missing: bool = False) -> None:
        """A server has not answered, or lacked an expert."""
        if server in self.avoided:
            self.avoided.remove(server)
        self.avoided.append(server)
        if missing and self.missing_s is None:
            self.missing_s = time.monotonic()

    def left_s(self, now: float) -> float:
        """Seconds for which the step may still wait."""
        return max(self.began(now) + self.limit_s - now, 0.0)

    def require_time(self, now: float, waits_for: str) -> None:
        """Raise RequestTimeout where there is none left."""
        if self.left_s(now) <= 0:
            raise RequestTimeout(self.limit_s, waits_for)


class RemoteDispatcher:
    """One lane of a driver: runs the experts of a layer, here and on other servers.

    ``connections``, all of one kind, lead to the other servers' workers; each has one call in
    flight, so a driver that serves several requests at once has a dispatcher for each. ``rtt_s`` is
    added to every call, half each way, where the network does not delay it.

    Calls of a server that is suspect go to other holders of the experts; where there are none, the
    step waits until one answers again, or a repair has loaded the expert elsewhere, up to
    ``request_timeout_s``. ``on_lost`` is called with the
    server of every call that was lost on its way.
    """

    def __init__(
        self,
        model: ModelShape,
        router: Router,
        connections: Mapping[int, Connection],
        compute: Compute,
        counters: Counters,
        *,
        request_timeout_s: float = 600.0,
        rtt_s: float = 0.0,
        on_lost: Callable[[ServerLost], None] = lambda lost: None,
    ) -> None:
        self.model = model
        self.router = router
        self.connections = connections
        self.compute = compute
        self.counters = counters
        self.request_timeout_s = request_timeout_s
        self.rtt_s = rtt_s
        self.on_lost = on_lost
        self.request = 0
        #: Sequence counter, incremented on entry to and exit from ``layer`` (odd = inside), like a
        #: seqlock; control/log_follower.py reads it. It is even while a step waits for a server,
        #: for then no call of the step is under way, and where they go is chosen afterwards.
        self.passes = 0
        self.layer = 0
        self._bits = wire.id_bits(model.num_experts)
        self._destinations = np.zeros((len(router.expert_map.servers), 2), np.int64)
        first = next(iter(connections.values()), None)
        self._wire_view = Connection.wire_view if first is None else first.wire_view
        buffer_tokens = [connection.buffer.tokens for connection in connections.values()]
        #: The longest step that may go to other servers, in tokens.
        self.max_tokens = min(buffer_tokens, default=sys.maxsize)

    def run(self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats) -> torch.Tensor:
        """Σ over each token's experts of weight x expert(hidden), [T, H].

        ``hidden`` [T, H], ``experts`` [T, K] ids, ``weights`` [T, K] of a layer position.

        Raises
        ------
        ExpertsLost
            All servers that held an expert are down, and no migration is about to load it.
        RequestTimeout
            The step has waited for ``request_timeout_s``.
        RuntimeFailure
            A server answers, but keeps saying that it does not have the expert.
        StepTooLong
            Other servers' buffers are too small for so many tokens; nothing has been sent.
        """
        wire.require_tokens(self.request, len(hidden), self.max_tokens)
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
        waits = _Waits(self.request_timeout_s)
        sums, failed = self._send_and_sum(layer, hidden, experts, weights, waits, first=True)
        while failed is not None and failed.any():
            self.counters.count(retries=1)
            self._pause(layer, waits)
            still_failed = np.zeros_like(failed)
            # a column at a time, so that no retry has more tokens than the step, for which the
            # servers' buffers are made; one row a call could have top-k times as many
            for k in np.flatnonzero(failed.any(axis=0)):
                token = np.flatnonzero(failed[:, k])
                rows = torch.from_numpy(token)
                retried, missing = self._send_and_sum(
                    layer, hidden[rows], experts[token, k, None], weights[token, k, None], waits
                )
                sums.index_add_(0, rows.to(sums.device), retried)
                if missing is not None:
                    still_failed[token, k] = missing[:, 0]
            failed = still_failed
        return sums.to(hidden.dtype)

    def _pause(self, layer: int, waits: _Waits) -> None:
        """Wait before calls are sent again, longer each time, unless for too long.

        The log entries of a move, or of a server that has come back, are about to arrive.
        """
        now = time.monotonic()
        waits.began(now)
        if waits.missing_s is not None:
            limit_s = min(MAX_MISSING_S, self.request_timeout_s)
            if now - waits.missing_s > limit_s:
                raise RuntimeFailure(
                    f"layer {self.model.moe_layers[layer]}: holders of an expert keep saying that "
                    "they do not have it"
                )
        waits.require_time(now, "calls that do not arrive are sent again")
        time.sleep(min(RETRY_S * 2 ** min(waits.pauses, 10), MAX_RETRY_S))
        waits.pauses += 1

    def _choose(self, layer: int, experts: Ints, waits: _Waits) -> npt.NDArray[np.int32]:
        """The server of each call [T, K].

        Waits where all holders of an expert are suspect, and where it was lost with its holders,
        but may be loaded elsewhere.
        """
        expert_map = self.router.expert_map
        while True:
            version = expert_map.version
            try:
                return self.router.choose(layer, experts, self.request, waits.avoided)
            except HoldersSilent as silent:
                now = time.monotonic()
                waits.began(now)
                waits.require_time(
                    now,
                    f"{self.model.pair_text(silent.pair)} is held by servers alone that do not "
                    f"answer: {', '.join(silent.holders)}",
                )
                left_s = waits.left_s(now)
            except ExpertsLost:
                left_s = waits.left_s(time.monotonic())
                if not left_s or not expert_map.may_be_repaired():
                    raise
            self.passes += 1
            try:
                expert_map.wait_for_change(min(left_s, WAIT_SLICE_S), version)
            finally:
                self.passes += 1

    def _send_and_sum(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats, waits: _Waits, *,
        first: bool = False,
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_] | None]:  # fmt: skip
        """Send all calls once; returns the sums, and which calls [T, K] were not answered."""
        rank = self.router.rank
        chosen = self._choose(layer, experts, waits)
        remote, waiting, destinations = count_destinations(chosen, rank, self._destinations)
        pending = self._send_all(layer, hidden, experts, weights, chosen) if remote else []
        sent_s = time.perf_counter()
        counted = {
            "messages": len(pending),
            "out_bytes": sum(call.out_bytes for call in pending),
            "back_bytes": sum(call.back_bytes for call in pending),
        }
        if first:
            self.counters.count_calls(layer, experts)
            counted |= {
                "calls": chosen.size,
                "remote_calls": remote,
                "steps": len(chosen),
                "waiting": waiting,
                "destinations": destinations,
            }
        self.counters.count(**counted)  # while the others compute
        sums: torch.Tensor | None = None
        failed = None
        try:
            if remote < chosen.size:
                num_own = chosen.size - remote
                batch = self._own_calls(layer, hidden, experts, weights, chosen, num_own)
                sums = self.compute.partial_sums(batch)
            computed_s = time.perf_counter()
            while pending:
                call = pending.pop(0)
                if not self._wait_for_answer(call, waits):
                    calls = chosen == call.server
                    failed = calls if failed is None else failed | calls
                elif hidden.dtype.is_floating_point:  # bytes stand for states in a replay
                    sums = self._add_answer(call, sums, hidden, bool(pending))
        except BaseException:
            self._discard_answers(pending)
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

    def _own_calls(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats,
        chosen: npt.NDArray[np.int32], num_calls: int,
    ) -> Batch:  # fmt: skip
        """The calls that this server computes itself."""
        token, ids = np.empty(num_calls, np.int64), np.empty(num_calls, np.int64)
        own_weights = np.empty(num_calls, np.float32)
        select_calls(chosen, self.router.rank, experts, weights, token, ids, own_weights)
        return Batch(layer, hidden, token, ids, own_weights)

    def _send_all(
        self, layer: int, hidden: torch.Tensor, experts: Ints, weights: Floats,
        chosen: npt.NDArray[np.int32],
    ) -> list[_PendingCall]:  # fmt: skip
        states = self._wire_view(hidden)
        weight_bits = weights.view(np.uint32)
        pending: list[_PendingCall] = []
        step_tokens, token_bytes = len(hidden), hidden.shape[1] * hidden.element_size()
        for server, (tokens, calls) in enumerate(self._destinations.tolist()):
            if not tokens:
                continue
            connection = self.connections[server]
            rows: Ints | None = np.empty(tokens, np.int64)
            try:
                words = connection.words(tokens, calls, token_bytes)
                if not pack_calls(chosen, server, experts, weight_bits, self._bits, rows, words):
                    wire.refuse_weights()
            except PrismError:
                self._discard_answers(pending)
                raise
            if tokens == step_tokens:
                rows = None
            sent = True
            try:
                connection.send(
                    wire.Header(wire.CALL, tokens, calls, layer, self.request), states, rows
                )
            except RuntimeError as error:
                sent = False
                self._report_lost(server, error)
            payload = wire.call_bytes(tokens, calls, token_bytes)
            pending.append(_PendingCall(server, tokens, rows, payload, tokens * token_bytes, sent))
        return pending

    def _wait_for_answer(self, call: _PendingCall, waits: _Waits) -> bool:
        """Wait for an answer; False if there is none, or the expert is not there."""
        if not call.sent:
            waits.failed(call.server)
            return False
        connection = self.connections[call.server]
        try:
            header = connection.answer()
        except RuntimeError as error:
            connection.reset()
            waits.failed(call.server)
            self._report_lost(call.server, error)
            return False
        if header.kind == wire.MISSING:
            waits.failed(call.server, missing=True)
            return False
        if header.kind != wire.ANSWER or header.tokens != call.tokens:
            name = self.router.expert_map.servers[call.server]
            raise RuntimeFailure(f"server {name!r} could not compute a call; see its messages")
        return True

    def _discard_answers(self, pending: list[_PendingCall]) -> None:
        """Give up the calls of a failed step, or the next one would read their answers."""
        for call in pending:
            self.connections[call.server].reset()

    def _add_answer(
        self, call: _PendingCall, sums: torch.Tensor | None, hidden: torch.Tensor, more: bool
    ) -> torch.Tensor:
        """Add the answer that has arrived for ``call`` to ``sums`` [T, H]; gives the sums.

        ``sums`` is None before the first part and else changed in place. The answer has one row per
        token of the call and is read from its connection, whose memory the next answer overwrites.
        ``hidden`` gives the sums' shape, dtype and device. Sums are kept in :func:`sum_dtype`, but
        a first answer that covers all tokens is kept in ``hidden``'s dtype unless ``more`` may
        follow.
        """
        answer = self.connections[call.server].sums(hidden.dtype, hidden.shape[1])
        dtype = sum_dtype(hidden.dtype)
        if call.rows is None:
            if sums is None:  # a copy, for the next answer overwrites it; in float32 only to add
                return answer.to(hidden.device, dtype if more else hidden.dtype, copy=True)
            sums += answer.to(sums.device) if sums.is_cuda else answer
            return sums
        if sums is None:
            sums = torch.zeros_like(hidden, dtype=dtype)
        rows = torch.from_numpy(call.rows).to(sums.device)
        sums.index_add_(0, rows, answer.to(device=sums.device, dtype=sums.dtype))
        return sums

    def _report_lost(self, server: int, error: Exception) -> None:
        name = self.router.expert_map.servers[server]
        self.on_lost(ServerLost(server, name, str(error).splitlines()[0]))
