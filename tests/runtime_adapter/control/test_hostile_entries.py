"""What a stranger, or a broken server, writes to a run's store ends no moves and no process."""

from __future__ import annotations

import json
import threading
import time
import zlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.errors import InputError
from prism_plan.io.placement import placement_to_json
from runtime_adapter.control import move_command
from runtime_adapter.control import scheduler as scheduling
from runtime_adapter.control.log_entries import (
    KINDS,
    Bounds,
    CallsReported,
    ExpertsLoaded,
    LogMessage,
    MigrationFinished,
    MigrationStarted,
    MoveRequested,
    read_entry,
)
from runtime_adapter.control.move_command import request_move
from runtime_adapter.control.placement_reviews import PendingReview
from runtime_adapter.transport.rendezvous import RuntimeFailure
from tests.runtime_adapter.control.fleet import MODEL, PATIENCE_S, Fleet, placement
from tests.runtime_adapter.control.memory_store import ADDRESS
from tests.runtime_adapter.control.test_migration_control import START, two

TARGET = two(list(range(7)), [7, 8, 9], [10, 11])

#: Of a run of two servers with three GPUs and twelve experts.
STRANGE = [
    b"",
    b"no JSON",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"9" * 10_000,
    b"[1, 2]",
    b'{"plan": 1}',
    b'{"kind": 3}',
    b'{"kind": "explode"}',
    b'{"kind": "experts_loaded", "kind": "drops_announced"}',
    *(
        json.dumps(values).encode()
        for values in (
            {"kind": "migration_started", "plan": -1, "read": 0},
            {"kind": "migration_started", "plan": 1.5, "read": 0},
            {"kind": "migration_started", "plan": 77, "read": 0},
            {"kind": "migration_started", "plan": 77},
            {"kind": "server_joined", "server": 2, "incarnation": 1, "host": "h", "port": 1,
             "experts": []},
            {"kind": "server_joined", "server": 0, "incarnation": 1, "host": "h", "port": 1 << 16,
             "experts": []},
            {"kind": "server_joined", "server": 0, "incarnation": 1, "host": "h", "port": 1,
             "experts": [[0, 12, 0]]},
            {"kind": "server_joined", "server": 0, "incarnation": 1, "host": "h", "port": 1,
             "experts": [[0, 0]]},
            {"kind": "server_down", "server": 0, "incarnation": -1, "reason": "r"},
            {"kind": "server_down", "server": 2, "incarnation": 1, "reason": "r"},
            {"kind": "server_left", "server": "s0", "incarnation": 1},
            {"kind": "driver_synced", "server": 0, "read": -1},
            {"kind": "experts_loaded", "plan": 1},
            {"kind": "experts_loaded", "plan": 1, "experts": [[0, 3, 0, 0]]},
            {"kind": "experts_loaded", "plan": 1, "experts": [[0, 0, 12, 0]]},
            {"kind": "experts_loaded", "plan": 1, "experts": [[0, 0, -1, 0]]},
            {"kind": "drops_announced", "plan": 1, "experts": [[0, 0, 0]]},
            {"kind": "drops_announced", "plan": 1, "experts": "all"},
            {"kind": "drops_acknowledged", "server": 2, "plan": 1, "steps": [0]},
            {"kind": "drops_acknowledged", "server": True, "plan": 1, "steps": [0]},
            {"kind": "slots_freed", "plan": 1, "steps": [None]},
            {"kind": "step_failed", "plan": 1, "step": 0, "server": 0, "reason": "r"},
            {"kind": "server_stopped", "plan": 1, "server": "s0"},
            {"kind": "calls_reported", "review": 1, "server": 2},
            {"kind": "move_requested", "move": ["1"]},
            {"kind": "move_requested", "move": "nowhere"},
            {"kind": "move_finished", "move": "1", "code": 256, "text": ""},
            {"kind": "log_message", "text": 3},
            {"kind": "log_message", "text": "x" * 10_000},
        )
    ),
]  # fmt: skip


def write(fleet: Fleet, raw: bytes) -> None:
    """Put bytes into the log, past the store's checks."""
    fleet.store.inject(raw.decode(errors="replace"))


def test_strange_entries_end_no_moves() -> None:
    """Before, between and after moves: all are skipped, each driver tells of one in one line."""
    fleet = Fleet(START)
    for raw in STRANGE:
        write(fleet, raw)
    fleet.ask(TARGET)
    code, text = fleet.moved()
    assert code == 0, text
    for raw in STRANGE[::-1]:
        write(fleet, raw)
    fleet.ask(START, "2")
    assert fleet.moved("2")[0] == 0
    assert (fleet.held() == START.on_gpu.reshape(3, -1)).all()
    assert not fleet.wrong()
    fleet.until(lambda: {entry.plan for entry in fleet.entries_of(MigrationFinished)} >= {1, 2, 77})
    for server in fleet.servers:
        said = [line for line in server.said if "is skipped" in line]
        assert len(said) == 1
        assert said[0].isprintable()
        assert said[0].startswith("the run's store: log/")


