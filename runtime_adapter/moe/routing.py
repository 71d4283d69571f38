"""Where each call of a step goes: the simulator's rules and code, on this server's own table.

The choices depend on the placement, the request's number and on what this server has sent before,
so they are those of the simulation, call for call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import PrismError
from prism_plan.jit import jit
from prism_plan.model import ModelShape
from prism_plan.simulate.network import Network
from prism_plan.simulate.routing_policies import ROUTES, Route, choose_holders
from runtime_adapter.moe.expert_map import ExpertMap


class ExpertsLost(PrismError):
    """A request needs an expert that no server holds any more."""


@jit
def _route(  # pragma: no cover - compiled
    rows: Any, first: int, at: int, request: int, route: int, gpu_of: Any, holder: Any,
    copies: Any, sent: Any, link_rank: Any, mask: Any, goals: Any, few: Any, best: Any, place: Any,
) -> Any:  # fmt: skip
    """Fill ``place`` [T, K] with servers; returns a pair that is held nowhere, or -1."""
    tokens, top_k = rows.shape
    for t in range(tokens):
        missing = 0
        for k in range(top_k):
            pair = first + np.int64(rows[t, k])
            if gpu_of[at, pair] >= 0:
                place[t, k] = at
            elif copies[pair] == 0:
                return pair
            else:
                few[0, missing] = pair
                few[2, missing] = k
                missing += 1
        if missing == 0:
            continue
        choose_holders(
            route, request, few, missing, holder, copies, sent, link_rank[at], mask, goals, best,
        )  # fmt: skip
        for i in range(missing):
            m = few[1, i]
            again = False
            for before in range(i):
                if few[1, before] == m:
                    again = True
            if not again:
                sent[m] += 1
            place[t, few[2, i]] = m
    return np.int64(-1)


@jit
def tally(place: Any, rank: int, sent: Any) -> Any:  # pragma: no cover - compiled
    """Count what a step sends, from ``place`` [T, K]; ``sent`` [N, 2] gets each server's part.

    A server's part is its tokens and its calls. Returns the remote calls, the tokens with one, and
    the servers that tokens go to.
    """
    sent[:] = 0
    remote, waiting, destinations = 0, 0, 0
    tokens, top_k = place.shape
    for t in range(tokens):
        before = remote
        for k in range(top_k):
            m = place[t, k]
            if m == rank:
                continue
            remote += 1
            sent[m, 1] += 1
            again = False
            for earlier in range(k):
                if place[t, earlier] == m:
                    again = True
            if not again:
                sent[m, 0] += 1
                destinations += 1
        waiting += remote > before
    return remote, waiting, destinations


@jit
def pack_calls(  # pragma: no cover - compiled
    place: Any, server: int, experts: Any, weights: Any, bits: int, rows: Any, words: Any
) -> Any:
    """Fill ``rows`` [tokens] and ``words`` [calls] of what goes to a server.

    ``weights`` are float32 as uint32 [T, K]; words are as
    :mod:`runtime_adapter.transport.messages` has them, and weights are rounded, not shortened.
    Returns whether all weights can be sent.
    """
    low = (np.int64(1) << bits) - 1
    half = np.int64(1) << (bits - 1)
    tokens, top_k = place.shape
    token, call = 0, 0
    for t in range(tokens):
        first = call
        for k in range(top_k):
            if place[t, k] != server:
                continue
            weight = np.int64(weights[t, k])
            if weight > 0x7F800000 and weight != 0x80000000:
                return False  # negative (but for -0) or not a number
            words[call] = ((weight + half) & 0x7FFFFFFF & ~low) | np.int64(experts[t, k])
            call += 1
        if call > first:
            words[call - 1] |= 0x80000000
            rows[token] = t
            token += 1
    return True


@jit
def take_calls(  # pragma: no cover - compiled
    place: Any, server: int, experts: Any, weights: Any, token: Any, ids: Any, kept: Any
) -> None:
    """Fill ``token``, ``ids`` and ``kept`` (weights), all [C], with a server's calls of a step."""
    call = 0
    for t in range(place.shape[0]):
        for k in range(place.shape[1]):
            if place[t, k] == server:
                token[call], ids[call], kept[call] = t, experts[t, k], weights[t, k]
                call += 1


