"""The solver ``latency``: what it gives keeps to everything asked, and is what it says it is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.instance import Instance
from prism_plan.io.placement import dump_placement, placement_from_json, placement_schema
from prism_plan.placement import Placement
from prism_plan.placement_check import violations
from prism_plan.simulate.short_run import short_run
from prism_plan.solvers import solve
from prism_plan.solvers.contract import Options
from prism_plan.solvers.latency import solver as latency_solver
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.trace import Trace
from tests.solvers.latency.drawn import (
    counts_of,
    drawn_cluster,
    drawn_model,
    drawn_trace,
    idle_s,
    in_bytes,
    with_unequal_sizes,
)
from tests.solvers.test_paths import a_cluster, a_model, a_trace
from tests.solvers.test_pipeline import single_gpus

SEEDS = st.integers(0, 2**32 - 1)
LONG = pytest.mark.long


def changed(cluster: Cluster, **changes: Any) -> Cluster:
    """The cluster with every server changed."""
    servers = tuple(dataclasses.replace(server, **changes) for server in cluster.servers)
    return dataclasses.replace(cluster, servers=servers)


def drawn_pairs(rng: np.random.Generator, trace: Trace) -> set[tuple[int, int]]:
    layers, experts = trace.model.moe_layers, trace.model.num_experts
    number = int(rng.integers(0, 3))
    return {(int(rng.choice(layers)), int(rng.integers(experts))) for _ in range(number)}


def with_rules(rng: np.random.Generator, cluster: Cluster, trace: Trace) -> Cluster:
    """Pins, forbidden experts and layer caps of some servers."""
    servers = []
    for server in cluster.servers:
        pin = drawn_pairs(rng, trace)
        cap = None if rng.random() < 0.5 else int(rng.integers(1, trace.model.num_experts + 1))
        servers.append(
            dataclasses.replace(
                server, pin=tuple(pin), forbid=tuple(drawn_pairs(rng, trace) - pin), layer_cap=cap
            )
        )
    return dataclasses.replace(cluster, servers=tuple(servers))


def drawn_case(rng: np.random.Generator, kind: str) -> tuple[Trace, Cluster]:
    """Any cluster, idle or busy or of unknown rates, by the kind of case."""
    layers, experts = int(rng.integers(1, 5)), int(rng.integers(2, 7))
    model = drawn_model(rng, layers, experts)
    cluster = drawn_cluster(
        rng, int(rng.integers(1, 5)), layers * experts, weight=1.0,
        concurrency=int(rng.integers(1, 4)),
    )  # fmt: skip
    if kind == "unequal sizes":
        model = with_unequal_sizes(rng, model)
    if kind in ("unequal sizes", "caches"):
        cluster = in_bytes(cluster, model)
    if kind == "caches":
        cluster = changed(cluster, kv_tokens=int(rng.choice([1, 5, 100])))
    interval_s = rng.choice(np.array([None, 0.01, 1.0, 1000.0]))
    cluster = changed(cluster, arrival_interval_s=interval_s)
    trace = drawn_trace(rng, model)
    if kind == "rules":
        cluster = with_rules(rng, cluster, trace)
    return counts_of(trace) if kind == "counts" else trace, cluster


def is_clean(value: Any) -> bool:
    """Whether a value is of JSON, with finite numbers."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_clean(own) for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_clean, value))
    return value is None or isinstance(value, str) or (
        isinstance(value, (int, float)) and math.isfinite(value)
    )  # fmt: skip


DRAWN: dict[str, Any] = {
    "seed": SEEDS,
    "kind": st.sampled_from(["slots", "counts", "unequal sizes", "caches", "rules"]),
    "whole_layers": st.booleans(),
    "min_replicas": st.sampled_from([1, 1, 1, 2]),
    "near": st.sampled_from(["", "", "exact", "latency", "pipeline"]),
}


