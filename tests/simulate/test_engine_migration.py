"""Migrations inside a run: loads on their channel, service from the new place, safe drops.

Execution tables change beside them: requests keep theirs, steps wait where they have to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.execution_table import TableChange, home_execution
from prism_plan.migration_step import MigrationStep
from tests.simulate.builders import (
    BYTES_PER_S,
    ENGINES,
    EXPERT_BYTES,
    HALF_RTT_S,
    LOAD_S,
    OVERHEAD_S,
    TOKEN_BYTES,
    Ask,
    back_s,
    dense_s,
    expert_s,
    finished,
    holding,
    lines,
    make_cluster,
    make_model,
    make_scenario,
    out_s,
)

pytestmark = pytest.mark.parametrize("engine", ENGINES)

D, E = dense_s(1), expert_s(1)
AWAY = OVERHEAD_S + out_s(1) + HALF_RTT_S + E + back_s(1) + HALF_RTT_S
#: Two servers of one GPU; server 0 holds expert 0 and server 1 the other three.
SPLIT = holding(1, 4, [(0, 0)], [(0, 1), (0, 2), (0, 3)])


def started(
    engine: Any, asks: list[Ask], held: np.ndarray = SPLIT, gpus: tuple[int, ...] = (1, 1)
) -> Any:
    _, layers, experts = held.shape
    return engine(
        make_scenario(make_model(layers, experts), make_cluster(gpus), held, asks), log=True
    )


def loaded(run: Any) -> list[tuple[float, int]]:
    """(time, GPU) of finished loads."""
    return [(event.time_s, event.to) for event in run.log() if event.kind == 7]


def test_loads_come_one_after_the_other(engine: Any) -> None:
    """Three loads on one GPU take turns, one on another runs beside them; bytes are counted."""
    run = started(engine, [])
    run.migrate(
        [
            MigrationStep("load", 0, 1),
            MigrationStep("load", 0, 2),
            MigrationStep("load", 1, 0),
            MigrationStep("load", 0, 3),
        ]
    )
    assert run.migrating
    run.advance()
    assert loaded(run) == [(LOAD_S, 0), (LOAD_S, 1), (2 * LOAD_S, 0), (3 * LOAD_S, 0)]
    assert not run.migrating
    assert run.on_gpu().all()
    outcome = run.outcome()
    assert (outcome.loads, outcome.loaded_bytes) == (4, 4 * EXPERT_BYTES)
    assert outcome.gpu_busy_s.tolist() == [0.0, 0.0]


def test_an_expert_serves_once_it_is_loaded(engine: Any) -> None:
    """Before the load is over calls go to the old place, after it they stay at home.

    A step that is routed at the very time of the load finds it done.
    """
    asks = [Ask(0, at_s, [], [[[1]]]) for at_s in (0.0, LOAD_S - D, 10.0)]
    run = started(engine, asks)
    run.migrate([MigrationStep("load", 0, 1)])
    assert not run.on_gpu()[0, 0, 1]
    outcome = finished(run)
    assert run.on_gpu()[0, 0, 1]
    assert outcome.done_s.tolist() == [D + AWAY, LOAD_S + E, 10.0 + D + E]
    assert outcome.remote_calls.tolist() == [1, 0]
    assert outcome.served.tolist() == [2, 1]


def test_steps_wait_for_what_they_need(engine: Any) -> None:
    """A drop after its load, a load after that drop; loads that are ready come in that order."""
    steps = [
        MigrationStep("load", 1, 0),
        MigrationStep("drop", 0, 0, (0,)),
        MigrationStep("load", 0, 1, (1,)),
        MigrationStep("drop", 1, 1, (2, 2, 0)),
        MigrationStep("load", 0, 2),
    ]
    run = started(engine, [])
    run.migrate(steps)
    run.advance(LOAD_S - 0.5)
    assert run.on_gpu()[:, 0].tolist() == SPLIT[:, 0].tolist()
    run.advance()
    # step 4 was ready first and holds GPU 0's channel until 4 s, when step 2 follows
    assert loaded(run) == [(LOAD_S, 1), (LOAD_S, 0), (2 * LOAD_S, 0)]
    expected = [[False, True, True, False], [True, False, True, True]]
    assert run.on_gpu()[:, 0].tolist() == expected
    assert not run.migrating
    assert run.log() == lines(
        (LOAD_S, "loaded", -1, -1, 1, 1),
        (LOAD_S, "loaded", -1, -1, 0, 0),
        (2 * LOAD_S, "loaded", -1, -1, 0, 0),
    )


def test_drops_are_done_at_once(engine: Any) -> None:
    """A migration of drops alone is over before time goes on, and takes no event."""
    run = started(engine, [], holding(1, 1, [(0, 0)], [(0, 0)]))
    run.advance(3.0)
    run.migrate([MigrationStep("drop", 0, 0)])
    assert not run.migrating
    assert run.on_gpu()[:, 0, 0].tolist() == [False, True]
    assert run.outcome().events == 0


@pytest.mark.parametrize("later", [False, True])
def test_the_only_copy_is_not_dropped(engine: Any, later: bool) -> None:
    """Whether at once or after a load: an error that names the step."""
    run = started(engine, [])
    if not later:
        with pytest.raises(ValueError, match="step 1 drops the only copy of pair 2"):
            run.migrate([MigrationStep("load", 0, 1), MigrationStep("drop", 1, 2)])
        return
    run.migrate([MigrationStep("load", 0, 1), MigrationStep("drop", 1, 2, (0,))])
    with pytest.raises(ValueError, match="step 1 drops the only copy of pair 2"):
        run.advance()


def test_dropping_what_is_not_there(engine: Any) -> None:
    """A drop of a copy that the GPU does not hold changes nothing."""
    run = started(engine, [Ask(0, 0.0, [], [[[1]]])])
    run.migrate([MigrationStep("drop", 0, 1), MigrationStep("drop", 1, 0)])
    assert run.on_gpu().tolist() == SPLIT.tolist()
    assert finished(run).done_s.tolist() == [D + AWAY]


def test_a_call_under_way_is_answered(engine: Any) -> None:
    """The copy that a message was sent to is dropped meanwhile: it computes all the same."""
    held = holding(1, 2, [(0, 0)], [(0, 1)], [(0, 1)])
    asks = [Ask(0, 0.0, [], [[[1]], [[1]]])]
    run = started(engine, asks, held, (1, 1, 1))
    run.advance(D + OVERHEAD_S)
    run.migrate([MigrationStep("drop", 1, 1)])
    outcome = finished(run)
    assert outcome.done_s.tolist() == [2 * (D + AWAY)]
    assert outcome.messages[0].tolist() == [0, 1, 1]
    assert outcome.served.tolist() == [0, 1, 1]


def test_a_copy_on_another_gpu_of_the_server(engine: Any) -> None:
    """Moved from GPU 1 to GPU 0 of one server: computed there from then on, at home all along."""
    held = holding(1, 1, [], [(0, 0)])
    run = started(engine, [Ask(0, 0.0, [], [[[0]]]), Ask(0, 9.0, [], [[[0]]])], held, (2,))
    run.migrate([MigrationStep("load", 0, 0), MigrationStep("drop", 1, 0, (0,))])
    outcome = finished(run)
    assert outcome.served.tolist() == [1, 1]
    assert outcome.remote_calls.tolist() == [0]
    assert run.on_gpu()[:, 0, 0].tolist() == [True, False]


def test_one_migration_at_a_time(engine: Any) -> None:
    """The next may begin when the last is over, and its loads follow."""
    run = started(engine, [])
    run.migrate([MigrationStep("load", 0, 1)])
    with pytest.raises(ValueError, match="still under way"):
        run.migrate([MigrationStep("load", 0, 2)])
    run.advance(10.0)
    run.migrate([MigrationStep("load", 0, 2)])
    run.advance()
    assert loaded(run) == [(LOAD_S, 0), (10.0 + LOAD_S, 0)]


def test_loads_that_block_the_gpu(engine: Any) -> None:
    """With `load_blocks_compute` a load waits for the GPU's work and delays what comes after it."""
    cluster = make_cluster([1, 1])
    slow = dataclasses.replace(cluster.servers[0].gpus[0], load_blocks_compute=True)
    first = dataclasses.replace(cluster.servers[0], gpus=(slow,))
    cluster = Cluster("c", (first, cluster.servers[1]), cluster.link)
    asks = [Ask(0, 0.0, [], [[[0]]])]
    run = engine(make_scenario(make_model(1, 4), cluster, SPLIT, asks), log=True)
    run.advance(0.5)
    run.migrate([MigrationStep("load", 0, 1), MigrationStep("load", 1, 0)])
    outcome = finished(run)
    # the dense part until 1 s, the load until 5 s, then the expert; server 1 loads from 0.5 s
    assert run.log()[1:] == lines(
        (D, "dense", 0, 0, 0, 0),
        (0.5 + LOAD_S, "loaded", -1, -1, 1, 1),
        (D + LOAD_S, "loaded", -1, -1, 0, 0),
        (D + LOAD_S + E, "local", 0, 0, 0, 0),
    )
    assert outcome.gpu_busy_s.tolist() == [D + LOAD_S + E, 0.0]


