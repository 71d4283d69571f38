"""A relay between a client and a server of a test, whose connections can be cut or stalled."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Passes bytes on between whoever connects to ``address`` and the server at ``target``.

    :meth:`stall` keeps all bytes back and takes no new connections, as a link that is away does;
    :meth:`resume` ends that, for new connections at once and for the old ones if ``old`` is given.
    :meth:`cut` closes all connections. ``counts`` are the connections that there have been.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self.count = 0
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._open = threading.Event()
        self._open.set()
        #: Bytes from the server that pass before every connection is cut, none if not set.
        self.cut_after: int | None = None
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._open.set()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self._open.wait()
                try:
                    server = socket.create_connection(self.target)
                except OSError:
                    client.close()
                    continue
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link = _Link(self, client, server)
                with self._lock:
                    self.count += 1
                    self._links.add(link)
                link.start()

    def cut(self) -> None:
        """Close all connections."""
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            link.close()

    def stall(self) -> None:
        """Pass nothing on from now on."""
        self._open.clear()
        with self._lock:
            for link in self._links:
                link.passing.clear()

    def resume(self, *, old: bool = False) -> None:
        """Pass on what new connections send, and what was kept back of the old ones if asked."""
        self._open.set()
        if old:
            with self._lock:
                for link in self._links:
                    link.passing.set()


class _Link:
    def __init__(self, relay: Relay, client: socket.socket, server: socket.socket) -> None:
        self._relay = relay
        self._ends = client, server
        self.passing = threading.Event()
        self.passing.set()

    def start(self) -> None:
        client, server = self._ends
        threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
        threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def close(self) -> None:
        self.passing.set()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                self.passing.wait()
                limit = self._relay.cut_after
                if counted and limit is not None:
                    if len(data) > limit:
                        self._relay.cut_after = None
                        target.sendall(data[:limit])
                        break
                    self._relay.cut_after = limit - len(data)
                target.sendall(data)
        except OSError:
            pass
        self.close()
        with contextlib.suppress(OSError):
            source.close()
