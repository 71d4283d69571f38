"""What a process sees of another server: where its worker is, and whether it answers.

A thread sends a ping over a connection of its own now and then. A link that was away is used as
soon as it is back, not when TCP's backoff next tries: while an answer is overdue, fresh connections
are dialled beside the old one, each a quarter of a second after the one before, and the first
answer counts. A ping over a slow link is late, but it is not lost: the old connection stays in use.

An answer to a ping is :data:`PONG`: a checksum of the name of the answering server, for its port
may have been given to another one, and whether that server's driver has finished.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable

from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.failure_detector import MAX_GAP_S, FailureDetector
from runtime_adapter.transport.handshake import Claim, HandshakeFailed, Session
from runtime_adapter.transport.secrets import RunSecret
from runtime_adapter.transport.socket_io import receive_exactly

Address = tuple[str, int]

PING = b"?"
#: CRC-32 of the server's name, and 1 if its driver has finished, else 0.
PONG = struct.Struct("!IB")
#: The longest time between two pings, and between two attempts to dial while an answer is overdue.
PING_INTERVAL_S, DIAL_INTERVAL_S = 0.5, 0.25
#: An answer is overdue after so long: other connections may be dialled, and those that were open
#: then are not trusted once a fresh one is answered.
OVERDUE_S = 1.0
#: A server whose port refuses connections for so long is suspect: its worker is not running.
REFUSED_S = 1.0
#: Attempts to dial that are under way at once.
MAX_ATTEMPTS = 4


class ConnectionLost(RuntimeError):
    """The other server of a connection is suspect or down."""


def pong(name: str, finished: bool) -> bytes:
    """What a server of that name answers to a ping."""
    return PONG.pack(zlib.crc32(name.encode()), finished)


class Peer:
    """One other server, as this process sees it.

    ``name`` is the other server's, ``own_name`` this one's. ``on_suspect`` is called with a reason
    when the other one has not answered for ``timeout_s``, ``on_return`` when it answers again, or
    has another address or none; both in the peer's thread or in that of :meth:`set_address`, and
    they must not block. A peer that is not started has an address and never becomes suspect.
    """

    def __init__(
        self,
        own_name: str,
        name: str,
        secret: RunSecret,
        timeout_s: float,
        on_suspect: Callable[[str], None] = lambda reason: None,
        on_return: Callable[[], None] = lambda: None,
    ) -> None:
        self.own_name = own_name
        self.name = name
        self.timeout_s = timeout_s
        self._secret = secret
        self._on_suspect = on_suspect
        self._on_return = on_return
        self._lock = threading.Lock()
        self._address: Address | None = None
        self._incarnation = 0
        #: No ping has been answered for ``timeout_s``, or the port has refused connections.
        self.suspect = False
        #: The other server's driver makes no more calls.
        self.finished = False
        #: Counts outages and addresses: a connection of an earlier generation may be stuck.
        self.generation = 0
        self._moved = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pings: _Pings | None = None

    # ------------------------------------------------------------------------------------- address

    @property
    def usable(self) -> bool:
        """Whether calls may go to the server: it has an address and is not suspect."""
        return self._address is not None and not self.suspect

    def set_address(self, address: Address | None, incarnation: int) -> None:
        """The server has joined at an address, or is down (None)."""
        with self._lock:
            if (address, incarnation) == (self._address, self._incarnation):
                return
            self._address, self._incarnation = address, incarnation
            self.generation += 1
            self.finished = False
            was_suspect, self.suspect = self.suspect, False
            if was_suspect:
                self._on_return()
            self._moved.set()
            if self._pings is not None:
                self._pings.wake()

    def dial(
        self, purpose: str, lane: int = 0, max_tokens: int = 0, timeout_s: float = 2.0
    ) -> tuple[socket.socket, Session]:
        """Connect to the server's worker.

        Raises
        ------
        ConnectionLost
            The server is down.
        OSError
            There is no connection within ``timeout_s``.
        HandshakeFailed
            What listens there is no server of this run.
        """
        address = self._address
        if address is None:
            raise ConnectionLost(f"server {self.name!r} is down")
        claim = Claim(purpose, server=self.own_name, lane=lane, max_tokens=max_tokens)
        return dial(address, claim, self._secret, timeout_s)

    # --------------------------------------------------------------------------------------- pings

    def start(self) -> None:
        """Begin to ping the server, whenever it has an address."""
        self._thread = threading.Thread(target=self._run, name=f"ping {self.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with self._lock:
            self._moved.set()
            if self._pings is not None:
                self._pings.wake()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._moved.wait()
            with self._lock:
                self._moved.clear()
                if self._address is None or self._closed.is_set():
                    continue
                pings = self._pings = _Pings(self)
            try:
                pings.run()
            finally:
                with self._lock:
                    self._pings = None
                pings.close()

    @property
    def moved(self) -> bool:
        """Whether the address has changed since the pings to it began, or the peer is closed."""
        return self._moved.is_set()

    def heard(self, *, finished: bool, fresh: bool) -> None:
        """A ping was answered; ``fresh`` if over a new connection after an outage."""
        with self._lock:
            if self.moved:
                return
            self.finished = finished
            if fresh:
                self.generation += 1
            if self.suspect:
                self.suspect = False
                self._on_return()

    def suspected(self, reason: str) -> None:
        """Pings are not answered."""
        with self._lock:
            if self.moved or self.suspect:
                return
            # told before anybody's call fails, so that no call is routed there any more
            self._on_suspect(reason)
            self.suspect = True


class _Pings:
    """The pings to one address of a peer, until the peer has another one or is closed."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._interval_s = min(peer.timeout_s / 4, PING_INTERVAL_S)
        self._socket: socket.socket | None = None
        self._received = b""
        self._asked_s: float | None = None  # when the ping was sent that is not answered yet
        self._next_s = 0.0  # when the next ping is due
        self._heard_s = time.monotonic()
        self._answers = 0
        # a pause of this process counts half a timeout at most, and so makes nobody suspect
        self._detector = FailureDetector(max_gap_s=min(MAX_GAP_S, peer.timeout_s / 2))
        self._dialled_s = -DIAL_INTERVAL_S
        self._refused_s: float | None = None  # since when all attempts have been refused
        self._lock = threading.Lock()  # of what attempts change
        self._attempts = 0
        self._found: list[tuple[socket.socket, bytes] | Exception] = []
        self._closed = False
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)

    def run(self) -> None:
        while not self._peer.moved:
            self._wait()
            self._read_answer()
            self._take_found()
            silent_s = self._detector.silent_s("answers", self._answers)
            if silent_s > self._peer.timeout_s:
                self._peer.suspected(f"no answer within {self._peer.timeout_s:g} s")
            self._send_ping()
            self._dial_if_overdue()

    def wake(self) -> None:
        """End the wait of :meth:`run`; before :meth:`close`."""
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b".")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            found, self._found = self._found, []
        for one in found:
            if isinstance(one, tuple):
                one[0].close()
        self._drop_socket()
        self._woken.close()
        self._wake.close()

    def _wait(self) -> None:
        """Wait for an answer, the end of an attempt, or until something is due."""
        now = time.monotonic()
        limit_s = self._interval_s
        if self._socket is None or self._is_overdue(now):
            limit_s = min(limit_s, max(self._dialled_s + DIAL_INTERVAL_S - now, 0.01))
        elif self._asked_s is None:
            limit_s = min(limit_s, max(self._next_s - now, 0.0))
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if self._socket is not None:
            poll.register(self._socket, select.POLLIN)
        poll.poll(1e3 * limit_s)
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(64)

    def _is_overdue(self, now: float) -> bool:
        return self._asked_s is not None and now - self._asked_s > OVERDUE_S

    def _read_answer(self) -> None:
        if self._socket is None:
            return
        try:
            received = self._socket.recv(PONG.size - len(self._received))
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop_socket()
            return
        self._received += received
        if len(self._received) == PONG.size:
            answer, self._received, self._asked_s = self._received, b"", None
            self._heard(answer, fresh=False)

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._received, self._asked_s = None, b"", None

    def _heard(self, answer: bytes, *, fresh: bool) -> None:
        name, finished = PONG.unpack(answer)
        if name != zlib.crc32(self._peer.name.encode()):  # another server has got that port
            self._drop_socket()
            return
        self._heard_s = time.monotonic()
        self._next_s = self._heard_s + self._interval_s
        self._answers += 1
        self._refused_s = None
        self._peer.heard(finished=bool(finished), fresh=fresh)

    def _send_ping(self) -> None:
        now = time.monotonic()
        if self._socket is None or self._asked_s is not None or now < self._next_s:
            return
        try:
            self._socket.send(PING)
        except OSError:
            self._drop_socket()
        else:
            self._asked_s = now

    # ------------------------------------------------------------------------------------- dialling

    def _dial_if_overdue(self) -> None:
        now = time.monotonic()
        if self._socket is not None and not self._is_overdue(now):
            return
        with self._lock:
            if self._attempts == MAX_ATTEMPTS or now - self._dialled_s < DIAL_INTERVAL_S:
                return
            self._attempts += 1
        self._dialled_s = now
        threading.Thread(target=self._dial, name=f"dial {self._peer.name}", daemon=True).start()

    def _dial(self) -> None:
        """Connect and have a ping answered, so that what is found is known to work."""
        found: tuple[socket.socket, bytes] | Exception
        try:
            limit_s = max(self._peer.timeout_s, 2.0)
            connection, _ = self._peer.dial("ping", timeout_s=limit_s)
            try:
                connection.settimeout(limit_s)
                connection.sendall(PING)
                answer = receive_exactly(connection, PONG.size)
                connection.setblocking(False)
            except BaseException:
                connection.close()
                raise
            found = connection, answer
        except (OSError, HandshakeFailed, ConnectionLost) as error:
            found = error
        with self._lock:
            self._attempts -= 1
            if not self._closed:
                self._found.append(found)
                self.wake()
            elif isinstance(found, tuple):
                found[0].close()

    def _take_found(self) -> None:
        """Use a connection that an attempt has made, and note refusals."""
        with self._lock:
            attempts, self._found = self._found, []
        for found in attempts:
            now = time.monotonic()
            if isinstance(found, ConnectionRefusedError):
                if self._refused_s is None:
                    self._refused_s = now
                elif now - self._refused_s >= REFUSED_S:
                    self._peer.suspected("its port refuses connections")
            elif not isinstance(found, tuple):
                self._refused_s = None
            elif self._socket is not None and not self._is_overdue(now):
                found[0].close()  # the connection that there was has answered meanwhile
            else:
                self._drop_socket()
                self._socket = found[0]
                self._heard(found[1], fresh=now - self._heard_s > OVERDUE_S)
