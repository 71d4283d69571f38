"""What is no request of a server of this run changes nothing, and never ends the store."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError, LimitReached, PrismError
from runtime_adapter.control.log_entries import LogMessage, MoveRequested, StopRequested
from runtime_adapter.control.store import messages, service
from runtime_adapter.control.store.client import StoreAddress, StoreClient
from runtime_adapter.control.store.key_values import KeyValues
from runtime_adapter.control.store.service import Refusals
from runtime_adapter.transport.dialing import dial
from runtime_adapter.transport.handshake import Claim, HandshakeFailed
from runtime_adapter.transport.secrets import RunSecret
from runtime_adapter.transport.signed_frames import FrameError, SignedFrames
from tests.limits import HANG_S
from tests.runtime_adapter.control.store.stores import (
    ManualStore,
    listening,
    run_of,
    serving,
    wait_until,
)

METHODS = (
    "run", "start_run", "join", "leave", "heartbeat", "members", "begin", "status", "append", "has",
    "delete", "put", "get", "read", "call", "__init__", "",
)  # fmt: skip
FIELDS = (
    "run", "server", "host", "port", "held", "after", "incarnation", "kind", "info", "entry",
    "epoch", "key", "keys", "prefix", "parts", "token", "wait_s",
)  # fmt: skip
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 70)
    | st.floats(allow_nan=False)
    | st.sampled_from(["worker", "driver", "e0", "plan/0", "{}"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(METHODS),
    st.dictionaries(st.sampled_from(FIELDS), json_values),
    st.sampled_from(["worker 0", "move x", "status", ""]),
)
def test_any_request_is_answered_or_refused(
    method: str, fields: dict[str, Any], client: str
) -> None:
    """No values of any type lead to an error that is not one of ours."""
    store = ManualStore()
    store.start_with_all()
    with contextlib.suppress(PrismError):
        json.dumps(store.store.call(method, fields, client, b"")[0])
    assert store.states()[0] in ("up", "left")


def entry(**values: Any) -> dict[str, Any]:
    return {"entry": json.dumps(values), "epoch": "e0"}


#: An entry that the store writes alone.
JOINED = entry(kind="server_joined", server=0, incarnation=9, host="10.0.0.1", port=1, experts=[])
SCHEDULER = {"server": 0, "incarnation": 0, "kind": "scheduler"}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("append", entry(kind="no such kind")),
        ("append", entry(kind="stop_requested", plan=-1, reason="")),
        ("append", entry(kind="experts_loaded", plan=0, experts=[[0, 3, 0, 0]])),
        ("append", entry(kind="experts_loaded", plan=0, experts=[[0, 0, 12, 0]])),
        ("append", JOINED),
        ("append", entry(kind="server_down", server=0, incarnation=1, reason="")),
        ("append", entry(kind="server_left", server=0, incarnation=1)),
        ("append", {"entry": "[" * 1000, "epoch": "e0"}),
        ("append", {"entry": "[]," * 400_000, "epoch": "e0"}),
        ("append", {"entry": "no JSON", "epoch": "e0"}),
        ("append", {"entry": "{}", "epoch": None}),
        ("heartbeat", {"server": 3, "incarnation": 1, "kind": "worker", "info": {}}),
        ("heartbeat", {"server": 0, "incarnation": 1, "kind": "nobody", "info": {}}),
        ("heartbeat", {"server": 0, "incarnation": 1, "kind": "driver", "info": []}),
        ("heartbeat", {"server": 0, "incarnation": 1, "kind": "driver", "info": {"suspects": [7]}}),
        ("heartbeat", {"server": 0, "incarnation": 1, "kind": "driver", "info": {"requests": {}}}),
        ("heartbeat", {"server": 0, "incarnation": 1, "kind": "driver", "info": {"error": 3}}),
        ("heartbeat", {**SCHEDULER, "info": {"migration": 3}}),
        ("leave", {"server": 0.0, "incarnation": 1}),
        ("leave", {"server": True, "incarnation": 1}),
        ("put", {"key": "a\nb", "parts": 0, "epoch": "e0"}),
        ("put", {"key": "k" * 1000, "parts": 0, "epoch": "e0"}),
        ("put", {"key": "k", "parts": 1 << 20, "epoch": "e0"}),
        ("put", {"key": "k", "parts": 0, "epoch": "an older one"}),
        ("get", {"key": "k"}),
        ("get", {"key": ["k"]}),
        ("delete", {"prefix": ""}),
        ("read", {"epoch": "e0", "after": -2}),
        ("start_run", {"run": []}),
        ("start_run", {"run": run_of(["a", "a"])}),
        ("start_run", {"run": run_of([])}),
        ("start_run", {"run": run_of(timeout_s=0)}),
        ("start_run", {"run": run_of(bounds=[1 << 40, 1])}),
        ("start_run", {"run": run_of(gpus=[3, 1, 0])}),
        ("start_run", {"run": run_of(scheduler="x")}),
        ("start_run", {"run": run_of(begun=1)}),
        ("run_away", {}),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_and_changes_nothing(
    method: str, fields: dict[str, Any]
) -> None:
    """Types, ranges and names are checked before anything is done."""
    store = ManualStore()
    store.start_with_all()
    before = store.call("status"), store.entries()
    with pytest.raises(PrismError):
        store.store.call(method, fields, "driver 0", b"")
    assert (store.call("status"), store.entries()) == before


def test_visitors_look_and_ask_for_moves_alone() -> None:
    """A client that is no server cannot join, speak for servers, or touch others' values."""
    store = ManualStore()
    store.start_with_all()
    text = '{"kind": "stop_requested", "plan": 0, "reason": ""}'
    for client, method, fields in (
        ("status", "join", {}),
        ("move 1", "heartbeat", {}),
        ("status", "append", {"entry": text, "epoch": "e0"}),
        ("move 1", "append", {"entry": text, "epoch": "e0"}),
        ("move 1", "put", {"key": "plan/0", "parts": 0, "epoch": "e0"}),
        ("move 1", "delete", {"prefix": "plan/0"}),
    ):
        with pytest.raises(InputError):
            store.call(method, client, **fields)
    assert store.call("put", "move 1", key="move/1", parts=0, epoch="e0") is None
    assert store.append(MoveRequested("1"), "move 1") == 3


