"""Waits for the store end although it hangs, is gone, or holds what no server has written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from typing import Any

import pytest

pytest.importorskip("torch")

from runtime_adapter.transport.rendezvous import Rendezvous, RuntimeFailure
from runtime_adapter.transport.tcp_store import (
    call_store,
    join_store,
    put_json,
    wait_for_json,
    wait_for_number,
)
from tests.runtime_adapter.replays import free_port

#: A wait that does not end by itself fails a test after so long.
LIMIT_S = 60.0


def host(port: int, ready: Any) -> None:
    """A process that hosts a store."""
    store = join_store(Rendezvous(1, 0, port=port, rendezvous_timeout_s=LIMIT_S), host_it=True)
    ready.send(store.num_keys() >= 0)
    time.sleep(1000)


def test_a_store_that_hangs_or_ends() -> None:
    """Whoever asks a store whose process is stopped, or killed, is told within the limit."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    rendezvous = Rendezvous(1, 1, port=free_port(), rendezvous_timeout_s=LIMIT_S)
    process = context.Process(target=host, args=(rendezvous.port, theirs), daemon=True)
    process.start()
    try:
        assert ours.recv()
        asking, other = (join_store(rendezvous, host_it=False) for _ in range(2))
        put_json(asking, "known", 1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # all its threads are stopped only then
        with pytest.raises(RuntimeFailure, match=r"does not answer within 0\.5 s"):
            call_store(lambda: asking.check(["known"]), 0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.join(LIMIT_S)
        with pytest.raises(RuntimeFailure, match="the store is lost; see what the first server"):
            wait_for_json(other, "known", LIMIT_S)
        with pytest.raises(RuntimeFailure, match="the store is lost"):
            put_json(other, "known", 2)
    finally:
        process.kill()
        process.join(LIMIT_S)


def test_a_listener_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What listens at the store's address but is no store is waited for no longer than to join."""
    monkeypatch.setattr("runtime_adapter.transport.tcp_store.STORE_TIMEOUT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        rendezvous = Rendezvous(2, 1, port=silent.getsockname()[1], rendezvous_timeout_s=0.5)
        with pytest.raises(RuntimeFailure, match=r"no store within 0\.5 s"):
            join_store(rendezvous, host_it=False)


def test_keys_of_the_store_that_no_server_has_written() -> None:
    """What is no JSON, or of another form, is one line that names the key."""
    rendezvous = Rendezvous(1, 0, port=free_port(), rendezvous_timeout_s=5.0)
    store = join_store(rendezvous, host_it=True)
    for raw in (b"\xff\xfe", b"{", b"[" * 5000, b"NaN", b'{"a": 1, "a": 2}'):
        store.set("facts", raw)
        with pytest.raises(RuntimeFailure, match="the run's store: facts") as error:
            wait_for_json(store, "facts", 5.0)
        assert "something that is no server of this run writes to its store" in str(error.value)
    for raw in (b'"7"', b"-1", b"true", b"1e999", b"7.5", b"1000001", b"null"):
        store.set("tokens/0", raw)
        with pytest.raises(RuntimeFailure, match="the run's store: tokens/0"):
            wait_for_number(store, "tokens/0", 5.0, 1e6, whole=True)
    store.set("tokens/0", b"98")
    assert wait_for_number(store, "tokens/0", 5.0, 1e6, whole=True) == 98
    store.set("aborted", b"\xff")
    with pytest.raises(RuntimeFailure, match="the run's store: aborted"):
        wait_for_json(store, "missing", 5.0)
