"""Hidden states that go from card to card by NCCL, beside the messages that announce them.

NCCL has no tags, must know the size of what comes before it comes, and occupies a card while it
waits. So headers and words go by TCP as ever, and states over a group of two processes::

    driver                                         worker
    states                       -- channel -->     (queued before they are announced)
    header | words               -- TCP -->       receives the header, then asks for the states
    (queued, as well)            <-- channel --     partial sums
    receives, asks for the sums  <-- TCP --       header

A side asks the channel only for what the other has queued already, and a queue waits only for what
was queued before: over all servers these waits point back in time, so they form no circle. Every
lane of every pair (driver of n, worker of m) has a group of its own, for NCCL keeps the order of a
group; it is made with the lane's connection, and anew after a failure. A group that breaks breaks
its lane only.

Backend ``gloo`` runs the same protocol over gloo between CPUs: to try it, and to test it where
there is no card.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from prism_plan.errors import InputError
from runtime_adapter.torch_private import gloo_device, gloo_pair, nccl_pair
from runtime_adapter.transport.c10d_store import PairStore

Backend = Literal["nccl", "gloo"]

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

    def __init__(
        self, group: Any, other_rank: int, timeout_s: float, store: PairStore | None = None
    ) -> None:
        self._group = group
        self._store = store  # the group uses it as long as it lives
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


def open_channel(
    channels: ChannelConfig, store: PairStore, rank: int, interface: str, timeout_s: float
) -> DataChannel:
    """Make one side of a channel: the driver's (``rank`` 0) or the worker's (1).

    Both do so at the same time, and find each other through the store.

    Raises
    ------
    DataChannelBroken
        The other side is not there within ``timeout_s``.
    """
    try:
        channel = _make_channel(channels, store, rank, interface, timeout_s)
    except RuntimeError as error:
        raise DataChannelBroken(
            f"``transport`` {channels.backend}: {str(error).splitlines()[0]:.120}"
        ) from error
    # NCCL connects with the first message each way
    first = torch.zeros(1, 1, device=channels.device)
    if rank == 0:
        sending = channel.send(first)
        channel.receive(torch.empty_like(first))
    else:
        channel.receive(first)
        sending = channel.send(first)
    channel.wait(sending)
    return channel


def _make_channel(
    channels: ChannelConfig, store: PairStore, rank: int, interface: str, timeout_s: float
) -> DataChannel:
    if channels.backend == "gloo":
        group = gloo_pair(store, rank, gloo_device(interface), timeout_s)
        return DataChannel(group, 1 - rank, timeout_s, store)
    group = nccl_pair(store, rank, channels.device, timeout_s)
    return NcclDataChannel(group, 1 - rank, timeout_s, store)


# ------------------------------------------------------------------------------------ requirements


def require_device(channels: ChannelConfig) -> None:
    """Refuse a transport that cannot work with this server's device.

    Raises
    ------
    InputError
        NCCL without a card, or in a torch that is built without it; ``gloo`` with a card.
    """
    kind = channels.device.type
    if channels.backend == "gloo" and kind != "cpu":
        raise InputError(
            f"gloo runs between CPUs (``device`` is {kind})",
            parameter="transport",
            remedy="use ``device`` cpu, or ``transport`` tcp or nccl",
        )
    if channels.backend == "nccl" and kind != "cuda":
        raise InputError(
            "nccl carries states between CUDA GPUs, and this server has none "
            f"(``device`` is {kind})",
            parameter="transport",
            remedy="give every server a GPU, or use ``transport`` tcp",
        )
    if channels.backend == "nccl" and not dist.is_nccl_available():
        raise InputError(
            "this torch is built without NCCL",
            parameter="transport",
            remedy="install a CUDA build of torch, or use ``transport`` tcp",
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


def require_own_card(rank: int, cards: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a card that another server of the run uses: NCCL cannot connect a card to itself.

    ``cards`` are the :func:`card_id` of every server, of which this is the one of ``rank``.

    Raises
    ------
    InputError
        Another server has this server's card; both raise it.
    """
    for n, card in enumerate(cards):
        if n != rank and card == cards[rank]:
            raise InputError(
                f"server {names[rank]!r} has the GPU of server {names[n]!r}",
                parameter="transport",
                place="nccl",
                expected="a GPU of its own for every server",
                remedy="give another ``device``, or use ``transport`` tcp",
            )
