"""Migrations through losses, returns, and restarts of the store and of the scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.instance import Instance
from prism_plan.placement import Placement
from runtime_adapter.control import repairs
from runtime_adapter.control.log_entries import (
    DropsAcknowledged,
    DropsAnnounced,
    ExpertsLoaded,
    MigrationFinished,
    MigrationStarted,
    ServerDown,
    ServerJoined,
    ServerStopped,
    SlotsFreed,
    StopRequested,
    TableBegan,
)
from runtime_adapter.control.run_state import surviving_instance
from tests.evaluate.simulation_material import small_cluster, small_trace
from tests.limits import HANG_S
from tests.runtime_adapter.control.fleet import Fleet, drawn

#: Three servers of which any two have room for two copies of each of the twelve experts.
CAPACITY = ((12,), (6, 6), (12,))
#: The same with hardly a slot to spare.
TIGHT = ((8,), (4, 4), (9,))


@pytest.fixture(autouse=True)
def quick_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs wait for little."""
    monkeypatch.setattr(repairs, "SETTLING_S", 0.1)
    monkeypatch.setattr(repairs, "FIRST_DELAY_S", 0.1)


def wanted(target: Placement) -> Any:
    """The rows of a placement, bool [G, J]."""
    return target.on_gpu.reshape(target.on_gpu.shape[0], -1)


def nothing_is_lost(fleet: Fleet) -> None:
    """Somebody holds every expert; no slot was taken twice, or while a driver used it."""
    assert fleet.held().any(axis=0).all()
    assert not fleet.wrong()


def copies(fleet: Fleet, servers: list[int]) -> Any:
    """On how many of these servers each expert is, int [J]."""
    held = fleet.held()
    return np.sum([held[fleet.start.gpus_of(n)].any(axis=0) for n in servers], axis=0)


def entries_of_move(fleet: Fleet) -> int:
    """How many entries there are from the begin of the first migration on."""
    kinds = [type(entry) for entry in fleet.entries]
    return len(kinds) - kinds.index(MigrationStarted) if MigrationStarted in kinds else 0


def run_until_entries(fleet: Fleet, number: int) -> None:
    """Let a move go on until so many entries are there, or it is over."""

    def reached() -> bool:
        nothing_is_lost(fleet)
        return entries_of_move(fleet) >= number or bool(fleet.answers("1"))

    fleet.until(reached)


def open_plans(fleet: Fleet) -> set[int]:
    """Migrations that have begun in the log, and have not ended."""
    finished = {entry.plan for entry in fleet.entries_of(MigrationFinished)}
    return {entry.plan for entry in fleet.entries_of(MigrationStarted)} - finished


def length_of_move(seed: int, capacity: Any, copies: int) -> int:
    """How many entries a move has."""
    fleet = Fleet(drawn(seed, capacity, copies=copies))
    fleet.ask(drawn(seed + 100, capacity, copies=copies))
    assert fleet.moved()[0] == 0
    fleet.close()
    return entries_of_move(fleet)


def reach(fleet: Fleet, target: Placement) -> None:
    """Move there, again while a server is lost meanwhile, as one is that a busy machine stops."""
    for attempt in itertools.count():
        fleet.ask(target, f"to the end {attempt}")
        code, text = fleet.moved(f"to the end {attempt}")
        if code == 0:
            break
        assert "is lost" in text
        fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.settle()