@settings(max_examples=10)
@example(seed=60841347, kind="counts", whole_layers=True, min_replicas=1, near="pipeline")
@given(**DRAWN)
def test_plans_keep_to_everything(**drawn: Any) -> None:
    """Of a few drawn cases; see :func:`assert_keeps_to_everything`."""
    assert_keeps_to_everything(**drawn)


@pytest.mark.long
@settings(max_examples=300)
@given(**DRAWN)
def test_many_plans_keep_to_everything(**drawn: Any) -> None:
    """Of many drawn cases; see :func:`assert_keeps_to_everything`."""
    assert_keeps_to_everything(**drawn)


def assert_keeps_to_everything(
    seed: int, kind: str, whole_layers: bool, min_replicas: int, near: str
) -> None:
    """Replicas, rules, homes, memory with the table's caches, whole layers; bounds and figures.

    Also near an existing placement that keeps none of the rules.
    """
    rng = np.random.default_rng(seed)
    trace, cluster = drawn_case(rng, kind)
    reference = None
    if near:
        free = changed(cluster, pin=(), forbid=(), layer_cap=None, execute_at_home=False)
        try:
            reference = solve(Instance.build(trace, free, reserve_kv=False), near)
        except (Infeasible, UnsupportedFeature):
            return
    options = Options(
        whole_layers=whole_layers, reference=reference,
        load_price=float(rng.choice([0.0, 1e-3, 1e9])) if reference is not None else 0.0,
    )  # fmt: skip
    try:
        instance = Instance.build(trace, cluster, min_replicas=min_replicas, reserve_kv=False)
        plan = solve(instance, "latency", options)
    except Infeasible:
        return
    except UnsupportedFeature:  # which says so, and names a solver that can
        assert kind == "unequal sizes"
        assert min_replicas > 1
        return
    counted = Instance.build(
        trace, cluster, min_replicas=min_replicas, execution=plan.execution_table
    )
    assert violations(plan, instance=counted) == []
    if whole_layers:
        whole = plan.local.all(axis=2)
        assert (plan.local.any(axis=2) == whole).all()
        for n, server in enumerate(cluster.servers):
            if server.has_users and not server.execute_at_home:
                assert all(whole[m, at] for at, m in enumerate(plan.execution_table[n]))
    extra = dict(plan.plan.extra)
    assert is_clean(extra)
    expected_s = extra["expected_latency_s"]
    problem = LatencyProblem(instance, cluster, trace, seed=0)
    assert expected_s == pytest.approx(problem.expected(plan).mean_s, rel=1e-9)
    assert sum(extra["expected_parts_s"].values()) == pytest.approx(expected_s, rel=1e-9)
    assert expected_s <= extra["candidates_s"][extra["chosen"]]  # less where copies fill slots
    assert 0 < extra["latency_bound_s"] <= idle_s(problem, plan) * (1 + 1e-9)
    shares = problem.expected(plan)
    if problem.loaded:
        every = (shares.place_share, shares.gpu_share, shares.up_share, shares.down_share)
        assert extra["busiest_share"] == max(float(share.max()) for share in every)
    if whole_layers:
        assert extra["whole_layers_bound_s"] <= idle_s(problem, plan) * (1 + 1e-9)
    assert (plan.plan.objective, plan.plan.termination) == ("latency", "heuristic")
    text = dump_placement(plan)
    values = json.loads(text)
    jsonschema.validate(values, placement_schema(values["version"]))
    again = placement_from_json(values)
    assert dump_placement(again) == text
    assert (again.execution_table == plan.execution_table).all()
    assert (again.on_gpu == plan.on_gpu).all()


def busy_case(interval_s: float | None, seed: int = 3) -> tuple[Trace, Cluster]:
    """Three unequal servers with memory for 1.3 copies of 4 layers of 6 experts."""
    rng = np.random.default_rng(seed)
    cluster = single_gpus(a_cluster(rng, 3), [8, 11, 12], weight=1.0, arrival_interval_s=interval_s)
    return a_trace(a_model()), cluster


