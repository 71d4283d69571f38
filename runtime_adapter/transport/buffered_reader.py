"""Reads a socket ahead, so that a short message costs one system call."""

from __future__ import annotations

import socket

from runtime_adapter.transport.socket_io import receive_into

#: What is read ahead at most.
AHEAD_BYTES = 1 << 14


class BufferedReader:
    """The bytes that come over a connection, in order; nobody else may read from it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._begin, self._end = 0, 0

    def read_into(self, target: memoryview) -> None:
        """Fill a buffer, each wait as long as the socket's own time limit.

        Raises
        ------
        OSError
            The connection is broken, or the other side has closed it.
        """
        done = 0
        while True:
            taken = min(self._end - self._begin, len(target) - done)
            target[done : done + taken] = self._ahead[self._begin : self._begin + taken]
            self._begin += taken
            done += taken
            if done == len(target):
                return
            if len(target) - done >= AHEAD_BYTES:
                receive_into(self._connection, target[done:])
                return
            self._end = self._connection.recv_into(self._ahead)
            self._begin = 0
            if not self._end:
                raise ConnectionResetError("closed by the other side")