def survive(
    seed: int, capacity: Any, copies_: int, disturb: Callable[[Fleet], None], at: int
) -> Fleet:
    """Disturb a move after so many entries; afterwards all is well, and the same move succeeds."""
    start, target = (drawn(s, capacity, copies=copies_) for s in (seed, seed + 100))
    fleet = Fleet(start, timeout_s=1.0)
    fleet.ask(target)
    run_until_entries(fleet, at)
    disturb(fleet)
    fleet.settle()
    nothing_is_lost(fleet)
    assert (copies(fleet, [0, 1, 2]) >= copies_).all()
    code, text = fleet.moved()
    assert code in (0, 5), text
    if code:
        assert "given up" in text or "abandoned" in text
    reach(fleet, target)
    assert (fleet.held() == wanted(target)).all()
    assert not fleet.wrong()
    return fleet


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [CAPACITY, TIGHT], ids=["roomy", "tight"])
def test_the_store_is_restarted_at_every_step(seed: int, capacity: Any) -> None:
    """No expert is lost and no slot taken twice, maps are what is held, who asked has a 5."""
    copies_ = 1 + (seed % 2 if capacity is CAPACITY else 0)
    length = length_of_move(seed, capacity, copies_)
    for at in range(1, length + 1, 3):

        def restart(fleet: Fleet) -> None:
            fleet.store.restart()

        fleet = survive(seed, capacity, copies_, restart, at)
        assert fleet.agrees()
        assert fleet.min_replicas() >= 1
        fleet.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_scheduler_is_restarted_at_every_step(seed: int) -> None:
    """It stops what it finds, and no server waits for it."""
    length = length_of_move(seed, CAPACITY, 2)
    for at in range(1, length + 1, 4):
        start, target = (drawn(s, CAPACITY, copies=2) for s in (seed, seed + 100))
        fleet = Fleet(start, timeout_s=1.0)
        fleet.ask(target)
        run_until_entries(fleet, at)
        fleet.restart_scheduler()
        fleet.settle()
        nothing_is_lost(fleet)
        fleet.until(lambda fleet=fleet: not open_plans(fleet))  # type: ignore[misc]
        reach(fleet, target)
        assert (fleet.held() == wanted(target)).all()
        assert not fleet.wrong()
        fleet.close()


@pytest.mark.parametrize("seed", range(2))
def test_store_and_scheduler_are_restarted_at_once(seed: int) -> None:
    """Nothing is left of the moves before; what is held stays, and replicas are kept."""
    length = length_of_move(seed, CAPACITY, 2)
    for at in range(1, length + 1, 6):
        start, target = (drawn(s, CAPACITY, copies=2) for s in (seed, seed + 100))
        fleet = Fleet(start, timeout_s=1.0)
        fleet.ask(target)
        run_until_entries(fleet, at)
        fleet.scheduler.log.close()
        fleet.store.restart()
        fleet.restart_scheduler()
        fleet.until(lambda fleet=fleet: fleet.scheduler.state.all_up)  # type: ignore[misc]
        fleet.settle()
        nothing_is_lost(fleet)
        assert (copies(fleet, [0, 1, 2]) >= 2).all()
        reach(fleet, target)
        assert (fleet.held() == wanted(target)).all()
        fleet.close()


def test_a_complete_move_outlives_a_restarted_scheduler() -> None:
    """A new scheduler knows where the last one led to, and does not lead back."""
    start, target = (drawn(s, CAPACITY) for s in (1, 101))
    fleet = Fleet(start)
    fleet.ask(target)
    assert fleet.moved()[0] == 0
    fleet.restart_scheduler()
    fleet.until(lambda: fleet.scheduler.state.begun and not fleet.scheduler.state.joined)
    fleet.settle()
    assert (fleet.held() == wanted(target)).all()
    fleet.store.restart()
    fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.until(lambda: not fleet.scheduler.state.joined)
    fleet.settle()
    assert (fleet.held() == wanted(target)).all()
    assert len(fleet.entries_of(MigrationStarted)) == 1


