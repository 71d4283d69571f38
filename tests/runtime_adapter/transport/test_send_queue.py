"""Long messages leave in the order in which they were ready, each when the one before has left."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from runtime_adapter.transport.dialing import UNSENT_BYTES, set_options
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue
from runtime_adapter.transport.socket_io import receive_exactly, wait_in_slices
from tests.limits import HANG_S

#: More than the kernel keeps for a side that does not read.
SIZE = 16 << 20


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Three connections, of a sending and a receiving end each."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        made = []
        for _ in range(3):
            one = stack.enter_context(socket.create_connection(server.getsockname()))
            other = stack.enter_context(server.accept()[0])
            other.settimeout(HANG_S)
            set_options(one)
            wait_in_slices(one)
            made.append((one, other))
        yield made


def message(n: int, size: int = SIZE) -> memoryview:
    """Of one byte, repeated."""
    return memoryview(bytes([n]) * size)


class Wire:
    """Stands for a socket: takes a part of a message whenever a test lets it."""

    def __init__(self, taken: list[tuple[int, int]]) -> None:
        self.taken = taken
        self.may_take = threading.Semaphore(0)

    def send(self, part: memoryview) -> int:
        """Take half of what is left, and note the message's byte and how much."""
        self.may_take.acquire()
        size = (len(part) + 1) // 2
        self.taken.append((part[0], size))
        return size


def test_one_after_the_other() -> None:
    """A message is not begun before the one before has left, in however many parts."""
    taken: list[tuple[int, int]] = []
    wires: list[Any] = [Wire(taken), Wire(taken)]
    queue = SendQueue()
    sending = [queue.put(wire, message(n, 100)) for n, wire in enumerate(wires, start=1)]
    for _ in range(50):
        wires[1].may_take.release()
    assert not sending[1].ended.is_set()
    for _ in range(50):
        wires[0].may_take.release()
    assert all(one.ended.wait(HANG_S) and one.error is None for one in sending)
    parts = [50, 25, 13, 6, 3, 2, 1]
    assert taken == [(n, size) for n in (1, 2) for size in parts]


def test_a_server_that_hangs_holds_nobody_up(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    """A message whose other side takes nothing lets others pass, and is finished when it does."""
    queue = SendQueue()
    (hung, late), (other, second), (third, last) = pairs
    stuck = queue.put(hung, message(1))
    others = [queue.put(other, message(2, LONG_BYTES)), queue.put(third, message(3, LONG_BYTES))]
    for n, end in ((2, second), (3, last)):
        assert set(receive_exactly(end, LONG_BYTES)) == {n}
    assert all(one.ended.wait(HANG_S) for one in others)
    assert not stuck.ended.is_set()
    assert set(receive_exactly(late, SIZE)) == {1}
    assert stuck.ended.wait(HANG_S)
    assert stuck.error is None


def test_messages_that_are_given_up(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """One that waits or is being sent ends at once; one whose connection breaks says so."""
    queue = SendQueue()
    (hung, _), (other, gone), (third, last) = pairs
    sending = [queue.put(hung, message(1)) for _ in range(2)]
    for one in sending:
        hung.shutdown(socket.SHUT_RDWR)
        queue.cancel(one)
        assert one.ended.is_set()
    gone.close()
    broken = queue.put(other, message(2))
    assert broken.ended.wait(HANG_S)
    assert isinstance(broken.error, OSError)
    queue.put(third, message(3, LONG_BYTES))
    assert set(receive_exactly(last, LONG_BYTES)) == {3}


def test_the_kernel_keeps_little_back(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    """A message that has left the process has nearly left the machine."""
    option = socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", 25)
    assert pairs[0][0].getsockopt(*option) == UNSENT_BYTES
