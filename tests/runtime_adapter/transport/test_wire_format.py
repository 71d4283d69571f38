"""Messages: what is packed comes out again, in the sizes that the simulator counts."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")

from runtime_adapter.moe.router import count_destinations
from runtime_adapter.transport.wire_format import (
    ANSWER,
    CALL,
    HEADER_BYTES,
    Header,
    WireError,
    get_header,
    id_bits,
    put_header,
    refuse_weights,
)
from runtime_adapter.transport.wire_kernels import pack_calls, unpack_calls

LAST = np.uint32(1 << 31)


def pack_words(
    experts: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    last: npt.NDArray[np.bool_],
    bits: int,
) -> npt.NDArray[np.uint32]:
    """Words of calls, all [calls]; weights must not be negative.

    Raises
    ------
    WireError
        A gate weight is negative or not a number: its sign has another meaning here.
    """
    if not bool((weights >= 0).all()):
        refuse_weights()
    low = np.uint32((1 << bits) - 1)
    # half of what the id cuts off is added, so that weights are rounded and not shortened
    kept = (weights.view(np.uint32) + np.uint32(1 << (bits - 1))) & ~low & ~LAST
    words = kept | experts.astype(np.uint32)
    words[last] |= LAST
    return words


def unpack_words(
    words: npt.NDArray[np.uint32], bits: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Experts, weights and token positions of words, all [calls]."""
    low = np.uint32((1 << bits) - 1)
    last = words >> np.uint32(31)
    token = np.cumsum(last, dtype=np.int64) - last
    weights = (words & np.uint32(0x7FFFFFFF ^ int(low))).view(np.float32)
    return (words & low).astype(np.int64), weights, token


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 7),
    experts=st.sampled_from([2, 8, 60, 64, 257]),
    servers=st.integers(1, 4),
)
@hypothesis.settings(max_examples=150)
def test_calls_of_a_step(seed: int, tokens: int, experts: int, servers: int) -> None:
    """Each server's words name its calls, tokens in order; weights keep all bits but an id's.

    The compiled packing, counting and reading equal numpy's, written out.
    """
    rng = np.random.default_rng(seed)
    top_k, rank = min(6, experts), 0
    rows = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    scale = np.float32(rng.choice([1e-30, 1.0, 16.0]))
    weights = rng.random((tokens, top_k), np.float32) * scale
    weights[rng.random(weights.shape) < 0.1] = rng.choice([0.0, -0.0])
    place = rng.integers(0, servers, rows.shape).astype(np.int32)
    bits = id_bits(experts)
    sent = np.ones((servers, 2), np.int64)
    away = place != rank
    counted = count_destinations(place, rank, sent)
    goes = [np.unique(row[row != rank]) for row in place]
    assert counted == (away.sum(), away.any(axis=1).sum(), sum(map(len, goes)))
    for server in range(1, servers):
        calls = place == server
        token, k = np.nonzero(calls)
        assert sent[server].tolist() == [calls.any(axis=1).sum(), calls.sum()]
        if not len(token):
            continue
        words = np.zeros(len(token), np.uint32)
        into = np.zeros(sent[server, 0], np.int64)
        assert pack_calls(place, server, rows, weights.view(np.uint32), bits, into, words)
        last = np.append(token[1:] != token[:-1], True)
        assert into.tolist() == token[last].tolist()
        assert np.array_equal(words, pack_words(rows[token, k], weights[token, k], last, bits))
        found, kept, at = unpack_words(words, bits)
        assert np.array_equal(found, rows[token, k])
        assert np.array_equal(into[at], token)
        assert np.allclose(kept, weights[token, k], rtol=2.0 ** (bits - 23), atol=1e-37)
        held_by = np.zeros(2 * experts, np.int32)
        gone = experts + int(found[rng.integers(len(found))])
        held_by[gone] = -rng.integers(0, 2)
        ids, same, names = np.zeros_like(found), np.zeros_like(words), np.zeros_like(found)
        lacking = gone - experts if held_by[gone] < 0 else -1
        named = unpack_calls(words, bits, experts, held_by, ids, same, names)
        assert named == (sent[server, 0], lacking)
        assert np.array_equal(ids, found)
        assert np.array_equal(same.view(np.float32), kept)
        assert np.array_equal(names, at)
    assert sent[rank].tolist() == [0, 0]


@pytest.mark.parametrize("weight", [-0.5, np.nan, -np.inf])
def test_weights_that_cannot_be_sent(weight: float) -> None:
    """A sign has another meaning on the wire, so a negative weight is refused, not bent."""
    weights = np.array([[0.5, weight]], np.float32)
    place, ids = np.ones((1, 2), np.int32), np.array([[0, 1]])
    rows, words = np.zeros(1, np.int64), np.zeros(2, np.uint32)
    assert not pack_calls(place, 1, ids, weights.view(np.uint32), 3, rows, words)
    with pytest.raises(WireError, match="negative or not a number"):
        pack_words(ids[0], weights[0], np.array([False, True]), 3)


@hypothesis.given(
    kind=st.sampled_from([CALL, ANSWER]),
    counts=st.tuples(*[st.integers(0, 2**31 - 1)] * 4),
)
def test_headers(kind: int, counts: tuple[int, int, int, int]) -> None:
    """What is written is read; the message after the header is left alone."""
    message = np.full(HEADER_BYTES + 3, 7, np.uint8)
    header = Header(kind, *counts)
    put_header(message, header)
    assert get_header(message) == header
    assert message[HEADER_BYTES:].tolist() == [7, 7, 7]


@hypothesis.given(st.binary(min_size=HEADER_BYTES, max_size=200))
def test_strange_messages(text: bytes) -> None:
    """Bytes that no server sends are refused, whatever they are."""
    with pytest.raises(WireError):
        get_header(np.frombuffer(text, np.uint8))


def test_too_many_experts() -> None:
    """An id may not take the whole mantissa."""
    assert [id_bits(n) for n in (1, 2, 8, 9, 64, 65)] == [1, 1, 3, 4, 6, 7]
    with pytest.raises(WireError, match="40000 experts a layer"):
        id_bits(40_000)