# -------------------------------------------------------------------------------- execution tables

HOME = home_execution(2, 2)
#: Requests of server 0 execute their second layer at server 1.
HANDED_ON = np.array([[0, 1], [1, 1]], np.int32)
#: An id and a hidden state between servers, from where they are ready to where they are needed.
ID = OVERHEAD_S + 4 / BYTES_PER_S + HALF_RTT_S
HOP = OVERHEAD_S + TOKEN_BYTES / BYTES_PER_S + HALF_RTT_S
BOTH_LAYERS = [(0, 0), (1, 0)]


def on_tables(engine: Any, asks: list[Ask], execution: np.ndarray = HOME, **changes: Any) -> Any:
    """Two servers that hold the one expert of both layers, begun with a table."""
    scenario = make_scenario(
        make_model(2, 1), make_cluster([1, 1], **changes), holding(2, 1, BOTH_LAYERS, BOTH_LAYERS),
        asks, execution=execution,
    )  # fmt: skip
    return engine(scenario, log=True)


def test_a_request_keeps_its_table(engine: Any) -> None:
    """The table changes at 2 s, in the second layer of the first pass of request 0.

    Request 0 runs both passes at home; request 1, which arrived before the change and was admitted
    after it, hands its second layer on. Every event is by hand.
    """
    token = [[0], [0]]
    asks = [Ask(0, 0.0, [], [token] * 2), Ask(0, 1.0, [], [token])]
    run = on_tables(engine, asks)
    run.advance(2.0)
    run.migrate([], TableChange(HANDED_ON, 0, 0))
    assert not run.migrating
    assert run.migration_end_s == 2.0
    assert run.tables_in_use().tolist() == [HANDED_ON.tolist(), HOME.tolist()]
    outcome = finished(run)
    layer = D + E
    first = 4 * layer  # when request 0 is answered and request 1 admitted
    sent = first + layer
    moved = sent + HOP
    made = moved + layer
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (1.0, "arrival", 1, -1, 0, 0),
        (layer, "local", 0, 0, 0, 0),
        (layer + D, "dense", 0, 1, 0, 0),
        (2 * layer, "local", 0, 1, 0, 0),
        (2 * layer + D, "dense", 0, 0, 0, 0),
        (3 * layer, "local", 0, 0, 0, 0),
        (3 * layer + D, "dense", 0, 1, 0, 0),
        (first, "local", 0, 1, 0, 0),
        (first + D, "dense", 1, 0, 0, 0),
        (sent, "local", 1, 0, 0, 0),
        (sent + OVERHEAD_S, "send", 1, 1, 0, 1),
        (sent + OVERHEAD_S + TOKEN_BYTES / BYTES_PER_S, "freed", 1, 1, 0, 1),
        (moved, "arrived", 1, 1, 0, 1),
        (moved + D, "dense", 1, 1, 1, 1),
        (made, "local", 1, 1, 1, 1),
        (made + OVERHEAD_S, "send", 1, 2, 1, 0),
        (made + OVERHEAD_S + 4 / BYTES_PER_S, "freed", 1, 2, 1, 0),
        (made + ID, "arrived", 1, 2, 1, 0),
    )
    assert outcome.start_s.tolist() == [0.0, first]
    assert outcome.done_s.tolist() == [first, made + ID]
    assert outcome.hops.tolist() == [[0, 1], [1, 0]]
    assert outcome.bytes_out.tolist() == [TOKEN_BYTES, 4]
    assert outcome.calls.tolist() == [6, 0]  # all are the home's
    assert run.tables_in_use().tolist() == [HANDED_ON.tolist()]


