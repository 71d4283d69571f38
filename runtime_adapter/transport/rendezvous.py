"""Point-to-point links between servers, each with a process group of its own.

Every ordered pair (n, m) has one two-rank group, in which the driver of n is rank 0 and the worker
of m is rank 1: a group that breaks, for a server was killed or did not answer, breaks nothing
else. The groups find each other through one TCPStore; its socket is bound to the named address
before the store is made, for by itself it would listen everywhere.
"""

from __future__ import annotations

import datetime
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from prism_plan.errors import InputError, PrismError
from prism_plan.io.json import parse_json
from runtime_adapter.transport.parallel import in_time

#: Where a server that cannot join says why, so that the others do not wait for it.
ABORTED = "aborted"
#: An idle worker waits for the next call without end; its driver ends it.
FOREVER = datetime.timedelta(days=3650)
#: A store that answers nothing for so long hangs, or its machine cannot be reached: a client of
#: torch's TCPStore waits for an answer without end.
STORE_TIMEOUT_S = 30.0
#: A run begins at most so far from now by the clock of any of its servers.
MAX_START_S = 3600.0

T = TypeVar("T")


class RuntimeFailure(PrismError):
    """Something outside of this server failed: a port, a server, the store."""

    exit_code = 5


class NameTaken(InputError):
    """A server of that name is in the run already."""


class ServerLost(RuntimeFailure):
    """Another server does not answer any more."""

    def __init__(self, server: int, name: str, reason: str) -> None:
        self.server = server
        super().__init__(f"server {name!r} is lost: {reason}")


@dataclass(frozen=True)
class Rendezvous:
    """Where the servers of a run find each other.

    ``host`` and ``port`` are of the store, which the first server hosts; ``interface`` is the
    network interface that links use; ``timeout_s`` after which a server that does not answer is
    lost; ``rendezvous_timeout_s`` within which all have to be there.
    """

    world_size: int
    rank: int
    host: str = "127.0.0.1"
    port: int = 29400
    interface: str = "lo"
    timeout_s: float = 10.0
    rendezvous_timeout_s: float = 60.0


