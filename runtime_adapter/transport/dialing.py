"""Opens connections to the listeners of a run."""

from __future__ import annotations

import contextlib
import socket

from runtime_adapter.transport.handshake import Claim, Session, open_session
from runtime_adapter.transport.secrets import RunSecret

#: The longest that a connection may take to be accepted by the other machine.
CONNECT_TIMEOUT_S = 1.0
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
        Nobody listens there (ConnectionRefusedError), or it does not answer within ``timeout_s``,
        of which connecting may take at most :data:`CONNECT_TIMEOUT_S`.
    """
    source = None if interface is None else (interface, 0)
    connection = socket.create_connection(
        address, min(timeout_s, CONNECT_TIMEOUT_S), source_address=source
    )
    try:
        if connection.getsockname() == connection.getpeername():
            raise ConnectionRefusedError("nobody listens there")  # TCP's connection to itself
        set_options(connection)
        return connection, open_session(connection, claim, secret, timeout_s)
    except BaseException:
        connection.close()
        raise