def test_dropped_experts_of_a_running_request_are_called(engine: Any) -> None:
    """A move drops the copy that a request on the old table uses: its later calls go remote."""
    token = [[0], [0]]
    run = on_tables(engine, [Ask(0, 0.0, [], [token])])
    run.advance(D)
    everything_away = np.array([[1, 1], [1, 1]], np.int32)
    run.migrate([MigrationStep("drop", 0, 1)], TableChange(everything_away, 0, 1))
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + E + D + AWAY]
    assert outcome.remote_calls.tolist() == [1, 0]
    assert outcome.hops.sum() == 0


def test_steps_wait_for_the_last_request_on_the_old_table(engine: Any) -> None:
    """A load that needs their KV bytes begins when the last one ends; the drop did not wait.

    Requests that are admitted meanwhile run on the new table and keep nothing waiting.
    """
    token = [[0], [0]]
    asks = [Ask(0, 0.0, [], [token]), Ask(1, 0.5, [], [token] * 3), Ask(0, 4.0, [], [token] * 8)]
    run = on_tables(engine, asks)
    run.advance(1.0)
    steps = [MigrationStep("drop", 0, 1), MigrationStep("load", 0, 1, (0,))]
    run.migrate(steps, TableChange(HANDED_ON, 0, 1))
    assert run.migrating
    assert run.on_gpu()[0].tolist() == [[True], [False]]
    outcome = finished(run)
    last = outcome.done_s[1]
    assert outcome.done_s[0] < 4.0 < last < outcome.done_s[2]
    assert loaded(run) == [(last + LOAD_S, 0)]
    assert run.migration_end_s == last + LOAD_S


