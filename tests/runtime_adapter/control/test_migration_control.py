"""The log, agents, drivers and the scheduler of a migration, without processes or requests."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.io.placement import read_placement
from runtime_adapter.control.event_log import EventLog, NewLog
from runtime_adapter.control.log_entries import (
    DriverSynced,
    DropsAcknowledged,
    DropsAnnounced,
    ExpertsLoaded,
    HeldExpert,
    LogMessage,
    MigrationStarted,
    ServerJoined,
    SlotsFreed,
    StepFailed,
)
from runtime_adapter.control.log_follower import LogFollower
from runtime_adapter.moe.counters import Counters
from runtime_adapter.weights.expert_map import ExpertMap
from tests.runtime_adapter.control.fleet import (
    MODEL,
    PATIENCE_S,
    FakeCompute,
    FakeLane,
    Fleet,
    drawn,
    placement,
)

CAPACITY = ((8,), (4, 4))


def two(*held: list[int]) -> Any:
    """A placement of two servers with one and two GPUs from the pairs of each GPU."""
    rows = np.zeros((3, MODEL.num_pairs), bool)
    for g, pairs in enumerate(held):
        rows[g, pairs] = True
    return placement(rows, CAPACITY)


#: Each expert once: 0 to 7 on the first server.
START = two(list(range(8)), [8, 9], [10, 11])


def test_all_readers_see_all_entries_in_one_order() -> None:
    """Writers that race lose no entry and each keep their order; all readers see the same."""
    fleet = Fleet(START)
    writers = [fleet.log(f"writer {w}") for w in range(3)]
    late = fleet.log("late")

    def write(w: int, log: EventLog) -> None:
        for i in range(40):
            log.append(LogMessage(f"{w} {i}"))

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(writers)]
    late.follow()  # in the middle of it
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fleet.until(lambda: len(fleet.entries_of(LogMessage)) == 120)
    first = late.next(PATIENCE_S)
    assert isinstance(first, NewLog)
    for log in writers:
        log.append(LogMessage("after the beginning"))
    fleet.until(lambda: len(fleet.entries_of(LogMessage)) == 123)
    expected = [entry for entry in fleet.entries if entry.number > first.number]
    assert [late.next(PATIENCE_S) for _ in expected] == expected
    begin = fleet.entries[0].number
    numbers = [entry.number for entry in fleet.entries]
    assert numbers == list(range(begin, begin + len(numbers)))
    for w in range(3):
        written = [e.text for e in fleet.entries_of(LogMessage) if e.text.startswith(f"{w} ")]
        assert written == [f"{w} {i}" for i in range(40)]


@pytest.mark.parametrize("seed", range(4))
def test_a_move_leads_to_its_target(seed: int) -> None:
    """Loaders, workers' and drivers' tables end at the target; on the way nothing is uncovered.

    No GPU ever holds more than its slots, and loads one expert at a time.
    """
    start, target = drawn(seed, CAPACITY), drawn(seed + 100, CAPACITY)
    fleet = Fleet(start)
    fleet.ask(target)
    code, text = fleet.moved()
    assert code == 0, text
    wanted = target.on_gpu.reshape(3, -1)
    assert (fleet.held() == wanted).all()
    assert not fleet.wrong()
    assert fleet.min_replicas() >= 1
    for n, server in enumerate(fleet.servers):
        assert (server.worker_map.held_by(n) == wanted[start.gpus_of(n)]).all()
        # the log ends with the move; a driver reads its last entries in its own time
        fleet.until(lambda server=server: (server.driver_map.on_gpu() == wanted).all())
        assert max(server.loader.most_loading) <= 1
    drops = [change.step for e in fleet.entries_of(DropsAnnounced) for change in e.experts]
    freed = [step for e in fleet.entries_of(SlotsFreed) for step in e.steps]
    assert sorted(drops) == sorted(freed)


def test_a_slot_is_not_freed_while_a_layer_may_use_it() -> None:
    """A driver inside of a layer does not confirm its drops: the expert stays until it is out."""
    target = two(list(range(7)), [7, 8, 9], [10, 11])
    fleet = Fleet(START)
    lane = fleet.servers[1].lane
    lane.layer, lane.passes = 1, 1  # pair 7 is of layer 1
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(DropsAnnounced))
    fleet.until(lambda: [e for e in fleet.entries_of(DropsAcknowledged) if e.server == 0])
    end = time.monotonic() + 0.3
    fleet.until(lambda: time.monotonic() > end)
    assert fleet.servers[0].loader.rows[0, 7]
    assert fleet.servers[0].worker_map.gpu_of[0, 7] == 0  # the worker still answers
    assert fleet.servers[1].driver_map.gpu_of[0, 7] == -1  # though nobody calls any more
    lane.passes = 2
    assert fleet.moved()[0] == 0
    assert not fleet.servers[0].loader.rows[0, 7]


def test_other_layers_hold_up_no_drop() -> None:
    """A driver that is in another layer, for however long, confirms; and so when it goes on."""
    fleet = Fleet(START)
    lane = fleet.servers[1].lane
    lane.layer, lane.passes = 0, 1
    fleet.ask(two(list(range(7)), [7, 8, 9], [10, 11]))
    assert fleet.moved()[0] == 0
    assert not fleet.servers[0].loader.rows[0, 7]
    assert lane.passes == 1


def test_a_driver_that_hangs_is_not_waited_for() -> None:
    """Another server's driver that confirms nothing delays a drop by the timeout, and no longer."""
    fleet = Fleet(START, silent=[1], timeout_s=1.0)
    fleet.ask(two(list(range(7)), [7, 8, 9], [10, 11]))
    assert fleet.moved()[0] == 0
    assert not fleet.servers[0].loader.rows[0, 7]


