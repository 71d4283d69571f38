"""Handshakes of two threads, and whole ones as bytes."""

from __future__ import annotations

import concurrent.futures
import socket
from dataclasses import dataclass, field

from runtime_adapter.transport.handshake import Claim, Session, accept_session, open_session
from runtime_adapter.transport.secrets import RunSecret
from tests.limits import HANG_S

SECRET = RunSecret(b"a secret of some length", given=True)
OTHER = RunSecret(b"another secret of a stranger", given=True)
CLAIM = Claim("calls", server="s1", incarnation=3, lane=2, max_tokens=512)


@dataclass
class Outcome:
    """What both sides of a handshake made of it: a session or an error."""

    client: Session | Exception
    server: Session | Exception
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def sessions(self) -> tuple[Session, Session]:
        """The client's and the server's."""
        assert isinstance(self.client, Session), self.client
        assert isinstance(self.server, Session), self.server
        return self.client, self.server

    def close(self) -> None:
        """Close both sides."""
        for connection in self.connections:
            connection.close()


def shake(client: RunSecret = SECRET, server: RunSecret = SECRET, claim: Claim = CLAIM) -> Outcome:
    """A handshake between two threads; the side that fails closes its connection."""
    near, far = socket.socketpair()

    def run(connection: socket.socket, *, is_client: bool) -> Session | Exception:
        try:
            if is_client:
                return open_session(connection, claim, client, HANG_S)
            return accept_session(connection, server, HANG_S)
        except Exception as error:
            connection.close()
            return error

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, near, is_client=True), pool.submit(run, far, is_client=False)]
        return Outcome(futures[0].result(HANG_S), futures[1].result(HANG_S), [near, far])
