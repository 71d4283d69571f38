"""Hands authenticated connections of a worker's port to the driver of the same server.

A server has one port, its worker's. What concerns requests is for the driver process, which gets
the connection itself after the handshake; the worker keeps nothing of it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from runtime_adapter.transport.handshake import Session

#: Bytes of what is said of a connection.
_MAX_BYTES = 4096


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a channel between a driver and its worker; messages keep their bounds."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def hand_over(channel: socket.socket, connection: socket.socket, session: Session) -> None:
    """Give the driver a connection; raises OSError where it is gone."""
    # an empty message would be the end of the channel
    socket.send_fds(channel, [b":", session.claim.server.encode()], [connection.fileno()])


def receive_handed(channel: socket.socket, use: Callable[[socket.socket, str], None]) -> None:
    """Call ``use`` with each connection and the name of the server that dialled it.

    Returns when the worker has ended.
    """
    with channel:
        while True:
            try:
                said, descriptors, _, _ = socket.recv_fds(channel, _MAX_BYTES, 1)
            except OSError:
                return
            if not said:
                return
            for descriptor in descriptors:
                use(socket.socket(fileno=descriptor), said[1:].decode())