@pytest.mark.parametrize("both", [False, True])
def test_all_agree_on_the_table_after_a_restart_of_the_store(both: bool) -> None:
    """Also who starts anew afterwards; of a new scheduler too, which knows the file's alone."""
    start, target = (drawn(s, CAPACITY) for s in (1, 101))
    table = np.array([[1, 2], [2, 0], [0, 1]], np.int32)
    fleet = Fleet(start)
    fleet.ask(target.replace(execution=table))
    assert fleet.moved()[0] == 0
    assert (fleet.scheduler.state.table == table).all()
    (began,) = fleet.entries_of(TableBegan)
    assert began.execution == table.tolist()
    if both:
        fleet.scheduler.log.close()
    fleet.store.restart()
    if both:
        fleet.restart_scheduler()

    def told() -> list[TableBegan]:
        return [entry for entry in fleet.store.entries() if isinstance(entry, TableBegan)]

    fleet.until(told)
    fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.settle()
    (entry,) = told()
    assert entry.execution == fleet.scheduler.state.table.tolist()
    assert (entry.execution == table.tolist()) != both
    fleet.close()


def test_a_cluster_without_servers_that_are_down() -> None:
    """What is planned among the servers that are up knows the cluster of these alone."""
    trace, cluster = small_trace(), small_cluster()
    instance = Instance.build(trace, cluster)
    assert instance.cluster is not None
    left = surviving_instance(instance, [0, 2], 1)
    assert left.cluster is not None
    assert [server.name for server in left.cluster.servers] == list(left.servers)


# -------------------------------------------------------------------------------- losses, returns


@pytest.mark.parametrize("kind", [ExpertsLoaded, DropsAnnounced, DropsAcknowledged, SlotsFreed])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_server_that_returns_empty_gets_its_experts_back(kind: type[Any], lost: int) -> None:
    """It goes down in mid-migration; the others keep two copies; in the end all is as wanted."""
    start, target = (drawn(s, CAPACITY, copies=2) for s in (3, 103))
    fleet = Fleet(start, timeout_s=1.0)
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(kind))
    fleet.kill(lost)
    code, text = fleet.moved()
    left = [n for n in range(3) if n != lost]
    fleet.until(lambda: fleet.entries_of(ServerDown))
    fleet.until(lambda: (copies(fleet, left) >= 2).all())
    fleet.settle()
    fleet.start_again(lost)
    fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.until(lambda: not fleet.scheduler.state.joined)
    fleet.settle()
    assert (fleet.held() == wanted(target if code == 0 else start)).all(), text
    assert not fleet.wrong()
    fleet.until(lambda: not open_plans(fleet))
    repaired = [e for e in fleet.entries_of(MigrationFinished) if "(a repair)" in e.text]
    assert len(repaired) >= 1
    assert all(e.complete for e in repaired)
    fleet.close()


def test_a_server_that_is_back_at_once_is_repaired_once() -> None:
    """It joins as its next incarnation before anybody has missed it."""
    start = drawn(5, CAPACITY, copies=2)
    fleet = Fleet(start)
    fleet.servers[2].kill()
    fleet.start_again(2)
    fleet.until(lambda: [e for e in fleet.entries_of(ServerJoined) if e.incarnation == 2])
    fleet.until(lambda: fleet.entries_of(MigrationFinished))
    fleet.settle()
    assert (fleet.held() == wanted(start)).all()
    assert len(fleet.entries_of(MigrationStarted)) == 1
    assert not fleet.wrong()
    fleet.close()


