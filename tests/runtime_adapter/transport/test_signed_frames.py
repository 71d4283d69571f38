"""A message that was changed on its way ends the connection, and is never given to anybody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_adapter.transport.handshake import Session
from runtime_adapter.transport.signed_frames import (
    SIGNATURE_BYTES,
    AsyncSignedFrames,
    FrameError,
    SignedFrames,
)
from tests.limits import HANG_S
from tests.runtime_adapter.transport.sessions import CLAIM

KEY = bytes(range(32))
MAX_BYTES = 3_000_000


def session(*, is_client: bool, key: bytes = KEY) -> Session:
    return Session(CLAIM, key, is_client)


class Recorder:
    """A socket that keeps what is sent."""

    def __init__(self) -> None:
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        """Keep it."""
        self.sent += data


def recorded(*payloads: bytes, is_client: bool = True, key: bytes = KEY) -> bytes:
    """The bytes of frames, one after the other."""
    recorder = Recorder()
    frames = SignedFrames(recorder, session(is_client=is_client, key=key))  # type: ignore[arg-type]
    for payload in payloads:
        frames.send(payload)
    return recorder.sent


def received(
    data: bytes, number: int, *, in_loop: bool = False, is_client: bool = False
) -> list[bytes]:
    """What the other side of the session makes of bytes, which end after that."""
    near, far = socket.socketpair()
    far.settimeout(HANG_S)
    own = session(is_client=is_client)

    def send() -> None:
        with near, contextlib.suppress(OSError):
            near.sendall(data)

    async def receive_async() -> list[bytes]:
        reader, writer = await asyncio.open_connection(sock=far)
        frames = AsyncSignedFrames(reader, writer, own, MAX_BYTES)
        try:
            return [await frames.receive() for _ in range(number)]
        finally:
            frames.close()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        if in_loop:
            return asyncio.run(receive_async())
        with far:
            frames = SignedFrames(far, own, MAX_BYTES)
            return [frames.receive() for _ in range(number)]
    finally:
        thread.join(HANG_S)


@contextlib.contextmanager
def connected() -> Iterator[tuple[SignedFrames, SignedFrames]]:
    near, far = socket.socketpair()
    near.settimeout(HANG_S)
    far.settimeout(HANG_S)
    with near, far:
        yield (
            SignedFrames(near, session(is_client=True), MAX_BYTES),
            SignedFrames(far, session(is_client=False), MAX_BYTES),
        )


@pytest.mark.parametrize("in_loop", [False, True])
def test_messages_arrive_as_they_were_sent(in_loop: bool) -> None:
    """Of any length up to the largest, in their order."""
    payloads = [b"", b"x", os.urandom(70_000), bytes(MAX_BYTES), b"", b"last"]
    assert received(recorded(*payloads), len(payloads), in_loop=in_loop) == payloads


def test_both_directions_at_once() -> None:
    """Answers are signed as answers."""
    with connected() as (client, server):
        for number in range(20):
            client.send(b"%d" % number)
            assert server.receive() == b"%d" % number
            server.send(b"%d" % -number)
            assert client.receive() == b"%d" % -number


def test_event_loops_and_threads_sign_alike() -> None:
    """What a loop sends is what a thread sends."""
    near, far = socket.socketpair()
    payloads = [b"", b"x" * 100, os.urandom(200_000)]

    async def send() -> None:
        reader, writer = await asyncio.open_connection(sock=near)
        frames = AsyncSignedFrames(reader, writer, session(is_client=False), MAX_BYTES)
        for payload in payloads:
            await frames.send(payload)
        frames.close()
        await writer.wait_closed()

    with far:
        far.settimeout(HANG_S)
        thread = threading.Thread(target=lambda: asyncio.run(send()))
        thread.start()
        frames = SignedFrames(far, session(is_client=True))
        assert [frames.receive() for _ in payloads] == payloads
        thread.join(HANG_S)
        with pytest.raises(ConnectionResetError):
            frames.receive()


@settings(max_examples=80)
@given(st.integers(0, 8 * (4 + 40 + SIGNATURE_BYTES) - 1), st.booleans())
def test_one_flipped_bit_is_noticed(bit: int, in_loop: bool) -> None:
    """In the length, in the message or in its signature."""
    data = bytearray(recorded(b"m" * 40) + recorded(b"next" * 100))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises((FrameError, ConnectionResetError)):
        received(bytes(data), 1, in_loop=in_loop)


@settings(max_examples=40)
@given(st.integers(0, 4 + 40 + SIGNATURE_BYTES - 1), st.booleans())
def test_a_message_that_is_cut_off_is_none(size: int, in_loop: bool) -> None:
    """The connection's end in the middle is no message."""
    with pytest.raises(ConnectionResetError):
        received(recorded(b"m" * 40)[:size], 1, in_loop=in_loop)


def test_messages_of_others_places_and_directions_are_refused() -> None:
    """Repeated, left out, exchanged, sent back, or of another connection: none is accepted."""
    first, second = recorded(b"one"), recorded(b"one", b"two")[len(recorded(b"one")) :]
    assert received(first + second, 2) == [b"one", b"two"]
    for data, number in (
        (first + first, 2), (second, 1), (second + first, 1),
        (recorded(b"one", is_client=False), 1), (recorded(b"one", key=bytes(32)), 1),
        (b"\0\0\0\3one", 1),
    ):  # fmt: skip
        with pytest.raises((FrameError, ConnectionResetError)):
            received(data, number)
    with pytest.raises(FrameError, match="wrong signature"):
        received(first, 1, is_client=True)


@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize("length", [MAX_BYTES + 1, 0xFFFFFFFF])
def test_a_length_beyond_the_bound_is_refused_at_once(length: int, in_loop: bool) -> None:
    """Nobody waits for such a message."""
    with pytest.raises(FrameError, match=f"a message of {length:,} bytes; at most 3,000,000"):
        received(length.to_bytes(4, "big") + b"x", 1, in_loop=in_loop)


def test_a_length_alone_takes_no_memory() -> None:
    """The largest that is allowed, before its bytes have come."""
    near, far = socket.socketpair()
    with near, far:
        near.sendall((256 << 20).to_bytes(4, "big") + bytes(1000))
        near.shutdown(socket.SHUT_WR)
        tracemalloc.start()
        try:
            with pytest.raises(ConnectionResetError):
                SignedFrames(far, session(is_client=False)).receive()
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_message_that_is_too_long_is_not_sent() -> None:
    """The connection goes on after that."""
    with connected() as (client, server):
        with pytest.raises(FrameError, match="at most 3,000,000"):
            client.send(bytes(MAX_BYTES + 1))
        client.send(b"short")
        assert server.receive() == b"short"


def test_time_limits_are_the_sockets() -> None:
    """A wait for a message ends as any of the socket does."""
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(0.01)
        with pytest.raises(TimeoutError):
            SignedFrames(far, session(is_client=False)).receive()


def test_closing() -> None:
    """The other side sees the end."""
    with connected() as (client, server):
        client.send(b"bye")
        client.close()
        assert server.receive() == b"bye"
        with pytest.raises(ConnectionResetError):
            server.receive()