@jit
def read_calls(  # pragma: no cover - compiled
    words: Any, bits: int, first: int, held_by: Any, experts: Any, weights: Any, token: Any
) -> Any:
    """Take words [C] apart, as :func:`pack_calls` makes them.

    Fills ``experts``, ``weights`` (float32 as uint32) and ``token``, all [C]. ``held_by`` int [J]
    is -1 for pairs that are not here, ``first`` the layer's first pair. Returns the tokens named,
    and the last expert that is not here, -1 if all are.
    """
    low = (np.uint32(1) << np.uint32(bits)) - np.uint32(1)
    tokens, lacking = np.int64(0), np.int64(-1)
    for c in range(len(words)):
        word = words[c]
        expert = np.int64(word & low)
        experts[c] = expert
        weights[c] = word & np.uint32(0x7FFFFFFF) & ~low
        token[c] = tokens
        tokens += np.int64(word >> np.uint32(31))
        if first + expert >= len(held_by) or held_by[first + expert] < 0:
            lacking = expert
    return tokens, lacking


class Router:
    """Routes the steps of one server; keeps what it has sent over each link."""

    def __init__(
        self, table: ExpertMap, rank: int, model: ModelShape, network: Network, route: Route
    ) -> None:
        servers = len(table.servers)
        self.table = table
        self.rank = rank
        self.model = model
        self.route = ROUTES.index(route)
        self.link_rank = network.link_rank()
        self.sent = np.zeros(servers, np.int64)
        self._mask = np.zeros(servers, np.int64)
        self._goals = np.zeros(servers, np.int32)
        self._few = np.zeros((3, model.top_k), np.int64)
        self._best = np.zeros((3, 1 << model.top_k), np.int64)
        self._warm_up()

    def place(
        self, layer: int, experts: npt.NDArray[np.int64], request: int
    ) -> npt.NDArray[np.int32]:
        """The server of each call, int32 [T, K], for ``experts`` [T, K] of a layer position.

        Raises
        ------
        ExpertsLost
            An expert is held by no server that is still there.
        """
        place = np.empty(experts.shape, np.int32)
        table = self.table
        lost = _route(
            experts, layer * self.model.num_experts, self.rank, request, self.route, table.gpu_of,
            table.holder, table.copies, self.sent, self.link_rank, self._mask, self._goals,
            self._few, self._best, place,
        )  # fmt: skip
        if lost >= 0:
            gone = [name for m, name in enumerate(table.servers) if table.lost(m)]
            raise ExpertsLost(
                f"{self.model.pair_text(int(lost))} is held by no server that is still there"
                + (f"; lost: {', '.join(gone)}" if gone else "")
            )
        return place

    def _warm_up(self) -> None:
        """Compile, or load, what runs in a step: the first request is not to wait for it."""
        none = np.zeros((0, self.model.top_k), np.int64)
        no_weights, ids = np.zeros(none.shape, np.float32), np.zeros(0, np.int64)
        words = np.zeros(0, np.uint32)
        place = self.place(0, none, 0)
        tally(place, self.rank, np.zeros((len(self.sent), 2), np.int64))
        pack_calls(place, self.rank, none, no_weights.view(np.uint32), 1, ids, words)
        take_calls(place, self.rank, none, no_weights, ids, ids, no_weights[:, 0].copy())


def warm_up_answers() -> None:
    """Compile, or load, what a worker runs."""
    ids, words = np.zeros(0, np.int64), np.zeros(0, np.uint32)
    read_calls(words, 1, 0, np.zeros(0, np.int32), ids, words, ids)