def test_a_placement_file_of_before_is_kept(tmp_path: Path) -> None:
    """A scheduler that knows of no earlier ones writes beside what they have written."""
    for number in (1, 2):
        (tmp_path / f"placement-{number}.json").write_text("of another run")
    fleet = Fleet(drawn(1, CAPACITY), folder=str(tmp_path))
    fleet.ask(drawn(101, CAPACITY))
    assert fleet.moved()[0] == 0
    assert (tmp_path / "placement-1.json").read_text() == "of another run"
    assert (tmp_path / "placement-2.json").read_text() == "of another run"
    stands = read_placement(tmp_path / "placement-3.json")
    assert (fleet.held() == stands.on_gpu.reshape(3, -1)).all()


@pytest.mark.parametrize("failing", range(0, 8, 2))
def test_a_load_that_fails_abandons_the_move(failing: int, tmp_path: Path) -> None:
    """Whichever load fails: everything stays covered, all agree on what stands, a move works."""
    start, target = drawn(1, CAPACITY), drawn(101, CAPACITY)
    fleet = Fleet(start, folder=str(tmp_path))
    loads = [0]

    def fails(pair: int, gpu: int) -> bool:
        loads[0] += 1
        return loads[0] == failing + 1

    for server in fleet.servers:
        server.loader.fails = fails
    fleet.ask(target)
    code, text = fleet.moved()
    assert code == 5
    assert "missing tensor" in text
    assert "model.safetensors: missing tensor" in (*fleet.servers[0].said, *fleet.servers[1].said)
    assert fleet.min_replicas() >= 1
    stands = read_placement(tmp_path / "placement-1.json")
    assert (fleet.held() == stands.on_gpu.reshape(3, -1)).all()
    assert stands.plan.solver == "interrupted"
    fleet.ask(target, "2")  # from what stands
    assert fleet.moved("2")[0] == 0
    assert (fleet.held() == target.on_gpu.reshape(3, -1)).all()
    assert not fleet.wrong()


def test_a_server_that_can_load_nothing_says_so_once_a_move() -> None:
    """Loads that had begun fail as well; its log names the reason once, and not those of others."""
    said: list[str] = []
    nobody: Any = None  # it is not followed here
    expert_map = ExpertMap(START)
    follower = LogFollower(
        0, START, expert_map, FakeCompute(), Counters(2, 6), lambda: [], nobody, said.append
    )
    for number, (server, plan) in enumerate([("s0", 1), ("s0", 1), ("s1", 1), ("s0", 2)]):
        reason = f"{server}: no folder"
        follower.handle(StepFailed(plan, number, server, reason, number=number))
    assert said == ["s0: no folder", "s0: no folder"]


def test_a_lost_server_ends_the_move() -> None:
    """A server without signs of life: the move is abandoned by name, then others go on."""
    rows = np.ones((3, MODEL.num_pairs), bool)
    capacity = ((12,), (12,), (12,))
    start = placement(rows, capacity)
    rows = rows.copy()
    rows[0, :4] = rows[1, 4:8] = rows[2, 8:] = False
    start, target = placement(rows, capacity), start
    fleet = Fleet(start, timeout_s=1.0)
    fleet.servers[2].loader.hold.clear()  # it never gets anywhere
    fleet.ask(target)
    fleet.until(lambda: fleet.entries_of(ExpertsLoaded))
    fleet.kill(2)
    code, text = fleet.moved()
    assert (code, text.endswith("server 's2' is lost")) == (5, True)
    fleet.ask(target, "2")
    code, text = fleet.moved("2")
    assert code == 2
    assert "for s2 is lost" in text
    left = np.array([[j % 2 == g for j in range(12)] for g in range(2)])
    fleet.ask(placement(left, capacity[:2]), "3")
    assert fleet.moved("3")[0] == 0
    assert (fleet.held()[:2] == left).all()


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        (two(list(range(8)), [8, 9], [10]), 2, "layer 3 expert 5 is held nowhere"),
        (placement(np.ones((3, 12), bool), ((12,), (12, 12))), 2, "holds 12 slots"),
        (placement(np.ones((2, 12), bool), ((12,), (12,))), 2, "GPUs per server"),
        (placement(np.ones((1, 12), bool), ((12,),)), 2, "['s0', 's1']"),
        (
            two(list(range(8)), [8, 9], [10, 11]).replace(
                model=MODEL.__class__("other", (1, 3), 6, 2, (1_000_000,) * 2)
            ),
            2,
            "other",
        ),
        (
            two(list(range(8)), [8, 9], [10, 11]).replace(
                execution=np.array([[1, 1], [1, 1]]), kv_tokens={"s1": 50}
            ),
            2,
            "kv_tokens: 50 of 's1'; expected none, as the run has started without",
        ),
    ],
)
def test_what_cannot_be_moved_to_is_refused(target: Any, code: int, words: str) -> None:
    """One line says why, and nothing moves."""
    fleet = Fleet(START)
    fleet.ask(target)
    found, text = fleet.moved()
    assert found == code
    assert text.startswith("refused: ")
    assert words in text
    assert not fleet.entries_of(MigrationStarted)


