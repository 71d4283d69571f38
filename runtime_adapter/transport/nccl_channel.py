"""Hidden states that go from card to card by NCCL, beside the messages that announce them.

NCCL has no tags, must know the size of what comes before it comes, and occupies a card while it
waits. So headers and words go by gloo as ever, and states over a second group::

    driver                                         worker
    states                       -- channel -->     (queued before they are announced)
    header | words               -- gloo -->      receives the header, then asks for the states
    (queued, as well)            <-- channel --     partial sums
    receives, asks for the sums  <-- gloo --      header

A side asks the channel only for what the other has queued already, and a queue waits only for what
was queued before: over all servers these waits point back in time, so they form no circle. Every
lane of every pair (driver of n, worker of m) has a group of its own, for NCCL keeps the order of a
group; all are made in one order, two sides at a time. A group that breaks breaks its lane only.

Backend ``split`` runs the same protocol over gloo between CPUs: to try it, and to test it where
there is no card.
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
from runtime_adapter.torch_private import nccl_pair
from runtime_adapter.transport.pair_groups import connect_pair, store_of_pair
from runtime_adapter.transport.rendezvous import Rendezvous, RuntimeFailure
from runtime_adapter.transport.tcp_store import put_json, wait_for_json

Backend = Literal["nccl", "split"]

#: Prefix of the groups of states in the store.
STATES = "states"
#: How often a card is polled for what it has received.
POLL_INTERVAL_S = 20e-6


class DataChannelBroken(RuntimeError):
    """The other side of a channel is gone or does not answer; the channel is closed."""


@dataclass(frozen=True)
class ChannelConfig:
    """The transport of a server's hidden states, and the device on which they leave and arrive."""

    backend: Backend
    device: torch.device


class DataChannel:
    """One side of the channel of one lane between a driver and a worker.

    Its methods raise DataChannelBroken where the other side is gone or does not answer in time.
    """

    def __init__(self, group: Any, other_rank: int, timeout_s: float) -> None:
        self._group = group
        self._other_rank = other_rank
        self.timeout_s = timeout_s

    def send(self, states: torch.Tensor) -> Any:
        """Queue states [T, H]; the caller keeps the result until they are answered."""
        with self._close_on_failure():
            return self._group.send([states.contiguous()], self._other_rank, 0)

    def wait(self, sending: Any) -> None:
        """Wait until what :meth:`send` has queued has arrived."""
        with self._close_on_failure():
            self._finish(sending)

    def receive(self, states: torch.Tensor) -> None:
        """Fill states [T, H] with what the other side has queued."""
        with self._close_on_failure():
            self._finish(self._group.recv([states], self._other_rank, 0))

    def _finish(self, work: Any) -> None:
        work.wait(datetime.timedelta(seconds=self.timeout_s))

    @contextlib.contextmanager
    def _close_on_failure(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()  # whatever is queued on a card would wait for ever
            raise DataChannelBroken(str(error)) from error

    def close(self) -> None:
        """Abort the group, and so whatever is queued."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()


class NcclDataChannel(DataChannel):
    """A channel by NCCL, on the current stream of the states' card."""

    def _finish(self, work: Any) -> None:
        # NCCL's own wait with a timeout polls only once a millisecond
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out after {self.timeout_s:g} s")
            time.sleep(POLL_INTERVAL_S)
        work.wait()


def connect_channels(
    channels: ChannelConfig,
    rendezvous: Rendezvous,
    pairs: Iterable[tuple[int, int]],
    num_lanes: int,
    rank: int,
) -> dict[tuple[int, int, int], DataChannel]:
    """Connect the channels of a driver (``rank`` 0) or worker (1), by (driver, worker, lane).

    ``pairs`` are the (driver, worker) of which it is that side. All sides call this at the same
    time.

    Raises
    ------
    RuntimeFailure
        The other side of one is not there in time.
    """
    connected = {}
    # in one order everywhere: the lowest one that is not connected is next on both of its sides
    for driver, worker in sorted(pairs):
        for lane in range(num_lanes):
            connected[driver, worker, lane] = _connect(
                channels, rendezvous, driver, worker, lane, rank
            )
    return connected


def _connect(
    channels: ChannelConfig, rendezvous: Rendezvous, driver: int, worker: int, lane: int, rank: int
) -> DataChannel:
    kind, timeout_s = f"{STATES}/{lane}", rendezvous.rendezvous_timeout_s
    if channels.backend == "split":
        group = connect_pair(rendezvous, driver, worker, rank, kind)
        channel = DataChannel(group, 1 - rank, timeout_s)
    else:
        store = store_of_pair(rendezvous, driver, worker, kind)
        group = nccl_pair(store, rank, channels.device, timeout_s)
        channel = NcclDataChannel(group, 1 - rank, timeout_s)
    # NCCL connects with the first message each way
    first = torch.zeros(1, 1, device=channels.device)
    try:
        if rank == 0:
            sending = channel.send(first)
            channel.receive(torch.empty_like(first))
        else:
            channel.receive(first)
            sending = channel.send(first)
        channel.wait(sending)
    except DataChannelBroken as error:
        other = worker if rank == 0 else driver
        raise RuntimeFailure(
            f"``transport`` {channels.backend}: no states from server {other} within "
            f"{timeout_s:g} s: {str(error).splitlines()[0]:.120}"
        ) from error
    channel.timeout_s = rendezvous.timeout_s
    return channel


# ------------------------------------------------------------------------------------ requirements


def require_device(channels: ChannelConfig) -> None:
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
            "nccl carries states between CUDA GPUs, and this server has none "
            f"(``device`` is {kind})",
            parameter="transport",
            remedy="give every server a GPU, or use ``transport`` gloo",
        )
    if channels.backend == "nccl" and not dist.is_nccl_available():
        raise InputError(
            "this torch is built without NCCL",
            parameter="transport",
            remedy="install a CUDA build of torch, or use ``transport`` gloo",
        )


def prepare_nccl(interface: str) -> None:
    """Set what NCCL and torch read when they start; call it before CUDA is first used.

    NCCL listens on the named interface alone; a communicator that fails is an error of its call
    and ends no process; streams that wait for other servers share no queue of the card.
    """
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def card_id(device: torch.device) -> str:
    """An identifier of a device's card, unique over all machines."""
    return str(torch.cuda.get_device_properties(device).uuid)


def require_own_card(
    store: dist.Store, rendezvous: Rendezvous, card: str, names: tuple[str, ...]
) -> None:
    """Refuse a card that another server of the run uses: NCCL cannot connect a card to itself.

    Raises
    ------
    InputError
        Another server has this server's card; both raise it.
    """
    put_json(store, f"card/{rendezvous.rank}", card)
    for n, name in enumerate(names):
        found = wait_for_json(
            store, f"card/{n}", rendezvous.rendezvous_timeout_s, f"server {name!r}"
        )
        if n != rendezvous.rank and found == card:
            raise InputError(
                f"server {names[rendezvous.rank]!r} has the GPU of server {name!r}",
                parameter="transport",
                place="nccl",
                expected="a GPU of its own for every server",
                remedy="give another ``device``, or use ``transport`` gloo",
            )