@functools.cache
def busy_plan(solver: str, interval_s: float | None, seed: int = 3) -> Placement:
    """The plan of a solver for :func:`busy_case`, found once."""
    trace, cluster = busy_case(interval_s, seed)
    return solve(Instance.build(trace, cluster), solver)


def without_times(plan: Placement) -> bytes:
    return dump_placement(plan.replace(plan=dataclasses.replace(plan.plan, runtime_s=0.0)))


@pytest.mark.parametrize("interval_s", [None, pytest.param(1e4, marks=LONG), 0.5])
def test_the_same_twice(interval_s: float | None) -> None:
    """The same bytes but for the time, whether it is simulated or not."""
    trace, cluster = busy_case(interval_s)
    again = solve(Instance.build(trace, cluster), "latency")
    assert without_times(again) == without_times(busy_plan("latency", interval_s))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=LONG) for n in range(2, 10))])
@pytest.mark.parametrize("interval_s", [None, 1e4, 0.3])
def test_never_worse_than_other_solvers_by_its_own_measure(
    seed: int, interval_s: float | None
) -> None:
    """By formula where the cluster is idle, else by simulations on the same requests.

    What comes from its own searches may only be chosen where the slowest home is not far behind
    that of the best plan of another solver, so that only those are surely not better.
    """
    extra = busy_plan("latency", interval_s, seed).plan.extra
    own = ("whole layers", "partial layers", "improved", "spread")
    others = [name for name in extra["candidates_s"] if not any(word in name for word in own)]
    assert {"exact", "exact+paths", "layer-partition+paths", "pipeline, 1 group"} & set(others)
    if interval_s is None:
        assert "simulated_s" not in extra
        best = min(extra["candidates_s"][name] for name in others)
        assert extra["expected_latency_s"] <= best * (1 + 1e-9)
        return
    simulated = extra.get("simulated_s", {})
    for name in set(others) & set(simulated):
        assert extra["simulated_latency_s"] <= simulated[name] * (1 + 1e-9)


def test_plans_of_one_name_are_numbered() -> None:
    """From the second on, also those of a further search and those made of numbered ones."""
    trace, cluster = busy_case(None)
    problem = LatencyProblem(Instance.build(trace, cluster), cluster, trace, seed=0)
    search = latency_solver._Search(problem, Options())
    plan = busy_plan("exact", None)
    for name in ("a, 1 group", "a, 1 group", "a, 1 group #2, improved", "a", "a, 1 group"):
        search.add(name, plan)
        search.add(name, plan)  # known: left out, without a number
        search._known.clear()
    names = ["a, 1 group", "a, 1 group #2", "a, 1 group #2, improved", "a", "a, 1 group #3"]
    assert list(search.plans) == names


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=LONG) for n in range(5, 40))])
@pytest.mark.parametrize("solver", ["exact", "exact+paths", "pipeline", "layer-partition+paths"])
def test_idle_clusters_gain_beside_each_solver(solver: str, seed: int) -> None:
    """By the formula, drawn clusters of unknown rates are never planned more slowly."""
    trace, cluster = busy_case(None, seed)
    problem = LatencyProblem(Instance.build(trace, cluster), cluster, trace, seed=0)
    mine, other = (
        problem.expected(busy_plan(name, None, seed)).mean_s for name in ("latency", solver)
    )
    assert mine <= other * (1 + 1e-9)


def test_the_formula_is_what_the_simulator_gives() -> None:
    """Of a cluster that is hardly used: within 3 % of a simulation of 300 requests a server."""
    from prism_plan.simulate.sampling import sample_requests

    trace, cluster = busy_case(1e4)
    plan = solve(Instance.build(trace, cluster), "latency")
    requests = sample_requests(trace, cluster, requests_per_server=300, seed=1)
    run = short_run(plan, requests, cluster, trace.model)
    seconds = float((run.done_s - requests.arrival_s).mean())
    assert plan.plan.extra["expected_latency_s"] == pytest.approx(seconds, rel=0.03)


