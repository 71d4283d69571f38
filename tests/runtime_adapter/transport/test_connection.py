"""Calls outlive their connections: what is cut or stalled is made anew, and answered once."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from runtime_adapter.moe.counters import Counters  # noqa: E402
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher  # noqa: E402
from runtime_adapter.moe.router import ExpertsLost, Router, uniform_network  # noqa: E402
from runtime_adapter.transport.connection import Connection, NcclConnection  # noqa: E402
from runtime_adapter.transport.nccl_channel import ChannelConfig  # noqa: E402
from runtime_adapter.transport.peer import ConnectionLost, Peer  # noqa: E402
from runtime_adapter.transport.rendezvous import RequestTimeout, RuntimeFailure  # noqa: E402
from runtime_adapter.transport.send_queue import LONG_BYTES, SendQueue  # noqa: E402
from runtime_adapter.transport.wire_format import MessageBuffer, WireError  # noqa: E402
from runtime_adapter.weights import expert_map as expert_map_module  # noqa: E402
from runtime_adapter.weights.expert_map import ExpertMap  # noqa: E402
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.transport.cut_wires import Relay  # noqa: E402
from tests.runtime_adapter.transport.one_worker import (  # noqa: E402
    MODEL,
    NAMES,
    SECRET,
    WIDTH,
    Worker,
    placement,
    step,
)


class Home:
    """The first server's driver: a lane with connections to the others, which hold all experts."""

    def __init__(
        self, addresses: dict[int, Any], *, timeout_s: float = HANG_S, max_tokens: int = 16,
        request_timeout_s: float = HANG_S, channels: ChannelConfig | None = None,
    ) -> None:  # fmt: skip
        self.expert_map = ExpertMap(placement(*addresses))
        self.suspected: list[str] = []
        self.peers = {n: self._peer(n, timeout_s) for n in addresses}
        queue, buffer = SendQueue(), MessageBuffer(max_tokens, 4)

        def connection(peer: Peer) -> Connection:
            if channels is None:
                return Connection(peer, 0, queue, buffer, request_timeout_s)
            return NcclConnection(peer, 0, queue, buffer, request_timeout_s, channels, "lo")

        self.connections = {n: connection(peer) for n, peer in self.peers.items()}
        router = Router(
            self.expert_map, 0, MODEL, uniform_network(3, 4 * WIDTH), "spread"
        )  # alternates
        nothing: Any = None
        self.lane = RemoteDispatcher(
            MODEL, router, self.connections, nothing, Counters(1, 8),
            request_timeout_s=request_timeout_s,
        )  # fmt: skip
        for n, address in addresses.items():
            self.peers[n].set_address(address, 1)
            self.peers[n].start()

    def _peer(self, n: int, timeout_s: float) -> Peer:
        def suspect(reason: str) -> None:
            self.suspected.append(f"{NAMES[n]}: {reason}")
            self.expert_map.suspect(n)

        def unsuspect() -> None:
            self.suspected.append(f"{NAMES[n]}: back")
            self.expert_map.unsuspect(n)

        return Peer("s0", NAMES[n], SECRET, timeout_s, suspect, unsuspect)

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self.connections.values():
            connection.close()
        for peer in self.peers.values():
            peer.close()

    def run(self, tokens: int = 5, seed: int = 0) -> None:
        """A step, whose sums must be right."""
        hidden, experts, weights, wanted = step(tokens, seed)
        assert torch.equal(self.lane.run(0, hidden, experts, weights), wanted)

    def begin(self, tokens: int = 5) -> tuple[threading.Thread, list[BaseException | None]]:
        """A step in a thread; the list gets its error, or None."""
        ended: list[BaseException | None] = []

        def run() -> None:
            try:
                self.run(tokens)
            except BaseException as error:
                ended.append(error)
            else:
                ended.append(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread, ended


def until(condition: Any) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("tokens", [1, 16, LONG_BYTES // 4 // WIDTH + 1])
def test_calls_are_answered(tokens: int) -> None:
    """Short messages go directly and long ones through the queue, over one connection each."""
    with (
        Worker(1) as one, Worker(2) as other, Relay(one.address) as relay,
        Home({1: relay.address, 2: other.address}, max_tokens=tokens) as home,
    ):  # fmt: skip
        until(lambda: relay.count == 1)  # for pings
        home.run(tokens, 0)
        connections = relay.count  # a busy machine may not take the first one in time
        assert connections >= 2
        for seed in range(1, 20):
            home.run(tokens, seed)
        assert relay.count == connections
        assert one.compute.count >= 20


@pytest.mark.parametrize("tokens", [5, LONG_BYTES // 4 // WIDTH + 1])
@pytest.mark.parametrize("passes", [0, 20, 100], ids=["before", "in-header", "in-states"])
def test_a_connection_that_is_cut_is_made_anew(tokens: int, passes: int) -> None:
    """The call is sent again and answered once, wherever its answer was cut; nobody is suspected.

    It is computed twice, which changes nothing.
    """
    with (
        Worker(1) as one, Relay(one.address) as relay,
        Home({1: relay.address}, max_tokens=tokens) as home,
    ):  # fmt: skip
        home.run(1)
        before = one.compute.count
        one.compute.may_go.clear()
        thread, ended = home.begin(tokens)
        assert one.compute.begun.acquire(timeout=HANG_S)
        until(lambda: one.compute.count == before + 1)
        relay.cut_after = passes
        if not passes:
            relay.cut()
            relay.cut_after = None
        one.compute.may_go.set()
        thread.join(HANG_S)
        assert ended == [None]
        assert one.compute.count in (before + 1, before + 2)  # pings may have taken the cut
        home.run(3, seed=1)
        assert not home.suspected


def test_a_worker_that_starts_again_is_called_again() -> None:
    """Its port refuses connections meanwhile; calls that find the old connection closed go on."""
    first = Worker(1)
    with Home({1: first.address}) as home:
        home.run()
        first.close()
        thread, ended = home.begin()
        with Worker(1, first.address[1]):
            thread.join(HANG_S)
            assert ended == [None]
            home.run(seed=2)


def test_a_stalled_link_is_waited_out_and_used_at_once() -> None:
    """A call that a link has swallowed is sent again when a fresh connection answers pings.

    The old connection never passes anything on again, as while TCP backs off.
    """
    with Worker(1) as one, Relay(one.address) as relay, Home({1: relay.address}) as home:
        home.run()
        until(lambda: relay.count == 2)  # for pings as well
        generation = home.peers[1].generation
        relay.stall()
        thread, ended = home.begin()
        time.sleep(1.5)  # an outage is one from a second on
        assert not ended
        relay.resume()
        thread.join(HANG_S)
        assert ended == [None]
        assert home.peers[1].generation > generation
        assert not home.suspected


def test_a_long_computation_is_waited_for() -> None:
    """As long as pings are answered a call waits, on its one connection."""
    with Worker(1) as one, Relay(one.address) as relay, Home({1: relay.address}) as home:
        home.run()
        generation = home.peers[1].generation
        one.compute.may_go.clear()
        thread, ended = home.begin()
        assert one.compute.begun.acquire(timeout=HANG_S)
        time.sleep(1.5)
        assert not ended
        one.compute.may_go.set()
        thread.join(HANG_S)
        assert ended == [None]
        assert home.peers[1].generation == generation


def test_a_silent_server_is_suspect_and_its_calls_go_elsewhere() -> None:
    """After the time limit other holders get the calls; when it answers again it gets its own."""
    with (
        Worker(1) as one, Worker(2) as other, Relay(one.address) as relay,
        Home({1: relay.address, 2: other.address}, timeout_s=2.0) as home,
    ):  # fmt: skip
        home.run(16)
        before = other.compute.count
        relay.stall()
        home.run(16, seed=1)
        assert other.compute.count > before
        assert home.suspected == ["s1: no answer within 2 s"]
        assert home.expert_map.lost_names() == ["s1"]
        relay.resume()
        until(lambda: home.suspected[1:] == ["s1: back"])
        assert not home.expert_map.lost_names()
        before = one.compute.count
        home.run(16, seed=2)
        assert one.compute.count > before


def test_a_step_waits_for_the_only_holder() -> None:
    """While it is suspect the step waits, outside of its layer, and goes on when it returns."""
    with (
        Worker(1) as one, Relay(one.address) as relay,
        Home({1: relay.address}, timeout_s=1.0) as home,
    ):  # fmt: skip
        home.run()
        relay.stall()
        thread, ended = home.begin()
        until(lambda: home.suspected == ["s1: no answer within 1 s"])
        until(lambda: home.lane.passes == 4)  # 2 of the step before, then in and out: it waits
        assert not ended
        relay.resume()
        thread.join(HANG_S)
        assert ended == [None]
        assert home.lane.passes % 2 == 0
        home.run(seed=1)


def test_a_step_fails_when_the_only_holder_is_down() -> None:
    """The log has the last word: a step that waited ends with the expert that nobody holds."""
    with (
        Worker(1) as one, Relay(one.address) as relay,
        Home({1: relay.address}, timeout_s=1.0) as home,
    ):  # fmt: skip
        home.run()
        relay.stall()
        thread, ended = home.begin()
        until(lambda: home.suspected)
        assert not ended
        home.peers[1].set_address(None, 1)
        home.expert_map.set_down(1)
        thread.join(HANG_S)
        assert isinstance(ended[0], ExpertsLost)
        assert "held by no server that is still there; down: s1" in str(ended[0])
        home.peers[1].set_address(one.address, 2)
        home.expert_map.set_up(1, [(1, pair) for pair in range(8)])
        home.run(seed=1)


def test_a_step_waits_for_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lost with its holder may be loaded elsewhere: the step waits for that migration.

    It goes on when the expert is there, and fails when the migration has ended without it.
    """
    with Worker(1) as one, Worker(2) as other, Home({1: one.address, 2: other.address}) as home:
        home.run()
        monkeypatch.setattr(expert_map_module, "REPAIR_BEGINS_S", HANG_S)
        home.expert_map.set_all({}, [1, 2])
        thread, ended = home.begin()
        until(lambda: home.lane.passes == 4)  # in and out: it waits
        assert not ended
        home.expert_map.set_migrating(True)
        monkeypatch.setattr(expert_map_module, "REPAIR_BEGINS_S", 0.0)
        home.expert_map.set_up(2, [(2, pair) for pair in range(8)])
        thread.join(HANG_S)
        assert ended == [None]
        before = home.lane.passes
        home.expert_map.set_down(2)
        thread, ended = home.begin()
        until(lambda: home.lane.passes == before + 2)
        assert not ended
        home.expert_map.set_migrating(False)
        thread.join(HANG_S)
        assert isinstance(ended[0], ExpertsLost)


def test_a_step_waits_no_longer_than_it_may() -> None:
    """The message names the option, the expert and who is silent."""
    with (
        Worker(1) as one, Relay(one.address) as relay,
        Home({1: relay.address}, timeout_s=1.0, request_timeout_s=0.5) as home,
    ):  # fmt: skip
        home.run()
        home.expert_map.suspect(1)
        hidden, experts, weights, _ = step(3)
        with pytest.raises(RequestTimeout, match="servers alone that do not answer: s1") as error:
            home.lane.run(0, hidden, experts, weights)
        names = {"request_timeout_s": "--request-timeout"}
        assert "a step has waited for 0.5 s (--request-timeout)" in error.value.line(names)
        assert home.lane.passes % 2 == 0
        home.expert_map.unsuspect(1)
        home.run()


def test_a_call_that_hangs_ends_with_the_limit() -> None:
    """Its server answers pings, but not the call; the next one goes over a new connection."""
    with Worker(1) as one, Home({1: one.address}, request_timeout_s=0.5) as home:
        home.run()
        one.compute.may_go.clear()
        hidden, experts, weights, _ = step(3)
        with pytest.raises(RequestTimeout, match="'s1' answers pings but not a call"):
            home.lane.run(0, hidden, experts, weights)
        one.compute.may_go.set()
        home.run()


def test_a_worker_without_memory_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver with steps that fit into no memory fails alone, before anything is allocated."""
    import psutil

    with Worker(1) as one, Home({1: one.address}) as home, monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(RuntimeFailure, match="server 's1' could not compute a call"):
            home.run()
        patched.undo()
        home.run()
    assert "steps need buffers of" in caplog.text


def test_an_answer_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer for more tokens than were sent is no answer; the connection is not used again."""
    from runtime_adapter import call_handler

    with Worker(1) as one, Home({1: one.address}) as home:
        home.run()
        kept = call_handler.wire.Header
        monkeypatch.setattr(
            call_handler.wire, "Header",
            lambda kind, tokens=0, *rest, **more: kept(kind, tokens + (kind == 2), *rest, **more),
        )  # fmt: skip
        with pytest.raises(WireError, match="server 's1': an answer of another size"):
            home.run()
        monkeypatch.undo()
        home.run()


def test_bytes_that_are_no_call_end_one_connection(caplog: pytest.LogCaptureFixture) -> None:
    """The worker answers that it failed, notes who sent them, and serves the others."""
    with Worker(1) as one, Home({1: one.address}) as home:
        home.run()
        peer = Peer("s2", "s1", SECRET, 1.0)
        peer.set_address(one.address, 1)
        connection, _ = peer.dial("calls", 3, max_tokens=4)
        with connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
            answer = b""
            while data := connection.recv(100):
                answer += data
                connection.shutdown(1) if len(answer) == 32 else None
        assert len(answer) == 32
        home.run()
    assert "(from server 's2')" in caplog.text


def test_a_lane_that_dials_anew_ends_its_earlier_connection() -> None:
    """A connection that is stuck keeps no thread of the worker; those of other lanes stay.

    Two that dial as one lane take its place from each other, and calls are answered all the same.
    """
    with Worker(1) as one, Home({1: one.address}) as home:
        peer = Peer("s0", "s1", SECRET, 1.0)
        peer.set_address(one.address, 1)
        home.run()
        other_lane, _ = peer.dial("calls", 1, max_tokens=4)
        with other_lane, peer.dial("calls", 0, max_tokens=4)[0] as same_lane:
            same_lane.settimeout(0.02)
            while True:  # until it took the place, and the lane took it back
                home.run()
                with contextlib.suppress(TimeoutError):
                    assert same_lane.recv(1) == b""
                    break
            other_lane.settimeout(0.05)
            with pytest.raises(TimeoutError):
                other_lane.recv(1)


def test_a_server_that_is_down_is_not_dialled() -> None:
    """Without an address there is nothing to connect to."""
    peer = Peer("s0", "s1", SECRET, 1.0)
    with pytest.raises(ConnectionLost, match="server 's1' is down"):
        peer.dial("calls")
    assert not peer.usable


def test_states_over_a_channel_of_their_own() -> None:
    """By gloo between CPUs; after the connection was cut, lane and channel are made anew."""
    channels = ChannelConfig("gloo", torch.device("cpu"))
    with (
        Worker(1, channels=channels) as one, Relay(one.address) as relay,
        Home({1: relay.address}, channels=channels) as home,
    ):  # fmt: skip
        for seed in range(5):
            home.run(5, seed)
        relay.cut()
        home.run(3, seed=6)
        home.run(16, seed=7)
        assert np.array_equal(home.expert_map.lost_names(), [])
