"""Strangers take a bounded part of a listener, and those with the secret still get in."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from prism_plan.errors import InputError
from runtime_adapter.transport import listener as listener_module
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.handshake import Claim, HandshakeFailed, Session
from runtime_adapter.transport.listener import MAX_UNAUTHENTICATED, Handler, Listener
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.transport.secrets import RunSecret
from tests.limits import HANG_S
from tests.runtime_adapter.transport.sessions import CLAIM, OTHER, SECRET

PING = Claim("ping", "s1")


def echo(connection: socket.socket, session: Session) -> None:
    """Send back what comes, until the other side ends."""
    while data := connection.recv(4096):
        connection.sendall(data)


class Lines:
    """What a listener reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()

    def __call__(self, text: str) -> None:
        """Keep a line."""
        self.texts.append(text)
        self._queue.put(text)

    def next(self) -> str:
        """Wait for the next line."""
        return self._queue.get(timeout=HANG_S)


@contextlib.contextmanager
def listening(
    handler: Handler = echo, *, max_connections: int = 100, report: Callable[[str], None] = print
) -> Iterator[Listener]:
    listener = Listener(
        "127.0.0.1", 0, SECRET, {"ping": handler}, max_connections=max_connections, report=report
    )
    listener.start()
    try:
        yield listener
    finally:
        listener.close()


@contextlib.contextmanager
def stranger(listener: Listener) -> Iterator[socket.socket]:
    with socket.create_connection(listener.address, HANG_S) as connection:
        yield connection


@contextlib.contextmanager
def client(
    listener: Listener, claim: Claim = PING, secret: RunSecret = SECRET
) -> Iterator[socket.socket]:
    """A connection with the secret; tried again where a flood has ended the handshake."""
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            connection, _ = dial(listener.address, claim, secret, HANG_S)
            break
        except ConnectionError:
            assert time.monotonic() < deadline
    with connection:
        connection.settimeout(HANG_S)
        yield connection


def answers(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"here")
        return connection.recv(4) == b"here"
    except ConnectionError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ends(connection: socket.socket) -> bool:
    """Whether the other side closes, without a byte that was not asked for."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_handlers_get_sessions_and_sockets() -> None:
    """Each connection has its own thread: one that waits holds up nobody."""
    sessions: queue.Queue[Session] = queue.Queue()

    def handler(connection: socket.socket, session: Session) -> None:
        sessions.put(session)
        echo(connection, session)

    with listening(handler) as listener, contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(client(listener, Claim("ping", f"s{n}", lane=n))) for n in range(5)
        ]
        assert all(map(answers, reversed(connections)))
        found = [sessions.get(timeout=HANG_S) for _ in connections]
        assert {(one.claim.server, one.claim.lane) for one in found} == {
            (f"s{n}", n) for n in range(5)
        }


def test_the_socket_is_closed_when_the_handler_returns() -> None:
    """The other side sees the end."""

    def handler(connection: socket.socket, session: Session) -> None:
        connection.sendall(b"bye")

    with listening(handler) as listener, client(listener) as connection:
        assert connection.recv(3) == b"bye"
        assert connection.recv(1) == b""


@pytest.mark.parametrize("error", [InputError("nonsense"), ConnectionResetError()])
def test_a_handler_that_gives_up_ends_its_connection(error: Exception) -> None:
    """What the other side has caused is no event; others are served on."""
    lines = Lines()

    def handler(connection: socket.socket, session: Session) -> None:
        if session.claim.lane:
            raise error
        echo(connection, session)

    with (
        listening(handler, report=lines) as listener,
        client(listener) as good,
        client(listener, Claim("ping", lane=1)) as bad,
    ):
        assert ends(bad)
        assert answers(good)
    assert not lines.texts


def test_an_internal_error_of_a_handler_is_reported() -> None:
    """One line; the listener and its other connections go on."""
    lines = Lines()

    def handler(connection: socket.socket, session: Session) -> None:
        raise KeyError("x")

    with listening(handler, report=lines) as listener:
        for _ in range(2):
            with client(listener) as connection:
                assert ends(connection)
            assert lines.next() == "internal error in a connection for 'ping': KeyError('x')"


def test_a_purpose_that_is_not_served() -> None:
    """It is refused after the handshake, and told."""
    lines = Lines()
    with listening(report=lines) as listener, client(listener, CLAIM) as connection:
        assert ends(connection)
        assert "refused a connection" in lines.next()


def test_strangers_are_refused_and_told_once() -> None:
    """One line a minute with the number of connections, not one for each."""
    lines = Lines()
    with listening(report=lines) as listener:
        for number in range(10):
            with stranger(listener) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: s1\r\nAccept: */*\r\n\r\n")
                assert ends(connection)
            if number == 0:
                host, port = listener.address
                line = f"refused a connection to {host}:{port}; the last reason: "
                assert lines.next().startswith(line)
        with pytest.raises(HandshakeFailed), client(listener, secret=OTHER):
            pass
        with client(listener) as connection:
            assert answers(connection)
    assert len(lines.texts) == 1


def test_the_next_line_has_the_number_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left out of the count."""
    lines = Lines()
    with listening(report=lines) as listener:
        for number in range(7):
            if number == 6:
                wait_until(lambda: listener._refused == 5)
                monkeypatch.setattr(listener_module, "REPORT_INTERVAL_S", 0.0)
            with stranger(listener) as connection:
                connection.sendall(b"x" * 40)
                assert ends(connection)
        assert lines.next().startswith("refused a connection")
        assert lines.next().startswith("refused 6 connections")


