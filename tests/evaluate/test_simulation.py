"""Whole simulations: fair comparison, the same bytes from one seed, reviews that move experts."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature, WrongModel
from prism_plan.evaluate import simulation
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.simulation import Simulation, dump_report, simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.evaluate.simulation_runner import SimulationRunner
from prism_plan.instance import Instance
from prism_plan.placement import Placement
from prism_plan.simulate.phase_schedule import Phase, Schedule
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.requests import Requests
from prism_plan.solvers import solve
from prism_plan.trace import Trace
from tests.evaluate.simulation_material import (
    SPEC,
    planned,
    sampled,
    simulated,
    small_cluster,
    small_trace,
    without_times,
)
from tests.profiling.synthetic import synthetic_trace

#: After 150 requests of each server the users of a and b have swapped their tasks.
SHIFT = Schedule(
    (Phase(requests=150), Phase(tasks={"a": {"y": 1.0}, "b": {"x": 1.0}, "c": {"y": 1.0}}))
)


def run_shift(policy: str, number: int = 600, **options: Any) -> Simulation:
    """The shift under a policy, from the plan for the tasks before it."""
    trace, cluster = small_trace(), small_cluster(("0.04", "0.02"))
    values = {"migrate": policy, "migrate_every_s": 1.0, "half_life_s": 1.0, **options}
    return simulate_placements(
        planned(trace, cluster, "exact"),
        sampled(trace, cluster, number, schedule=SHIFT),
        trace,
        cluster,
        SimulationOptions(**values),
    )


# ------------------------------------------------------------------------------ fair and repeatable


def same_requests(a: Requests, b: Requests) -> bool:
    """Whether two runs were asked for the same."""
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("home", "arrival_s", "prompt")
    )


def test_runs_see_the_same_requests() -> None:
    """All placements get the same requests, whatever else is compared and however it is routed."""
    trace, cluster = small_trace(), small_cluster()
    alone = simulated(trace, cluster, "exact").runs
    among = simulated(trace, cluster, "uniform", "exact", "redundance").runs
    routed = simulated(trace, cluster, "exact", route="spread").runs
    requests = alone[0].scenario.requests
    for run in (*among, *routed):
        assert same_requests(run.scenario.requests, requests)
    assert without_times(among[1].to_json()) == without_times(alone[0].to_json())


@pytest.mark.parametrize("policy", ["never", "prism", "partial"])
def test_same_seed_same_report(policy: str) -> None:
    """One seed gives one report, but for the time it took; another seed another one."""

    def report(seed: int, engine: str = "compiled") -> Any:
        trace, cluster = small_trace(), small_cluster()
        return without_times(
            simulate_placements(
                planned(trace, cluster, "redundance", "exact"),
                sampled(trace, cluster, 30, seed=seed),
                trace,
                cluster,
                SimulationOptions(
                    migrate=policy,  # type: ignore[arg-type]
                    migrate_every_s=0.2,
                    seed=seed,
                    engine=engine,  # type: ignore[arg-type]
                ),
            ).to_json()
        )

    assert report(3) == report(3)
    assert report(3, "reference") == report(3)
    assert report(4)["runs"] != report(3)["runs"]


# ------------------------------------------------------------------------------------------ reviews


def test_never_means_never() -> None:
    """Without a policy there are no reviews and no loads."""
    (run,) = run_shift("never").runs
    assert run.migrations == ()
    assert run.outcome.loads == 0


def test_moving_pays_after_a_shift() -> None:
    """After users swap tasks both policies answer faster than staying, by a quarter at least."""
    latency_s = {}
    for policy in ("never", "prism", "partial"):
        (run,) = run_shift(policy).runs
        shifted = run.scenario.requests.arrival_s > 6.0  # from 3 s on users ask for other tasks
        latency_s[policy] = run.latency_s[shifted].mean()
    assert latency_s["prism"] < 0.75 * latency_s["never"]
    assert latency_s["partial"] < 0.75 * latency_s["never"]


@pytest.mark.parametrize("engine", ["compiled", "reference"])
@pytest.mark.parametrize("every_s", [0.05, 0.31, 1e6])
def test_reviews_that_stay_change_nothing(every_s: float, engine: str) -> None:
    """Without a move the run is the one without reviews: its length, its busy shares, all of it."""
    trace, cluster = small_trace(), small_cluster()
    plans, requests = planned(trace, cluster, "uniform"), sampled(trace, cluster, 20)
    reports = []
    for policy in ("never", "partial"):
        options = SimulationOptions(
            migrate=policy,  # type: ignore[arg-type]
            migrate_every_s=every_s,
            horizon_s=1e-9,
            engine=engine,  # type: ignore[arg-type]
        )
        result = simulate_placements(plans, requests, trace, cluster, options)
        reports.append(without_times(result.to_json()["runs"][0]))
    assert all(review["decision"] == "stay" for review in reports[1]["migrations"])
    assert bool(reports[1].pop("migrations")) == (every_s < 1)
    assert reports[0].pop("migrations") == []
    assert reports[1] == reports[0]


@pytest.mark.parametrize("policy", ["prism", "partial"])
def test_reviews_are_told(policy: str) -> None:
    """Reviews stand at multiples of the period; moves end after they begin and before the next."""
    (run,) = run_shift(policy).runs
    times_s = [review.at_s for review in run.migrations]
    assert times_s == [1.0 * (i + 1) for i in range(len(times_s))]
    assert times_s[-1] <= np.nanmax(run.outcome.done_s) < times_s[-1] + 1.0
    moves = [review for review in run.migrations if review.decision == "move"]
    assert len(moves) >= 2
    for review in moves:
        assert review.finished_at_s is not None
        assert review.at_s < review.finished_at_s
        assert review.moved_experts > 0
        assert review.moved_bytes == review.moved_experts * 1_000_000
        assert review.saving_s is not None
        assert review.cost_s is not None
        assert review.saving_s > review.cost_s
    others = [review for review in run.migrations if review.decision != "move"]
    assert all(review.finished_at_s is None for review in others)
    assert run.outcome.loads >= sum(review.moved_experts for review in moves)


def test_loads_that_take_long_keep_the_next_reviews_busy() -> None:
    """While a move is under way reviews decide nothing; the move ends when it ends."""
    trace = small_trace()
    cluster = small_cluster(("slots = 11", "slots = 11\nload_gbs = 0.005"))  # 0.2 s an expert
    plan = planned(trace, cluster, "uniform")
    options = SimulationOptions(migrate="prism", migrate_every_s=0.1, horizon_s=1e4)
    result = simulate_placements(plan, sampled(trace, cluster, 200), trace, cluster, options)
    reviews = result.runs[0].migrations
    first, second = reviews[:2]
    assert (first.decision, second.decision) == ("move", "busy")
    assert (second.saving_s, second.cost_s, second.moved_experts) == (None, None, 0)
    for at, review in enumerate(reviews):
        if review.decision == "move" and review.finished_at_s is not None:
            during = [r for r in reviews[at + 1 :] if r.at_s < review.finished_at_s]
            assert all(r.decision == "busy" for r in during)
            after = [r for r in reviews[at + 1 :] if r.at_s > review.finished_at_s]
            assert not after or after[0].decision != "busy"
    assert first.finished_at_s is not None
    assert first.finished_at_s > 0.1 + 2 * 0.2


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runners of the simulations to come, with what their engines and reviews saw."""
    made: list[Any] = []

    class Runner(SimulationRunner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.taken = 0
            self.targets: list[Placement] = []
            take = self.engine.take_calls

            def take_calls() -> Any:
                calls = take()
                self.taken += int(calls.sum())
                return calls

            self.engine.take_calls = take_calls  # type: ignore[method-assign]
            made.append(self)

        def _start_migration(self, current: Placement, target: Placement, rates: Any) -> bool:
            moving = super()._start_migration(current, target, rates)
            if moving:
                self.targets.append(target)
            return moving

    monkeypatch.setattr(simulation, "SimulationRunner", Runner)
    return made


@pytest.mark.parametrize("engine", ["compiled", "reference"])
def test_reviews_count_every_call_once(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """The calls that reviews were told of and those since the last one are all of the run's."""
    made = watched(monkeypatch)
    (run,) = run_shift("partial", number=200, engine=engine).runs
    (runner,) = made
    told = runner.taken
    assert 0 < told < run.outcome.calls.sum()
    assert told + runner.engine.take_calls().sum() == run.outcome.calls.sum()


@pytest.mark.parametrize("policy", ["prism", "partial"])
def test_experts_end_where_the_last_move_put_them(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """After the run each GPU serves what the last target says, and the report counts that."""
    made = watched(monkeypatch)
    result = run_shift(policy)
    (runner,) = made
    assert len(runner.targets) >= 2
    assert np.array_equal(runner.engine.on_gpu(), runner.targets[-1].on_gpu)
    gpus = [g for s in result.to_json()["runs"][0]["servers"] for g in s["gpus"]]
    assert [g["experts"] for g in gpus] == runner.targets[-1].on_gpu.sum(axis=(1, 2)).tolist()


def test_partial_costs_no_more_than_prism() -> None:
    """Of the first review, under the same statistics, `partial` leaves the lower total cost."""
    for cost in ("sum", "max"):
        for plan in ("uniform", "smartmoe"):
            gain_s = []
            for policy in ("prism", "partial"):
                result = simulated(
                    small_trace(), small_cluster(), plan,
                    migrate=policy, migrate_every_s=0.3, migration_cost=cost,
                )  # fmt: skip
                first = result.runs[0].migrations[0]
                assert first.decision == "move"
                gain_s.append(first.saving_s - first.cost_s)
            assert gain_s[1] >= gain_s[0] - 1e-12


def full_cluster() -> Cluster:
    """24 slots for 24 experts: no copy to spare, no free slot."""
    return small_cluster(("slots = 11", "slots = 8"), ("slots = 8\n[[server.gpu]]\nslots = 3", "slots = 8"))  # fmt: skip  # noqa: E501


def test_a_move_that_cannot_be_ordered_is_noted() -> None:
    """Without any slack experts cannot swap places: the review stays, and one note says why."""
    trace, cluster = small_trace(), full_cluster()
    result = simulate_placements(
        planned(trace, cluster, "uniform"),
        sampled(trace, cluster, 60),
        trace,
        cluster,
        SimulationOptions(migrate="partial", migrate_every_s=0.2),
    )
    run = result.runs[0]
    assert len(run.migrations) >= 3
    assert all(review.decision == "stay" for review in run.migrations)
    assert run.migrations[0].saving_s > run.migrations[0].cost_s  # type: ignore[operator]
    assert run.outcome.loads == 0
    assert any(note.startswith("uniform: a move was not made: infeasible") for note in result.notes)
    assert len(set(result.notes)) == len(result.notes)


def test_replicas_that_a_move_cannot_keep_are_noted() -> None:
    """Two replicas on full servers: the moves are made, and a note tells of experts with one.

    With a free slot on one server both are kept, and nothing is noted.
    """
    trace = small_trace()
    for slots, noted in (("16", True), ("17", False)):
        cluster = small_cluster(
            ("interval_s = 0.04\ntasks = { x = 0.5, z = 0.5 }\n[[server.gpu]]\nslots = 11",
             f"interval_s = 0.04\ntasks = {{ x = 0.5, z = 0.5 }}\n[[server.gpu]]\nslots = {slots}"),
            ("slots = 11", "slots = 16"),
            ("slots = 3", "slots = 8"),
        )  # fmt: skip
        plan = solve(Instance.build(trace, cluster, min_replicas=2), "exact")
        result = simulate_placements(
            [("exact", plan)],
            sampled(trace, cluster, 600, schedule=SHIFT),
            trace,
            cluster,
            SimulationOptions(migrate="partial", migrate_every_s=1.0, half_life_s=1.0),
        )
        (run,) = result.runs
        assert any(review.decision == "move" for review in run.migrations)
        text = "exact: during a move 1 expert has fewer than 2 copies for a while"
        assert any(note.startswith(text) for note in result.notes) == noted
        assert any("copies" in note for note in result.notes) == noted


# ------------------------------------------------------------------------------ holdout and offload


def test_held_out_requests_alone_are_simulated() -> None:
    """With a split trace no simulated request is one that was planned on."""
    trace, cluster = small_trace(), small_cluster()
    planned_on, scored = trace.split(0.5, 0)

    def ids(part: Trace) -> set[int]:
        assert part.batches is not None
        return {int(r) for batch in part.batches() for r in batch.request}

    requests = sampled(scored, cluster, 100)
    used = {int(r) for r in requests.prompts.trace_request[requests.prompt]}
    assert used == ids(scored)
    assert not used & ids(planned_on)


def test_offload_calls_nobody() -> None:
    """The baseline sends nothing and loads what is missing; its start is each one's favourites."""
    trace, cluster = small_trace(), small_cluster()
    instance = Instance.build(trace, cluster)
    start = offload_placement(instance)
    for n, slots in enumerate(instance.slots):
        held = start.local[n]
        assert held.sum() == slots
        assert instance.activations[n][held].min() >= instance.activations[n][~held].max()
    requests = sampled(trace, cluster, 40)
    result = simulate_placements([("offload", start)], requests, trace, cluster)
    run = result.to_json()["runs"][0]
    assert (run["remote_calls"], run["bytes_sent"], run["messages"]) == (0, 0, 0)
    assert run["loads"] > 0
    assert run["loaded_bytes"] == run["loads"] * 1_000_000
    assert run["finished"] == 120


def test_offload_is_never_reviewed() -> None:
    """Servers that help nobody have nothing to migrate, whatever the policy."""
    trace, cluster = small_trace(), small_cluster()
    start = offload_placement(Instance.build(trace, cluster))
    options = SimulationOptions(migrate="partial", migrate_every_s=0.1)
    result = simulate_placements(
        [("offload", start)], sampled(trace, cluster, 40), trace, cluster, options
    )
    assert result.runs[0].migrations == ()


# ---------------------------------------------------------------------------------- ended too early


@pytest.fixture
def quiet_sigint() -> Any:
    """SIGINT raises KeyboardInterrupt, whatever stood before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("quiet_sigint")
@pytest.mark.parametrize("at", [1, 777, 2001])
def test_ctrl_c_within_an_event_of_the_plain_engine(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Ctrl-C takes effect between events: the partial report is sound, the handler is as before."""
    begun = ended = 0
    take = ReferenceEngine.process

    def taking(self: Any, *args: Any) -> None:
        nonlocal begun, ended
        begun += 1
        if begun == at:
            os.kill(os.getpid(), signal.SIGINT)
        take(self, *args)
        ended += 1

    monkeypatch.setattr(ReferenceEngine, "process", taking)
    result = simulated(small_trace(), small_cluster(), "exact", number=300, engine="reference")
    assert result.partial
    assert result.interrupted
    run = result.to_json()["runs"][0]  # Little's law is checked
    assert run["partial"]
    assert begun == ended == run["events"] < at + 2001
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("when", ["first", "between", "second"])
def test_ctrl_c_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Finished runs are kept; before the first event there is nothing to keep."""
    begin = SimulationRunner.__init__
    runners: list[Any] = []

    def beginning(self: Any, *args: Any) -> None:
        begin(self, *args)
        runners.append(self)
        if when == "first" or (when == "between" and len(runners) == 2):
            raise KeyboardInterrupt
        if when == "second" and len(runners) == 2:
            self.progress = interrupting

    def interrupting(done: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SimulationRunner, "__init__", beginning)
    if when == "first":
        with pytest.raises(KeyboardInterrupt):
            simulated(small_trace(), small_cluster(), "exact", "prism", "uniform")
        return
    result = simulated(small_trace(), small_cluster(), "exact", "prism", "uniform")
    assert result.partial
    assert result.interrupted
    assert [run.partial for run in result.runs] == [False] + [True] * (when == "second")


def clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """A clock that goes on by so much whenever it is read."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += step_s
        return now[0]

    monkeypatch.setattr(simulation.time, "monotonic", monotonic)


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run under way ends, later ones do not begin; that is no interruption."""
    clock(monkeypatch, 1.0)
    result = simulated(
        small_trace(), small_cluster(), "exact", "prism",
        number=500, engine="reference", time_limit_s=3.5,
    )  # fmt: skip
    assert result.partial
    assert not result.interrupted
    (run,) = result.runs
    assert run.partial
    assert run.outcome.events == 4 * 2000


@pytest.mark.parametrize("policy", ["never", "partial"])
def test_a_run_that_is_done_is_not_partial(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """A limit that passes with the last event takes nothing from that run, but the next one."""
    clock(monkeypatch, 1.0)
    result = simulated(
        small_trace(), small_cluster(), "exact", "prism",
        number=20, migrate=policy, migrate_every_s=0.1,
        time_limit_s=0.5 if policy == "never" else 1e3,
    )  # fmt: skip
    assert not result.runs[0].partial
    assert len(result.runs) == (1 if policy == "never" else 2)
    assert result.partial == (policy == "never")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"migrate_every_s": 0.0}, "migrate_every_s: "),
        ({"migrate_every_s": math.inf}, "migrate_every_s: "),
        ({"migrate_every_s": math.nan}, "migrate_every_s: "),
        ({"horizon_s": -1.0}, "horizon_s: "),
        ({"horizon_s": math.nan}, "horizon_s: "),
        ({"half_life_s": 0.0}, "half_life_s: "),
        ({"half_life_s": math.nan}, "half_life_s: "),
        ({"time_limit_s": 0.0}, "time_limit_s: "),
        ({"time_limit_s": math.inf}, "time_limit_s: "),
        ({"engine": "fast"}, "engine: "),
        ({"migrate": "always"}, "migrate: "),
        ({"migration_cost": "mean"}, "migration_cost: "),
        ({"migrate_solver": "exakt"}, "migrate_solver: 'exakt', did you mean 'exact'"),
        ({"seed": -1}, "seed: "),
    ],
    ids=str,
)
def test_options_out_of_range(values: dict[str, Any], word: str) -> None:
    """Options are refused where they are made, by the name that the command gives them."""
    with pytest.raises(InputError, match=f"^{word}"):
        SimulationOptions(**values)


def changed_gpu(**changes: float) -> Callable[[Cluster], Cluster]:
    """A cluster with other figures of the first GPU, unchecked."""

    def change(cluster: Cluster) -> Cluster:
        first, *others = cluster.servers
        gpu = dataclasses.replace(first.gpus[0], **changes)
        first = dataclasses.replace(first, gpus=(gpu, *first.gpus[1:]))
        return dataclasses.replace(cluster, servers=(first, *others))

    return change


def changed_link(**changes: float) -> Callable[[Cluster], Cluster]:
    """A cluster with other figures of [link], unchecked."""
    return lambda cluster: dataclasses.replace(
        cluster, link=dataclasses.replace(cluster.link, **changes)
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (changed_link(bandwidth_mbps=0.0), "link.bandwidth_mbps"),
        (changed_link(bandwidth_mbps=math.nan), "link.bandwidth_mbps"),
        (changed_link(rtt_ms=-1.0), "link.rtt_ms"),
        (changed_link(call_overhead_ms=math.inf), "link.call_overhead_ms"),
        (changed_gpu(load_gbs=0.0), r"server\[0\].gpu\[0\].load_gbs"),
        (changed_gpu(tflops=math.nan), r"server\[0\].gpu\[0\].tflops"),
    ],
)
def test_figures_of_a_cluster_made_in_python(
    change: Callable[[Cluster], Cluster], word: str
) -> None:
    """Zero bandwidth and times that are none are refused by name, and not as the placement's."""
    trace, cluster = small_trace(), small_cluster()
    plans, requests = planned(trace, cluster, "exact"), sampled(trace, cluster, 2)
    with pytest.raises(InputError, match=f"^{word}"):
        simulate_placements(plans, requests, trace, change(cluster))


def test_placement_of_something_else() -> None:
    """Another model, other servers, other GPUs, too little memory, a hole: named with its place."""
    trace, cluster = small_trace(), small_cluster()
    requests = sampled(trace, cluster, 2)
    ((_, plan),) = planned(trace, cluster, "exact")

    def refused(placement: Placement, on: Cluster = cluster) -> str:
        with pytest.raises(InputError) as caught:
            simulate_placements([("p.json", placement)], requests, trace, on)
        assert str(caught.value).startswith("p.json: ")
        return str(caught.value)

    shape = dataclasses.replace(plan.model, top_k=1)
    with pytest.raises(WrongModel, match=r"^p\.json: "):
        simulate_placements([("p.json", plan.replace(model=shape))], requests, trace, cluster)
    assert "servers" in refused(plan.replace(servers=("a", "b", "d")))
    assert "1 GPUs" in refused(
        plan.replace(gpu_capacity=((11,), (11,), (11,)), on_gpu=plan.on_gpu[[0, 1, 3]])
    )
    smaller = small_cluster(("slots = 8", "slots = 7"))
    assert "holds 8 slots" in refused(plan, smaller)
    hole = plan.on_gpu.copy()
    hole[:, 1, 3] = False
    assert "layer 2 expert 3 is called and held nowhere" in refused(plan.replace(on_gpu=hole))


@pytest.mark.parametrize("policy", ["prism", "partial"])
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("pin = [[1, 7], [2, 7], [3, 7]]", "is pinned but not held"),
        ("layer_cap = 2", "layer_cap is 2"),
    ],
)
def test_moves_from_a_placement_that_breaks_the_rules(policy: str, rule: str, words: str) -> None:
    """Reviews could not keep rules that are broken already: refused at once, not in mid-run."""
    trace, cluster = small_trace(), small_cluster(('name = "a"', f'name = "a"\n{rule}'))
    plans = [("p.json", planned(trace, small_cluster(), "exact")[0][1])]
    requests = sampled(trace, cluster, 2)
    options = SimulationOptions(migrate=policy, migrate_solver="exact")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"^p\.json: servers: .*{words}"):
        simulate_placements(plans, requests, trace, cluster, options)
    assert simulate_placements(plans, requests, trace, cluster).runs[0].outcome.events > 0


