"""Point-to-point links between servers, each a process group of its own.

Every ordered pair (n, m) has one two-rank group, in which the driver of n is rank 0 and the worker
of m is rank 1. A group breaks when one side is killed or does not answer; since no other link uses
it, nothing else breaks. Both sides find each other through the run's store.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from runtime_adapter.torch_private import gloo_device, gloo_pair
from runtime_adapter.transport.call_threads import run_with_timeout
from runtime_adapter.transport.rendezvous import Rendezvous, RuntimeFailure
from runtime_adapter.transport.tcp_store import STORE_TIMEOUT_S, join_store


def store_of_pair(rendezvous: Rendezvous, driver: int, worker: int, kind: str) -> dist.Store:
    """The part of the store in which the two sides of a pair find each other.

    Over a connection of its own, since one that waits for a pair's other side does nothing for the
    next pair.

    Raises
    ------
    RuntimeFailure
        There is no store.
    """
    return dist.PrefixStore(f"{kind}/{driver}/{worker}", join_store(rendezvous, host_it=False))


def connect_pair(
    rendezvous: Rendezvous, driver: int, worker: int, rank: int, kind: str = "pair"
) -> dist.ProcessGroupGloo:
    """Connect one side of the pair (driver of one server, worker of another), by gloo.

    ``kind`` tells several groups of one pair apart.

    Raises
    ------
    RuntimeFailure
        The interface does not exist, or the other side is not there within
        ``rendezvous_timeout_s``.
    """
    try:
        device = gloo_device(rendezvous.interface)
    except RuntimeError as error:
        raise RuntimeFailure(
            f"``interface`` {rendezvous.interface}: {str(error).splitlines()[0]:.120}"
        ) from error
    store = store_of_pair(rendezvous, driver, worker, kind)
    timeout_s = rendezvous.rendezvous_timeout_s
    try:
        # gloo's own limit does not hold where the store hangs
        group: dist.ProcessGroupGloo = run_with_timeout(
            partial(gloo_pair, store, rank, device, timeout_s), 2 * timeout_s + STORE_TIMEOUT_S
        )
    except (RuntimeError, TimeoutError) as error:
        other = worker if rank == 0 else driver
        raise RuntimeFailure(
            f"server {other} is not there within {timeout_s:g} s: {str(error).splitlines()[0]:.120}"
        ) from error
    return group


def send(group: dist.ProcessGroupGloo, message: torch.Tensor, to: int, tag: int) -> dist.Work:
    """Begin to send the bytes of a message to a rank."""
    return group.send([message], to, tag)


def receive(group: dist.ProcessGroupGloo, buffer: torch.Tensor, source: int, tag: int) -> dist.Work:
    """Begin to receive a message of at most the buffer's bytes from a rank."""
    return group.recv([buffer], source, tag)
