"""Chooses the server of each call of a step, by the simulator's kernels on this server's state.

The choices depend on the placement, the request's number and what this server has sent before, so
they are the simulation's, call for call (docs/design.md, section 4, rule 5). The tie-breaks are in
:mod:`prism_plan.simulate.routing_policies`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from prism_plan.errors import PrismError
from prism_plan.jit import kernel
from prism_plan.model_spec import ModelShape
from prism_plan.simulate.network import Network
from prism_plan.simulate.routing_policies import ROUTES, Route, choose_holders
from runtime_adapter.transport.wire_kernels import pack_calls
from runtime_adapter.weights.expert_map import ExpertMap


class ExpertsLost(PrismError):
    """A request needs an expert that no server holds any more."""


class HoldersSilent(Exception):
    """An expert is held by servers alone that do not answer at the moment, but are not down."""

    def __init__(self, pair: int, holders: Sequence[str]) -> None:
        self.pair = pair
        self.holders = holders
        super().__init__(f"no answer from {', '.join(holders)}")


@kernel
def _route(  # pragma: no cover - compiled
    experts: Any, first: int, rank: int, request: int, route: int, gpu_of: Any, holder: Any,
    num_replicas: Any, sent: Any, link_rank: Any, mask: Any, candidates: Any, missing: Any,
    best: Any, chosen: Any,
) -> Any:  # fmt: skip
    """Fill ``chosen`` [T, K] with servers; returns a pair that is held nowhere, or -1.

    ``first`` is the layer's first pair. ``missing`` int64 [3, K] are scratch rows of the token's
    experts that are not here: pair, chosen server, position in the token's list; ``mask``,
    ``candidates`` and ``best`` are working memory of
    :func:`~prism_plan.simulate.routing_policies.choose_holders`.
    """
    tokens, top_k = experts.shape
    for t in range(tokens):
        num_missing = 0
        for k in range(top_k):
            pair = first + np.int64(experts[t, k])
            if gpu_of[rank, pair] >= 0:
                chosen[t, k] = rank
            elif num_replicas[pair] == 0:
                return pair
            else:
                missing[0, num_missing] = pair
                missing[2, num_missing] = k
                num_missing += 1
        if num_missing == 0:
            continue
        choose_holders(
            route, request, missing, num_missing, holder, num_replicas, sent, link_rank[rank], mask,
            candidates, best,
        )  # fmt: skip
        for i in range(num_missing):
            server = missing[1, i]
            repeated = False
            for before in range(i):
                if missing[1, before] == server:
                    repeated = True
            if not repeated:
                sent[server] += 1
            chosen[t, missing[2, i]] = server
    return np.int64(-1)


@kernel
def count_destinations(chosen: Any, rank: int, counts: Any) -> Any:  # pragma: no cover - compiled
    """Count what a step sends, from ``chosen`` [T, K]; fills ``counts`` [N, 2].

    A server's counts are its tokens and its calls. Returns the number of remote calls, of tokens
    with one, and of pairs (token, server that it goes to).
    """
    counts[:] = 0
    remote, waiting, destinations = 0, 0, 0
    tokens, top_k = chosen.shape
    for t in range(tokens):
        before = remote
        for k in range(top_k):
            server = chosen[t, k]
            if server == rank:
                continue
            remote += 1
            counts[server, 1] += 1
            repeated = False
            for earlier in range(k):
                if chosen[t, earlier] == server:
                    repeated = True
            if not repeated:
                counts[server, 0] += 1
                destinations += 1
        waiting += remote > before
    return remote, waiting, destinations


@kernel
def select_calls(  # pragma: no cover - compiled
    chosen: Any, server: int, experts: Any, weights: Any, token: Any, ids: Any, selected: Any
) -> None:
    """Fill ``token``, ``ids`` and ``selected`` (weights), all [C], with a server's calls."""
    call = 0
    for t in range(chosen.shape[0]):
        for k in range(chosen.shape[1]):
            if chosen[t, k] == server:
                token[call], ids[call], selected[call] = t, experts[t, k], weights[t, k]
                call += 1


class Router:
    """Routes the steps of one server; keeps what it has sent over each link."""

    def __init__(
        self, expert_map: ExpertMap, rank: int, model: ModelShape, network: Network, route: Route
    ) -> None:
        num_servers = len(expert_map.servers)
        self.expert_map = expert_map
        self.rank = rank
        self.model = model
        self.route = ROUTES.index(route)
        self.link_rank = network.link_rank()
        self.sent = np.zeros(num_servers, np.int64)
        self._mask = np.zeros(num_servers, np.int64)
        self._candidates = np.zeros(num_servers, np.int32)
        self._missing = np.zeros((3, model.top_k), np.int64)
        self._best = np.zeros((3, 1 << model.top_k), np.int64)
        self._compile()

    def choose(
        self,
        layer: int,
        experts: npt.NDArray[np.int64],
        request: int,
        avoided: Sequence[int] = (),
    ) -> npt.NDArray[np.int32]:
        """The server of each call, int32 [T, K], for ``experts`` [T, K] of a layer position.

        ``avoided`` servers are chosen only for experts that no other one holds, the first ones of
        them before the last ones.

        Raises
        ------
        HoldersSilent
            All servers that hold an expert and are not down are suspect.
        ExpertsLost
            All servers that held an expert are down.
        """
        chosen = np.empty(experts.shape, np.int32)
        expert_map = self.expert_map
        holder, num_replicas = expert_map.holder, expert_map.num_replicas
        if avoided:
            holder, num_replicas = expert_map.without(avoided)
        sent = self.sent.copy()
        lost = int(
            _route(
                experts, layer * self.model.num_experts, self.rank, request, self.route,
                expert_map.gpu_of, holder, num_replicas, self.sent, self.link_rank, self._mask,
                self._candidates, self._missing, self._best, chosen,
            )
        )  # fmt: skip
        if lost >= 0:
            self.sent[:] = sent  # nothing is sent
            self._raise_lost(lost)
        return chosen

    def _raise_lost(self, pair: int) -> NoReturn:
        expert_map = self.expert_map
        silent = [expert_map.servers[n] for n in expert_map.holders_suspect(pair)]
        if silent:
            raise HoldersSilent(pair, silent)
        if expert_map.num_replicas[pair]:  # one has just come back
            raise HoldersSilent(pair, ["a server that was just away"])
        down = expert_map.down_names()
        raise ExpertsLost(
            f"{self.model.pair_text(pair)} is held by no server that is still there"
            + (f"; down: {', '.join(down)}" if down else "")
        )

    def _compile(self) -> None:
        """Compile what runs in a step, or load it from the cache: the first step must not wait."""
        none = np.zeros((0, self.model.top_k), np.int64)
        no_weights, ids = np.zeros(none.shape, np.float32), np.zeros(0, np.int64)
        words = np.zeros(0, np.uint32)
        chosen = self.choose(0, none, 0)
        count_destinations(chosen, self.rank, np.zeros((len(self.sent), 2), np.int64))
        pack_calls(chosen, self.rank, none, no_weights.view(np.uint32), 1, ids, words)
        select_calls(chosen, self.rank, none, no_weights, ids, ids, no_weights[:, 0].copy())


def uniform_network(num_servers: int, token_bytes: int) -> Network:
    """Links that are all alike, for routing without a cluster file."""
    zeros = np.zeros((num_servers, num_servers))
    ports = np.full(num_servers, math.inf)
    return Network(zeros, zeros.copy(), ports, ports.copy(), 0.0, 0.0, token_bytes)
