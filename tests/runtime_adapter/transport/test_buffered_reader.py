"""What is read ahead arrives in order, whatever sizes are sent and asked for."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_adapter.transport.buffered_reader import AHEAD_BYTES, BufferedReader

SIZES = st.one_of(st.integers(0, 300), st.integers(AHEAD_BYTES - 2, 2 * AHEAD_BYTES + 2))
SENT = st.lists(st.integers(500, 3 * AHEAD_BYTES), min_size=1, max_size=8)


@settings(max_examples=50)
@given(st.lists(SIZES, max_size=8), SENT)
def test_bytes_in_order(asked: list[int], sent: list[int]) -> None:
    """Every buffer has the bytes that follow the one before; then the end is told."""
    here, there = socket.socketpair()
    raw = bytes(range(251)) * (sum(asked) // 251 + 1)
    raw = raw[: sum(asked)]

    def send() -> None:
        with there:
            begin, turn = 0, 0
            while begin < len(raw):
                end = begin + sent[turn % len(sent)]
                there.sendall(raw[begin:end])
                begin, turn = end, turn + 1

    thread = threading.Thread(target=send)
    thread.start()
    with here:
        reader = BufferedReader(here)
        begin = 0
        for size in asked:
            buffer = bytearray(size)
            reader.read_into(memoryview(buffer))
            assert buffer == raw[begin : begin + size]
            begin += size
        with pytest.raises(ConnectionResetError):
            reader.read_into(memoryview(bytearray(1)))
    thread.join()
