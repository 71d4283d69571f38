"""States beside the messages: the order of all waits, what breaks, and what NCCL is refused for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

from prism_plan.errors import InputError  # noqa: E402
from runtime_adapter.transport import nccl_channel as channels  # noqa: E402
from runtime_adapter.transport.call_threads import run_in_parallel  # noqa: E402
from runtime_adapter.transport.nccl_channel import (  # noqa: E402
    ChannelConfig,
    DataChannelBroken,
    NcclDataChannel,
    connect_channels,
    prepare_nccl,
    require_device,
    require_own_card,
)
from runtime_adapter.transport.rendezvous import Rendezvous  # noqa: E402

CPU = torch.device("cpu")


class Work:
    """An operation of a card that is complete after some looks, or never."""

    def __init__(self, looks: float, error: str = "") -> None:
        self.looks = looks
        self.error = error
        self.waited = False

    def is_completed(self) -> bool:
        """One look."""
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        """As NCCL: raises what went wrong."""
        self.waited = True
        if self.error:
            raise RuntimeError(self.error)


class Group:
    """Stands for a process group of NCCL."""

    def __init__(self, looks: float, error: str = "") -> None:
        self.work = Work(looks, error)
        self.asked: list[tuple[str, int]] = []
        self.aborted = False

    def send(self, tensors: list[Any], other: int, tag: int) -> Work:
        """Queue."""
        assert all(one.is_contiguous() for one in tensors)
        self.asked.append(("send", other))
        return self.work

    def recv(self, tensors: list[Any], other: int, tag: int) -> Work:
        """Queue."""
        self.asked.append(("recv", other))
        return self.work

    def abort(self) -> None:
        """Free the card."""
        self.aborted = True


def test_a_card_is_asked_until_it_has_received() -> None:
    """Nothing is read before the card has it; then the stream is told, which raises errors."""
    group = Group(looks=5)
    NcclDataChannel(group, 1, 10.0).receive(torch.empty(2, 3))
    assert group.asked == [("recv", 1)]
    assert group.work.looks == -1
    assert group.work.waited
    assert not group.aborted


@pytest.mark.parametrize(
    ("looks", "error", "message"),
    [(1e9, "", "timed out after 0.05 s"), (0, "remote process exited", "exited")],
)
@pytest.mark.parametrize("ask", ["receive", "wait"])
def test_what_does_not_come_is_given_up(looks: float, error: str, message: str, ask: str) -> None:
    """Silence and an error are one thing: the group is aborted, so that no card waits for ever."""
    group = Group(looks, error)
    channel = NcclDataChannel(group, 0, 0.05)
    with pytest.raises(DataChannelBroken, match=message):
        if ask == "receive":
            channel.receive(torch.empty(1, 1))
        else:
            channel.wait(channel.send(torch.ones(3, 2).T))
    assert group.aborted


def test_states_go_both_ways_by_gloo() -> None:
    """Over `split`, made by both sides at once: what one queues is what the other gets."""
    from tests.runtime_adapter.replays import free_port

    port = free_port()
    host = dist.TCPStore(
        "127.0.0.1", port, None, True, wait_for_workers=False
    )  # kept until the end
    states = torch.arange(12.0).reshape(3, 4)
    found = [torch.empty(3, 4), torch.empty(2, 4)]

    def side(rank: int) -> Callable[[], None]:
        def run() -> None:
            rendezvous = Rendezvous(2, rank, port=port, timeout_s=5.0)
            made = connect_channels(ChannelConfig("split", CPU), rendezvous, [(0, 1)], 2, rank)
            assert sorted(made) == [(0, 1, 0), (0, 1, 1)]
            channel = made[0, 1, 1]
            if rank == 0:
                sending = channel.send(states)
                channel.receive(found[1])
                channel.wait(sending)
            else:
                channel.receive(found[0])
                channel.wait(channel.send(found[0][:2] * 2))

        return run

    run_in_parallel([side(0), side(1)])
    assert host.num_keys() > 0
    assert (found[0] == states).all()
    assert (found[1] == 2 * states[:2]).all()


@settings(max_examples=50, deadline=None)
@given(servers=st.integers(2, 6), lanes=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_all_connect_whatever_the_order_of_their_lists(servers: int, lanes: int, seed: int) -> None:
    """Drivers and workers that connect two at a time, each by its own list, never wait in a circle.

    There is always a pair that both sides have next, until all have met.
    """
    rng = np.random.default_rng(seed)
    lists: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    kept = channels._connect
    try:
        channels._connect = lambda how, rendezvous, driver, worker, lane, rank: None  # type: ignore
        for server in range(servers):
            others = rng.permutation([n for n in range(servers) if n != server]).tolist()
            for rank, side, pairs in (
                (0, "driver", [(server, n) for n in others]),
                (1, "worker", [(n, server) for n in others]),
            ):
                made = connect_channels(
                    ChannelConfig("split", CPU), Rendezvous(servers, server), pairs, lanes, rank
                )
                lists[side, server] = list(made)
    finally:
        channels._connect = kept
    met = 0
    while any(lists.values()):
        ready = {
            todo[0] for (side, _), todo in lists.items()
            if todo and side == "driver" and lists["worker", todo[0][1]][:1] == todo[:1]
        }  # fmt: skip
        assert ready
        for driver, worker, lane in ready:
            assert lists["driver", driver].pop(0) == (driver, worker, lane)
            assert lists["worker", worker].pop(0) == (driver, worker, lane)
            met += 1
    assert met == servers * (servers - 1) * lanes


@pytest.mark.parametrize("cards", ["abc", "aba", "aaa"])
def test_a_card_is_of_one_server(cards: str) -> None:
    """Servers that share a card are told so, each of the other; those that do not are not."""
    store, names = dist.HashStore(), ("x", "y", "z")

    def check(rank: int) -> Callable[[], str]:
        def run() -> str:
            try:
                require_own_card(store, Rendezvous(3, rank), f"card {cards[rank]}", names)
            except InputError as error:
                return str(error)
            return ""

        return run

    said = run_in_parallel([check(rank) for rank in range(3)])
    for rank, other in itertools.permutations(range(3), 2):
        if cards[rank] == cards[other]:
            assert f"server {names[rank]!r} has the GPU of server" in said[rank]
            assert "use transport gloo" in said[rank]
    assert [bool(text) for text in said] == [cards.count(card) > 1 for card in cards]


def test_what_a_transport_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL a card and a torch that has it, split the CPU; each in one line, with what to do."""
    card = torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"between CUDA GPUs.*\(device is cpu\).*gloo"):
        require_device(ChannelConfig("nccl", CPU))
    with pytest.raises(InputError, match=r"between CPUs \(device is cuda\); use device cpu"):
        require_device(ChannelConfig("split", card))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match=r"without NCCL; install a CUDA build of torch"):
        require_device(ChannelConfig("nccl", card))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    require_device(ChannelConfig("nccl", card))
    require_device(ChannelConfig("split", CPU))


def test_what_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named interface and no other; errors end calls, not processes."""
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    prepare_nccl("eth1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"  # as whoever runs it wants it
