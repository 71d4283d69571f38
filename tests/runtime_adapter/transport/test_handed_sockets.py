"""Connections that a worker hands to its driver arrive usable, with who dialled them."""

from __future__ import annotations

import socket
import threading

from runtime_adapter.transport.handed_sockets import hand_over, receive_handed, socket_pair
from runtime_adapter.transport.handshake import Claim, Session
from tests.limits import HANG_S


def test_connections_arrive_until_the_worker_ends() -> None:
    """Also of a server without a name; the worker's own copy may be closed at once."""
    here, there = socket_pair()
    taken: list[tuple[str, bytes]] = []

    def use(connection: socket.socket, server: str) -> None:
        with connection:
            taken.append((server, connection.recv(9)))

    thread = threading.Thread(target=receive_handed, args=(here, use))
    thread.start()
    for name in ("edge-1", "", "日本"):
        one, other = socket.socketpair()
        with one:
            hand_over(there, other, Session(Claim("spans", server=name), b"", is_client=False))
            other.close()
            one.sendall(b"hello")
    there.close()
    thread.join(HANG_S)
    assert not thread.is_alive()
    assert taken == [("edge-1", b"hello"), ("", b"hello"), ("日本", b"hello")]
