"""Servers that are lost and come back: times by hand, and what becomes of every request."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.execution_table import home_execution
from prism_plan.instance import Instance
from prism_plan.io.cluster import read_cluster
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.compiled.compiled_losses import CompiledEngineWithLosses
from prism_plan.simulate.losses import HELD_NOWHERE, LOST, WAITED_TOO_LONG, Loss, LossPlan
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.reference_losses import ReferenceEngineWithLosses
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.scenario import Scenario
from prism_plan.solvers import solve
from prism_plan.trace import Trace
from tests.conftest import ROOT
from tests.simulate.builders import (
    BYTES_PER_S,
    HALF_RTT_S,
    LOAD_S,
    OVERHEAD_S,
    TOKEN_BYTES,
    Ask,
    back_s,
    dense_s,
    differing,
    drawn_scenario,
    expert_s,
    finished,
    holding,
    lines,
    make_cluster,
    make_model,
    make_scenario,
    out_s,
)
from tests.simulate.drawn_losses import drawn_run, run_with_losses

SEEDS = st.integers(0, 2**32)
ENGINES: list[Any] = [ReferenceEngineWithLosses, CompiledEngineWithLosses]


@pytest.fixture(params=ENGINES, ids=["reference", "compiled"])
def engine(request: pytest.FixtureRequest) -> Any:
    """Each engine in turn."""
    return request.param


#: Of one token: the dense part, an expert, and a call of one expert from its routing to its answer.
D, E = dense_s(1), expert_s(1)
AWAY = OVERHEAD_S + out_s(1) + HALF_RTT_S + E + back_s(1) + HALF_RTT_S
#: When a call is on the link, at the other server, computed, and its answer on its way home.
SENT = D + OVERHEAD_S
THERE = SENT + out_s(1) + HALF_RTT_S
COMPUTED = THERE + E
UNDER_WAY = COMPUTED + back_s(1)
#: Server 0 lacks expert 1, which the servers 1 and 2 hold; the first of them is called.
TWICE = holding(1, 2, [(0, 0)], [(0, 1)], [(0, 1)])
HOME = home_execution(3, 1)
CALL = [[1]]


def started(
    engine: Any, asks: list[Ask], held: np.ndarray = TWICE, execution: np.ndarray | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """An engine for servers of one GPU."""
    gpus, layers, experts = held.shape
    scenario = make_scenario(
        make_model(layers, experts), make_cluster([1] * gpus), held, asks, execution=execution,
        restarts=True,
    )  # fmt: skip
    return engine(scenario, log=True, **options)


@pytest.mark.parametrize("lost_s", [0.5, SENT + 0.1, THERE - 0.01, THERE + 0.1, COMPUTED + 0.1])
def test_a_call_waits_until_the_loss_is_known(engine: Any, lost_s: float) -> None:
    """Wherever the call is when its server is lost: sent again at the notice, as if routed then."""
    run = started(engine, [Ask(0, 0.0, [], [CALL])])
    run.advance(lost_s)
    run.lose(1)
    run.advance(lost_s + 10.0)
    assert not run.all_finished
    run.notice(1, [], HOME)
    outcome = finished(run)
    assert outcome.done_s.tolist() == pytest.approx([lost_s + 10.0 + AWAY], abs=1e-12)
    assert run.losses().repeated_calls == 1
    assert outcome.messages[0].tolist() == [0, 1, 1]
    assert (outcome.calls.tolist(), outcome.steps.tolist()) == ([1, 0, 0], [1, 0, 0])
    assert not run.on_gpu()[1].any()


def test_an_answer_under_way_arrives(engine: Any) -> None:
    """What the server sent completely before it was lost is received."""
    run = started(engine, [Ask(0, 0.0, [], [CALL])])
    run.advance(UNDER_WAY)
    run.lose(1)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + AWAY]


def test_ports_of_cut_transfers_are_free_at_once(engine: Any) -> None:
    """A message to another server that waits for the same uplink starts at the loss.

    Request 1 calls server 2 while request 0's message to server 1 is on the uplink of server 0.
    """
    held = holding(1, 3, [], [(0, 0)], [(0, 1), (0, 0)])
    asks = [Ask(0, 0.0, [], [[[0]]])]
    cluster = make_cluster([1, 1, 1], concurrency=2)
    scenario = make_scenario(make_model(1, 3), cluster, held, [*asks, Ask(0, 0.0, [], [[[1]]])])
    run = engine(scenario, log=True)
    run.advance(SENT + 0.125)
    run.lose(1)
    assert run.outcome().up_busy_s.tolist() == [0.125, 0.0, 0.0]
    run.advance(D + D + OVERHEAD_S + 1.0)
    sent = [e for e in run.log() if e.kind == 8 and e.request == 1]
    assert sent[0].time_s == 2 * D + OVERHEAD_S + out_s(1)


def test_nobody_knows_before_the_notice(engine: Any) -> None:
    """A request that comes after the loss calls the lost server, waits, and is served elsewhere."""
    run = started(engine, [Ask(0, 3.0, [], [CALL])])
    run.advance(1.0)
    run.lose(1)
    run.advance(11.0)
    run.notice(1, [], HOME)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [11.0 + AWAY]
    assert run.log() == lines(
        (3.0, "arrival", 0, -1, 0, 0),
        (3.0 + D, "dense", 0, 0, 0, 0),
        (3.0 + SENT, "send", 0, 0, 0, 1),
        (11.0 + OVERHEAD_S, "send", 0, 0, 0, 2),
        (11.0 + OVERHEAD_S + out_s(1), "freed", 0, 0, 0, 2),
        (11.0 + OVERHEAD_S + out_s(1) + HALF_RTT_S, "arrived", 0, 0, 0, 2),
        (11.0 + OVERHEAD_S + out_s(1) + HALF_RTT_S + E, "computed", 0, 0, 0, 2),
        (11.0 + AWAY - HALF_RTT_S, "freed", 0, 0, 0, 2),
        (11.0 + AWAY, "returned", 0, 0, 0, 2),
    )


def test_a_lost_home_loses_its_requests(engine: Any) -> None:
    """Those in progress and in the queue; those of other homes are not touched.

    What server 2 has queued for it is computed, so that the call of server 0 waits for it.
    """
    held = holding(1, 2, [(0, 0)], [(0, 0)], [(0, 1)])
    asks = [Ask(1, 0.0, [], [CALL]), Ask(1, 0.0, [], [CALL]), Ask(0, 0.0625, [], [CALL])]
    run = started(engine, asks, held)
    run.advance(THERE)
    run.lose(1)
    assert run.num_finished == 0
    run.advance(THERE + 10.0)
    run.notice(1, [], HOME)
    outcome = finished(run)
    losses = run.losses()
    assert losses.left_s[:2].tolist() == [THERE, THERE]
    assert losses.why.tolist() == [LOST, LOST, 0]
    assert np.isnan(outcome.done_s).tolist() == [True, True, False]
    other_there = 0.0625 + OVERHEAD_S + D + 2 * out_s(1) + HALF_RTT_S  # the downlink of server 2
    assert outcome.done_s[2] >= other_there
    assert outcome.present_s.tolist() == pytest.approx([outcome.done_s[2] - 0.0625, 2 * THERE, 0])


def test_an_expert_that_nobody_holds(engine: Any) -> None:
    """Without a repair the request fails at the notice; the next one of its home is admitted."""
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    asks = [Ask(0, 0.0, [], [CALL]), Ask(0, 0.0, [], [[[0]]])]
    run = started(engine, asks, held)
    run.advance(0.0)
    run.lose(1)
    run.advance(10.0)
    run.notice(1, [], home_execution(2, 1))
    outcome = finished(run)
    assert run.losses().why.tolist() == [HELD_NOWHERE, 0]
    assert run.losses().left_s[0] == 10.0
    assert outcome.done_s[1] == 10.0 + D + E
    assert outcome.present_s[0] == 10.0 + 10.0 + D + E


def test_an_expert_that_is_being_loaded(engine: Any) -> None:
    """A call that a repair will serve goes on when the load is complete, here or elsewhere."""
    held = holding(1, 2, [(0, 0)], [(0, 1)], [(0, 0)])
    for gpu, seconds in ((0, E), (2, AWAY)):
        run = started(engine, [Ask(0, 0.0, [], [CALL])], held)
        run.advance(0.0)
        run.lose(1)
        run.advance(10.0)
        run.notice(1, [MigrationStep("load", gpu, 1)], HOME)
        outcome = finished(run)
        assert outcome.done_s.tolist() == pytest.approx([10.0 + LOAD_S + seconds], abs=1e-12)
        assert outcome.calls.tolist() == [1, 0, 0]


def test_a_step_that_comes_later_waits_too(engine: Any) -> None:
    """It is routed as a whole when its last expert is there, and counted then."""
    held = holding(1, 3, [(0, 0)], [(0, 1), (0, 2)])
    run = started(engine, [Ask(0, 10.0, [[[1]], [[2]], [[0]]])], held)
    run.advance(0.0)
    run.lose(1)
    run.advance(10.0)
    steps = [MigrationStep("load", 0, 1), MigrationStep("load", 0, 2)]
    run.notice(1, steps, home_execution(2, 1))
    run.advance(10.0 + 2 * LOAD_S - 0.25)
    assert run.outcome().calls.tolist() == [0, 0]
    outcome = finished(run)
    assert outcome.done_s.tolist() == [10.0 + 2 * LOAD_S + 3 * E]
    assert outcome.remote_calls.tolist() == [0, 0]


def test_waiting_too_long(engine: Any) -> None:
    """After the request timeout it fails, though the load comes later."""
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    run = started(engine, [Ask(0, 0.0, [], [CALL])], held, request_timeout_s=LOAD_S / 2)
    run.advance(0.0)
    run.lose(1)
    run.advance(10.0)
    run.notice(1, [MigrationStep("load", 0, 1)], home_execution(2, 1))
    assert run.advance()
    assert run.all_finished
    assert run.losses().why.tolist() == [WAITED_TOO_LONG]
    assert run.losses().left_s.tolist() == [10.0 + LOAD_S / 2]
    assert run.on_gpu()[0, 0, 1]


def test_a_second_loss_gives_the_repair_up(engine: Any) -> None:
    """The loads that were not complete begin anew elsewhere, and the request waits on for them."""
    held = holding(1, 2, [(0, 0)], [(0, 1)], [(0, 0)])
    run = started(engine, [Ask(0, 0.0, [], [CALL])], held)
    run.advance(0.0)
    run.lose(1)
    run.advance(10.0)
    run.notice(1, [MigrationStep("load", 2, 1)], HOME)
    run.advance(11.0)
    run.lose(2)
    run.advance(21.0)
    assert run.migrating
    run.notice(2, [MigrationStep("load", 0, 1)], HOME)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [21.0 + LOAD_S + E]
    assert run.on_gpu()[:, 0].tolist() == [[True, True], [False, False], [False, False]]


def test_a_server_comes_back(engine: Any) -> None:
    """Its users are served again from its return on; its experts serve once they are loaded."""
    asks = [Ask(1, 20.0 + D, [], [CALL]), Ask(0, 20.0 + LOAD_S + 1.0, [], [CALL])]
    run = started(engine, asks)
    run.advance(0.0)
    run.lose(1)
    run.advance(10.0)
    run.notice(1, [], HOME)
    run.advance(20.0)
    run.rejoin(1, [MigrationStep("load", 1, 1), MigrationStep("drop", 2, 1, (0,))], HOME)
    outcome = finished(run)
    assert outcome.done_s[0] == pytest.approx(20.0 + 2 * D + AWAY)
    assert outcome.messages.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert run.on_gpu()[:, 0, 1].tolist() == [False, True, False]


# -------------------------------------------------------------------------------- execution tables

#: Three servers that hold the one expert of two layers, and tables by home.
EVERYWHERE = holding(2, 1, *[[(0, 0), (1, 0)]] * 3)
OVER_1 = np.array([[0, 1], [1, 1], [2, 2]], np.int32)
OVER_2 = np.array([[0, 2], [1, 1], [2, 2]], np.int32)
TOKEN = [[0], [0]]
LAYER = D + E


def hop_s(payload: int) -> float:
    """A message between spans, from where it is ready to where it is needed."""
    return OVERHEAD_S + payload / BYTES_PER_S + HALF_RTT_S


#: A pass over one token, from its start at server 0 until its id is back there.
PASS = LAYER + hop_s(TOKEN_BYTES) + LAYER + hop_s(4)


def test_a_request_starts_again_without_its_span_server(engine: Any) -> None:
    """Prompt and tokens at home are prefilled in one pass on the new table; no id comes twice.

    Two of four tokens are at home at the loss: a pass over four tokens makes the third.
    """
    run = started(engine, [Ask(0, 0.0, [TOKEN] * 2, [TOKEN] * 3)], EVERYWHERE, OVER_1)
    prefill = (dense_s(2) + expert_s(2)) * 2 + hop_s(2 * TOKEN_BYTES) + hop_s(4)
    lost_s = prefill + PASS + LAYER / 2
    run.advance(lost_s)
    run.lose(1)
    run.advance(lost_s + 10.0)
    run.notice(1, [], OVER_2)
    outcome = finished(run)
    again = (dense_s(4) + expert_s(4)) * 2 + hop_s(4 * TOKEN_BYTES) + hop_s(4)
    assert outcome.first_token_s.tolist() == pytest.approx([prefill], abs=1e-12)
    assert outcome.done_s.tolist() == pytest.approx([lost_s + 10.0 + again + PASS], abs=1e-12)
    assert run.losses().restarts.tolist() == [1]
    assert run.tables_in_use().tolist() == [OVER_2.tolist()]


def test_a_prompt_starts_again_elsewhere(engine: Any) -> None:
    """With nothing at home the new first span gets the ids of the prompt, 4 bytes each."""
    everything_at_1, at_2 = np.full((3, 2), 1, np.int32), np.full((3, 2), 2, np.int32)
    run = started(engine, [Ask(0, 0.0, [TOKEN] * 5, [TOKEN])], EVERYWHERE, everything_at_1)
    run.advance(0.5)
    run.lose(1)
    run.advance(10.5)
    run.notice(1, [], at_2)
    outcome = finished(run)
    first = 10.5 + hop_s(5 * 4) + 2 * (dense_s(5) + expert_s(5)) + hop_s(4)
    assert outcome.first_token_s.tolist() == pytest.approx([first], abs=1e-12)
    assert outcome.done_s.tolist() == pytest.approx([first + 2 * LAYER], abs=1e-12)
    assert outcome.hops.tolist() == [[0, 1, 1], [0, 0, 0], [2, 0, 0]]


def test_tables_begin_at_once_and_after_the_migration(engine: Any) -> None:
    """A table without the server from the notice on, the planned one when its experts are back."""
    asks = [Ask(0, at_s, [], [TOKEN]) for at_s in (12.0, 20.0 + LOAD_S - 1, 20.0 + 2 * LOAD_S + 1)]
    run = started(engine, asks, EVERYWHERE, OVER_1)
    run.advance(0.0)
    run.lose(1)
    run.advance(10.0)
    run.notice(1, [], OVER_2)
    run.advance(20.0)
    steps = [MigrationStep("load", 1, pair) for pair in (0, 1)]
    run.rejoin(1, steps, OVER_2, OVER_1)
    outcome = finished(run)
    assert outcome.hops.tolist() == [[0, 1, 2], [1, 0, 0], [2, 0, 0]]
    assert run.tables_in_use().tolist() == [OVER_1.tolist()]
    assert run.migration_end_s == 20.0 + 2 * LOAD_S


def test_a_table_that_does_not_name_the_server_goes_on(engine: Any) -> None:
    """Only requests with layers at the lost server begin again."""
    asks = [Ask(0, 0.0, [], [TOKEN] * 3), Ask(2, 0.0, [], [TOKEN] * 3)]
    run = started(engine, asks, EVERYWHERE, OVER_1)
    run.advance(LAYER)
    run.lose(1)
    run.advance(LAYER + 10.0)
    run.notice(1, [], OVER_2)
    outcome = finished(run)
    assert run.losses().restarts.tolist() == [1, 0]
    assert outcome.done_s[1] == 6 * LAYER


# ------------------------------------------------------------------------------- drawn at random


def checked(engine: Any, plan: LossPlan) -> None:
    """After a run: each request was answered or has left, and nothing of it is still counted."""
    scenario, outcome, losses = engine.scenario, engine.outcome(), engine.losses()
    requests = scenario.requests
    assert engine.all_finished
    answered, left = np.isfinite(outcome.done_s), np.isfinite(losses.left_s)
    assert (answered ^ left).all()
    assert (left == (losses.why > 0)).all()
    names = np.array(requests.servers)[requests.home]
    assert set(names[losses.why == LOST]) <= {loss.server for loss in plan.losses}
    spent_s = np.where(answered, outcome.done_s, losses.left_s) - requests.arrival_s
    by_home = np.bincount(requests.home, spent_s, minlength=len(requests.servers))
    np.testing.assert_allclose(outcome.present_s, by_home, atol=1e-9)
    assert (outcome.first_token_s[answered] <= outcome.done_s[answered]).all()
    assert not losses.restarts[np.isnan(outcome.start_s)].any()


@settings(max_examples=300)
@given(
    seed=SEEDS,
    ties=st.booleans(),
    contended=st.booleans(),
    repair=st.booleans(),
    most=st.sampled_from([None, 1, 7]),
)
def test_engines_are_equal_under_losses(
    seed: int, ties: bool, contended: bool, repair: bool, most: int | None
) -> None:
    """Every event and figure, to the last bit, and every request comes to an end.

    Under any losses, migrations and tables, also where the compiled engine runs in pieces.
    """
    scenario, plan = drawn_run(np.random.default_rng(seed), ties=ties, contended=contended)
    runs = []
    for kind, pieces in ((ReferenceEngineWithLosses, None), (CompiledEngineWithLosses, most)):
        run = kind(scenario, request_timeout_s=plan.request_timeout_s, log=True)
        rng = np.random.default_rng(seed + 1)
        run_with_losses(run, plan, rng, repair=repair, max_events=pieces)
        checked(run, plan)
        runs.append(run)
    reference, compiled = runs
    assert compiled.log() == reference.log()
    assert not differing(compiled.outcome(), reference.outcome())
    assert np.array_equal(compiled.on_gpu(), reference.on_gpu())
    assert np.array_equal(compiled.tables_in_use(), reference.tables_in_use())
    assert np.array_equal(compiled.take_calls(), reference.take_calls())
    assert compiled.migrating == reference.migrating
    losses = [vars(run.losses()) for run in runs]
    for name, value in losses[0].items():
        assert np.array_equal(value, losses[1][name], equal_nan=name == "left_s"), name


@settings(max_examples=60)
@given(seed=SEEDS, ties=st.booleans())
def test_requests_outlive_servers_that_hold_copies(seed: int, ties: bool) -> None:
    """Where every server holds every expert only requests of lost homes have no answer."""
    rng = np.random.default_rng(seed)
    scenario, plan = drawn_run(rng, ties=ties)
    placement = scenario.placement
    held = np.ones_like(placement.on_gpu)
    plan = LossPlan(tuple(dataclasses.replace(loss, return_s=None) for loss in plan.losses[:1]))
    scenario = dataclasses.replace(
        scenario,
        placement=placement.replace(on_gpu=held),
        requests=plan.served(scenario.requests),
    )
    run = CompiledEngineWithLosses(scenario)
    run_with_losses(run, plan, rng, moves=False)
    checked(run, plan)
    assert set(run.losses().why) <= {0, LOST}


@settings(max_examples=40)
@given(seed=SEEDS, ties=st.booleans(), contended=st.booleans())
def test_without_losses_it_is_the_engine_without(seed: int, ties: bool, contended: bool) -> None:
    """The same events and figures, to the last bit."""
    scenario, _ = drawn_run(np.random.default_rng(seed), ties=ties, contended=contended)
    for plain, with_losses in (
        (ReferenceEngine, ReferenceEngineWithLosses),
        (CompiledEngine, CompiledEngineWithLosses),
    ):
        engine, run = plain(scenario, log=True), with_losses(scenario, log=True)
        assert not differing(finished(engine), finished(run))
        assert run.log() == engine.log()


def test_room_grows_where_losses_need_it() -> None:
    """90 requests at once start again, and their calls are sent again: more room than at first."""
    token = [[1], [1]]
    held = holding(2, 2, [(0, 0), (1, 0)], *[[(0, 1), (1, 1)]] * 2)
    asks = [Ask(0, float(n % 3), [], [token]) for n in range(90)]
    cluster = make_cluster([1, 1, 1], concurrency=90)
    model = make_model(2, 2)
    for execution in (np.array([[0, 0], [1, 1], [2, 2]]), np.array([[0, 2], [1, 1], [2, 2]])):
        runs = []
        for kind in ENGINES:
            scenario = make_scenario(model, cluster, held, asks, execution=execution, restarts=True)
            run = kind(scenario, log=True)
            run.advance(3.0)
            run.lose(2)
            run.advance(210.0)
            run.notice(2, [], home_execution(3, 2))
            run.advance(211.0)
            run.rejoin(2, [MigrationStep("load", 2, 1)], home_execution(3, 2))
            finished(run)
            runs.append(run)
        assert runs[0].log() == runs[1].log()
        assert runs[1].losses().repeated_calls + runs[1].losses().restarts.sum() > 40


def test_what_the_engines_do_not_do() -> None:
    """Offloading servers help nobody; more calls of a token than a number has bits."""
    scenario = drawn_scenario(np.random.default_rng(0), offload=True)
    for kind in ENGINES:
        with pytest.raises(ValueError, match="offloading servers do not help"):
            kind(scenario)
    wide = make_scenario(
        make_model(1, 63, 63), make_cluster([1]), np.ones((1, 1, 63)), [], route="nearest"
    )
    with pytest.raises(InputError, match=r"^lose: top_k 63; expected at most 62 for the compiled"):
        CompiledEngineWithLosses(wide)


@pytest.mark.traces
@pytest.mark.parametrize("solver", ["redundance", "pipeline"])
def test_engines_are_equal_on_the_real_trace(v2_trace: Trace, solver: str) -> None:
    """A few requests of DeepSeek-V2-Lite, with a loss and a return while they run."""
    cluster = read_cluster(ROOT / "traces" / "paper-v2lite.toml")
    instance = Instance.build(v2_trace, cluster)
    requests = sample_requests(v2_trace, cluster, requests_per_server=2, decode_tokens=8)
    first_s = float(requests.arrival_s[0])
    served = LossPlan((Loss("edge-1", first_s + 0.1, first_s + 0.4),)).served(requests)
    scenario = Scenario.build(
        solve(instance, solver), served, cluster, v2_trace.model, restarts=True
    )
    table = home_execution(3, v2_trace.model.num_layers)
    logs = []
    for kind in ENGINES:
        run = kind(scenario, log=True)
        run.advance(first_s + 0.1)
        run.lose(1)
        run.advance(first_s + 0.2)
        nowhere = ~scenario.placement.local[[0, 2]].any(axis=0)
        steps = [MigrationStep("load", 2, int(pair)) for pair in np.flatnonzero(nowhere)]
        run.notice(1, steps, table)
        run.advance(first_s + 0.4)
        run.rejoin(1, steps, table)
        assert run.advance()
        assert run.all_finished
        logs.append(run.log())
    assert logs[0] == logs[1]
    assert len(logs[0]) > 5_000