def test_values_are_kept_within_bounds() -> None:
    """A flood of keys or bytes is refused; overwriting and deleting makes room."""
    values = KeyValues(max_keys=3, max_bytes=100)
    for key in ("a/1", "a/2", "b"):
        values.put(key, 0, b"x" * 20)
    with pytest.raises(LimitReached, match="full"):
        values.put("c", 0, b"")
    with pytest.raises(LimitReached, match="full"):
        values.put("b", 0, b"x" * 60)
    values.put("b", 0, b"y" * 50)
    assert values.num_bytes == 7 + 90
    values.delete("a/")
    assert (len(values), values.num_bytes) == (1, 51)
    assert values.get("b") == (0, b"y" * 50)


def test_the_answers_kept_for_repeated_requests_are_bounded() -> None:
    """However many entries were appended."""
    store = ManualStore()
    store.start_with_all()
    text = '{"kind": "log_message", "text": ""}'
    for number in range(10_000):
        store.call("append", entry=text, epoch="e0", token=str(number))
    assert store.call("append", entry=text, epoch="e0", token="9999") == 10_002
    assert store.call("append", entry=text, epoch="e0", token="0") == 10_003


def test_refusals_are_told_once_a_minute_and_slow_down_who_causes_them() -> None:
    """With a count of those in between."""
    lines: list[str] = []
    now = [0.0]
    refusals = Refusals(lines.append, lambda: now[0])
    for _ in range(service.MAX_FAILURES_PER_S - 1):
        refusals.note("10.0.0.9", "foreign bytes")
    assert refusals.pause_s() == 0
    refusals.note("10.0.0.9", "foreign bytes")
    assert refusals.pause_s() == 1
    now[0] = 61.0
    assert refusals.pause_s() == 0
    refusals.note("10.0.0.9", "foreign bytes")
    assert len(lines) == 2
    assert lines[1].endswith("; 100 since the last such line")


@contextlib.contextmanager
def connection(address: StoreAddress, name: str = "worker 0") -> Iterator[SignedFrames]:
    """An authenticated connection without a client behind it."""
    raw, session = dial(
        (address.host, address.port), Claim("control", name), address.secret, HANG_S
    )
    raw.settimeout(HANG_S)
    with raw:
        yield SignedFrames(raw, session)


