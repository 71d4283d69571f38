"""The state that a log leads to, and the log's own bounds."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_adapter.control import log_entries as entries
from runtime_adapter.control.log_entries import ExpertChange, HeldExpert, LogEntry
from runtime_adapter.control.store import entry_log
from runtime_adapter.control.store.entry_log import EntryLog
from runtime_adapter.control.store.log_state import LogState

SERVERS, GPUS, PAIRS = ("a", "b", "c"), (1, 2, 0), 4

servers = st.integers(0, 2)
incarnations = st.integers(0, 4)
plans = st.integers(0, 3)
gpus = st.integers(0, 2)
pairs = st.integers(0, PAIRS - 1)
changes = st.lists(st.builds(ExpertChange, st.integers(0, 9), gpus, pairs, st.integers(0, 2)))
held = st.lists(st.builds(HeldExpert, gpus, pairs, st.integers(0, 2)))


def joined(server: int, incarnation: int, experts: list[HeldExpert]) -> entries.ServerJoined:
    own = [
        expert for expert in experts if LogState(SERVERS, GPUS).server_of_gpu[expert.gpu] == server
    ]
    return entries.ServerJoined(server, incarnation, "h", 1, own)


any_entry: st.SearchStrategy[LogEntry] = st.one_of(
    st.builds(joined, servers, incarnations, held),
    st.builds(entries.ServerDown, servers, incarnations, st.just("why")),
    st.builds(entries.ServerLeft, servers, incarnations),
    st.builds(entries.ExpertsLoaded, plans, changes),
    st.builds(entries.DropsAnnounced, plans, changes),
    st.builds(entries.MigrationStarted, plans, st.just(0)),
    st.builds(entries.MigrationFinished, plans, st.booleans(), st.just("")),
    st.builds(entries.LogMessage, st.just("text")),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(any_entry, max_size=40), st.data())
def test_a_snapshot_and_the_entries_after_it_give_the_same_state(
    log: list[LogEntry], data: st.DataObject
) -> None:
    """Whoever begins in the middle of the log knows what those know who have read all of it."""
    cut = data.draw(st.integers(0, len(log)))
    whole = LogState(SERVERS, GPUS)
    snapshot: Any = whole.snapshot()
    for number, entry in enumerate(log):
        if number == cut:
            snapshot = whole.snapshot()
        whole.apply(entry)
    if cut == len(log):
        snapshot = whole.snapshot()
    later = LogState.from_snapshot(GPUS, json.loads(json.dumps(snapshot)))
    for entry in log[later.number + 1 :]:
        later.apply(entry)
    assert later == whole


def test_experts_of_servers_that_are_not_up_are_held_by_nobody() -> None:
    """A server that is down holds nothing, and what it says late changes nothing."""
    state = LogState(SERVERS, GPUS)
    state.apply(joined(1, 1, [HeldExpert(1, 0, 0), HeldExpert(2, 3, 1)]))
    state.apply(entries.ExpertsLoaded(0, [ExpertChange(0, 1, 2, 1)]))
    state.apply(entries.DropsAnnounced(0, [ExpertChange(1, 2, 3, 0)]))
    assert state.snapshot()["held"] == [[1, 1, 0, 0], [1, 1, 2, 1]]
    state.apply(entries.ServerDown(1, 0, "an incarnation before"))
    assert state.num_held == 2
    state.apply(entries.ServerDown(1, 1, "why"))
    state.apply(entries.ExpertsLoaded(0, [ExpertChange(0, 1, 2, 1)]))
    assert state.snapshot()["held"] == []
    assert state.members[1].state == "down"


def test_a_log_keeps_the_newest_entries_within_its_bounds() -> None:
    """Numbers go on; a reader behind the oldest one cannot continue."""
    log = EntryLog(max_entries=3, max_bytes=10)
    assert log.last == -1
    assert log.can_continue(-1)
    assert [log.append("ab") for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [log.can_continue(after) for after in (-1, 0, 1, 4, 5)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert log.read(2) == [[3, "ab"], [4, "ab"]]
    log.append("123456789")
    assert (len(log), log.last) == (1, 5)
    log.append("more bytes than the log may keep")
    assert log.read(5) == [[6, "more bytes than the log may keep"]]


def test_an_answer_has_at_least_one_entry_and_not_too_many() -> None:
    """A reader that is far behind asks several times, and gets everything once."""
    log = EntryLog()
    long = "x" * (entry_log.MAX_READ_BYTES // 2)
    for text in (long, long, long, long * 3, "y"):
        log.append(text)
    read: list[int] = []
    answers = 0
    while found := log.read(read[-1] if read else -1):
        read += [int(number) for number, _ in found]
        answers += 1
    assert read == [0, 1, 2, 3, 4]
    assert answers == 4
