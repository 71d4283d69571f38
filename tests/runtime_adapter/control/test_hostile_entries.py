"""What a stranger, or a broken server, writes to a run's store ends no moves and no process."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.errors import InputError
from runtime_adapter.control import scheduler as scheduling
from runtime_adapter.control.failure_detector import DRIVER_HEARTBEAT, SCHEDULER_HEARTBEAT
from runtime_adapter.control.log_entries import (
    KINDS,
    Bounds,
    CallsReported,
    ExpertsLoaded,
    LogMessage,
    MigrationFinished,
    MoveRequested,
    read_entry,
)
from runtime_adapter.control.move_command import request_move
from runtime_adapter.control.placement_reviews import PendingReview
from tests.runtime_adapter.control.fleet import MODEL, Fleet, placement
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
            {"kind": "migration_started", "plan": -1},
            {"kind": "migration_started", "plan": 1.5},
            {"kind": "migration_started", "plan": 77},
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
]


def write(fleet: Fleet, raw: bytes) -> None:
    """Put bytes at the first free place of the log."""
    at = 0
    while fleet._host.check([f"log/{at}"]):
        at += 1
    fleet._host.set(f"log/{at}", raw)


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
        STRANGE[12],
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
            fleet._host.set(key, raw)

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
        fleet._host.set("move/1", raw)
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
    pending = PendingReview(1, 0.0, scheduler.state.now())
    scheduler.reviews.pending = pending
    monkeypatch.setattr(scheduler.reviews, "decide", lambda event: None)
    if raw is not None:
        fleet._host.set("calls/0/1", raw)
    fleet._host.set("times/0/1", b'{"compute_us": 1, "waiting_us": 1}')
    fleet.asking.append(CallsReported(1, 0))
    fleet.until(lambda: fleet.entries_of(LogMessage))
    assert "calls of a server are not counted" in fleet.entries_of(LogMessage)[0].text
    assert not np.asarray(pending.calls[0]).any()


# ---------------------------------------------------------------------------- heartbeats in a move


def test_a_worker_that_dies_after_its_driver_has_finished() -> None:
    """That the driver has written ``finished`` is no heartbeat of the worker: the move ends."""
    rows = np.ones((3, MODEL.num_pairs), bool)
    rows[0, :4] = rows[1, 4:8] = rows[2, 8:] = False
    start = placement(rows, ((12,), (12,), (12,)))
    target = placement(np.ones((3, MODEL.num_pairs), bool), ((12,), (12,), (12,)))
    fleet = Fleet(start, timeout_s=1.0)
    fleet.servers[2].loader.hold.clear()
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(ExpertsLoaded))
    fleet._host.set("finished/2", "1")
    fleet.servers[2].sends_heartbeats = False
    code, text = fleet.moved()
    assert (code, text.endswith("server 's2' is lost")) == (5, True)


def test_a_driver_that_hangs_while_its_own_experts_are_dropped() -> None:
    """Its worker would wait for it without end: the move is abandoned, later ones are refused."""
    fleet = Fleet(START, silent=[0], timeout_s=0.5)
    fleet._host.set(DRIVER_HEARTBEAT.format(0), "1")
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


def test_a_request_to_a_scheduler_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `move` ends with the reason: no answer, and an unchanged heartbeat."""
    from dataclasses import replace

    from prism_plan.io.placement import placement_to_json
    from runtime_adapter.transport.rendezvous import RuntimeFailure

    fleet = Fleet(START)
    fleet._host.set("movable", "true")
    fleet._host.set("timeout", "0.5")
    fleet._host.set(SCHEDULER_HEARTBEAT, "7")
    said: list[str] = []
    write(fleet, b"no JSON")
    with pytest.raises(RuntimeFailure, match=r"scheduler of the run has sent no heartbeat for 2"):
        request_move(replace(fleet.rendezvous, rank=-1), placement_to_json(TARGET), said.append)
    assert len(said) == 1
    fleet._host.set("movable", "false")
    with pytest.raises(RuntimeFailure, match="a run that moves no experts"):
        request_move(replace(fleet.rendezvous, rank=-1), placement_to_json(TARGET))