def flood(send: Callable[[socket.socket], None], address: StoreAddress, number: int) -> None:
    """Connections of a stranger, each of which sends something and is closed by the store."""
    for _ in range(number):
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address.host, address.port), HANG_S) as raw,
        ):
            send(raw)
            raw.settimeout(HANG_S)
            while raw.recv(4096):
                pass


def test_the_service_outlives_whatever_is_sent_to_it() -> None:
    """Bytes of strangers, frames that are no requests, lengths that lie; others are served on."""
    secret = RunSecret(os.urandom(32), True)
    with listening() as listener, serving(listener, secret=secret) as address:
        client = StoreClient(address, "driver 0")
        client.start_run(run_of())
        flood(lambda raw: raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\0" * 100), address, 20)
        flood(lambda raw: raw.sendall(os.urandom(1 << 20)), address, 5)
        flood(lambda raw: raw.shutdown(socket.SHUT_WR), address, 20)
        with pytest.raises(HandshakeFailed):
            StoreClient(StoreAddress(address.host, address.port), "worker 0").run(HANG_S)
        for frame in (
            b"", b"\0\0", b"\xff" * 100, messages.pack([]), messages.pack({}),  # type: ignore[arg-type]
            messages.pack({"id": "x" * 1000, "method": ["join"]}),
            b"\0\0\0\3{}}", b"\0\0\0\2{}" + b"body",
            b"\0\x0f\x42\x40" + b"[" * 1_000_000,
        ):  # fmt: skip
            with connection(address) as frames:
                frames.send(frame)
                answer, _ = messages.unpack(frames.receive(), "answer")
                assert "error" in answer
        with connection(address) as frames, pytest.raises((OSError, EOFError, FrameError)):
            frames.send(b"x" * (messages.MAX_FRAME_BYTES + 1))
            frames.receive()
        assert client.run()["run"]["servers"] == ["a", "b", "c"]
        client.close()


def test_connections_that_say_nothing_do_not_keep_others_out() -> None:
    """The oldest of them are dropped for newer ones."""
    with (
        listening() as listener,
        serving(listener, secret=RunSecret(b"k" * 32, True)) as address,
        contextlib.ExitStack() as stack,
    ):
        silent = [
            stack.enter_context(socket.create_connection((address.host, address.port), HANG_S))
            for _ in range(2 * service.MAX_UNAUTHENTICATED)
        ]
        client = StoreClient(address, "status")
        assert client.run(HANG_S)["run"] is None
        client.close()
        silent[0].settimeout(HANG_S)
        with contextlib.suppress(ConnectionError):
            assert silent[0].recv(1) == b""


def test_connections_of_clients_are_bounded() -> None:
    """One that is not in use is closed for a new one."""
    with listening() as listener, serving(listener) as address, contextlib.ExitStack() as stack:
        for _ in range(service.OTHER_CONNECTIONS + 10):
            frames = stack.enter_context(connection(address))
            frames.send(messages.pack({"method": "run"}))
            frames.receive()
        first = stack.enter_context(connection(address))
        first.send(messages.pack({"method": "status"}))
        assert b"epoch" in first.receive()


def test_an_internal_error_is_told_and_does_not_end_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client gets an answer that names no internals."""
    reports: list[str] = []
    with listening() as listener, serving(listener, reports=reports) as address:
        client = StoreClient(address, "status")
        client.run()
        from runtime_adapter.control.store.methods import KeyValues as Used

        monkeypatch.setattr(Used, "get", lambda self, key: 1 / 0)
        with pytest.raises(PrismError, match="failed at this request"):
            client.get("x")
        assert client.run()["run"] is None
        assert "ZeroDivisionError" in wait_until(lambda: reports)[0]
        client.close()


def test_entries_are_written_as_the_store_has_read_them() -> None:
    """Fields that no kind has, and the name of another writer, are not kept."""
    store = ManualStore()
    store.start_with_all()
    store.append(StopRequested(0, "why"))
    store.call("append", "worker 1", entry=json.dumps(
        {"kind": LogMessage.kind, "text": "t", "by": "scheduler", "junk": [0] * 100}
    ), epoch="e0")  # fmt: skip
    assert store.entries(3) == [{"kind": "log_message", "text": "t", "by": "worker 1"}]