def test_policies_that_lack_a_rule() -> None:
    """What the first review would refuse is refused before the run, by the option's name."""
    trace, cluster = small_trace(), small_cluster(('name = "a"', 'name = "a"\nlayer_cap = 7'))
    plans, requests = planned(trace, cluster, "exact"), sampled(trace, cluster, 2)
    with pytest.raises(UnsupportedFeature, match=r"^migrate_solver: 'prism' .*layer caps; .*exact"):
        simulate_placements(plans, requests, trace, cluster, SimulationOptions(migrate="prism"))
    for options in (
        SimulationOptions(migrate="prism", migrate_solver="exact"),
        SimulationOptions(migrate="partial"),
        SimulationOptions(),
    ):
        assert simulate_placements(plans, requests, trace, cluster, options).runs


def test_experts_of_unequal_size_have_no_partial_move() -> None:
    """Policy `partial` counts in slots: refused before the run where slots have no meaning."""
    spec = dataclasses.replace(SPEC, expert_bytes=(1_000_000, 2_000_000, 1_000_000))
    trace = synthetic_trace(spec, ["x", "y", "z"], requests=2, prompt_tokens=2, decode_tokens=2)
    cluster = small_cluster(
        ("slots = 11", "memory_gb = 0.5"),
        ("slots = 8", "memory_gb = 0.5"),
        ("slots = 3", "memory_gb = 0.5"),
    )
    plans, requests = planned(trace, cluster, "ilp"), sampled(trace, cluster, 2)
    with pytest.raises(
        UnsupportedFeature, match=r"^migrate: 'partial' does not support .*unequal size"
    ):
        simulate_placements(plans, requests, trace, cluster, SimulationOptions(migrate="partial"))
    options = SimulationOptions(migrate="prism", migrate_solver="ilp", migrate_every_s=0.01)
    assert simulate_placements(plans, requests, trace, cluster, options).runs[0].migrations


