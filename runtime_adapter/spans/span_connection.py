"""Sends messages of one lane to one other server, in order, also over a link that was away.

A connection that breaks may have lost what was sent last. Whoever sends a message of the next pass
of a request knows that those of the pass before have arrived, for its token depends on them. So the
messages of the pass under way are kept, and sent again over the next connection; receivers drop
what they have had. Tokens on their way home alone are kept longer, for no pass waits for them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from typing import Any

from runtime_adapter.transport.handshake import HandshakeFailed
from runtime_adapter.transport.peer import ConnectionLost, Peer
from runtime_adapter.transport.send_queue import LONG_BYTES, Sending, SendQueue
from runtime_adapter.transport.socket_io import keep_alive, send_all, wait_in_slices

#: Between two attempts to dial; grows up to the second value.
RETRY_S, MAX_RETRY_S = 0.05, 1.0
#: A connection breaks that acknowledges nothing for so long: of a peer that answers pings.
LOST_S = 60.0
#: Messages that are kept at most.
MAX_KEPT = 4096
_BROKEN = (OSError, HandshakeFailed)


class SpanConnection:
    """One lane's messages to one peer; ``lane`` tells connections of this server apart.

    It is dialled with the first message. Whoever owns it calls :meth:`renew` now and then. Long
    messages leave by ``send_queue``, and :meth:`send` does not wait for them.
    """

    def __init__(self, peer: Peer, lane: int, send_queue: SendQueue) -> None:
        self.peer = peer
        self._lane = lane
        self._send_queue = send_queue
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._kept: deque[tuple[tuple[int, int] | None, list[Any]]] = deque(maxlen=MAX_KEPT)
        self._unsent: deque[list[Any]] = deque()
        self._sending: Sending | None = None
        self._pump: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._generation = -1
        self._attempts = 0
        self._next_s = 0.0
        self._closed = False

    def send(self, buffers: list[Any], step: tuple[int, int] | None = None) -> None:
        """Send a message of a pass, its ``step`` (attempt, turn), or of none.

        Raises
        ------
        ConnectionLost
            The peer is suspect or down; nothing has been sent, and nothing is kept.
        """
        with self._lock:
            self._require_usable()
            if step is not None:
                earlier = [i for i, (of, _) in enumerate(self._kept) if of not in (None, step)]
                for _ in range(max(earlier, default=-1) + 1):
                    self._kept.popleft()
            self._kept.append((step, buffers))
            if self._socket is not None and self._generation == self.peer.generation:
                self._transmit(buffers)  # if the other side has closed it, renew() sends again
            else:
                self._disconnect()
                self._open()

    def forget(self, attempt: int) -> None:
        """No pass of this attempt, or of one before it, is needed by anybody any more."""
        with self._lock:
            kept = (one for one in self._kept if one[0] is None or one[0][0] > attempt)
            self._kept = deque(kept, maxlen=MAX_KEPT)

    def renew(self) -> None:
        """Send what is kept again, where the connection is broken or from before an outage.

        Raises
        ------
        ConnectionLost
            The peer is suspect or down; nothing is kept any more.
        """
        with self._lock:
            if self._kept:
                self._require_usable()
                if not self._is_open():
                    self._open()

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._closed = True
            self._disconnect()
            self._kept.clear()
            self._changed.notify_all()

    # --------------------------------------------------------------------------------------- parts

    def _require_usable(self) -> None:
        if self._closed or not self.peer.usable:
            self._disconnect()
            self._kept.clear()
            raise ConnectionLost(f"server {self.peer.name!r} does not answer")

    def _is_open(self) -> bool:
        """Whether the connection is of now, and the other side has not closed it."""
        if self._socket is None:
            return False
        if self._generation == self.peer.generation:
            try:  # nothing is ever sent there, so what can be read is the end
                self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                pass
        self._disconnect()
        return False

    def _open(self) -> None:
        """Dial, and send all that is kept; does nothing so soon after an attempt that failed."""
        now = time.monotonic()
        if now < self._next_s:
            return
        generation = self.peer.generation
        try:
            timeout_s = min(2.0**self._attempts, max(2.0, self.peer.timeout_s))
            connection, _ = self.peer.dial("spans", self._lane, timeout_s=timeout_s)
            keep_alive(connection, LOST_S)
            wait_in_slices(connection, receiving=False)
        except _BROKEN:
            self._attempts += 1
            pause_s = min(RETRY_S * 2 ** min(self._attempts - 1, 10), MAX_RETRY_S)
            self._next_s = time.monotonic() + pause_s
            return
        self._attempts = 0
        self._socket, self._generation = connection, generation
        for _, buffers in self._kept:
            self._transmit(buffers)

    def _transmit(self, buffers: list[Any]) -> None:
        """Send a short message, or let the pump send it after those that wait already."""
        if self._socket is None:
            return  # has broken at the message before
        if self._unsent or sum(map(len, buffers)) >= LONG_BYTES:
            self._unsent.append(buffers)
            if self._pump is None:
                self._pump = threading.Thread(target=self._send_unsent, daemon=True)
                self._pump.start()
            self._changed.notify_all()
            return
        try:
            send_all(self._socket, memoryview(b"".join(buffers)))
        except OSError:
            self._disconnect()  # renew() sends again

    def _send_unsent(self) -> None:
        """Send what waits, one message after the other."""
        while True:
            with self._lock:
                while not self._unsent and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                assert self._socket is not None
                message = memoryview(b"".join(self._unsent[0]))
                sending = self._sending = self._send_queue.put(self._socket, message)
            sending.ended.wait()
            with self._lock:
                if self._sending is not sending:
                    continue  # the connection was given up
                self._sending = None
                if sending.error is not None:
                    self._disconnect()
                else:
                    self._unsent.popleft()

    def _disconnect(self) -> None:
        self._unsent.clear()
        if self._socket is None:
            return
        connection, self._socket = self._socket, None
        sending, self._sending = self._sending, None
        if sending is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            self._send_queue.cancel(sending)
        connection.close()