def test_one_beyond_the_bound_is_refused_and_others_go_on() -> None:
    """A place that has become free is given again."""
    lines = Lines()
    with listening(max_connections=2, report=lines) as listener, contextlib.ExitStack() as stack:
        first = stack.enter_context(client(listener))
        assert answers(first)
        with client(listener) as second:
            assert answers(second)
            with client(listener) as third:
                assert ends(third)
            assert lines.next().endswith("too many connections")
        wait_until(lambda: len(listener._authenticated) == 1)
        with client(listener) as fourth:
            assert answers(fourth)
        assert answers(first)


def test_the_silent_give_way_to_the_next() -> None:
    """The oldest first; connections that are authenticated are not affected."""
    with listening() as listener, contextlib.ExitStack() as stack:
        early = stack.enter_context(client(listener))
        assert answers(early)
        silent = [stack.enter_context(stranger(listener)) for _ in range(MAX_UNAUTHENTICATED + 5)]
        assert all(ends(connection) for connection in silent[:5])
        late = stack.enter_context(client(listener))
        assert answers(early)
        assert answers(late)
        # nobody has told the others to go yet, unless their time was over
        assert len(listener._unauthenticated) <= MAX_UNAUTHENTICATED


def test_the_silent_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time is limited though nobody needs their place."""
    monkeypatch.setattr(listener_module, "HANDSHAKE_TIMEOUT_S", 0.05)
    with listening() as listener, stranger(listener) as silent, stranger(listener) as slow:
        slow.sendall(b"PRISM")
        assert ends(silent)
        assert ends(slow)


def test_failures_pause_accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the clock stopped, only so many begin and fail; then it goes on."""
    clock = [1000.0]

    class Clock:
        """The time module of the listener."""

        @staticmethod
        def monotonic() -> float:
            return clock[0]

    monkeypatch.setattr(listener_module, "time", Clock)
    monkeypatch.setattr(listener_module, "MAX_FAILURES_PER_S", 20)
    with listening() as listener, contextlib.ExitStack() as stack:
        waited = threading.Event()
        wait = listener._closed.wait

        def paused(timeout: float | None = None) -> bool:
            assert timeout == pytest.approx(1.0)
            waited.set()
            return wait(0.01)

        monkeypatch.setattr(listener._closed, "wait", paused)

        def fail() -> socket.socket:
            connection = stack.enter_context(stranger(listener))
            connection.sendall(b"x" * 40)
            return connection

        assert all(ends(fail()) for _ in range(20))
        fail()  # may have been waited for already
        late = fail()
        assert waited.wait(HANG_S)
        late.setblocking(False)
        with pytest.raises(BlockingIOError):
            late.recv(1)
        late.settimeout(HANG_S)
        clock[0] += 1.0
        assert ends(late)
        clock[0] += 1.0
        monkeypatch.setattr(listener._closed, "wait", wait)
        with client(listener) as connection:
            assert answers(connection)


def test_a_flood_takes_little_and_servers_get_in() -> None:
    """Thousands of connections of all kinds: few threads, sockets and bytes; clients succeed."""
    process = psutil.Process()
    stop = threading.Event()
    flooded = [0, 0, 0]

    def flood(kind: int) -> None:
        held: list[socket.socket] = []
        while not stop.is_set():
            try:
                connection = socket.create_connection(listener.address, 1.0)
                if kind == 0:
                    connection.sendall(b"\xff" * 100_000)
                elif kind == 1:
                    connection.sendall(b"PRISMRT\x02" + b"n" * 32)
            except OSError:
                continue
            finally:
                flooded[kind] += 1
            held.append(connection)
            if len(held) > 50:
                held.pop(0).close()
        for connection in held:
            connection.close()

    with listening(report=Lines()) as listener, client(listener) as connection:
        assert answers(connection)
        before, threads_before = process.memory_info().rss, threading.active_count()
        threads = [threading.Thread(target=flood, args=(kind,)) for kind in range(3)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: listener._refused > 150)
            for _ in range(3):
                with client(listener) as other:
                    assert answers(other)
                assert answers(connection)
                assert len(listener._unauthenticated) <= MAX_UNAUTHENTICATED
                assert threading.active_count() - threads_before < 3 * MAX_UNAUTHENTICATED
        finally:
            stop.set()
            for thread in threads:
                thread.join(HANG_S)
        # of this process, which floods as well
        assert process.memory_info().rss - before < 40e6
    assert all(flooded)


def test_closing_ends_all() -> None:
    """Clients, strangers and handlers see the end; the port is free."""
    ended = threading.Event()

    def handler(connection: socket.socket, session: Session) -> None:
        echo(connection, session)
        ended.set()

    with listening(handler) as listener, client(listener) as good, stranger(listener) as bad:
        assert answers(good)
        listener.close()
        assert ends(good)
        assert ends(bad)
        assert ended.wait(HANG_S)
        with pytest.raises(ConnectionRefusedError):
            dial(listener.address, PING, SECRET, HANG_S)


def test_a_port_that_cannot_be_had() -> None:
    """The message names the option; the exit code is that of the network's failures."""
    with listening() as listener:
        with pytest.raises(RuntimeFailure, match=r"listen_port 127\.0\.0\.1:.*in use") as error:
            Listener(*listener.address, SECRET, {}, max_connections=1, report=print)
        assert error.value.exit_code == 5
    with pytest.raises(RuntimeFailure, match="cannot assign"):
        Listener("192.0.2.1", 0, SECRET, {}, max_connections=1, report=print)
