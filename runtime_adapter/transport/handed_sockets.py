"""Hands authenticated connections of a worker's port to the driver of the same server.

A server has one port, its worker's. What concerns requests is for the driver process, which gets
the connection itself after the handshake; the worker keeps nothing of it.
"""

from __future__ import annotations

import contextlib
import json
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
    said = json.dumps([session.claim.server, session.claim.lane]).encode()
    socket.send_fds(channel, [said], [connection.fileno()])


def receive_handed(channel: socket.socket, use: Callable[[socket.socket, str, int], None]) -> None:
    """Call ``use`` with each connection, the name of the server that dialled it, and its lane.

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
                connection = socket.socket(fileno=descriptor)
                with contextlib.suppress(ValueError):
                    server, lane = json.loads(said)
                    use(connection, server, lane)
                    continue
                connection.close()
