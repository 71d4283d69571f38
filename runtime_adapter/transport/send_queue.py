"""Sends long messages of a process one after the other (docs/design.md, section 4).

TCP would share the link among messages that are in flight together, so that all of them end late:
two equal ones would both take until 2, where the first could arrive at 1 and be worked on.
"""

from __future__ import annotations

import collections
import socket
import threading

from runtime_adapter.transport.socket_io import send_some

#: Messages from this size on are queued.
LONG_BYTES = 128 * 1024


class Sending:
    """A message in the queue; ``ended`` is set when it has left, was given up, or has failed."""

    def __init__(self, connection: socket.socket, message: memoryview) -> None:
        self.connection = connection
        self.message = message
        self.sent = 0
        self.ended = threading.Event()
        self.error: OSError | None = None


class SendQueue:
    """A queue of long messages and the thread that sends them; one for all lanes of a process.

    Sockets are those of :func:`~runtime_adapter.transport.socket_io.wait_in_slices`. A message
    whose other side takes nothing for a while lets those behind it go first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[Sending] = collections.deque()
        self._thread: threading.Thread | None = None

    def put(self, connection: socket.socket, message: memoryview) -> Sending:
        """Queue a message; neither its memory nor the socket's may be freed before it has ended."""
        sending = Sending(connection, message)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="send queue", daemon=True)
                self._thread.start()
            self._waiting.append(sending)
            self._changed.notify()
        return sending

    def cancel(self, sending: Sending) -> None:
        """Give a message up; on return it has ended.

        Shut the connection down before, or the queue's thread may still wait for it.
        """
        with self._changed:
            if sending in self._waiting:
                self._waiting.remove(sending)
                sending.ended.set()
        sending.ended.wait()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                sending = self._waiting.popleft()
            try:
                self._send(sending)
            except OSError as error:
                sending.error = error
                sending.ended.set()

    def _send(self, sending: Sending) -> None:
        """Send a message, or a part of it and put the rest at the end of the queue."""
        while sending.sent < len(sending.message):
            sent = send_some(sending.connection, sending.message[sending.sent :])
            sending.sent += sent
            if not sent:
                with self._changed:
                    if self._waiting:
                        self._waiting.append(sending)
                        return
        sending.ended.set()
