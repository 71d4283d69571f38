"""Opens connections to the listeners of a run."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import time
from typing import Any

from runtime_adapter.transport.handshake import Claim, Session, open_session
from runtime_adapter.transport.secrets import RunSecret

#: How often a further attempt to connect is begun while there is no answer, and how many there are.
ATTEMPT_INTERVAL_S, MAX_ATTEMPTS = 1.0, 8
#: What the kernel may keep of a connection without having sent it.
UNSENT_BYTES = 32 * 1024
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


def set_options(connection: socket.socket) -> None:
    """Send short messages at once, and take little more than the line can carry.

    Then a send that has completed means that nearly all of the message has left. Where the system
    lacks the second option, long messages share the link.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def dial(
    address: tuple[str, int], claim: Claim, secret: RunSecret, timeout_s: float, *,
    interface: str | None = None,
) -> tuple[socket.socket, Session]:  # fmt: skip
    """Connect to a listener and do the handshake; the socket blocks without a limit.

    ``interface`` is the address of this machine from which to connect, or None for the system's
    choice.

    Raises
    ------
    HandshakeFailed
        The other side does not know the secret, or is something else.
    OSError
        Nobody listens there (ConnectionRefusedError), the host is unknown, or it does not answer
        within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    connection = _connect(address, interface, deadline)
    try:
        if connection.getsockname() == connection.getpeername():
            raise ConnectionRefusedError("nobody listens there")  # TCP's connection to itself
        set_options(connection)
        left_s = max(deadline - time.monotonic(), 0.0)
        return connection, open_session(connection, claim, secret, left_s)
    except BaseException:
        connection.close()
        raise


def _connect(address: tuple[str, int], source: str | None, deadline: float) -> socket.socket:
    """The first connection that is accepted, of one that is begun every second.

    TCP asks again after 1, 3 and 7 s, so that a link that is back may not be noticed for seconds;
    and an answer that is slow, behind other messages on the link, must not be given up either.
    """
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{address[0]!r:.60} is no name of a host") from error
    places = itertools.cycle(found)
    attempts: list[socket.socket] = []
    errors = 0
    next_s = time.monotonic()
    try:
        while (now := time.monotonic()) < deadline:
            ended: dict[int, int] = {}  # the error's number or 0, of a file descriptor
            if now >= next_s:
                if len(attempts) == MAX_ATTEMPTS:
                    attempts.pop(0).close()
                family, kind, protocol, _, place = next(places)
                attempts.append(socket.socket(family, kind, protocol))
                code = _begin(attempts[-1], place, source)
                if code != errno.EINPROGRESS:
                    ended[attempts[-1].fileno()] = code
                next_s = now + ATTEMPT_INTERVAL_S
            ended = ended or _wait(attempts, max(min(next_s, deadline) - time.monotonic(), 0.0))
            for attempt in [one for one in attempts if one.fileno() in ended]:
                attempts.remove(attempt)
                code = ended[attempt.fileno()]
                if not code:
                    attempt.setblocking(True)
                    return attempt
                attempt.close()
                errors += 1
                if errors == len(found):  # a name may have other addresses
                    raise OSError(code, os.strerror(code))
                next_s = 0.0
        raise TimeoutError("no connection in time")
    finally:
        for attempt in attempts:
            attempt.close()


def _begin(attempt: socket.socket, place: Any, source: str | None) -> int:
    """Begin to connect; returns the error's number, EINPROGRESS as a rule."""
    attempt.setblocking(False)
    if source is not None:
        attempt.bind((source, 0))
    return attempt.connect_ex(place)


def _wait(attempts: list[socket.socket], limit_s: float) -> dict[int, int]:
    """The attempts that end within a time: error's number, 0 if connected, of a descriptor."""
    poll = select.poll()
    for attempt in attempts:
        poll.register(attempt, select.POLLOUT)
    ended = {number for number, _ in poll.poll(1e3 * limit_s + 1)}
    return {
        attempt.fileno(): attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        for attempt in attempts
        if attempt.fileno() in ended
    }