def test_a_table_that_begins_after_steps(engine: Any) -> None:
    """Requests admitted before the load is complete keep the old table, later ones get the new."""
    token = [[0], [0]]
    asks = [Ask(0, at_s, [], [token]) for at_s in (0.0, LOAD_S - 0.5, LOAD_S + 0.5)]
    run = on_tables(engine, asks, concurrency=3)
    steps = [MigrationStep("load", 1, 0), MigrationStep("drop", 0, 1, (0,))]
    run.migrate([*steps, MigrationStep("load", 0, 1, (1,))], TableChange(HANDED_ON, 2, 2))
    assert run.tables_in_use().tolist() == [HOME.tolist()]
    run.advance(LOAD_S)
    assert run.tables_in_use().tolist() == [HANDED_ON.tolist(), HOME.tolist()]
    outcome = finished(run)
    assert outcome.hops.tolist() == [[0, 1], [1, 0]]  # of the third request alone
    # nobody ran on the old table when the second one had ended
    assert loaded(run) == [(LOAD_S, 1), (outcome.done_s[1] + LOAD_S, 0)]


def test_no_request_on_an_older_table(engine: Any) -> None:
    """Where nothing runs no step waits; a table that stays makes none wait either."""
    run = on_tables(engine, [])
    run.migrate([MigrationStep("load", 0, 0)], TableChange(HANDED_ON, 0, 0))
    run.advance()
    assert loaded(run) == [(LOAD_S, 0)]
    run = on_tables(engine, [Ask(0, 0.0, [], [[[0], [0]]] * 9)])
    run.advance(1.0)
    run.migrate([MigrationStep("load", 0, 0)], TableChange(HOME, 0, 0))
    finished(run)
    assert loaded(run) == [(1.0 + LOAD_S, 0)]


def test_a_second_change_counts_all_older_requests(engine: Any) -> None:
    """Steps wait for requests on either of two older tables, also where a table comes again."""
    token = [[0], [0]]
    asks = [Ask(0, 0.0, [], [token] * 4), Ask(0, 2.5, [], [token]), Ask(0, 4.5, [], [token] * 9)]
    run = on_tables(engine, asks, concurrency=3)
    run.advance(2.0)
    run.migrate([], TableChange(HANDED_ON, 0, 0))
    run.advance(4.0)
    run.migrate([MigrationStep("load", 1, 0)], TableChange(HOME, 0, 0))
    run.advance(5.0)
    assert run.tables_in_use().tolist() == [HOME.tolist(), HANDED_ON.tolist(), HOME.tolist()]
    outcome = finished(run)
    assert outcome.done_s[1] < outcome.done_s[0] < outcome.done_s[2]
    assert loaded(run) == [(outcome.done_s[0] + LOAD_S, 1)]


def test_changes_that_make_no_sense(engine: Any) -> None:
    """A table begins at once, or after the steps that do not wait."""
    for begins_after, waits_from in ((1, 2), (2, 1), (-1, -1)):
        with pytest.raises(ValueError, match=f"begins after {begins_after}"):
            TableChange(HOME, begins_after, waits_from)