def test_the_worker_map_is_never_seen_half_changed() -> None:
    """A reader that looks at any moment finds a holder of an expert that always has one."""
    expert_map = ExpertMap(placement(np.ones((3, 12), bool), ((12,), (12, 12))))
    wrong, over = [], threading.Event()

    def look() -> None:
        while not over.is_set():
            if expert_map.gpu_of[1, 5] < 0 or expert_map.num_replicas[5] < 1:
                wrong.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(3000):
        expert_map.change(1, 5, bool(i % 2))
        expert_map.change(0, 5, bool(i % 3))
    over.set()
    reader.join()
    assert not wrong


class Appended:
    """A log that only notes what is appended."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def append(self, entry: Any) -> int:
        """Note it."""
        self.entries.append(entry)
        return len(self.entries)

    def caught_up(self) -> bool:
        """There is nothing to read."""
        return True


def member(state: str, incarnation: int) -> dict[str, Any]:
    """A member of a new log."""
    return {"state": state, "incarnation": incarnation, "address": ["127.0.0.1", 1]}


def test_a_driver_that_fell_behind_acknowledges_all_at_once() -> None:
    """What was dropped meanwhile it forgets when its lanes are out of their layers, and says so."""
    log: Any = Appended()
    table = {(0, pair): pair for pair in range(8)}
    compute = FakeCompute(table=table)
    expert_map = ExpertMap(START)
    lane: Any = FakeLane()
    follower = LogFollower(
        0, START, expert_map, compute, Counters(2, 6), lambda: [lane], log, lambda text: None
    )
    lane.layer, lane.passes = 1, 1
    held = [[0, 0, pair, pair] for pair in range(7)] + [[1, 1, 7, 0], [1, 1, 8, 1]]
    follower.handle(NewLog("e", 41, [member("up", 3), member("up", 1)], held, []))
    assert follower.incarnation == 3
    assert (expert_map.gpu_of[:, 7] == [-1, 1]).all()
    follower.acknowledge()
    assert not log.entries
    assert (0, 7) in compute.table  # the lane may be about to compute with it
    lane.passes = 2
    follower.acknowledge()
    assert log.entries == [DriverSynced(0, 42)]
    assert (0, 7) not in compute.table


def test_servers_that_have_not_joined_yet_keep_what_they_hold() -> None:
    """After a restart of the store a driver calls them as before, and computes with its own."""
    log: Any = Appended()
    compute = FakeCompute(table={(0, pair): pair for pair in range(8)})
    expert_map = ExpertMap(START)
    follower = LogFollower(0, START, expert_map, compute, Counters(2, 6), lambda: [], log, print)
    before = expert_map.on_gpu()
    follower.handle(NewLog("e", -1, [member("absent", 0), member("joining", 0)], [], []))
    assert (expert_map.on_gpu() == before).all()
    assert not expert_map.down_names()
    assert follower.incarnation == 0
    follower.handle(NewLog("f", 7, [member("absent", 0), member("down", 4)], [], []))
    assert expert_map.down_names() == ["s1"]
    assert (expert_map.on_gpu()[0] == before[0]).all()


def test_what_an_earlier_process_held_is_not_computed_with() -> None:
    """A server that is started again may find itself up in the log: that was another memory."""
    log: Any = Appended()
    compute = FakeCompute()
    expert_map = ExpertMap(START)
    follower = LogFollower(
        0, START, expert_map, compute, Counters(2, 6), lambda: [], log, print, older=("e", 2)
    )
    held = [[0, 0, pair, pair] for pair in range(8)]
    follower.handle(NewLog("e", 7, [member("up", 2), member("up", 1)], held, []))
    assert not compute.table
    assert not expert_map.on_gpu()[0].any()
    assert follower.incarnation == 0
    follower.handle(ServerJoined(0, 3, "127.0.0.1", 1, [HeldExpert(0, 5, 6)], number=8))
    assert compute.table == {(0, 5): 6}
    assert expert_map.gpu_of[0, 5] == 0
    follower.handle(NewLog("f", 7, [member("up", 1), member("up", 1)], held, []))
    assert len(compute.table) == 8  # in another epoch incarnations count anew
