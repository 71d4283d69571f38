"""Sends and receives on sockets that block for a short while at a time.

The kernel ends a wait after :data:`SLICE_S` by itself (``SO_RCVTIMEO``), so a call needs one system
call to send and one to receive; Python's own time limits cost another one each.
"""

from __future__ import annotations

import socket
import struct

#: How long one wait on a socket lasts, after which its owner looks whether to go on.
SLICE_S = 0.1
_TIMEVAL = struct.pack("@ll", int(SLICE_S), int(SLICE_S % 1 * 1e6))


def wait_in_slices(connection: socket.socket, *, receiving: bool = True) -> None:
    """Let each later wait of the socket end after :data:`SLICE_S`, or those to send alone."""
    connection.settimeout(None)
    if receiving:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)


def keep_alive(connection: socket.socket, lost_s: float = 120.0) -> None:
    """Let waits without a limit end where the other side's machine is gone.

    An idle connection is probed after half a minute; it breaks when nothing is acknowledged for
    ``lost_s``.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6),
        ("TCP_USER_TIMEOUT", int(1e3 * lost_s)),
    ):  # fmt: skip
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def send_some(connection: socket.socket, message: memoryview) -> int:
    """Send the beginning of a message; returns its bytes, 0 if none could leave in this slice.

    Raises
    ------
    OSError
        The connection is broken.
    """
    try:
        return connection.send(message)
    except BlockingIOError:
        return 0


def send_all(connection: socket.socket, message: memoryview) -> None:
    """Send a message, however long the other side takes.

    Raises
    ------
    OSError
        The connection is broken.
    """
    sent = send_some(connection, message)
    while sent < len(message):
        sent += send_some(connection, message[sent:])


def receive_some(connection: socket.socket, buffer: memoryview) -> int:
    """Receive into a buffer that is not empty; returns the bytes, 0 if none came in this slice.

    Raises
    ------
    OSError
        The connection is broken, or the other side has closed it.
    """
    try:
        received = connection.recv_into(buffer)
    except BlockingIOError:
        return 0
    if not received:
        raise ConnectionResetError("closed by the other side")
    return received


def receive_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer, each wait as long as the socket's own time limit.

    Raises
    ------
    OSError
        The connection is broken, or the other side has closed it.
    """
    done = 0
    while done < len(buffer):
        received = connection.recv_into(buffer[done:])
        if not received:
            raise ConnectionResetError("closed by the other side")
        done += received


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Receive so many bytes; waits and raises as :func:`receive_into`."""
    buffer = bytearray(size)
    receive_into(connection, memoryview(buffer))
    return bytes(buffer)
