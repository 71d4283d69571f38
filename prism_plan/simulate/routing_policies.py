"""The route policies: which of the servers that hold an expert computes a call.

An expert that the executing server holds is computed there. Of the others, ``spread`` takes the
holder by a hash of request and expert, ``nearest`` the one over the cheapest link, and ``cover``
sends each token to the fewest servers that together hold its missing experts
(docs/design.md, section 4, rule 5).

Every choice depends on nothing but the placement, the request's number and what the executing
server itself has sent before, so a runtime makes the same choices without asking anyone, whatever
the timing. Each policy stands here in plain Python, its definition, which the reference engine
uses, and below that compiled, for the compiled engine and the runtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prism_plan.jit import inline_kernel, kernel

Route = Literal["spread", "nearest", "cover"]
ROUTES: tuple[Route, ...] = ("cover", "nearest", "spread")
#: Positions in :data:`ROUTES`, by which compiled code names a policy; the third is `spread`.
COVER, NEAREST = 0, 1

Array = Any

# ------------------------------------------------------------------------------- the definitions

_MASK = (1 << 64) - 1


def hash_call(request: int, pair: int) -> int:
    """A 64-bit hash of a request's number and a (layer, expert) pair (splitmix64's finaliser)."""
    x = (request * 0x9E3779B97F4A7C15 + pair + 1) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def spread(request: int, pair: int, holders: Sequence[int]) -> int:
    """The holder, of those in ascending order, that the hash picks."""
    return holders[hash_call(request, pair) % len(holders)]


def nearest(link_rank: Sequence[int], holders: Sequence[int]) -> int:
    """The holder of least rank: cheapest link, then lowest index."""
    return min(holders, key=lambda m: link_rank[m])


def cover(holders: Sequence[Sequence[int]], tokens_sent: Sequence[int]) -> list[int]:
    """The server that computes each of a token's missing experts, under route ``cover``.

    ``holders`` lists for each missing expert, in the gate's order, the servers that hold it;
    ``tokens_sent`` counts the tokens that went over the link to each server so far. Of the
    smallest sets of servers that hold all experts, those over links that carried the fewest tokens
    are best. Ties: the first expert goes to the lowest server of any best set, with all others
    that this server holds; the first expert left goes to the lowest server of any best set that
    contains those chosen; and so on. By enumeration; :func:`cover_compiled` finds the same faster.
    """
    candidates = sorted(set(itertools.chain.from_iterable(holders)))
    best: list[tuple[int, ...]] = []
    for size in range(1, len(holders) + 1):
        covers = [
            group
            for group in itertools.combinations(candidates, size)
            if all(any(m in group for m in holding) for holding in holders)
        ]
        if covers:
            least = min(sum(tokens_sent[m] for m in group) for group in covers)
            best = [group for group in covers if sum(tokens_sent[m] for m in group) == least]
            break
    chosen: list[int] = []
    place = [-1] * len(holders)
    for k, holding in enumerate(holders):
        if place[k] >= 0:
            continue
        fitting = [group for group in best if set(chosen) <= set(group)]
        server = min(m for group in fitting for m in group if m in holding)
        chosen.append(server)
        for other in range(k, len(holders)):
            if place[other] < 0 and server in holders[other]:
                place[other] = server
    return place


# --------------------------------------------------------------------------------- compiled forms


@kernel
def hash_call_compiled(request: Any, pair: Any) -> Any:  # pragma: no cover - compiled
    """:func:`hash_call` in unsigned numbers of 64 bits."""
    x = np.uint64(request) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(pair) + np.uint64(1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inline_kernel
def cover_compiled(  # pragma: no cover - compiled
    missing_experts: Array, num_missing: int, holders: Array, num_replicas: Array,
    tokens_sent: Array, held_mask: Array, candidate_servers: Array, cover_table: Array,
) -> None:  # fmt: skip
    """:func:`cover`, by dynamic programming over the sets of missing experts.

    Parameters are those of :func:`choose_holders`. Of servers that hold the same of the missing
    experts only the best counts. The least cost of covering each set follows from smaller sets:
    some server must hold its first expert. Cost: servers, then tokens sent, in one number.
    """
    if num_missing == 1:
        pair = missing_experts[0, 0]
        chosen = holders[pair, 0]
        for i in range(1, num_replicas[pair]):
            if tokens_sent[holders[pair, i]] < tokens_sent[chosen]:
                chosen = holders[pair, i]
        missing_experts[1, 0] = chosen
        return
    num_candidates = 0
    for k in range(num_missing):
        pair = missing_experts[0, k]
        for i in range(num_replicas[pair]):
            m = holders[pair, i]
            if held_mask[m] == 0:
                candidate_servers[num_candidates] = m
                num_candidates += 1
            held_mask[m] |= 1 << k
    full = (1 << num_missing) - 1
    whole = -1  # the best server that holds all of them: no larger set is needed
    for i in range(num_candidates):
        m = candidate_servers[i]
        if held_mask[m] == full and (
            whole < 0
            or tokens_sent[m] < tokens_sent[whole]
            or (tokens_sent[m] == tokens_sent[whole] and m < whole)
        ):
            whole = m
    if whole >= 0:
        for i in range(num_candidates):
            held_mask[candidate_servers[i]] = 0
        for k in range(num_missing):
            missing_experts[1, k] = whole
        return
    server, cost, sets = cover_table[0], cover_table[1], cover_table[2]
    for u in range(full + 1):
        server[u] = -1
    num_sets = 0
    for i in range(num_candidates):
        m = candidate_servers[i]
        own = held_mask[m]
        held_mask[m] = 0
        known = server[own]
        if known < 0:
            sets[num_sets] = own
            num_sets += 1
        if (
            known < 0
            or tokens_sent[m] < tokens_sent[known]
            or (tokens_sent[m] == tokens_sent[known] and m < known)
        ):
            server[own] = m
    cost[0] = 0
    one = np.int64(1) << 48
    for u in range(1, full + 1):
        low = u & -u
        least = np.int64(1) << 62
        for i in range(num_sets):
            own = sets[i]
            if own & low:
                total = one + tokens_sent[server[own]] + cost[u & ~own]
                if total < least:
                    least = total
        cost[u] = least
    u = full
    while u:
        low = u & -u
        chosen = -1
        covered = 0
        for i in range(num_sets):
            own = sets[i]
            on_best = own & low and one + tokens_sent[server[own]] + cost[u & ~own] == cost[u]
            if on_best and (chosen < 0 or server[own] < chosen):
                chosen = server[own]
                covered = own
        for k in range(num_missing):
            if u & covered & (1 << k):
                missing_experts[1, k] = chosen
        u &= ~covered


def holder_lists(first_gpu: npt.NDArray[np.int32]) -> tuple[Array, Array]:
    """``holders`` [J, N] and ``num_replicas`` [J] of :func:`choose_holders`.

    ``first_gpu`` [N, J] is -1 where a server does not hold a pair.
    """
    holders = np.argsort(first_gpu.T < 0, axis=1, kind="stable").astype(np.int32)
    return holders, (first_gpu >= 0).sum(axis=0).astype(np.int32)


@kernel
def choose_holders(  # pragma: no cover - compiled
    route: int, request: Any, missing_experts: Array, num_missing: int, holders: Array,
    num_replicas: Array, tokens_sent: Array, link_rank: Array, held_mask: Array,
    candidate_servers: Array, cover_table: Array,
) -> None:  # fmt: skip
    """Choose a server for each missing expert of a token by the policy ``ROUTES[route]``.

    ``missing_experts`` int64 [2 or more, K] has their (layer, expert) pairs in row 0 and gets the
    servers in row 1. ``holders`` [J, N] lists each pair's servers, ascending, ``num_replicas``
    [J] their number; of the executing server are ``tokens_sent`` [N] and ``link_rank`` [N].
    Working memory of `cover`: ``held_mask`` int64 [N], zero before and after;
    ``candidate_servers`` int [N]; ``cover_table`` int64 [3, 2^K].
    """
    if route == COVER:
        cover_compiled(
            missing_experts, num_missing, holders, num_replicas, tokens_sent, held_mask,
            candidate_servers, cover_table,
        )  # fmt: skip
        return
    for k in range(num_missing):
        pair = missing_experts[0, k]
        if route == NEAREST:
            chosen = holders[pair, 0]
            for i in range(1, num_replicas[pair]):
                if link_rank[holders[pair, i]] < link_rank[chosen]:
                    chosen = holders[pair, i]
        else:
            which = hash_call_compiled(request, pair) % np.uint64(num_replicas[pair])
            chosen = holders[pair, np.int64(which)]
        missing_experts[1, k] = chosen