def test_lost_experts_are_loaded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for them; for copies of what others hold the servers may settle first."""
    monkeypatch.setattr(repairs, "SETTLING_S", HANG_S)
    for number, urgent in ((1, True), (2, False)):
        start = drawn(4, CAPACITY, copies=number)
        fleet = Fleet(start, timeout_s=1.0)
        fleet.kill(0)
        fleet.until(lambda fleet=fleet: fleet.entries_of(ServerDown))  # type: ignore[misc]
        if urgent:
            fleet.until(lambda fleet=fleet: (copies(fleet, [1, 2]) >= 1).all())  # type: ignore[misc]
        else:
            fleet.until(lambda fleet=fleet: fleet.knows_all())  # type: ignore[misc]
            assert fleet.scheduler.repairs.pending
            fleet.step()
            assert not fleet.entries_of(MigrationStarted)
        fleet.close()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_server_that_is_lost_with_the_store_gets_the_experts_of_its_file(lost: int) -> None:
    """Nothing is left of what was planned, and the others hold all experts: it is used again."""
    start = drawn(4, CAPACITY)
    fleet = Fleet(start, timeout_s=1.0)
    fleet.until(lambda: fleet.scheduler.state.begun)
    fleet.scheduler.log.close()
    fleet.kill(lost)
    fleet.store.restart()
    fleet.restart_scheduler()
    left = [n for n in range(3) if n != lost]
    fleet.until(lambda: (copies(fleet, left) >= 1).all())
    fleet.settle()
    fleet.start_again(lost)
    fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.until(lambda: not fleet.scheduler.state.joined)
    fleet.settle()
    gpus = start.gpus_of(lost)
    on_server, wanted_there = (rows[gpus].any(axis=0) for rows in (fleet.held(), wanted(start)))
    assert (on_server >= wanted_there).all()  # not twice on GPUs of the same server
    nothing_is_lost(fleet)
    fleet.close()


def test_a_driver_that_joins_in_mid_migration() -> None:
    """The migration ends; a drop that was announced before waits for no driver that is gone."""
    start, target = (drawn(s, CAPACITY, copies=2) for s in (6, 106))
    fleet = Fleet(start)
    for server in fleet.servers:
        server.lane.layer, server.lane.passes = 0, 1  # no drop of this layer is acknowledged
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(DropsAnnounced))
    fleet.servers[1].kill()
    fleet.start_again(1, empty=False)
    code, text = fleet.moved()
    assert code == 5
    assert "server 's1' " in text
    for server in fleet.servers:
        server.lane.passes += server.lane.passes % 2
    fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.until(lambda: not fleet.scheduler.state.joined)
    fleet.settle()
    nothing_is_lost(fleet)
    assert (copies(fleet, [0, 1, 2]) >= 2).all()
    fleet.close()


def test_drops_are_cancelled_when_a_holder_is_lost() -> None:
    """Who has announced the drop of what only the lost server held as well keeps it."""
    start = drawn(7, CAPACITY, copies=2)
    rows = wanted(start).copy()
    pair = int(np.flatnonzero(rows[0] & rows[3] & ~rows[1] & ~rows[2])[0])
    rows[0, pair] = False
    target = start.replace(on_gpu=rows.reshape(start.on_gpu.shape))
    target = target.replace(plan=drawn(7, CAPACITY).plan)  # with one copy
    fleet = Fleet(start, timeout_s=1.0)
    fleet.servers[0].lane.layer, fleet.servers[0].lane.passes = pair // 6, 1
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(DropsAnnounced))
    fleet.kill(2)
    code, _ = fleet.moved()
    assert code == 5
    assert fleet.held()[0, pair]
    assert not fleet.entries_of(SlotsFreed)
    fleet.servers[0].lane.passes = 2
    fleet.settle()
    assert (copies(fleet, [0, 1]) >= 1).all()
    assert not fleet.wrong()
    fleet.close()


def test_a_plan_that_did_not_know_of_a_loss_is_begun_by_nobody() -> None:
    """A server came between what the scheduler had read and its plan: the plan is void."""
    start, target = (drawn(s, CAPACITY, copies=2) for s in (8, 108))
    fleet = Fleet(start)
    begin = fleet.scheduler.migrations.begin

    def too_late(*arguments: Any, **options: Any) -> None:
        if not fleet.entries_of(MigrationStarted):
            fleet.servers[1].kill()
            fleet.start_again(1, empty=False)
            member: dict[str, Any] = {}
            while member.get("incarnation") != 2:  # the scheduler does not read meanwhile
                member = fleet.store.call("members")[1]
        begin(*arguments, **options)

    fleet.scheduler.migrations.begin = too_late  # type: ignore[method-assign]
    fleet.ask(target)
    code, _ = fleet.moved()
    assert code == 5
    plan = fleet.entries_of(MigrationStarted)[0].plan
    steps = [e for e in fleet.entries_of(ExpertsLoaded) if e.plan == plan]
    assert not steps
    assert not [e for e in fleet.entries_of(DropsAnnounced) if e.plan == plan]
    assert {e.plan for e in fleet.entries_of(ServerStopped)} >= {plan}
    assert [e for e in fleet.entries_of(StopRequested) if e.plan == plan]
    fleet.close()


def test_another_process_of_the_same_name_is_told() -> None:
    """A server that was replaced does not fight for its name, and says so."""
    fleet = Fleet(drawn(9, CAPACITY, copies=2))
    old = fleet.servers[0]
    another = {"server": 0, "host": "127.0.0.2", "port": 1, "after": 7, "held": []}
    fleet.store.call("join", "worker 0", **another)  # type: ignore[arg-type]
    fleet.until(lambda: old.replaced)
    assert [e.incarnation for e in fleet.entries_of(ServerJoined) if e.server == 0][-1] == 8
    fleet.close()


# ------------------------------------------------------------------------------------ at random


@pytest.mark.parametrize("seed", range(10))
def test_anything_may_happen(seed: int) -> None:
    """Whatever is killed and restarted in whatever order, with two copies nothing is lost."""
    rng = np.random.default_rng(seed)
    capacity = CAPACITY
    fleet = Fleet(drawn(seed, capacity, copies=2), timeout_s=0.6)
    down: set[int] = set()
    moves = 0

    def go_on(rounds: int) -> None:
        for _ in range(rounds):
            for server in fleet.servers:
                if rng.random() < 0.3:
                    server.lane.passes += 1
                    server.lane.layer = int(rng.integers(2))
            fleet.step()
            assert not fleet.wrong()
            alive = [n for n in range(3) if n not in down]
            assert (copies(fleet, alive) >= 1).all()

    def leave_layers() -> None:
        for server in fleet.servers:
            server.lane.passes += server.lane.passes % 2

    for _ in range(12):
        what = rng.choice(["move", "store", "away", "scheduler", "kill", "start", "fail"])
        if what == "move":
            moves += 1
            fleet.ask(drawn(int(rng.integers(1000)), capacity, copies=2), str(moves))
        elif what == "store":
            fleet.store.restart()
        elif what == "away":
            fleet.store.away = True
            go_on(int(rng.integers(5)))
            if rng.random() < 0.5:
                fleet.store.restart()
            fleet.store.away = False
        elif what == "scheduler":
            fleet.restart_scheduler()
        elif what == "kill" and not down:
            leave_layers()
            fleet.settle()
            fleet.until(lambda: fleet.scheduler.state.all_up and copies_are(fleet, [0, 1, 2]))
            n = int(rng.integers(3))
            fleet.kill(n)
            down.add(n)
        elif what == "start" and down:
            fleet.start_again(down.pop(), empty=bool(rng.integers(2)))
            if rng.random() < 0.5:
                fleet.until(lambda: fleet.scheduler.state.all_up)
        elif what == "fail":
            n = int(rng.integers(3))
            fleet.servers[n].loader.fails = lambda pair, gpu: bool(rng.random() < 0.05)
        go_on(int(rng.integers(1, 40)))
    for server in fleet.servers:
        server.loader.fails = lambda pair, gpu: False
    leave_layers()
    for n in sorted(down):
        fleet.start_again(n)
    down.clear()
    fleet.until(lambda: fleet.scheduler.state.all_up)
    fleet.until(lambda: copies_are(fleet, [0, 1, 2]))
    fleet.settle()
    nothing_is_lost(fleet)
    last = drawn(seed + 500, capacity, copies=2)
    reach(fleet, last)
    fleet.settle()
    assert (fleet.held() == wanted(last)).all()
    fleet.close()


def copies_are(fleet: Fleet, servers: list[int], number: int = 2) -> bool:
    """Whether each expert is on so many of these servers."""
    return bool((copies(fleet, servers) >= number).all())
