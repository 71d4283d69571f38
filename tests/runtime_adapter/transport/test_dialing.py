"""Connections are begun again while nobody answers, and refused where nobody listens."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from prism_plan.errors import InputError
from runtime_adapter.transport import dialing, interfaces
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.handshake import HandshakeFailed, accept_session
from runtime_adapter.transport.interfaces import address_of, is_loopback
from runtime_adapter.transport.secrets import RunSecret
from tests.limits import HANG_S
from tests.runtime_adapter.transport.sessions import CLAIM, OTHER, SECRET

Address = tuple[str, int]


@contextlib.contextmanager
def listening(backlog: int = 16) -> Iterator[tuple[socket.socket, Address]]:
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        listener.settimeout(HANG_S)
        yield listener, listener.getsockname()


def accept(listener: socket.socket, secret: RunSecret = SECRET) -> socket.socket:
    """Accept connections until a handshake succeeds; the caller closes the connection."""
    while True:
        connection, _ = listener.accept()
        try:
            accept_session(connection, secret, HANG_S)
        except ConnectionResetError:  # an attempt that was not needed any more
            connection.close()
        else:
            return connection


def test_a_connection_has_low_latency_and_no_time_limit() -> None:
    """Short messages leave at once, and what a send has taken has nearly left."""
    with listening() as (listener, address), concurrent.futures.ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept, listener)
        connection, session = dial(address, CLAIM, SECRET, HANG_S)
        with connection, accepted.result(HANG_S):
            assert session.claim == CLAIM
            assert session.is_client
            assert connection.gettimeout() is None
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            unsent = connection.getsockopt(socket.IPPROTO_TCP, 25)  # TCP_NOTSENT_LOWAT
            assert unsent == dialing.UNSENT_BYTES


def test_it_comes_from_the_address_that_is_given() -> None:
    """As of the interface that a user has named."""
    with listening() as (listener, address), concurrent.futures.ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept, listener)
        connection, _ = dial(address, CLAIM, SECRET, HANG_S, interface="127.0.0.2")
        with connection, accepted.result(HANG_S) as other:
            assert other.getpeername()[0] == "127.0.0.2"


def test_nobody_listens() -> None:
    """A refusal is passed on at once, so that a caller can tell it from silence."""
    with listening() as (_, address):
        pass
    with pytest.raises(ConnectionRefusedError):
        dial(address, CLAIM, SECRET, HANG_S)


def test_another_secret_is_no_error_of_the_network() -> None:
    """So that a caller does not try again for ever."""
    with listening() as (listener, address), concurrent.futures.ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept, listener, OTHER)
        with pytest.raises(HandshakeFailed):
            dial(address, CLAIM, SECRET, HANG_S)
        # the connection was closed: the other side waits for the next one
        connection, _ = dial(address, CLAIM, OTHER, HANG_S)
        with connection, accepted.result(HANG_S):
            pass


def test_a_server_that_accepts_and_says_nothing() -> None:
    """The time limit includes the handshake."""
    with listening() as (_, address), pytest.raises(TimeoutError):
        dial(address, CLAIM, SECRET, 0.1)


@contextlib.contextmanager
def deaf() -> Iterator[tuple[socket.socket, Address, contextlib.ExitStack]]:
    """A port that answers nobody: its queue is full, so that the kernel drops all requests.

    The stack holds the connections that fill it.
    """
    with listening(backlog=0) as (listener, address), contextlib.ExitStack() as stack:
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield listener, address, stack


def test_one_who_does_not_answer_is_waited_for_until_the_limit() -> None:
    """Silence ends in a time-out."""
    with deaf() as (_, address, _), pytest.raises(TimeoutError):
        dial(address, CLAIM, SECRET, 0.2)


def test_a_link_that_is_back_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts are repeated and old ones are kept: whichever is answered first is used."""
    monkeypatch.setattr(dialing, "ATTEMPT_INTERVAL_S", 0.05)
    begun: list[float] = []
    begin = dialing._begin

    def counted(attempt: socket.socket, place: Address, source: str | None) -> int:
        begun.append(time.monotonic())
        assert len(begun) < 10 * HANG_S
        return begin(attempt, place, source)

    monkeypatch.setattr(dialing, "_begin", counted)
    with (
        deaf() as (listener, address, fillers),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        dialled = pool.submit(dial, address, CLAIM, SECRET, HANG_S)
        while len(begun) < 2 * dialing.MAX_ATTEMPTS:
            time.sleep(0.01)
        assert not dialled.done()
        fillers.close()
        with accept(listener):
            connection, _ = dialled.result(HANG_S)
            connection.close()


def test_a_name_with_several_addresses() -> None:
    """All are tried before a refusal counts, as of a name with one of IPv6 too."""
    with listening() as (listener, address), concurrent.futures.ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept, listener)
        connection, _ = dial(("localhost", address[1]), CLAIM, SECRET, HANG_S)
        with connection, accepted.result(HANG_S):
            assert connection.getpeername()[:2] == address


def test_hosts_that_are_none() -> None:
    """An OSError as of any host that is not reached."""
    for host in "a..b", "x" * 100:
        with pytest.raises(OSError, match=r".+"):
            dial((host, 1), CLAIM, SECRET, HANG_S)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("fe80::1%lo", False),
        ("a..b", False), ("x" * 100, False),
    ],
)  # fmt: skip
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    """An address of all interfaces is not loopback, nor is a host that is not known."""
    assert is_loopback(host) == expected


def test_the_address_of_an_interface() -> None:
    """That of the loopback interface is known everywhere."""
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(InputError, match="no interface 'eth99x'"):
        address_of("eth99x")


def test_an_interface_whose_address_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours, not a crash."""
    monkeypatch.setattr(interfaces, "require_interface", lambda name: None)
    monkeypatch.setattr(interfaces, "_request", lambda name, code: None)
    with pytest.raises(InputError, match="'lo' has no address"):
        address_of("lo")
