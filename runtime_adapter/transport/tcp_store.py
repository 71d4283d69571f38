"""The key-value store of a run: torch's TCPStore with JSON values and time limits.

The first server's driver hosts it. Its socket is bound to the named address before the store is
made, for by itself a TCPStore listens on every address.
"""

from __future__ import annotations

import datetime
import json
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from runtime_adapter.transport.call_threads import run_with_timeout
from runtime_adapter.transport.rendezvous import NameTaken, Rendezvous, RuntimeFailure

#: Where a server that cannot join says why, so that the others do not wait for it.
ABORTED = "aborted"
#: A store that does not answer for so long hangs, or its machine cannot be reached: a client of
#: torch's TCPStore waits for an answer without a limit.
STORE_TIMEOUT_S = 30.0
#: A run begins at most so far from now by the clock of any of its servers.
MAX_START_S = 3600.0

T = TypeVar("T")


def listen(rendezvous: Rendezvous) -> socket.socket:
    """The store's socket, bound to the rendezvous's address alone.

    Raises
    ------
    RuntimeFailure
        The port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in rendezvous.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((rendezvous.host, rendezvous.port))
        listener.listen(4 * rendezvous.world_size + 16)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise RuntimeFailure(
            f"``store`` {rendezvous.host}:{rendezvous.port}: {reason}; choose another port, or the "
            "address of the interface that the servers share"
        ) from error
    return listener


def join_store(rendezvous: Rendezvous, *, host_it: bool) -> dist.TCPStore:
    """Connect to the store of a run, or host it.

    Raises
    ------
    RuntimeFailure
        The port is in use, or nobody hosts the store within ``rendezvous_timeout_s``.
    """
    try:
        # a listener that never answers would be waited for without a limit
        return run_with_timeout(
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
    _wait_for_listener(rendezvous)
    return dist.TCPStore(
        rendezvous.host, rendezvous.port, None, False, timeout=timeout, wait_for_workers=False
    )


def _wait_for_listener(rendezvous: Rendezvous) -> None:
    """Wait until a process listens at the store's address, for TCPStore's retries take too long."""
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


def call_store(operation: Callable[[], T], timeout_s: float = STORE_TIMEOUT_S) -> T:
    """Run an operation of the store and return its result.

    Raises
    ------
    RuntimeFailure
        The store is lost, or does not answer within ``timeout_s``.
    """
    try:
        return run_with_timeout(operation, timeout_s)
    except TimeoutError as error:
        raise RuntimeFailure(
            f"the store does not answer within {timeout_s:g} s; see whether the first server hangs"
        ) from error
    except (dist.DistError, RuntimeError) as error:
        raise RuntimeFailure("the store is lost; see what the first server says") from error


def put_json(store: dist.Store, key: str, values: Any) -> None:
    """Write JSON to the store; raises as :func:`call_store`."""
    call_store(partial(store.set, key, json.dumps(values).encode()))


def parse_value(raw: bytes, key: str) -> Any:
    """Parse the JSON that the store holds under a key.

    Raises
    ------
    InputError
        It is not JSON.
    """
    source = f"the run's store: {key}"
    try:
        return parse_json(raw.decode(), source)
    except UnicodeDecodeError as error:
        raise InputError("not JSON: bytes that are no UTF-8", source=source) from error
    except InputError as error:  # its remedy is one for files
        raise InputError(error.found, source=source, place=error.place) from error


def wait_for_json(store: dist.Store, key: str, timeout_s: float, subject: str = "") -> Any:
    """Wait for a key and read its JSON; ``subject`` is what messages call the key.

    Raises
    ------
    RuntimeFailure
        It is not there in time or not JSON, another server has given up the run, or the store is
        gone or hangs.
    """
    raw = call_store(
        partial(_wait_for_key, store, key, timeout_s, subject), timeout_s + STORE_TIMEOUT_S
    )
    return _parse_own_value(raw, key)


def _wait_for_key(store: dist.Store, key: str, timeout_s: float, subject: str) -> bytes:
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):
        if store.check([ABORTED]):
            raise RuntimeFailure(str(_parse_own_value(store.get(ABORTED), ABORTED)))
        if time.monotonic() > deadline:
            raise RuntimeFailure(f"{subject or repr(key)} did not come within {timeout_s:g} s")
        time.sleep(0.02)
    return bytes(store.get(key))


def _parse_own_value(raw: bytes, key: str) -> Any:
    """Parse JSON that only servers of this run write; anything else was written by a stranger."""
    try:
        return parse_value(raw, key)
    except InputError as error:
        raise RuntimeFailure(
            f"{error}; something that is no server of this run writes to its store"
        ) from error


def wait_for_number(
    store: dist.Store, key: str, timeout_s: float, maximum: float, subject: str = "", *, whole: bool
) -> float:
    """Wait for a number from 0 to ``maximum``; raises as :func:`wait_for_json`, also for others."""
    found = wait_for_json(store, key, timeout_s, subject)
    kinds = (int,) if whole else (int, float)
    if type(found) not in kinds or not 0 <= found <= maximum:
        raise RuntimeFailure(
            f"the run's store: {key}: {found!r:.60}; expected a {'whole ' * whole}number from 0 to "
            f"{maximum:,}; something that is no server of this run writes to its store"
        )
    return float(found)


def require_same_run(
    store: dist.Store, rendezvous: Rendezvous, facts: dict[str, Any], name: str
) -> None:
    """Refuse to join a run with other facts (placement, model, options) than the first server's.

    Raises
    ------
    InputError
        This server was started for another number of servers, another placement, model or options,
        or a second server has this name.
    RuntimeFailure
        The store is lost or hangs, or holds something else than facts.
    """
    if call_store(partial(store.add, f"joined/{rendezvous.rank}", 1)) != 1:
        raise NameTaken(
            f"server {name!r} is there already", parameter="server", remedy="start each server once"
        )
    if rendezvous.rank == 0:
        put_json(store, "facts", facts)
    expected = wait_for_json(store, "facts", rendezvous.rendezvous_timeout_s)
    if not isinstance(expected, dict):
        raise RuntimeFailure(
            f"the run's store: facts: {expected!r:.60}; expected an object; something that is no "
            "server of this run writes to its store"
        )
    for key, value in facts.items():
        if expected.get(key) != value:
            raise InputError(
                f"{value!r:.80}",
                source=f"server {name!r}",
                parameter=key,
                expected=f"{expected.get(key)!r:.80}, as the first server has it",
            )
