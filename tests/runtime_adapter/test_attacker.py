"""The attacker does what it says, and a listener and a store withstand it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from runtime_adapter.control.store.client import StoreClient
from runtime_adapter.transport import handshake
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.handshake import Claim, Session
from runtime_adapter.transport.listener import Listener
from tests.limits import HANG_S
from tests.runtime_adapter import attacker
from tests.runtime_adapter.attacker import ATTACKS, attack, record, sink
from tests.runtime_adapter.control.store.stores import listening, run_of, serving
from tests.runtime_adapter.transport.sessions import OTHER, SECRET


class Attack:
    """An attack in a thread of its own."""

    def __init__(self, addresses: list[tuple[str, int]], recordings: list[bytes]) -> None:
        self.counts: dict[str, int] = {}
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(addresses, recordings))
        self._thread.start()

    def _run(self, addresses: list[tuple[str, int]], recordings: list[bytes]) -> None:
        self.counts = attack(addresses, self.stop, 17, rate=100.0, recordings=recordings)

    def end(self) -> dict[str, int]:
        """Stop, and say what was done."""
        self.stop.set()
        self._thread.join(HANG_S)
        return self.counts


def echo(connection: socket.socket, session: Session) -> None:
    while data := connection.recv(4096):
        connection.sendall(data)


def test_it_speaks_the_protocol() -> None:
    """Its handshake is accepted if it has the secret: so without it fails for that alone."""
    assert attacker.MAGIC == handshake.MAGIC
    assert set(attacker.PURPOSES) == set(handshake.PURPOSES)
    listener = Listener(
        "127.0.0.1", 0, SECRET, {"ping": echo}, max_connections=4, report=lambda line: None
    )
    listener.start()
    try:
        whole = record(listener.address, SECRET.key)
        assert whole.startswith(handshake.MAGIC)
        with pytest.raises((ValueError, OSError)):
            record(listener.address, OTHER.key)
    finally:
        listener.close()


def test_a_listener_withstands_it() -> None:
    """Nobody is accepted, replays of real handshakes included; a client is served meanwhile."""
    lines: list[str] = []
    listener = Listener(
        "127.0.0.1", 0, SECRET, {"ping": echo}, max_connections=4, report=lines.append
    )
    listener.start()
    process = psutil.Process()
    try:
        connection, _ = dial(listener.address, Claim("ping", "s1"), SECRET, HANG_S)
        with connection:
            connection.settimeout(HANG_S)
            recordings = [record(listener.address, SECRET.key)]
            before = process.memory_info().rss
            running = Attack([listener.address], recordings)
            refused = 0
            while refused < 150:
                connection.sendall(b"here")
                assert connection.recv(4) == b"here"
                time.sleep(0.01)
                refused = listener._refused
            with dial(listener.address, Claim("ping", "s2"), SECRET, HANG_S)[0] as other:
                other.settimeout(HANG_S)
                other.sendall(b"too")
                assert other.recv(3) == b"too"
            counts = running.end()
            assert process.memory_info().rss - before < 40e6  # the attacker's as well
    finally:
        listener.close()
    assert counts["accepted"] == 0
    assert counts["connections"] >= 150
    assert len(lines) == 1


def test_every_kind_is_tried_and_the_seed_decides() -> None:
    """Runs in pairs have the same traffic: it does not depend on answers."""
    with sink(2) as addresses:
        assert len(set(addresses)) == 2
        plans = [
            list(itertools.islice(attacker.Attacker(addresses, seed, 1.0, []).plan(), 1000))
            for seed in (5, 5, 6)
        ]
        assert plans[0] == plans[1] != plans[2]
        assert {name for name, _, _ in plans[0]} == set(ATTACKS)
        assert {address for _, address, _ in plans[0]} == set(addresses)


def test_a_store_withstands_it() -> None:
    """Its log, values and members stay as they are, and its clients are answered."""
    lines: list[str] = []
    with (
        listening() as listener,
        serving(listener, secret=SECRET, reports=lines) as address,
        contextlib.closing(StoreClient(address, "worker 0")) as client,
    ):
        epoch = client.start_run(run_of())["epoch"]
        client.join(0, "10.0.0.1", 1000, [[0, 0, 0]], 0, timeout_s=HANG_S)
        client.put("plan/1", b"kept", epoch)

        def facts() -> tuple[object, ...]:
            members = [(one["state"], one["incarnation"]) for one in client.members()]
            return client.read(epoch, -1, 0.0)["entries"], members, client.get("plan/1")

        before = facts()
        found = attacker.Attacker(
            [(address.host, address.port)], 23, 100.0,
            [record((address.host, address.port), SECRET.key, purpose="control")],
        )  # fmt: skip

        def is_over() -> bool:
            return found.counts["connections"] >= 150 and all(
                found.counts[name] for name in ATTACKS
            )

        thread = threading.Thread(target=lambda: asyncio.run(found.run(is_over)))
        thread.start()
        while thread.is_alive():
            assert facts() == before
            time.sleep(0.01)
        assert facts() == before
    assert found.counts["accepted"] == 0
    assert len(lines) <= 2


def test_the_sink_accepts_all_and_says_little() -> None:
    """No attack is refused, and none counts as accepted."""
    with sink() as addresses:
        found = attacker.Attacker(addresses, 29, 1000.0, [])
        asyncio.run(found.run(lambda: found.counts["connections"] >= 50))
    assert found.counts["refused"] == found.counts["accepted"] == 0


def test_the_rate_is_bounded() -> None:
    """It cannot starve the machine that it runs on, however long it runs."""
    with sink() as addresses:
        began_s = time.monotonic()
        counts = attack(addresses, 2.0, 3, rate=50.0)
        took_s = time.monotonic() - began_s
    assert counts["connections"] <= 50.0 * took_s + attacker.GROUP + 1


def test_the_script_needs_no_package() -> None:
    """It runs with a bare Python, as on a machine that is not of the run."""
    words = [sys.executable, "-I", "-S", attacker.__file__, "127.0.0.1:1"]
    found = subprocess.run(
        [*words, "--seconds", "0.5", "--seed", "3", "--sink"],
        capture_output=True, text=True, timeout=HANG_S, check=True,
    )  # fmt: skip
    assert '"accepted": 0' in found.stdout
    assert not found.stderr
