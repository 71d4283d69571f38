"""States beside the messages: how two sides meet, what breaks, and what NCCL is refused for."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

from prism_plan.errors import InputError  # noqa: E402
from runtime_adapter.transport.c10d_store import (  # noqa: E402
    MAX_KEYS,
    PairKeys,
    PairStore,
    RemoteKeys,
)
from runtime_adapter.transport.call_threads import run_in_parallel  # noqa: E402
from runtime_adapter.transport.handshake import Claim, Session  # noqa: E402
from runtime_adapter.transport.nccl_channel import (  # noqa: E402
    ChannelConfig,
    DataChannelBroken,
    NcclDataChannel,
    open_channel,
    prepare_nccl,
    require_device,
    require_own_card,
)
from tests.limits import HANG_S  # noqa: E402

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
    """Made by both sides at once: what one queues is what the other gets."""
    keys = PairKeys()
    states = torch.arange(12.0).reshape(3, 4)
    found = [torch.empty(3, 4), torch.empty(2, 4)]

    def side(rank: int) -> Callable[[], None]:
        def run() -> None:
            channel = open_channel(
                ChannelConfig("gloo", CPU), PairStore(keys, HANG_S), rank, "lo", HANG_S
            )
            if rank == 0:
                sending = channel.send(states)
                channel.receive(found[1])
                channel.wait(sending)
            else:
                channel.receive(found[0])
                channel.wait(channel.send(found[0][:2] * 2))

        return run

    run_in_parallel([side(0), side(1)])
    assert (found[0] == states).all()
    assert (found[1] == 2 * states[:2]).all()


def test_a_side_that_is_alone() -> None:
    """It waits for the limit and no longer, and says which transport it was."""
    with pytest.raises(DataChannelBroken, match="``transport`` gloo: "):
        open_channel(ChannelConfig("gloo", CPU), PairStore(PairKeys(), 0.2), 0, "lo", 0.2)


def test_keys_over_a_connection() -> None:
    """The driver reads and writes the worker's keys; what is no request ends the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other = server.accept()[0]
    claim = Claim("channel")
    keys = PairKeys()

    def answer() -> None:
        with other:  # as a listener does
            keys.answer(other, Session(claim, b"k" * 32, is_client=False))

    with one:
        thread = threading.Thread(target=answer)
        thread.start()
        remote = RemoteKeys(one, Session(claim, b"k" * 32, is_client=True), HANG_S)
        store = PairStore(remote, HANG_S)
        assert not store.check(["a"])
        store.set("a", "text")
        store.set("b", b"\x00\xff")
        store.wait(["a", "b"], datetime.timedelta(seconds=1))
        assert (store.get("a"), store.get("b")) == (b"text", b"\x00\xff")
        assert keys.find("b") == b"\x00\xff"
        keys.put("c", b"of the worker")
        assert PairStore(remote, 1.0).get("c") == b"of the worker"
        with pytest.raises(RuntimeError, match=r"no d within 0\.01 s"):
            PairStore(remote, 0.01).get("d")
        for n in range(MAX_KEYS - 3):
            store.set(f"key {n}", "")
        with pytest.raises(RuntimeError, match="the keys of a data channel"):
            store.set("one too many", "")
        thread.join(HANG_S)


@pytest.mark.parametrize("cards", ["abc", "aba", "aaa"])
def test_a_card_is_of_one_server(cards: str) -> None:
    """Servers that share a card are told so, each of the other; those that do not are not."""
    names = ("x", "y", "z")
    for rank, card in enumerate(cards):
        if cards.count(card) == 1:
            require_own_card(rank, list(cards), names)
            continue
        with pytest.raises(InputError, match=f"server '{names[rank]}' has the GPU of server"):
            require_own_card(rank, list(cards), names)


def test_what_a_transport_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL a card and a torch that has it, gloo the CPU; each in one line, with what to do."""
    card = torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"between CUDA GPUs.*\(device is cpu\).*tcp"):
        require_device(ChannelConfig("nccl", CPU))
    with pytest.raises(InputError, match=r"between CPUs \(device is cuda\); use device cpu"):
        require_device(ChannelConfig("gloo", card))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match=r"without NCCL; install a CUDA build of torch"):
        require_device(ChannelConfig("nccl", card))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    require_device(ChannelConfig("nccl", card))
    require_device(ChannelConfig("gloo", CPU))


def test_what_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named interface and no other; errors end calls, not processes."""
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    prepare_nccl("eth1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"  # as whoever runs it wants it
