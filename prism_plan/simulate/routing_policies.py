"""Where a call goes that several servers could serve (docs/design.md, section 4, rule 5).

An expert that the executing server holds is computed there. Of the others, ``spread`` takes the
holder by a hash of request and expert, ``nearest`` the one over the cheapest link, and ``cover``
sends each token to the fewest servers that together hold its missing experts.

All of it depends on nothing but the placement, the request's number and what the executing server
itself has sent before, so a runtime can do the same without asking anyone, whatever the timing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

Route = Literal["spread", "nearest", "cover"]
ROUTES: tuple[Route, ...] = ("cover", "nearest", "spread")

_MASK = (1 << 64) - 1


def mix(request: int, pair: int) -> int:
    """A 64-bit hash of a request's number and a (layer, expert) pair (splitmix64's finaliser)."""
    x = (request * 0x9E3779B97F4A7C15 + pair + 1) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def spread(request: int, pair: int, holders: Sequence[int]) -> int:
    """The holder (of those ascending) that the hash picks."""
    return holders[mix(request, pair) % len(holders)]


def nearest(rank: Sequence[int], holders: Sequence[int]) -> int:
    """The holder of least rank: cheapest link, then lowest index."""
    return min(holders, key=lambda m: rank[m])


def cover(holders: Sequence[Sequence[int]], sent: Sequence[int]) -> list[int]:
    """The server that computes each of a token's missing experts, under route ``cover``.

    ``holders`` lists for each missing expert, in the gate's order, the servers that hold it;
    ``sent`` the tokens that went over the link to each server so far. Of the smallest sets of
    servers that hold all, those over links that carried the fewest tokens are best. The first
    expert goes to the lowest server of any best set, with all others that this server holds; the
    first expert left goes to the lowest server of any best set that contains those chosen; and so
    on. By enumeration: this is the definition; the compiled engine finds the same faster.
    """
    candidates = sorted(set(itertools.chain.from_iterable(holders)))
    best: list[tuple[int, ...]] = []
    for size in range(1, len(holders) + 1):
        covers = [
            group
            for group in itertools.combinations(candidates, size)
            if all(any(m in group for m in held) for held in holders)
        ]
        if covers:
            least = min(sum(sent[m] for m in group) for group in covers)
            best = [group for group in covers if sum(sent[m] for m in group) == least]
            break
    chosen: list[int] = []
    place = [-1] * len(holders)
    for k, held in enumerate(holders):
        if place[k] >= 0:
            continue
        fitting = [group for group in best if set(chosen) <= set(group)]
        server = min(m for group in fitting for m in group if m in held)
        chosen.append(server)
        for other in range(k, len(holders)):
            if place[other] < 0 and server in holders[other]:
                place[other] = server
    return place
