"""Whether another server answers: silence, refusals, returns, and pauses of whoever looks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from runtime_adapter.transport.handshake import Session
from runtime_adapter.transport.listener import Listener
from runtime_adapter.transport.peer import Peer, pong
from runtime_adapter.transport.secrets import RunSecret
from tests.limits import HANG_S
from tests.runtime_adapter.transport.cut_wires import Relay

SECRET = RunSecret(b"a secret of this test", given=True)


class Answering:
    """A server that answers pings by a name, and counts them."""

    def __init__(self, name: str = "there", port: int = 0) -> None:
        self.name = name
        self.finished = False
        self.pings = 0
        self.listener = Listener(
            "127.0.0.1", port, SECRET, {"ping": self._answer}, max_connections=64, report=print
        )
        self.listener.start()
        self.address: tuple[str, int] = self.listener.address

    def _answer(self, connection: socket.socket, session: Session) -> None:
        connection.settimeout(None)
        with contextlib.suppress(OSError):
            while connection.recv(1):
                self.pings += 1
                connection.sendall(pong(self.name, self.finished))

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *error: object) -> None:
        self.listener.close()


class Watched:
    """A peer, and what it has said."""

    def __init__(self, address: tuple[str, int] | None, timeout_s: float) -> None:
        self.said: list[str] = []
        self.peer = Peer(
            "here", "there", SECRET, timeout_s, self.said.append, lambda: self.said.append("back")
        )
        self.peer.set_address(address, 1)
        self.peer.start()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.peer.close()


def until(condition: Callable[[], Any]) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_silence_and_return() -> None:
    """Silent for the time limit is suspect; the first answer, over a new connection, ends it."""
    with Answering() as there, Relay(there.address) as relay, Watched(relay.address, 1.0) as here:
        until(lambda: there.pings > 1)
        assert here.peer.usable
        generation = here.peer.generation
        relay.stall()
        until(lambda: here.said == ["no answer within 1 s"])
        until(lambda: not here.peer.usable)
        relay.resume()
        until(lambda: here.said == ["no answer within 1 s", "back"])
        until(lambda: here.peer.usable)
        assert here.peer.generation > generation
        there.finished = True
        until(lambda: here.peer.finished)


def test_a_short_outage_is_none() -> None:
    """What is back before the limit is not suspected; connections of before are not trusted."""
    with (
        Answering() as there, Relay(there.address) as relay,
        Watched(relay.address, HANG_S) as here,
    ):  # fmt: skip
        until(lambda: there.pings)
        generation = here.peer.generation
        relay.stall()
        time.sleep(1.2)
        relay.resume()
        until(lambda: here.peer.generation > generation)
        assert not here.said


def test_a_port_that_refuses() -> None:
    """A worker that has ended is suspect after a second, whatever the limit, until it is back."""
    there = Answering()
    with Watched(there.address, HANG_S) as here:
        until(lambda: there.pings)
        there.listener.close()
        until(lambda: here.said == ["its port refuses connections"])
        with Answering(port=there.address[1]):
            until(lambda: here.said[1:] == ["back"])
            assert not here.peer.suspect


def test_another_server_on_the_port() -> None:
    """Its answers are not taken for those of the server that was there."""
    with Answering("another") as there, Watched(there.address, 1.0) as here:
        until(lambda: here.said == ["no answer within 1 s"])
        assert there.pings


def test_addresses() -> None:
    """A new address ends a suspicion, none at all makes a server unusable and is not pinged."""
    with Answering() as there, socket.create_server(("127.0.0.1", 0)) as mute:
        with Watched(mute.getsockname()[:2], 1.0) as here:
            until(lambda: here.said == ["no answer within 1 s"])
            generation = here.peer.generation
            here.peer.set_address(there.address, 2)
            assert here.said[1:] == ["back"]
            assert here.peer.generation == generation + 1
            until(lambda: there.pings)
            here.peer.set_address(there.address, 2)  # nothing new
            assert here.peer.generation == generation + 1
            here.peer.set_address(None, 2)
            assert not here.peer.usable
        with Watched(None, 0.1) as nobody:
            time.sleep(0.5)
            assert not nobody.said


def test_a_peer_that_is_closed_leaves_no_threads() -> None:
    """Also while connections to it are being tried."""
    before = set(threading.enumerate())  # threads of earlier tests may be ending still
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        Watched(mute.getsockname()[:2], 1.0) as here,
    ):
        until(lambda: here.said)
        assert set(threading.enumerate()) - before
    until(lambda: not set(threading.enumerate()) - before)


LOOKER = """
import sys, time
from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.secrets import RunSecret

said = []
peer = Peer("here", "there", RunSecret(b"a secret of this test", given=True), 2.0, said.append)
peer.set_address(("127.0.0.1", int(sys.argv[1])), 1)
peer.start()
sys.stdin.readline()
print(said, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals")
def test_a_stopped_observer_sees_no_silence() -> None:
    """A process that was stopped for longer than the limit suspects nobody when it goes on."""
    with Answering() as there:
        command = [sys.executable, "-c", LOOKER, str(there.address[1])]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as looker:
            until(lambda: there.pings > 2)
            os.kill(looker.pid, signal.SIGSTOP)
            time.sleep(4.0)  # twice the limit
            os.kill(looker.pid, signal.SIGCONT)
            before = there.pings
            until(lambda: there.pings > before + 2)
            assert looker.communicate("\n", timeout=HANG_S)[0] == "[]\n"
