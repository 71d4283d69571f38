"""Messages between spans arrive as they were sent; anything else is refused before memory."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from prism_plan.execution_table import Span  # noqa: E402
from runtime_adapter.spans import messages as wire  # noqa: E402
from runtime_adapter.spans.messages import Attempt, RequestSetup, SpanMessage  # noqa: E402
from runtime_adapter.spans.span_connection import SpanConnection  # noqa: E402
from runtime_adapter.transport.listener import Listener  # noqa: E402
from runtime_adapter.transport.peer import ConnectionLost, Peer  # noqa: E402
from runtime_adapter.transport.secrets import RunSecret  # noqa: E402
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue  # noqa: E402
from runtime_adapter.transport.socket_io import receive_exactly  # noqa: E402
from runtime_adapter.transport.wire_format import WireError  # noqa: E402
from tests.limits import HANG_S  # noqa: E402

TOKEN_BYTES = 24
SETUP = RequestSetup(7, (Span(0, 0, 1), Span(1, 2, 0)), 5, 20)


def received(raw: bytes) -> SpanMessage:
    """What a server reads of these bytes; the sender closes after them."""
    here, there = socket.socketpair()
    with here, there:
        thread = threading.Thread(target=lambda: (there.sendall(raw), there.close()))
        thread.start()
        try:
            return wire.MessageReader(here, [2, 2], 3, TOKEN_BYTES).read()
        finally:
            here.close()
            thread.join()


def raw_of(message: SpanMessage) -> bytes:
    """The bytes of a message."""
    return b"".join(bytes(part) for part in message.pack())


def states(tokens: int) -> SpanMessage:
    """A message with random states."""
    payload = np.random.default_rng(0).integers(0, 255, tokens * TOKEN_BYTES, np.uint8)
    counts = np.arange(wire.COUNTED)
    return SpanMessage(
        wire.STATES, Attempt(1, 0, 1 << 40), 1, 4, tokens, wire.LAST, 3, payload,
        SETUP.to_json(), counts,
    )  # fmt: skip


def test_a_message_arrives_as_it_was_sent() -> None:
    """All fields, the payload and the setup."""
    sent = states(3)
    found = received(raw_of(sent))
    for name in ("kind", "attempt", "span", "past", "tokens", "flags", "turn", "setup"):
        assert getattr(found, name) == getattr(sent, name), name
    assert (found.payload == sent.payload).all()
    assert (found.counts == sent.counts).all()
    assert RequestSetup.from_json(found.setup, 2, 3) == SETUP
    ids = SpanMessage(wire.START, Attempt(0, 1, 1), tokens=2, payload=wire.ids_payload([5, 70_000]))
    assert received(raw_of(ids)).ids() == [5, 70_000]


@given(st.integers(0, 76), st.binary(min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_read(at: int, value: bytes) -> None:
    """Whatever the header says, a reader ends with a message that fits the run, or an error.

    In particular it takes no memory for sizes that do not fit.
    """
    raw = bytearray(raw_of(states(2)))
    raw[at : at + len(value)] = value
    try:
        found = received(bytes(raw))
    except (WireError, ConnectionResetError):
        return
    assert found.attempt.home in (0, 1)
    assert found.attempt.lane in (0, 1)
    assert 0 <= found.span < 3
    assert len(found.payload) in (0, 4, 2 * TOKEN_BYTES, 4 * found.tokens)


def test_a_huge_size_takes_no_memory() -> None:
    """A header that declares terabytes is refused before anything is allocated."""
    raw = bytearray(raw_of(states(2)))
    tokens = 1 << 30
    struct.pack_into("=q", raw, 24, tokens * TOKEN_BYTES)  # size
    struct.pack_into("=i", raw, 40, tokens)
    with pytest.raises(WireError, match="bytes"):
        received(bytes(raw))


@pytest.mark.parametrize(
    "change",
    [
        {"path": []},
        {"path": [[0, 1, 0]]},
        {"path": [[0, 0, 0], [2, 2, 1]]},
        {"path": [[0, 2, 2]]},
        {"path": [[0, 2, -1]]},
        {"path": [[0, 2]]},
        {"path": "x"},
        {"new": 0},
        {"kv": "x"},
        {"request": None},
    ],
)
def test_setups_that_do_not_fit(change: dict[str, Any]) -> None:
    """A path must cover the layers in order, on servers of the run."""
    with pytest.raises(WireError):
        RequestSetup.from_json(SETUP.to_json() | change, 2, 3)


class Taking:
    """A server that takes connections of one peer, and keeps the bytes of each."""

    def __init__(self) -> None:
        self.secret = RunSecret(b"a secret of this test", given=True)
        self.connections: list[socket.socket] = []
        self.taken = threading.Condition()
        self.listener = Listener(
            "127.0.0.1", 0, self.secret, {"spans": self.take}, max_connections=9, report=print
        )
        self.listener.start()
        self.peer = Peer("here", "there", self.secret, 5.0)
        self.peer.set_address(self.listener.address, 1)

    def take(self, connection: socket.socket, _: object) -> None:
        """Keep a connection."""
        with self.taken:
            self.connections.append(connection.dup())
            self.taken.notify_all()

    def connection(self, number: int) -> socket.socket:
        """The connection of a number, once it is there."""
        with self.taken:
            assert self.taken.wait_for(lambda: len(self.connections) > number, HANG_S)
            found = self.connections[number]
        found.settimeout(HANG_S)
        return found

    def close(self) -> None:
        """End all."""
        self.listener.close()
        for connection in self.connections:
            connection.close()


def test_what_is_kept_is_sent_again_in_order() -> None:
    """A new connection begins with the messages of the pass under way, long and short ones.

    Those of the pass before are not among them; tokens on their way home are.
    """
    server = Taking()
    sender = SpanConnection(server.peer, 0, SendQueue())
    try:
        long = [b"L" * (LONG_BYTES + 5)]
        sender.send([b"pass 1"], (1, 1))
        sender.send([b"token 1"])
        sender.send(long, (1, 2))
        sender.send([b"pass 2"], (1, 2))
        size = len(b"pass 1token 1") + len(long[0]) + len(b"pass 2")
        assert receive_exactly(server.connection(0), size) == (
            b"pass 1token 1" + long[0] + b"pass 2"
        )
        server.peer.generation += 1  # as after an outage
        sender.renew()
        again = b"token 1" + long[0] + b"pass 2"
        assert receive_exactly(server.connection(1), len(again)) == again
        server.connections[1].close()
        sender.forget(0)  # of an attempt before: nothing changes
        assert len(sender._kept) == 3
        sender.forget(1)
        sender.send([b"pass 3"], (2, 0))
        deadline = time.monotonic() + HANG_S
        while len(server.connections) < 3:  # until it notices that the other side has closed it
            assert time.monotonic() < deadline
            sender.renew()
            time.sleep(0.01)
        assert receive_exactly(server.connection(2), 13) == b"token 1pass 3"
        server.peer.set_address(None, 2)
        with pytest.raises(ConnectionLost):
            sender.send([b"pass 4"], (2, 1))
    finally:
        sender.close()
        server.close()


def test_sending_does_not_wait_for_a_reader() -> None:
    """Long messages to a server that reads nothing do not stop who sends them, or another lane."""
    server = Taking()
    queue = SendQueue()
    first, second = (SpanConnection(server.peer, lane, queue) for lane in range(2))
    try:
        message = [bytes(30 << 20)]
        for step in range(3):
            first.send(message, (1, step))
        second.send([b"short"], (1, 0))
        for number in range(2):
            server.connection(number)
        found = {one.recv(5) for one in server.connections}
        assert b"short" in found
    finally:
        first.close()
        second.close()
        server.close()
