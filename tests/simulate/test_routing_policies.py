"""Route policies: the definition, the compiled form, and what each promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.simulate.routing_policies import (
    COVER,
    NEAREST,
    ROUTES,
    choose_holders,
    cover,
    hash_call,
    hash_call_compiled,
    nearest,
    spread,
)


def compiled_choice(
    route: int, holders: Sequence[Sequence[int]], sent: Sequence[int], link_rank: Sequence[int] = ()
) -> list[int]:
    """`choose_holders` of request 3 on arrays made for it; it leaves its working memory clean."""
    missing, servers = len(holders), len(sent)
    missing_experts = np.zeros((2, missing), np.int64)
    missing_experts[0] = np.arange(missing)
    holder = np.zeros((missing, servers), np.int32)
    for k, held in enumerate(holders):
        holder[k, : len(held)] = held
    held_mask = np.zeros(servers, np.int64)
    choose_holders(
        route,
        np.int64(3),
        missing_experts,
        missing,
        holder,
        np.array([len(held) for held in holders], np.int32),
        np.array(sent, np.int64),
        np.array(link_rank or range(servers), np.int32),
        held_mask,
        np.zeros(servers, np.int32),
        np.zeros((3, 1 << missing), np.int64),
    )
    assert not held_mask.any()
    return [int(m) for m in missing_experts[1]]


@st.composite
def tokens(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Up to 6 missing experts on up to 12 servers, and how much was sent to each."""
    servers = draw(st.integers(1, 12))
    held = st.sets(st.integers(0, servers - 1), min_size=1, max_size=draw(st.integers(1, servers)))
    holders = [sorted(h) for h in draw(st.lists(held, min_size=1, max_size=6))]
    most = draw(st.sampled_from([0, 2, 1000]))
    sent = draw(st.lists(st.integers(0, most), min_size=servers, max_size=servers))
    return holders, sent


@settings(max_examples=250)
@given(tokens())
def test_compiled_cover_is_the_definition(token: tuple[list[list[int]], list[int]]) -> None:
    """The recursion over subsets places every expert where the enumeration does."""
    holders, sent = token
    assert compiled_choice(COVER, holders, sent) == cover(holders, sent)


@settings(max_examples=120)
@given(tokens())
def test_cover_promises(token: tuple[list[list[int]], list[int]]) -> None:
    """Each expert goes to a holder; no set of fewer servers would do, none as small sent less."""
    holders, sent = token
    place = cover(holders, sent)
    assert all(m in held for m, held in zip(place, holders, strict=True))
    used = set(place)
    # every assignment of experts to holders, were it not for the number of them: all subsets
    for size in range(1, len(used) + 1):
        for group in itertools.combinations(range(len(sent)), size):
            if all(set(held) & set(group) for held in holders):
                assert size == len(used)
                assert sum(sent[m] for m in group) >= sum(sent[m] for m in used)


def test_cover_by_hand() -> None:
    """One server for both beats the nearer two; ties go to the idler, then to the lower server."""
    assert cover([[0, 2], [1, 2]], [0, 0, 100]) == [2, 2]
    assert cover([[0, 1], [0, 1]], [5, 4]) == [1, 1]
    assert cover([[0, 1], [0, 1]], [5, 5]) == [0, 0]
    # {0, 2} and {1, 2} are smallest; 1 has sent less, and serves what it holds before 2 does
    assert cover([[0, 1], [2], [1, 2]], [3, 1, 9]) == [1, 2, 1]
    assert cover([], [1, 2]) == []


def splitmix(request: int, pair: int) -> int:
    """The finaliser again, in arrays of 64 bits."""
    with np.errstate(over="ignore"):
        x = np.array([request], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = x + np.uint64(pair) + np.uint64(1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((x ^ (x >> np.uint64(31)))[0])


@settings(max_examples=300)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_the_hash_is_the_same_everywhere(request: int, pair: int) -> None:
    """Python's whole numbers, numpy's 64 bits and the compiled code give one hash."""
    assert hash_call(request, pair) == splitmix(request, pair)
    assert int(hash_call_compiled(np.int64(request), np.int64(pair))) == hash_call(request, pair)


@pytest.mark.parametrize("number", [2, 3, 5])
def test_spread_is_even(number: int) -> None:
    """Of 40,000 calls every holder gets its share, by request and by pair (5 standard errors)."""
    holders = [7 * m + 1 for m in range(number)]
    fixed = [
        [spread(request, 11, holders) for request in range(40_000)],
        [spread(3, pair, holders) for pair in range(40_000)],
    ]
    share = 1 / number
    error = (share * (1 - share) * 40_000) ** 0.5
    for got in fixed:
        counts = [got.count(m) for m in holders]
        assert sum(counts) == 40_000
        assert all(abs(count - share * 40_000) < 5 * error for count in counts)


def test_spread_is_a_function_of_request_and_expert() -> None:
    """A later step of the same request asks the same server for the same expert."""
    assert spread(5, 9, [1, 2, 3]) == spread(5, 9, [1, 2, 3])
    assert len({spread(request, 9, [1, 2, 3]) for request in range(20)}) == 3


@settings(max_examples=120)
@given(tokens(), st.randoms(use_true_random=False))
def test_compiled_nearest_and_spread_are_the_definitions(
    token: tuple[list[list[int]], list[int]], random: Random
) -> None:
    """Compiled code chooses the same holders for any ranks of links."""
    holders, sent = token
    link_rank = random.sample(range(len(sent)), len(sent))
    near = [nearest(link_rank, held) for held in holders]
    assert compiled_choice(NEAREST, holders, sent, link_rank) == near
    hashed = [spread(3, pair, held) for pair, held in enumerate(holders)]
    assert compiled_choice(ROUTES.index("spread"), holders, sent) == hashed


def test_nearest() -> None:
    """The holder of least rank."""
    assert nearest([0, 3, 1, 2], [1, 2, 3]) == 2
    assert nearest([0, 3, 1, 2], [1, 3]) == 3