@pytest.mark.parametrize("raw", STRANGE)
def test_an_entry_that_no_server_writes(raw: bytes) -> None:
    """One line says which entry, and what is wrong with it; well-formed ones are read."""
    bounds = Bounds.of(START)
    if raw in (
        b'{"kind": "migration_started", "plan": 77, "read": 0}',
        b'{"kind": "move_requested", "move": "nowhere"}',
    ):  # what they name is missing
        assert read_entry(7, raw, bounds).number == 7
        return
    with pytest.raises(InputError) as error:
        read_entry(7, raw, bounds)
    assert "7" in str(error.value)
    assert str(error.value).isprintable()


def test_all_kinds_that_are_written_are_known() -> None:
    """The table of the log's kinds is complete: a whole move writes no entry that is skipped."""
    fleet = Fleet(START)
    fleet.ask(TARGET)
    fleet.moved()
    assert {entry.kind for entry in fleet.entries} <= set(KINDS)
    assert not [line for server in fleet.servers for line in server.said if "skipped" in line]


@pytest.mark.parametrize("raw", [b'{"format": "prism-plan/migration"}', None])
def test_a_plan_that_cannot_be_read(raw: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The move is abandoned with the reason, all stays where it is, and the next one works."""
    fleet = Fleet(START, timeout_s=0.5)
    put = fleet.scheduler.log.put

    def spoilt(key: str, values: Any) -> None:
        if key != "plan/1":
            put(key, values)
        elif raw is not None:
            fleet.scheduler.log.put_bytes(key, raw)

    monkeypatch.setattr(fleet.scheduler.log, "put", spoilt)
    fleet.ask(TARGET)
    code, text = fleet.moved()
    assert code == 5
    assert "the run's store: plan/1: " in text
    assert (fleet.held() == START.on_gpu.reshape(3, -1)).all()
    fleet.ask(TARGET, "2")
    assert fleet.moved("2")[0] == 0


@pytest.mark.parametrize("raw", [b"\xff", b'{"servers": []}', None])
def test_a_placement_that_cannot_be_read(raw: bytes | None) -> None:
    """Who asks is refused in one line; the next one that asks is served."""
    fleet = Fleet(START)
    if raw is not None:
        fleet.asking.put_bytes("move/1", raw)
    fleet.asking.append(MoveRequested("1"))
    code, text = fleet.moved()
    assert code == 2
    assert text.startswith("refused: ")
    fleet.ask(TARGET, "2")
    assert fleet.moved("2")[0] == 0


@pytest.mark.parametrize("raw", [b"no zlib", zlib.compress(b"\7" * 10**7), None])
def test_calls_that_cannot_be_read(raw: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as none, however large they would be, and the review goes on."""
    fleet = Fleet(START)
    scheduler = fleet.scheduler
    pending = PendingReview(1, 0.0, scheduler.state.now(), np.zeros((2, 2, 2), np.int64))
    scheduler.reviews.pending = pending
    monkeypatch.setattr(scheduler.reviews, "decide", lambda event: None)
    if raw is not None:
        fleet.scheduler.log.put_bytes("calls/0/1", raw)
    fleet.scheduler.log.put_bytes("times/0/1", b'{"compute_us": 1, "waiting_us": 1}')
    fleet.scheduler.log.append(CallsReported(1, 0))
    fleet.until(lambda: fleet.entries_of(LogMessage))
    assert "calls of a server are not counted" in fleet.entries_of(LogMessage)[0].text
    assert not pending.calls.any()


# ---------------------------------------------------------------------------- heartbeats in a move


def test_a_worker_that_dies_after_its_driver_has_finished() -> None:
    """That the driver says ``finished`` is no heartbeat of the worker: the move ends."""
    rows = np.ones((3, MODEL.num_pairs), bool)
    rows[0, :4] = rows[1, 4:8] = rows[2, 8:] = False
    start = placement(rows, ((12,), (12,), (12,)))
    target = placement(np.ones((3, MODEL.num_pairs), bool), ((12,), (12,), (12,)))
    fleet = Fleet(start, timeout_s=1.0)
    fleet.servers[2].loader.hold.clear()
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(ExpertsLoaded))
    fleet.servers[2].finished = True
    fleet.step()
    fleet.servers[2].executor.close()
    for other in fleet.servers[:2]:
        other.suspects.add(2)
    code, text = fleet.moved()
    assert (code, text.endswith("server 's2' is lost")) == (5, True)


