"""Reviews that change where layers execute, in whole simulations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate import simulation_runner
from prism_plan.evaluate.simulation import Simulation, simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.io.simulation import simulation_from_json
from prism_plan.simulate.phase_schedule import Phase, Schedule
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.trace import Trace
from tests.evaluate.simulation_material import (
    SPEC,
    planned,
    sampled,
    small_cluster,
    small_trace,
    without_times,
)

#: After 150 requests of each server the users of a and b have swapped their tasks.
SHIFT = Schedule(
    (Phase(requests=150), Phase(tasks={"a": {"y": 1.0}, "b": {"x": 1.0}, "c": {"y": 1.0}}))
)
#: Plans and policies: a table that comes, one that changes, one that goes, one that stays.
CASES = [
    ("exact", "prism", "layer-partition+paths"),
    ("layer-partition+paths", "prism", "layer-partition+paths"),
    ("layer-partition+paths", "prism", "prism+paths"),
    ("layer-partition+paths", "partial", "prism"),
]


def with_caches(kv_tokens: int = 20) -> tuple[Trace, Cluster]:
    """The small case with memory in place of slots: caches of 20 tokens take an expert's bytes."""
    spec = dataclasses.replace(SPEC, kv_bytes_per_token=50_000)
    trace = dataclasses.replace(small_trace(), model=spec)
    cluster = small_cluster(
        ("0.04", "0.02"),
        ("slots = 11", "memory_gb = 0.018"),
        ("slots = 8", "memory_gb = 0.015"),
        ("slots = 3", "memory_gb = 0.003"),
    )
    servers = [dataclasses.replace(s, kv_tokens=kv_tokens, concurrency=3) for s in cluster.servers]
    return trace, dataclasses.replace(cluster, servers=tuple(servers))