def listen(rendezvous: Rendezvous) -> socket.socket:
    """The store's socket, bound to the rendezvous's address alone.

    Raises
    ------
    RuntimeFailure
        The port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in rendezvous.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((rendezvous.host, rendezvous.port))
        bound.listen(4 * rendezvous.world_size + 16)
    except OSError as error:
        bound.close()
        reason = (error.strerror or str(error)).lower()
        raise RuntimeFailure(
            f"``store`` {rendezvous.host}:{rendezvous.port}: {reason}; choose another port, or the "
            "address of the interface that the servers share"
        ) from error
    return bound


def join_store(rendezvous: Rendezvous, *, host_it: bool) -> dist.TCPStore:
    """The store of a run; the first server's driver hosts it.

    Raises
    ------
    RuntimeFailure
        The port is in use, or nobody hosts the store within ``rendezvous_timeout_s``.
    """
    try:
        # a listener that says nothing would be waited for without end
        return in_time(
            partial(_join_store, rendezvous, host_it),
            rendezvous.rendezvous_timeout_s + STORE_TIMEOUT_S,
        )
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:  # and so TimeoutError
        first = str(error).splitlines()[0]
        raise RuntimeFailure(
            f"``store`` {rendezvous.host}:{rendezvous.port}: no store within "
            f"{rendezvous.rendezvous_timeout_s:g} s ({first:.120}); start the first server, or "
            "check the address"
        ) from error


def _join_store(rendezvous: Rendezvous, host_it: bool) -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=rendezvous.rendezvous_timeout_s)
    if host_it:
        descriptor = listen(rendezvous).detach()
        return dist.TCPStore(
            rendezvous.host, rendezvous.port, None, True, timeout=timeout,
            wait_for_workers=False, master_listen_fd=descriptor,
        )  # fmt: skip
    _await_listener(rendezvous)
    return dist.TCPStore(
        rendezvous.host, rendezvous.port, None, False, timeout=timeout, wait_for_workers=False
    )


def _await_listener(rendezvous: Rendezvous) -> None:
    """Until somebody listens at the store's address: TCPStore's own retries overrun their time."""
    deadline = time.monotonic() + rendezvous.rendezvous_timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            socket.create_connection((rendezvous.host, rendezvous.port), max(left_s, 0.01)).close()
        except OSError:
            if time.monotonic() + 0.1 > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def ask_store(job: Callable[[], T], within_s: float = STORE_TIMEOUT_S) -> T:
    """What a store answers.

    Raises
    ------
    RuntimeFailure
        It is gone, or it answers nothing within ``within_s``.
    """
    try:
        return in_time(job, within_s)
    except TimeoutError as error:
        raise RuntimeFailure(
            f"the store does not answer within {within_s:g} s; see whether the first server hangs"
        ) from error
    except (dist.DistError, RuntimeError) as error:
        raise RuntimeFailure("the store is gone; see what the first server says") from error


def put(store: dist.Store, key: str, values: Any) -> None:
    """Write JSON to the store; raises as :func:`ask_store`."""
    ask_store(partial(store.set, key, json.dumps(values).encode()))


def read_json(raw: bytes, key: str) -> Any:
    """The JSON that the store holds under a key.

    Raises
    ------
    InputError
        It is none.
    """
    source = f"the run's store: {key}"
    try:
        return parse_json(raw.decode(), source)
    except UnicodeDecodeError as error:
        raise InputError("not JSON: bytes that are no UTF-8", source=source) from error
    except InputError as error:  # its remedy is one for files
        raise InputError(error.found, source=source, place=error.place) from error


def get(store: dist.Store, key: str, timeout_s: float, what: str = "") -> Any:
    """Wait for a key, which is ``what`` to a reader, and read its JSON.

    Raises
    ------
    RuntimeFailure
        It is not there in time or no JSON, another server has given up the run, or the store is
        gone or hangs.
    """
    raw = ask_store(partial(_await_key, store, key, timeout_s, what), timeout_s + STORE_TIMEOUT_S)
    return _own_json(raw, key)


def _await_key(store: dist.Store, key: str, timeout_s: float, what: str) -> bytes:
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):
        if store.check([ABORTED]):
            raise RuntimeFailure(str(_own_json(store.get(ABORTED), ABORTED)))
        if time.monotonic() > deadline:
            raise RuntimeFailure(f"{what or repr(key)} did not come within {timeout_s:g} s")
        time.sleep(0.02)
    return bytes(store.get(key))


def _own_json(raw: bytes, key: str) -> Any:
    """JSON that only servers of this run write; what is none was written by somebody else."""
    try:
        return read_json(raw, key)
    except InputError as error:
        raise RuntimeFailure(
            f"{error}; something that is no server of this run writes to its store"
        ) from error


def get_number(
    store: dist.Store, key: str, timeout_s: float, most: float, what: str = "", *, whole: bool
) -> float:
    """Wait for a number from 0 to ``most``; raises as :func:`get`, also where it is none."""
    found = get(store, key, timeout_s, what)
    kinds = (int,) if whole else (int, float)
    if type(found) not in kinds or not 0 <= found <= most:
        raise RuntimeFailure(
            f"the run's store: {key}: {found!r:.60}; expected a {'whole ' * whole}number from 0 to "
            f"{most:,}; something that is no server of this run writes to its store"
        )
    return float(found)


def check_run(store: dist.Store, rendezvous: Rendezvous, facts: dict[str, Any], name: str) -> None:
    """All servers of a run must agree on its facts: the first one's count.

    Raises
    ------
    InputError
        This server was started for another number of servers, another placement, model or options,
        or a second server has this name.
    RuntimeFailure
        The store is gone or hangs, or holds something else than facts.
    """
    if ask_store(partial(store.add, f"joined/{rendezvous.rank}", 1)) != 1:
        raise NameTaken(
            f"server {name!r} is there already", parameter="server", remedy="start each server once"
        )
    if rendezvous.rank == 0:
        put(store, "facts", facts)
    wanted = get(store, "facts", rendezvous.rendezvous_timeout_s)
    if not isinstance(wanted, dict):
        raise RuntimeFailure(
            f"the run's store: facts: {wanted!r:.60}; expected an object; something that is no "
            "server of this run writes to its store"
        )
    for key, value in facts.items():
        if wanted.get(key) != value:
            raise InputError(
                f"{value!r:.80}",
                source=f"server {name!r}",
                parameter=key,
                expected=f"{wanted.get(key)!r:.80}, as the first server has it",
            )


def store_of_pair(rendezvous: Rendezvous, driver: int, worker: int, kind: str) -> dist.Store:
    """Where the two sides of a pair find each other.

    Over a connection of its own, since one that waits for a pair's other side does nothing for the
    next pair.

    Raises
    ------
    RuntimeFailure
        There is no store.
    """
    return dist.PrefixStore(f"{kind}/{driver}/{worker}", join_store(rendezvous, host_it=False))


def group(
    rendezvous: Rendezvous, driver: int, worker: int, rank: int, kind: str = "pair"
) -> dist.ProcessGroupGloo:
    """One side of the pair (driver of one server, worker of another), or of one of another kind.

    Raises
    ------
    RuntimeFailure
        The interface does not exist, or the other side is not there within
        ``rendezvous_timeout_s``.
    """
    options = dist.ProcessGroupGloo._Options()
    try:
        device = dist.ProcessGroupGloo.create_device(interface=rendezvous.interface)
    except RuntimeError as error:
        raise RuntimeFailure(
            f"``interface`` {rendezvous.interface}: {str(error).splitlines()[0]:.120}"
        ) from error
    options._devices = [device]
    options._threads = 1
    options._timeout = datetime.timedelta(seconds=rendezvous.rendezvous_timeout_s)
    store = store_of_pair(rendezvous, driver, worker, kind)
    try:
        # gloo's own limit does not hold where the store hangs
        made = in_time(
            partial(dist.ProcessGroupGloo, store, rank, 2, options),
            2 * rendezvous.rendezvous_timeout_s + STORE_TIMEOUT_S,
        )
    except (RuntimeError, TimeoutError) as error:
        other = worker if rank == 0 else driver
        raise RuntimeFailure(
            f"server {other} is not there within {rendezvous.rendezvous_timeout_s:g} s: "
            f"{str(error).splitlines()[0]:.120}"
        ) from error
    return made


def send(made: dist.ProcessGroupGloo, message: torch.Tensor, to: int, tag: int) -> dist.Work:
    """Begin to send bytes."""
    return made.send([message], to, tag)


def receive(made: dist.ProcessGroupGloo, room: torch.Tensor, at: int, tag: int) -> dist.Work:
    """Begin to receive a message of at most the room's bytes."""
    return made.recv([room], at, tag)