def test_a_driver_that_hangs_while_its_own_experts_are_dropped() -> None:
    """Its worker would wait for it without end: the move is abandoned, later ones are refused."""
    fleet = Fleet(START, silent=[0], timeout_s=0.5)
    fleet.servers[0].sends_heartbeats = False  # those of its driver; its worker lives
    fleet.ask(TARGET)
    code, text = fleet.moved()
    assert code == 5
    assert "the process that serves the requests of 's0' has sent no heartbeat" in text
    fleet.ask(TARGET, "2")
    assert fleet.moved("2") == (
        5, "refused: the process that serves the requests of 's0' has sent no heartbeat"
    )  # fmt: skip


def test_a_load_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move of which no step is done for long is abandoned, though all servers live."""
    monkeypatch.setattr(scheduling, "MAX_STALL_S", 1.0)
    fleet = Fleet(START, timeout_s=0.5)
    for server in fleet.servers:
        server.loader.hold.clear()
    fleet.ask(TARGET)
    code, text = fleet.moved()
    for server in fleet.servers:
        server.loader.hold.set()
    assert code == 5
    assert text.endswith("no step was done for 1 s")


def request(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> list[Any]:
    """Run the command `move` in a thread; returns a list for its answer, or its error."""
    monkeypatch.setattr(move_command, "EventLog", lambda address, by: fleet.log(by))
    monkeypatch.setattr(move_command, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(move_command, "RESTART_S", 0.0)
    answers: list[Any] = []

    def ask() -> None:
        try:
            target = placement_to_json(TARGET)
            answers.append(request_move(ADDRESS, target, PATIENCE_S, said.append))
        except RuntimeFailure as error:
            answers.append(error)

    threading.Thread(target=ask, daemon=True).start()
    return answers


def wait_without_scheduler(answers: list[Any]) -> str:
    """The error of a request that no scheduler answers."""
    deadline = time.monotonic() + PATIENCE_S
    while not answers:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert isinstance(answers[0], RuntimeFailure), answers
    return str(answers[0])


def test_the_command_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the end of the move, and tells of one entry that makes no sense."""
    fleet = Fleet(START)
    said: list[str] = []
    for server in fleet.servers:
        server.loader.hold.clear()
    answers = request(fleet, monkeypatch, said)
    fleet.until(lambda: fleet.entries_of(MoveRequested))
    write(fleet, b"no JSON")
    write(fleet, b"[1]")
    for server in fleet.servers:
        server.loader.hold.set()
    fleet.until(lambda: answers)
    assert answers[0][0] == 0, answers
    assert len(said) == 1
    fleet.settle()


def test_a_request_to_a_scheduler_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `move` ends with the reason: no answer, and no sign of life."""
    fleet = Fleet(START, timeout_s=0.5)
    fleet.scheduler.log.close()
    answers = request(fleet, monkeypatch, [])
    assert "scheduler of the run has sent no heartbeat for 2.5" in wait_without_scheduler(answers)


def test_a_request_to_a_run_that_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is written."""
    fleet = Fleet(START, movable=False)
    answers = request(fleet, monkeypatch, [])
    assert "a run that moves no experts" in wait_without_scheduler(answers)


def test_a_request_to_a_store_that_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with code 5: some experts may have moved."""
    fleet = Fleet(START)
    for server in fleet.servers:
        server.loader.hold.clear()
    answers = request(fleet, monkeypatch, [])
    fleet.until(lambda: fleet.entries_of(MigrationStarted))
    fleet.store.restart()
    fleet.until(lambda: answers)
    for server in fleet.servers:
        server.loader.hold.set()
    assert isinstance(answers[0], RuntimeFailure)
    assert answers[0].exit_code == 5
    assert "the store of the run was restarted; some experts may have moved" in str(answers[0])
    fleet.settle()


def test_a_request_outlives_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that is started again abandons what it finds, and then does as asked."""
    fleet = Fleet(START, timeout_s=0.5)
    for server in fleet.servers:
        server.loader.hold.clear()
    answers = request(fleet, monkeypatch, [])
    monkeypatch.setattr(move_command, "RESTART_S", PATIENCE_S)
    fleet.until(lambda: fleet.entries_of(MigrationStarted))
    fleet.restart_scheduler()
    for server in fleet.servers:
        server.loader.hold.set()
    fleet.until(lambda: answers)
    assert answers[0][0] == 0, answers
    fleet.settle()
    assert (fleet.held() == TARGET.on_gpu.reshape(3, -1)).all()
    assert not fleet.wrong()