def test_one_server() -> None:
    """Everything at home, no hops, no calls: the bound is of the same, and nothing is away."""
    trace = a_trace(a_model())
    gpus = (Gpu(slots=12, memory_bandwidth_gbs=5.0), Gpu(slots=12, memory_bandwidth_gbs=5.0))
    cluster = Cluster("c", (Server("a", gpus, tasks={"x": 1.0}, arrival_interval_s=100.0),))
    plan = solve(Instance.build(trace, cluster), "latency")
    assert plan.execution is None
    assert plan.local.all()
    parts = plan.plan.extra["expected_parts_s"]
    assert parts["hops"] == parts["calls"] == parts["ports"] == 0
    assert plan.plan.extra["latency_bound_s"] <= plan.plan.extra["expected_latency_s"]
    assert plan.plan.extra["reason"] == "every layer runs at home: no other table is faster"


def test_a_server_without_users_serves_others() -> None:
    """The slow home has all users, the fast server none: layers run there, as the reason says."""
    trace = a_trace(a_model())
    slow, fast = (Gpu(slots=24, memory_bandwidth_gbs=x, tflops=x) for x in (0.5, 50.0))
    users = Server("slow", (slow,), tasks={"x": 1.0}, arrival_interval_s=100.0)
    link = Link(bandwidth_mbps=10_000, rtt_ms=0.01)
    cluster = Cluster("c", (users, Server("fast", (fast,))), link)
    plan = solve(Instance.build(trace, cluster), "latency")
    assert plan.execution_table.tolist() == [[1] * 4, [1] * 4]
    assert plan.plan.extra["reason"].startswith("layers 1-4 of slow run on fast: saves ")
    home = dataclasses.replace(cluster.servers[0], execute_at_home=True)
    kept = dataclasses.replace(cluster, servers=(home, cluster.servers[1]))
    at_home = solve(Instance.build(trace, kept), "latency")
    assert at_home.execution_table[0].tolist() == [0] * 4
    assert "execute_at_home" in at_home.plan.extra["reason"]
    assert at_home.plan.extra["expected_latency_s"] > plan.plan.extra["expected_latency_s"]


def with_bursts(cluster: Cluster, burst_kb: float) -> Cluster:
    link = dataclasses.replace(cluster.link, burst_kb=burst_kb)
    return dataclasses.replace(cluster, link=link)


@pytest.mark.parametrize("interval_s", [None, 100.0])
def test_bursts_leave_no_bounds(interval_s: float | None) -> None:
    """Over slow links with bursts no bound, reason or limit is given: simulations are below them.

    Where arrival rates are known several plans are simulated, though nothing is busy for long.
    """
    from prism_plan.simulate.sampling import sample_requests

    trace, cluster = busy_case(interval_s)
    slow = dataclasses.replace(cluster, link=dataclasses.replace(cluster.link, bandwidth_mbps=1.0))
    extra = solve(Instance.build(trace, with_bursts(slow, 0.0)), "latency").plan.extra
    names = ("latency_bound_s", "whole_layers_bound_s", "reason", "limits")
    assert all(extra[name] for name in names)
    plan = solve(Instance.build(trace, with_bursts(slow, 10_000.0)), "latency")
    assert [plan.plan.extra[name] for name in names] == [None] * 4
    assert ("simulated_s" in plan.plan.extra) == (interval_s is not None)
    if interval_s is not None:
        assert len(plan.plan.extra["simulated_s"]) > 1
        assert plan.plan.extra["busiest_share"] < 0.3
        requests = sample_requests(trace, cluster, requests_per_server=40, seed=9)
        run = short_run(plan, requests, with_bursts(slow, 10_000.0), trace.model)
        seconds = float((run.done_s - requests.arrival_s).mean())
        assert seconds < 0.9 * extra["whole_layers_bound_s"]


