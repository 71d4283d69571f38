"""Migrations inside a run: loads on their channel, service from the new place, safe drops."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.migration_step import MigrationStep
from tests.simulate.builders import (
    ENGINES,
    EXPERT_BYTES,
    HALF_RTT_S,
    LOAD_S,
    OVERHEAD_S,
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
