"""Clients and the event log on a service that goes away and comes back."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from typing import TypeVar

import pytest

from prism_plan.errors import InputError
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_entries import (
    Bounds,
    LogEntry,
    LogMessage,
    NewLog,
    ServerJoined,
    StopRequested,
)
from runtime_adapter.control.store import client as client_module
from runtime_adapter.control.store import messages
from runtime_adapter.control.store.client import (
    StoreAddress,
    StoreClient,
    StoreRestartedError,
    StoreUnavailable,
)
from tests.limits import HANG_S
from tests.runtime_adapter.control.store.stores import listening, run_of, serving, wait_until

Kind = TypeVar("Kind")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listening() as found:
        yield found


def take(log: EventLog, kind: type[Kind]) -> Kind:
    """The next entry of a kind."""

    def found() -> Kind | None:
        item = log.next(0.1)
        return item if isinstance(item, kind) else None

    return wait_until(found, kind.__name__)  # type: ignore[no-any-return]


def test_entries_come_in_one_order_to_all_readers(listener: socket.socket) -> None:
    """Several writers at once; every reader sees the same numbers and texts without gaps."""
    with serving(listener) as address:
        logs = [EventLog(address, f"driver {n}") for n in range(3)]
        logs[0].client.start_run(run_of())
        for log in logs:
            log.follow()
            assert take(log, NewLog).number == -1

        def write(log: EventLog) -> None:
            for i in range(20):
                log.append(LogMessage(f"{log.writer} {i}"))

        writers = [threading.Thread(target=write, args=(log,)) for log in logs]
        for writer in writers:
            writer.start()
        seen = [[take(log, LogMessage) for _ in range(60)] for log in logs]
        assert seen[0] == seen[1] == seen[2]
        assert [entry.number for entry in seen[0]] == list(range(60))
        assert all(log.responds and log.caught_up() for log in logs)
        for log in logs:
            log.close()


def test_a_reader_that_is_behind_gets_a_snapshot(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that are not kept are replaced by what they have led to."""
    from runtime_adapter.control.store import methods
    from runtime_adapter.control.store.entry_log import EntryLog as Log

    monkeypatch.setattr(methods, "EntryLog", lambda: Log(max_entries=4))
    with serving(listener) as address:
        log = EventLog(address, "worker 1")
        client = log.client
        epoch = client.start_run(run_of())["epoch"]
        client.join(1, "127.0.0.1", 77, [[1, 5, 0]], 0)
        for i in range(10):
            log.append(LogMessage(str(i)))
        answer = client.read(epoch, 0, 0.0)
        assert answer["snapshot"]["number"] == 10
        assert answer["snapshot"]["held"] == [[1, 1, 5, 0]]
        assert answer["entries"] == []
        assert [number for number, _ in client.read(epoch, 6, 0.0)["entries"]] == [7, 8, 9, 10]
        log.follow()
        begin = take(log, NewLog)
        assert (begin.epoch, begin.number, begin.held) == (epoch, 10, [[1, 1, 5, 0]])
        assert [member["state"] for member in begin.members] == ["absent", "up", "absent"]
        log.append(LogMessage("next"))
        assert take(log, LogMessage).number == 11
        log.close()


def test_a_restart_begins_a_new_log(listener: socket.socket) -> None:
    """Writers of the old log are refused until they have read so; members join again."""
    with serving(listener) as address:
        log = EventLog(address, "driver 1")
        log.expect(Bounds(3, 3, 12))
        log.client.start_run(run_of())
        log.follow()
        first = take(log, NewLog)
        assert log.client.join(1, "127.0.0.1", 77, [[1, 5, 0]], 0) == 1
        assert take(log, ServerJoined).experts == [(1, 5, 0)]
        log.put("plan/0", {"steps": [1, 2]})
        assert log.get("plan/0") == {"steps": [1, 2]}
    with serving(listener):
        # the driver's own client starts the run again when it hears that there is none
        wait_until(lambda: log.client.run()["run"])
        for write in (
            lambda: log.append(StopRequested(0, "why")),
            lambda: log.put("plan/0", {}),
        ):
            with pytest.raises(StoreRestartedError):
                write()
        second = take(log, NewLog)
        assert (second.number, second.held) == (-1, [])
        assert second.epoch != first.epoch
        assert not log.has("plan/0")
        with pytest.raises(InputError, match="is not there"):
            log.get("plan/0")
        assert log.append(StopRequested(0, "why")) == 0
        assert log.client.join(1, "127.0.0.1", 77, [[1, 5, 0]], 1) == 2
        assert take(log, ServerJoined).incarnation == 2
        log.close()


def test_writers_wait_while_the_store_is_away(listener: socket.socket) -> None:
    """`next` gives nothing meanwhile, `append` returns once it is there; closing ends the wait."""
    address = StoreAddress("127.0.0.1", listener.getsockname()[1])
    log = EventLog(address, "driver 0")
    log.follow()
    numbers: list[int] = []
    log_message = LogMessage("early")
    writer = threading.Thread(target=lambda: numbers.append(log.append(log_message)))
    writer.start()
    assert log.next(0.05) is None
    assert not log.responds
    with serving(listener):
        starter = StoreClient(address, "driver 1")
        starter.start_run(run_of())
        writer.join(HANG_S)
        assert numbers == [0]
        starter.close()
    errors: list[Exception] = []

    def write() -> None:
        try:
            log.append(LogMessage("late"))
        except StoreUnavailable as error:
            errors.append(error)

    late = threading.Thread(target=write)
    late.start()
    log.close()
    late.join(HANG_S)
    assert len(errors) == 1


def test_nobody_listens(listener: socket.socket) -> None:
    """A client says so after its time limit."""
    port = listener.getsockname()[1]
    listener.close()
    client = StoreClient(StoreAddress("127.0.0.1", port), "status")
    with pytest.raises(StoreUnavailable, match=rf"127.0.0.1:{port} does not answer within 0.3 s"):
        client.status(0.3)
    client.close()
    with pytest.raises(StoreUnavailable):
        client.status()


def test_long_values_are_written_in_parts(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read as they were, and deleted with all their parts."""
    for module in (client_module, messages):
        monkeypatch.setattr(module, "MAX_PART_BYTES", 100)
    data = bytes(itertools.islice(itertools.cycle(range(256)), 1234))
    with serving(listener) as address:
        log = EventLog(address, "scheduler")
        log.put_bytes("plan/1", data)
        log.put_bytes("plan/2", data[:100])
        assert log.get_bytes("plan/1") == data
        assert log.get_bytes("plan/2") == data[:100]
        assert log.client.status()["keys"] == 15
        log.delete("plan/1")
        assert log.client.status()["keys"] == 1
        assert not log.has("plan/1", "plan/2")
        assert log.has("plan/2")
        log.close()


def test_entries_of_strangers_are_skipped_and_told_once(listener: socket.socket) -> None:
    """A reader's bounds may be narrower than the store's; it goes on with the next entry."""
    lines: list[str] = []
    with serving(listener) as address:
        log = EventLog(address, "driver 0")
        log.expect(Bounds(servers=1, gpus=1, pairs=12), lines.append)
        log.client.start_run(run_of())
        log.follow()
        take(log, NewLog)
        for server in (1, 2, 0):
            log.client.join(server, "127.0.0.1", 70 + server, [], 0)
        assert take(log, ServerJoined).server == 0
        assert len(lines) == 1
        assert "server_joined.server" in lines[0]
        log.wake()
        assert isinstance(log.next(HANG_S), LogEntry)
        log.close()