def test_when_the_formula_is_trusted() -> None:
    """Nothing is busy for more than 30 % of the time, and links have no bursts."""
    trace, cluster = busy_case(100.0)
    problem = LatencyProblem(Instance.build(trace, cluster), cluster, trace, seed=0)
    expected = problem.expected(busy_plan("exact", 100.0))
    for share, trusted in ((0.3, True), (0.31, False)):
        busy = dataclasses.replace(expected, gpu_share=np.full(3, share))
        assert problem.trusts(busy) == trusted
    bursts = with_bursts(cluster, 1.0)
    problem = LatencyProblem(Instance.build(trace, bursts), bursts, trace, seed=0)
    assert not problem.trusts(expected)


@pytest.mark.parametrize(("interval_s", "told"), [(100.0, True), (0.01, False)])
def test_savings_are_told_where_the_formula_is_trusted(interval_s: float, told: bool) -> None:
    """What a run of layers saves, for the home whose layers they are; near saturation no number.

    There the formula's waiting, and so what it saves, can be off by a multiple.
    """
    trace = a_trace(a_model())
    slow, fast = (Gpu(slots=24, memory_bandwidth_gbs=x, tflops=x) for x in (0.5, 50.0))
    users = Server("slow", (slow,), tasks={"x": 1.0}, arrival_interval_s=interval_s)
    link = Link(bandwidth_mbps=10_000, rtt_ms=0.01)
    cluster = Cluster("c", (users, Server("fast", (fast,))), link)
    reason = solve(Instance.build(trace, cluster), "latency").plan.extra["reason"]
    run = "layers 1-4 of slow run on fast"
    if told:
        assert reason.startswith(f"{run}: saves ")
        assert reason.endswith(" s a request of slow")
    else:
        assert reason == run


def test_the_bound_for_whole_layers_is_no_lower_than_that_for_all() -> None:
    """They are plans, too: with homes that execute at home, which have no bound of their own."""
    trace, cluster = busy_case(100.0)
    kept = changed(cluster, execute_at_home=True)
    extra = solve(Instance.build(trace, kept), "latency").plan.extra
    assert extra["whole_layers_bound_s"] == extra["latency_bound_s"] > 0


def test_what_is_taken_for_granted_is_told() -> None:
    """Weights instead of rates: an idle cluster; a counts-only trace: drawn prompts."""
    trace, cluster = busy_case(None)
    idle = solve(Instance.build(trace, cluster), "latency")
    assert any("an idle cluster" in text for text in idle.plan.assumed)
    counted = solve(Instance.build(counts_of(trace), busy_case(1e4)[1]), "latency")
    assert not any("an idle cluster" in text for text in counted.plan.assumed)
    assert any("drawn from counts" in text for text in counted.plan.assumed)


# ---------------------------------------------------------------------------------- what fits not


def test_what_fits_nowhere() -> None:
    """Too few slots, too large caches, too little for whole layers: what lacks, and by how much."""
    trace, cluster = busy_case(None)
    for solver in ("exact", "latency"):
        with pytest.raises(Infeasible, match=r"24 experts need 24 slots, 3 servers have 23"):
            solve(Instance.build(trace, single_gpus(cluster, [7, 8, 8])), solver)
    scarce = Instance.build(trace, single_gpus(cluster, [8, 8, 8]))
    assert solve(scarce, "latency").local.sum() == 24
    with pytest.raises(Infeasible, match="memory for 3 whole layers, the model has 4") as caught:
        solve(scarce, "latency", Options(whole_layers=True))
    assert (caught.value.shortfall, caught.value.unit) == (1, "layers")
    model = a_model(kv_bytes_per_token=10_000)
    gpus = tuple(Gpu(memory_bytes=20 * 10**6) for _ in range(3))
    large = Cluster(
        "c",
        tuple(
            Server(f"s{n}", (gpu,), tasks={"x": 1.0}, weight=1.0, kv_tokens=3000)
            for n, gpu in enumerate(gpus)
        ),
    )
    build = Instance.build(a_trace(model), large, reserve_kv=False)
    with pytest.raises(Infeasible, match=r"'s0' gpu\[0\]: 20,000,000 usable bytes .* KV caches"):
        solve(build, "latency")


