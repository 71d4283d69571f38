"""Long messages leave in the order in which they were ready, each when the one before has left."""

from __future__ import annotations

import datetime
import socket
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from runtime_adapter.torch_private import UNSENT_BYTES, limit_unsent_bytes  # noqa: E402
from runtime_adapter.transport import send_queue  # noqa: E402
from runtime_adapter.transport.send_queue import SendQueue  # noqa: E402

SECOND = datetime.timedelta(seconds=1)


class FakeGroup:
    """Stands for a pair's group: sends are noted, and end when a test says so."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def wait(self, timeout: datetime.timedelta) -> None:
        """Wait for the end of the send; raises as gloo does."""
        self.begun.set()
        ended = self.may_end.wait(timeout.total_seconds())
        if self.broken or not ended:
            raise RuntimeError("Timed out")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to the transport, in order."""
    found: list[Any] = []

    def send(group: FakeGroup, message: Any, to: int, lane: int) -> FakeGroup:
        found.append((group, message, to, lane))
        return group

    monkeypatch.setattr(send_queue, "send", send)
    return found


def test_one_after_the_other(sent: list[Any]) -> None:
    """The second message is not begun before the first has left; then it is, as it was handed."""
    groups = [FakeGroup(), FakeGroup()]
    queue = SendQueue(10 * SECOND)
    done = [queue.put(group, f"message {n}", n, 7 + n) for n, group in enumerate(groups)]
    assert groups[0].begun.wait(5)
    assert not groups[1].begun.wait(0.05)
    assert [one.is_set() for one in done] == [False, False]
    groups[0].may_end.set()
    assert done[0].wait(5)
    assert groups[1].begun.wait(5)
    groups[1].may_end.set()
    assert done[1].wait(5)
    assert sent == [(groups[0], "message 0", 0, 7), (groups[1], "message 1", 1, 8)]


@pytest.mark.parametrize("broken", [True, False])
def test_a_server_that_hangs_holds_others_up_for_the_timeout(sent: list[Any], broken: bool) -> None:
    """A send that fails, or never ends, counts as left; what waits behind it goes."""
    bad, good = FakeGroup(broken=broken), FakeGroup()
    good.may_end.set()
    if broken:
        bad.may_end.set()
    queue = SendQueue(0.2 * SECOND)
    done = [queue.put(bad, "a", 1, 0), queue.put(good, "b", 1, 0)]
    assert all(one.wait(5) for one in done)
    assert [message for _, message, _, _ in sent] == ["a", "b"]


def test_the_kernel_keeps_little_back() -> None:
    """Connections of the process get the limit; other sockets and files are done alone."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        limit_unsent_bytes()
        option = socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", 25)
        assert [end.getsockopt(*option) for end in (one, other)] == [UNSENT_BYTES] * 2
        one.sendall(b"still open")
        assert other.recv(100) == b"still open"