def run_shift(
    trace: Trace, cluster: Cluster, plan: str, *, number: int = 300, **options: Any
) -> Simulation:
    values = {"migrate_every_s": 1.0, "half_life_s": 1.0, **options}
    return simulate_placements(
        planned(trace, cluster, plan), sampled(trace, cluster, number, schedule=SHIFT), trace,
        cluster, SimulationOptions(**values),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _least_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of least idle time, whatever a simulation says: most cases gain too little by one."""
    monkeypatch.setattr("prism_plan.solvers.execution.queues_matter", lambda *_: False)


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize(("plan", "policy", "solver"), CASES)
def test_both_engines_give_the_same_report(
    plan: str, policy: str, solver: str, caches: bool
) -> None:
    """Migrations, latencies, hops and all: to the last bit, and the report reads as one."""
    trace, cluster = with_caches() if caches else (small_trace(), small_cluster(("0.04", "0.02")))
    reports = []
    for engine in ("compiled", "reference"):
        result = run_shift(
            trace, cluster, plan, migrate=policy, migrate_solver=solver, engine=engine
        )
        reports.append(result.to_json())  # Little's law is checked there
        simulation_from_json(reports[-1])
    assert without_times(reports[0]) == without_times(reports[1])
    review = reports[0]["review"]
    assert review["solver"] == (solver if policy == "prism" else None)
    (run,) = reports[0]["runs"]
    assert run["hops"] > 0
    moves = [m for m in run["migrations"] if m["decision"] == "move"]
    for move in moves:
        assert move["at_s"] <= move["finished_at_s"]
        assert move["saving_s"] > move["cost_s"]
    assert moves or (policy, solver) == ("prism", "prism+paths")


def test_both_engines_agree_on_reviews_that_count_latency() -> None:
    """Reviews of solver `latency` begin a table, and both engines carry it out alike."""
    options: dict[str, Any] = {"migrate": "prism", "migrate_solver": "latency"}
    options |= {"migrate_every_s": 110.0, "half_life_s": 110.0}
    trace, cluster = small_trace(), small_cluster(("0.04", "1"))
    compiled, reference = (
        run_shift(trace, cluster, "exact", number=200, engine=engine, **options).to_json()
        for engine in ("compiled", "reference")
    )
    assert without_times(compiled) == without_times(reference)
    (run,) = compiled["runs"]
    assert run["hops"] > 0
    assert run["migrations"][0]["decision"] == "move"


def test_a_new_table_is_faster_after_a_shift() -> None:
    """Reviews that plan tables beat the table that stays, and reviews that plan none."""
    trace, cluster = small_trace(), small_cluster(("0.04", "0.02"))

    def mean_s(plan: str, from_s: float = 5.0, **options: Any) -> float:
        (run,) = run_shift(trace, cluster, plan, number=600, **options).runs
        return float(run.latency_s[run.scenario.requests.arrival_s > from_s].mean())

    paths = {"migrate": "prism", "migrate_solver": "layer-partition+paths"}
    stays = mean_s("layer-partition+paths", migrate="never")
    assert mean_s("layer-partition+paths", **paths) < 0.98 * stays
    without = mean_s("exact", migrate="prism", migrate_solver="exact")
    assert mean_s("exact", **paths) < 0.98 * without
    # reviewed two seconds after the shift, by what was called since
    latency: dict[str, Any] = {"migrate": "prism", "migrate_solver": "latency"}
    latency |= {"migrate_every_s": 4.0, "half_life_s": 2.0}
    others = mean_s("layer-partition+paths", 9.0, **paths)
    assert mean_s("layer-partition+paths", 9.0, **latency) < 0.9 * others


class _MemoryWatch(ReferenceEngine):
    """The plain engine; checks after every event that experts and caches fit every GPU."""

    cluster: Cluster
    waited = late = checked = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        self._loading: dict[int, int] = {}
        self._known: dict[tuple[bytes, ...], list[int]] = {}
        super().__init__(*args, **options)

    def _load(self, gpu: int, layer: int, earliest_s: float) -> float:
        self._loading[gpu] = self._loading.get(gpu, 0) + 1
        return super()._load(gpu, layer, earliest_s)

    def complete_load(self, index: int) -> None:
        self._loading[self._steps[index].gpu] -= 1
        super().complete_load(index)

    def process(self, kind: int, subject: Any) -> None:
        super().process(kind, subject)
        type(self).waited += bool(self._waiting_steps) and self._change is None
        type(self).late += self._change is not None
        model, g = self.scenario.model, 0
        held = self._gpu_holds.sum(axis=1).tolist()
        for server, kept in zip(
            self.cluster.servers, self._kept(self.tables_in_use()), strict=True
        ):
            for number, gpu in enumerate(server.gpus):
                used = (held[g] + self._loading.get(g, 0)) * model.expert_bytes_by_layer[0]
                used += (model.dense_bytes + kept) * (number == 0)
                assert used <= gpu.usable_bytes
                g += 1
        type(self).checked += 1

    def _kept(self, tables: Sequence[Any]) -> list[int]:
        """Bytes of the caches of these tables by server; counted once for the same tables."""
        key = tuple(table.tobytes() for table in tables)
        if key not in self._known:
            # layer 0 has no experts and executes with layer 1: four decoder layers
            self._known[key] = [
                sum(
                    other.kv_tokens
                    * max(int((table[n] == m) @ [2, 1, 1]) for table in tables)
                    * self.scenario.model.kv_bytes_per_token
                    // 4
                    for n, other in enumerate(self.cluster.servers)
                )
                for m in range(self.cluster.num_servers)
            ]
        return self._known[key]


def test_memory_holds_after_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that have begun, and the caches of all tables that requests run on, always fit.

    Among the moves are some whose steps wait for requests, or whose table waits for steps.
    """

    class Watch(_MemoryWatch):
        pass

    monkeypatch.setattr(simulation_runner, "ENGINES", {"reference": Watch})
    for kv_tokens in (20, 40):
        trace, Watch.cluster = with_caches(kv_tokens)
        for plan, policy, solver in CASES:
            run_shift(
                trace, Watch.cluster, plan, number=200, migrate=policy, migrate_solver=solver,
                engine="reference", migrate_every_s=0.5, half_life_s=0.5,
            )  # fmt: skip
    assert Watch.checked > 10_000
    assert Watch.waited > 0
    assert Watch.late > 0


def test_reviews_without_a_candidate_that_fits() -> None:
    """Where caches of both tables leave too little room a review stays, and the report says why.

    Of the table by itself nothing is known of that: the move was worth making.
    """
    trace, cluster = with_caches(60)
    result = run_shift(
        trace, cluster, "exact", migrate="prism", migrate_solver="layer-partition+paths"
    )
    (run,) = result.runs
    assert len(run.migrations) > 0
    for review in run.migrations:
        assert (review.decision, review.moved_experts) == ("stay", 0)
    first = run.migrations[0]
    assert first.saving_s is not None
    assert first.cost_s is not None
    assert first.saving_s > first.cost_s
    (note,) = (text for text in result.notes if "a move was not made" in text)
    assert "3 servers have 23" in note
    simulation_from_json(result.to_json())


@pytest.mark.parametrize("solver", ["pipeline", "exakt+paths", "paths"])
def test_solvers_that_reviews_refuse(solver: str) -> None:
    """One line that names the option and what is expected."""
    with pytest.raises(InputError, match=r"^migrate_solver: '.*; expected one of uniform, ") as one:
        SimulationOptions(migrate="prism", migrate_solver=solver)
    assert "\n" not in str(one.value)


def test_reviews_plan_on_the_trace_that_is_given() -> None:
    """Held-out requests are not what a table is planned for: another trace gives another run."""
    trace, cluster = small_trace(requests=20), small_cluster(("0.04", "0.02"))
    known, scored = trace.split(0.5, 0)
    options = SimulationOptions(
        migrate="prism", migrate_solver="layer-partition+paths", migrate_every_s=0.5
    )
    plans = planned(known, cluster, "exact")
    requests = sampled(scored, cluster, 100)
    runs = [
        simulate_placements(plans, requests, scored, cluster, options, planned_on=by).runs[0]
        for by in (None, scored, known)
    ]
    savings = [[review.saving_s for review in run.migrations] for run in runs]
    assert savings[0] == savings[1] != savings[2]
    assert np.isfinite(runs[2].outcome.done_s).all()