def test_what_whole_layers_lack() -> None:
    """Layer caps below the experts of a layer, copies, or pins and forbidden experts: the true one.

    Three servers have memory for four layers of six experts; caps leave two of them none.
    """
    trace, cluster = busy_case(None)
    roomy = single_gpus(cluster, [6, 6, 12])
    whole = Options(whole_layers=True)
    assert solve(Instance.build(trace, roomy), "latency", whole).local.sum() == 24

    def error(cluster: Cluster, **more: Any) -> Infeasible:
        with pytest.raises(Infeasible, match="whole layer") as caught:
            solve(Instance.build(trace, cluster, **more), "latency", whole)
        return caught.value

    def with_rule(**rule: Any) -> Cluster:
        first = dataclasses.replace(roomy.servers[0], **rule)
        return dataclasses.replace(roomy, servers=(first, *roomy.servers[1:]))

    name = roomy.servers[0].name
    found = error(with_rule(layer_cap=5))
    assert f"by layer_cap {name} may hold no whole layer of 6 experts" in found.constraint
    assert "memory for 3 whole layers, the model has 4" in found.constraint
    assert (found.shortfall, found.remedy.partition(",")[0]) == (1, "raise layer_cap")
    found = error(single_gpus(cluster, [15, 17, 23]), min_replicas=2)
    assert "for 7 whole layers, 2 replicas of 4 layers are 8" in found.constraint
    assert (found.shortfall, found.unit) == (1, "layers")
    assert "lower ``min_replicas``" in found.remedy
    spread = tuple((layer, 0) for layer in trace.model.moe_layers)  # a part of every layer
    found = error(with_rule(pin=spread))
    assert "servers can hold 4 whole layers, the model has 4" in found.constraint
    assert "loosen pin" in found.remedy


def test_rules_that_nothing_keeps() -> None:
    """An expert that is forbidden everywhere, and caps that are too low: as ``exact`` tells it."""
    trace, cluster = busy_case(None)
    for changes in ({"forbid": ((2, 3),)}, {"layer_cap": 1}):
        instance = Instance.build(trace, changed(cluster, **changes))
        told = []
        for solver in ("exact", "latency"):
            with pytest.raises(Infeasible) as caught:
                solve(instance, solver)
            told.append(str(caught.value))
        assert told[0] == told[1]


def test_bad_input() -> None:
    """No links, a wrong time limit, paths on top: one line each."""
    trace, cluster = busy_case(None)
    instance = Instance.build(trace, cluster)
    with pytest.raises(UnsupportedFeature, match="needs the links of a cluster"):
        solve(instance.replace(cluster=None), "latency")
    with pytest.raises(UnsupportedFeature, match="needs the links of a cluster"):
        solve(instance.replace(trace=None), "latency")
    with pytest.raises(InputError, match="plans by itself where layers execute"):
        solve(instance, "latency+paths")
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="time_limit_s"):
            Options(time_limit_s=seconds)


def test_a_time_limit_searches_on() -> None:
    """With more time the plan is no worse by its measure, and the search ends.

    A limit that is already over gives the plan without one.
    """
    trace, cluster = busy_case(None)
    instance = Instance.build(trace, cluster)
    plain, short, longer = (
        solve(instance, "latency", Options(time_limit_s=limit)) for limit in (None, 1e-6, 1.0)
    )
    seconds = [plan.plan.extra["expected_latency_s"] for plan in (plain, short, longer)]
    assert seconds[1] == seconds[0]
    assert seconds[2] <= seconds[0] * (1 + 1e-9)
    assert (short.on_gpu == plain.on_gpu).all()
    assert longer.plan.seed == plain.plan.seed == 0


