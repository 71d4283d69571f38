"""Hidden states that go from card to card by NCCL, beside the messages that announce them.

NCCL has no tags, wants to know what comes before it comes, and what it waits for occupies a card.
So headers and words go by gloo as ever, and states over a second group::

    driver                                         worker
    states                       -- channel -->     (queued before they are announced)
    header | words               -- gloo -->      takes the header, then asks for the states
    (queued, as well)            <-- channel --     partial sums
    takes it, asks for the sums  <-- gloo --      header

A side asks the channel only for what the other has queued already, and a queue waits only for what
was queued before: over all servers these waits go back in time, so they form no circle. Every lane
of every pair (driver of n, worker of m) has a group of its own, for NCCL keeps the order of a
group; all are made in one order, two sides at a time. A group that breaks breaks its lane only.

``split`` runs the same over gloo on CPUs: to try it, and to test it where there is no card.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from prism_plan.errors import InputError
from runtime_adapter.transport.rendezvous import (
    Rendezvous,
    RuntimeFailure,
    get,
    group,
    put,
    store_of_pair,
)

Backend = Literal["nccl", "split"]

#: Before the name of a group of states in the store.
STATES = "states"
#: Between two looks at whether a card has received.
POLL_INTERVAL_S = 20e-6


class DataChannelBroken(RuntimeError):
    """The other side of a channel is gone or silent; nothing more goes over it."""


@dataclass(frozen=True)
class DataChannels:
    """How a server's states travel, and the device on which they leave and arrive."""

    backend: Backend
    device: torch.device


class DataChannel:
    """One lane of one driver to one worker, seen from one side of it."""

    def __init__(self, made: Any, other: int, timeout_s: float) -> None:
        self._group = made
        self._other = other
        self.timeout_s = timeout_s

    def send(self, states: torch.Tensor) -> Any:
        """Queue states [T, H]; what is returned is to be kept until they are answered.

        Raises
        ------
        DataChannelBroken
            It cannot be sent any more.
        """
        with self._closed_if_it_fails():
            return self._group.send([states.contiguous()], self._other, 0)

    def wait(self, going: Any) -> None:
        """Until what :meth:`send` has queued is there.

        Raises
        ------
        DataChannelBroken
            It is not taken in time.
        """
        with self._closed_if_it_fails():
            self._finish(going)

    def receive(self, states: torch.Tensor) -> None:
        """Fill states [T, H] with what the other side has queued.

        Raises
        ------
        DataChannelBroken
            It does not come in time.
        """
        with self._closed_if_it_fails():
            self._finish(self._group.recv([states], self._other, 0))

    def _finish(self, work: Any) -> None:
        work.wait(datetime.timedelta(seconds=self.timeout_s))

    @contextlib.contextmanager
    def _closed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()  # whatever is queued on a card would wait for ever
            raise DataChannelBroken(str(error)) from error

    def close(self) -> None:
        """Give up what is queued."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()


class NcclDataChannel(DataChannel):
    """By NCCL, on the current stream of the states' card."""

    def _finish(self, work: Any) -> None:
        # NCCL's own wait with a timeout looks but once a millisecond
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out after {self.timeout_s:g} s")
            time.sleep(POLL_INTERVAL_S)
        work.wait()


def make_channels(
    channels: DataChannels,
    rendezvous: Rendezvous,
    pairs: Iterable[tuple[int, int]],
    lanes: int,
    rank: int,
) -> dict[tuple[int, int, int], DataChannel]:
    """The channels of a driver (``rank`` 0) or worker (1), by (driver, worker, lane).

    ``pairs`` are those (driver, worker) in which it is that side. Both sides of a pair call this,
    all of them at the same time.

    Raises
    ------
    RuntimeFailure
        The other side of one is not there in time.
    """
    made = {}
    # one order for all: then the least that is not made yet is the next of both of its sides
    for driver, worker in sorted(pairs):
        for lane in range(lanes):
            made[driver, worker, lane] = _make(channels, rendezvous, driver, worker, lane, rank)
    return made


def _make(
    channels: DataChannels, rendezvous: Rendezvous, driver: int, worker: int, lane: int, rank: int
) -> DataChannel:
    kind = f"{STATES}/{lane}"
    if channels.backend == "split":
        channel = DataChannel(
            group(rendezvous, driver, worker, rank, kind), 1 - rank, rendezvous.rendezvous_timeout_s
        )
    else:
        store = store_of_pair(rendezvous, driver, worker, kind)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(seconds=rendezvous.rendezvous_timeout_s)
        with torch.cuda.device(channels.device):
            made = dist.ProcessGroupNCCL(store, rank, 2, options)
        channel = NcclDataChannel(made, 1 - rank, rendezvous.rendezvous_timeout_s)
    # NCCL connects with the first message each way
    first = torch.zeros(1, 1, device=channels.device)
    try:
        if rank == 0:
            going = channel.send(first)
            channel.receive(torch.empty_like(first))
        else:
            channel.receive(first)
            going = channel.send(first)
        channel.wait(going)
    except DataChannelBroken as error:
        other = worker if rank == 0 else driver
        raise RuntimeFailure(
            f"``transport`` {channels.backend}: no states from server {other} within "
            f"{rendezvous.rendezvous_timeout_s:g} s: {str(error).splitlines()[0]:.120}"
        ) from error
    channel.timeout_s = rendezvous.timeout_s
    return channel


# --------------------------------------------------------------------------------------- conditions


def require_device(channels: DataChannels) -> None:
    """Refuse a transport that cannot work with this server's device.

    Raises
    ------
    InputError
        NCCL without a card, or in a torch that is built without it; ``split`` with a card.
    """
    kind = channels.device.type
    if channels.backend == "split" and kind != "cpu":
        raise InputError(
            f"split runs over gloo, between CPUs (``device`` is {kind})",
            parameter="transport",
            remedy="use ``device`` cpu, or ``transport`` nccl or gloo",
        )
    if channels.backend == "nccl" and kind != "cuda":
        raise InputError(
            "nccl carries states between CUDA cards, and this server has none "
            f"(``device`` is {kind})",
            parameter="transport",
            remedy="give every server a card, or use ``transport`` gloo",
        )
    if channels.backend == "nccl" and not dist.is_nccl_available():
        raise InputError(
            "this torch is built without NCCL",
            parameter="transport",
            remedy="install a CUDA build of torch, or use ``transport`` gloo",
        )


def prepare_nccl(interface: str) -> None:
    """Set what NCCL and torch read when they begin; call it before CUDA is first used.

    NCCL listens on the named interface alone; a communicator that fails is an error of its call
    and ends no process; streams that wait for other servers do not share a queue of the card.
    """
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def card_name(device: torch.device) -> str:
    """The card of a device, unlike all others on this and other machines."""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_cards(
    store: dist.Store, rendezvous: Rendezvous, card: str, names: tuple[str, ...]
) -> None:
    """Two servers of a run on one card cannot reach each other by NCCL.

    Raises
    ------
    InputError
        Another server has this server's card; both say so.
    """
    put(store, f"card/{rendezvous.rank}", card)
    for n, name in enumerate(names):
        found = get(store, f"card/{n}", rendezvous.rendezvous_timeout_s, f"server {name!r}")
        if n != rendezvous.rank and found == card:
            raise InputError(
                f"server {names[rendezvous.rank]!r} has the card of server {name!r}",
                parameter="transport",
                place="nccl",
                expected="a card of its own for every server",
                remedy="give another ``device``, or use ``transport`` gloo",
            )
