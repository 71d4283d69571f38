"""Accepts the connections of one port, and believes nothing before a handshake.

Strangers can take a bounded part of a process at most: so many connections without a handshake at a
time, the oldest of which gives way to the next, and so many failed handshakes a second, after which
new connections wait in the kernel's queue. Connections that are authenticated are not affected.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

from prism_plan.errors import PrismError
from runtime_adapter.transport.dialing import set_options
from runtime_adapter.transport.handshake import HandshakeFailed, Session, accept_session
from runtime_adapter.transport.rendezvous import RuntimeFailure
from runtime_adapter.transport.secrets import RunSecret
from runtime_adapter.transport.stranger_limits import (
    HANDSHAKE_TIMEOUT_S,
    MAX_FAILURES_PER_S,
    MAX_UNAUTHENTICATED,
    REPORT_INTERVAL_S,
)

#: Connections that wait to be accepted: of all servers, when a store is started again.
_BACKLOG = 256

Handler = Callable[[socket.socket, Session], None]


def listen(host: str, port: int, *, parameter: str = "listen_port") -> socket.socket:
    """A socket that listens on one address alone.

    Raises
    ------
    RuntimeFailure
        The port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise RuntimeFailure(
            f"``{parameter}`` {host}:{port}: {reason}; choose another port, or the address of the "
            "interface that the servers share"
        ) from error
    return listener


class Listener:
    """Listens on one address; each connection is authenticated in a thread of its own.

    ``handlers`` by purpose get the socket and the session, in that thread; the socket is closed
    when they return or raise. At most ``max_connections`` authenticated ones are open at a time.
    ``report`` gets a line about refused connections now and then.

    Raises
    ------
    RuntimeFailure
        The port is in use, or the address is not one of this machine.
    """

    def __init__(
        self, host: str, port: int, secret: RunSecret, handlers: Mapping[str, Handler], *,
        max_connections: int, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._secret = secret
        self._handlers = dict(handlers)
        self._max_connections = max_connections
        self._report = report
        self._listener = listen(host, port)
        #: Where it listens: host and port.
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._unauthenticated: OrderedDict[int, socket.socket] = OrderedDict()
        self._authenticated: set[socket.socket] = set()
        # one that gave way may take a moment to end
        self._threads = threading.Semaphore(2 * MAX_UNAUTHENTICATED)
        self._failed_s: deque[float] = deque(maxlen=MAX_FAILURES_PER_S)
        self._refused, self._reported_s = 0, -REPORT_INTERVAL_S
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to accept, in a thread."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening, and close all connections."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = [*self._unauthenticated.values(), *self._authenticated]
        for connection in connections:
            _shut_down(connection)

    # ------------------------------------------------------------------------------------ accepting

    def _accept(self) -> None:
        number = 0
        while not self._closed.is_set():
            self._wait_after_failures()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed.wait(0.1):  # or there are no more descriptors for a while
                    return
                continue
            self._threads.acquire()
            number += 1
            with self._lock:
                if len(self._unauthenticated) >= MAX_UNAUTHENTICATED:
                    _shut_down(self._unauthenticated.popitem(last=False)[1])
                self._unauthenticated[number] = connection
            thread = threading.Thread(target=self._serve, args=(number, connection), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads for a while
                self._forget(number)
                connection.close()

    def _wait_after_failures(self) -> None:
        """Begin at most :data:`MAX_FAILURES_PER_S` handshakes that fail within any second."""
        with self._lock:
            full = len(self._failed_s) == self._failed_s.maxlen
            wait_s = self._failed_s[0] + 1.0 - time.monotonic() if full else 0.0
        if wait_s > 0:
            self._closed.wait(wait_s)

    def _serve(self, number: int, connection: socket.socket) -> None:
        with connection:
            try:
                set_options(connection)
                session = accept_session(connection, self._secret, HANDSHAKE_TIMEOUT_S)
            except (HandshakeFailed, OSError) as error:
                self._forget(number)
                # a client that went away is nothing to tell
                told = not isinstance(error, ConnectionError)
                self._refuse(str(error) or type(error).__name__, told=told)
                return
            self._forget(number)
            handler = self._handlers.get(session.claim.purpose)
            with self._lock:
                fits = len(self._authenticated) < self._max_connections
                fits = fits and not self._closed.is_set()
                if fits and handler is not None:
                    self._authenticated.add(connection)
            if handler is None or not fits:
                self._refuse("too many connections" if handler else "nothing that is served here")
                return
            try:
                handler(connection, session)
            except (OSError, PrismError):
                pass  # the other side is gone, or has sent nonsense: the connection ends
            except Exception as error:  # of ours: it must not end silently, nor the process
                name = session.claim.purpose
                self._report(f"internal error in a connection for {name!r}: {error!r:.200}")
            finally:
                with self._lock:
                    self._authenticated.discard(connection)

    def _forget(self, number: int) -> None:
        """The handshake of a connection is over."""
        with self._lock:
            self._unauthenticated.pop(number, None)
        self._threads.release()

    def _refuse(self, reason: str, *, told: bool = True) -> None:
        """Count a refused connection; a line says how many there were, not one for each.

        One that is not ``told`` is counted alone.
        """
        now = time.monotonic()
        with self._lock:
            self._failed_s.append(now)
            self._refused += 1
            recently = now - self._reported_s < REPORT_INTERVAL_S
            if not told or recently or self._closed.is_set():
                return
            count, self._refused, self._reported_s = self._refused, 0, now
        host, port = self.address
        connections = f"{count:,} connections" if count > 1 else "a connection"
        self._report(f"refused {connections} to {host}:{port}; the last reason: {reason}")


def _shut_down(connection: socket.socket) -> None:
    """End a connection that a thread reads from; that thread closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