def test_wrong_rules_are_the_clusters() -> None:
    """A rule about a layer that the model lacks is not blamed on the placement."""
    trace, cluster = small_trace(), small_cluster(('name = "a"', 'name = "a"\npin = [[9, 1]]'))
    plans = [("p.json", planned(trace, small_cluster(), "exact")[0][1])]
    with pytest.raises(InputError, match=r"^server\[0\]\.pin: layer 9"):
        simulate_placements(plans, sampled(trace, cluster, 2), trace, cluster)


def test_infeasible_memory_is_infeasible() -> None:
    """A GPU that cannot hold the dense part is told as infeasible, not as a broken placement."""
    trace, cluster = small_trace(), small_cluster()
    plans, requests = planned(trace, cluster, "exact"), sampled(trace, cluster, 2)
    gpu = dataclasses.replace(cluster.servers[0].gpus[0], slots=None, memory_bytes=1000)
    servers = (dataclasses.replace(cluster.servers[0], gpus=(gpu,)), *cluster.servers[1:])
    with pytest.raises(Infeasible, match="dense part"):
        simulate_placements(plans, requests, trace, dataclasses.replace(cluster, servers=servers))


def test_reports_are_json_without_nan() -> None:
    """The bytes end in one newline and are the values, also with migrations."""
    data = dump_report(run_shift("partial", number=200).to_json())
    assert data.endswith(b"}\n")
    assert b"NaN" not in data


def test_a_solver_plan_scores_better_than_uniform() -> None:
    """The point of it all: exact placement answers faster than uniform on the same requests."""
    runs = simulated(small_trace(), small_cluster(), "exact", "uniform").runs
    means = [run.latency_s.mean() for run in runs]
    assert means[0] < 0.8 * means[1]