def test_a_time_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effort doubles for as long as twice the last search, and selection, fit within the limit.

    By a clock on which a search takes a second for each unit of effort, and selection one.
    """
    now_s, efforts = [0.0], []
    run, best = latency_solver._Search.run, latency_solver.PlanSelection.best

    def search(self: Any, required: Any, effort: int) -> None:
        if not self.plans:
            run(self, required, 1)
        efforts.append(effort)
        now_s[0] += effort

    def select(*arguments: Any) -> str:
        now_s[0] += 1
        return best(*arguments)

    monkeypatch.setattr(latency_solver._Search, "run", search)
    monkeypatch.setattr(latency_solver.PlanSelection, "best", select)
    monkeypatch.setattr(latency_solver, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    trace, cluster = busy_case(None)
    for limit_s, wanted in ((1, [1]), (5, [1, 2]), (16.9, [1, 2, 4]), (17, [1, 2, 4, 8])):
        efforts.clear()
        now_s[0] = 0.0
        solve(Instance.build(trace, cluster), "latency", Options(time_limit_s=float(limit_s)))
        assert efforts == wanted
        assert now_s[0] <= max(limit_s, 3)  # one search and two choices there always are


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=LONG) for n in range(1, 6))])
def test_more_time_is_no_worse_in_simulations(seed: int) -> None:
    """On a busy cluster, too: on the same samples of requests."""
    trace, cluster = busy_case(0.4, seed)
    instance = Instance.build(trace, cluster)
    plain, longer = (
        solve(instance, "latency", Options(time_limit_s=limit)).plan.extra for limit in (None, 1.5)
    )
    assert "simulated_latency_s" in plain
    assert longer["simulated_latency_s"] <= plain["simulated_latency_s"] * (1 + 1e-9)


def test_whole_layers_are_no_faster_than_all_plans() -> None:
    """They are plans, too; and no plan of them is below their bound."""
    for seed in range(5):
        trace, cluster = busy_case(None, seed)
        instance = Instance.build(trace, cluster)
        every = busy_plan("latency", None, seed).plan.extra
        whole = solve(instance, "latency", Options(whole_layers=True)).plan.extra
        assert every["expected_latency_s"] <= whole["expected_latency_s"] * (1 + 1e-9)
        assert whole["whole_layers_bound_s"] <= whole["expected_latency_s"] * (1 + 1e-9)


@pytest.mark.parametrize("interval_s", [None, 1e4])
def test_whole_layers_are_the_best_there_are(interval_s: float | None) -> None:
    """Three servers of one GPU, 3 layers: within 1 % of the best holdings, by enumeration."""
    model = a_model(3, experts=4)
    rng = np.random.default_rng(5)
    cluster = single_gpus(a_cluster(rng, 3), [4, 8, 8], arrival_interval_s=interval_s, weight=1.0)
    trace = a_trace(model)
    instance = Instance.build(trace, cluster)
    found = solve(instance, "latency", Options(whole_layers=True))
    problem = LatencyProblem(instance, cluster, trace, seed=0)
    best = np.inf
    for flags in itertools.product([False, True], repeat=9):
        whole = np.array(flags).reshape(3, 3)
        if (whole.sum(axis=1) * 4 > [4, 8, 8]).any() or not whole.any(axis=0).all():
            continue
        idle = problem.measure.idle_time(np.repeat(whole[:, :, None], 4, axis=2))
        seconds = 0.0
        for n in range(3):
            request = idle.of_home(n)
            rows = itertools.product(*(np.flatnonzero(column) for column in whole.T))
            seconds += problem.weights[n] * min(request.of_row(np.array(row)) for row in rows)
        best = min(best, seconds)
    assert best * (1 - 1e-9) <= idle_s(problem, found) <= 1.01 * best
