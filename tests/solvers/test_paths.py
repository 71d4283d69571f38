"""Execution tables of least idle time: the measure, the shortest path, and memory that moves."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.expert_capacity import gpu_capacity, kv_bytes
from prism_plan.instance import Instance
from prism_plan.latency.idle_time import IdleTime, MeanRequest, _prompts_by_task, idle_time
from prism_plan.model_spec import ModelSpec
from prism_plan.placement_check import violations
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.scenario import Scenario
from prism_plan.solvers import solve
from prism_plan.solvers.paths import _toll, shortest_path, shortest_paths, tolled_paths
from prism_plan.trace import Trace
from tests.profiling.synthetic import synthetic_trace
from tests.simulate.builders import drawn_held, place

SEEDS = st.integers(0, 2**32 - 1)


def a_model(layers: int = 4, experts: int = 6, **changes: Any) -> ModelSpec:
    """A model whose experts, states and cache take milliseconds on :func:`a_cluster`."""
    values: dict[str, Any] = {
        "hidden_size": 512, "dtype_bytes": 2, "expert_bytes": 10**6, "dense_bytes": 4 * 10**6,
        "kv_bytes_per_token": 2000, "num_decoder_layers": layers + 1, "attention_flops": 10**5,
        **changes,
    }  # fmt: skip
    return ModelSpec("m", tuple(range(1, layers + 1)), experts, 2, **values)


def a_cluster(rng: np.random.Generator, servers: int, **changes: Any) -> Cluster:
    """Unequal servers of 1 or 2 GPUs and unequal ports; task x or y."""
    made = []
    for n in range(servers):
        gpus = tuple(
            Gpu(
                slots=40,
                memory_bandwidth_gbs=float(rng.uniform(1, 20)),
                tflops=float(rng.uniform(0.1, 2)),
            )
            for _ in range(int(rng.integers(1, 3)))
        )
        made.append(
            Server(
                f"s{n}",
                gpus,
                tasks={"xy"[n % 2]: 1.0},
                arrival_interval_s=10.0,
                uplink_mbps=float(rng.uniform(50, 500)),
                **changes,
            )
        )
    return Cluster("c", tuple(made), Link(bandwidth_mbps=300, rtt_ms=1.0, call_overhead_ms=0.2))


def a_trace(model: ModelSpec) -> Trace:
    return synthetic_trace(model, ["x", "y"], requests=4, prompt_tokens=5, decode_tokens=3)


def alone(requests: Requests, number: int | np.integer) -> Requests:
    """One of the requests on its own, at time zero."""
    at = slice(int(number), int(number) + 1)
    return dataclasses.replace(
        requests, home=requests.home[at], arrival_s=np.zeros(1), prompt=requests.prompt[at]
    )


@settings(max_examples=40)
@given(seed=SEEDS)
def test_the_measure_is_what_the_simulator_gives_a_lone_request(seed: int) -> None:
    """Every prompt of a task alone on the cluster: the mean of its latencies, for any table.

    Every expert is on one GPU only, for the route's choice between copies depends on the past.
    """
    rng = np.random.default_rng(seed)
    model = a_model(int(rng.integers(1, 5)))
    cluster = a_cluster(rng, int(rng.integers(1, 4)))
    trace = a_trace(model)
    gpus = sum(len(server.gpus) for server in cluster.servers)
    held = drawn_held(rng, gpus, model.num_layers, model.num_experts, 0.0)
    shape = (cluster.num_servers, model.num_layers)
    table = rng.integers(0, cluster.num_servers, shape).astype(np.int32)
    expected = idle_time(held, model, cluster, trace).of_table(table)
    drawn = _prompts_by_task(trace, np.arange(2), cluster.num_servers, 0)
    names = tuple(server.name for server in cluster.servers)
    for home in range(cluster.num_servers):
        of_task = np.flatnonzero(drawn.home == home % 2)
        found = []
        for number in of_task:
            asked = dataclasses.replace(
                alone(drawn, number), servers=names, home=np.full(1, home, np.int32), rate=None
            )
            run = CompiledEngine(
                Scenario.build(place(model, cluster, held), asked, cluster, model, execution=table)
            )
            assert run.advance()
            found.append(run.outcome().done_s[0])
        assert expected[home] == pytest.approx(np.mean(found), rel=1e-9)


def drawn_request(rng: np.random.Generator, servers: int, layers: int, ties: bool) -> MeanRequest:
    """Any parts: with ``ties`` of few values."""

    def draw(*shape: int) -> np.ndarray:
        if ties:
            return rng.integers(0, 3, shape).astype(float)
        return rng.uniform(0, 1, shape)

    away = ~np.eye(servers, dtype=bool)
    return MeanRequest(
        draw(layers, servers), away * draw(servers, servers), draw(servers), draw(servers, servers)
    )


@settings(max_examples=100)
@given(seed=SEEDS, ties=st.booleans())
def test_paths_are_optimal(seed: int, ties: bool) -> None:
    """No table of a home takes less idle time, by enumeration of all of them."""
    rng = np.random.default_rng(seed)
    servers, layers = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    request = drawn_request(rng, servers, layers, ties)
    found = request.of_row(shortest_path(request, int(rng.integers(servers))))
    rows = itertools.product(range(servers), repeat=layers)
    least = min(request.of_row(np.array(row)) for row in rows)
    assert found == pytest.approx(least, abs=1e-12)


def test_where_nothing_is_gained_layers_stay_at_home() -> None:
    """Of equal tables the one at home; servers without users, or named, are left at home."""
    free = MeanRequest(np.ones((4, 3)), np.zeros((3, 3)), np.zeros(3), np.zeros((3, 3)))
    for home in range(3):
        assert shortest_path(free, home).tolist() == [home] * 4
    away = np.ones((1, 4, 3))
    away[:, :, 0] = -1.0  # everybody gains at server 0
    users, nothing = np.array([[1.0], [1.0], [0.0]]), np.zeros((3, 3))
    idle = IdleTime(users, away, *np.zeros((3, 3)), nothing, nothing, token_bytes=1)
    assert shortest_paths(idle).tolist() == [[0] * 4, [0] * 4, [2] * 4]
    table = shortest_paths(idle, np.array([False, True, False]))
    assert table.tolist() == [[0] * 4, [1] * 4, [2] * 4]


@settings(max_examples=20)
@given(seed=SEEDS)
def test_a_table_takes_no_longer_than_home(seed: int) -> None:
    """A solver with paths gives the placement of the solver, and no home a longer idle time."""
    rng = np.random.default_rng(seed)
    model = a_model()
    cluster = a_cluster(rng, 3)
    trace = a_trace(model)
    instance = Instance.build(trace, cluster)
    plain = solve(instance, "layer-partition")
    with_table = solve(instance, "layer-partition+paths")
    assert (with_table.on_gpu == plain.on_gpu).all()
    idle = idle_time(plain.on_gpu, model, cluster, trace)
    home = idle.of_table(plain.execution_table)
    assert (idle.of_table(with_table.execution_table) <= home * (1 + 1e-12)).all()
    assert with_table.plan.solver == "layer-partition+paths"
    assert with_table.plan.objective == "remote"
    assert solve(instance, "layer-partition+paths", inputs={}).execution_table.tolist() == (
        with_table.execution_table.tolist()
    )


def _equals_but_one(interval_s: float | None) -> tuple[Trace, Cluster]:
    """Three servers that hold everything, the last one a little faster, on a very fast link."""
    servers = []
    for n in range(3):
        gpu = Gpu(slots=24, memory_bandwidth_gbs=1.1 if n == 2 else 1.0, tflops=1.0)
        servers.append(
            Server(
                f"s{n}",
                (gpu,),
                tasks={"x": 1.0},
                arrival_interval_s=interval_s,
                weight=1.0,
                concurrency=8,
            )
        )
    link = Link(bandwidth_mbps=10**6, rtt_ms=0.0, call_overhead_ms=0.0)
    return a_trace(a_model()), Cluster("c", tuple(servers), link)


def test_a_table_that_would_overload_a_server_is_not_taken() -> None:
    """All homes gain by the fast server until they queue there: then one of them may have it.

    A request takes about 0.1 s: one in 0.15 s from each of three homes is too much for one server.
    Rarely asked, or without known rates, the cluster is planned as idle.
    """
    for interval_s in (1e4, None):
        trace, cluster = _equals_but_one(interval_s)
        idle = solve(Instance.build(trace, cluster), "exact+paths")
        assert idle.execution_table[:2, 1].tolist() == [2, 2]
        assert "simulated_s" not in idle.plan.extra
        said = [text for text in idle.plan.assumed if "idle cluster" in text]
        assert len(said) == (interval_s is None)
    trace, cluster = _equals_but_one(0.15)
    busy = solve(Instance.build(trace, cluster), "exact+paths")
    assert sorted(busy.execution_table[:, 0].tolist()) == [0, 1, 2]
    simulated = busy.plan.extra["simulated_s"]
    assert simulated["home"] < simulated["paths"]
    assert simulated["paths with tolls"] < simulated["paths"]


def test_tolls() -> None:
    """Without requests the table of least idle time; else homes spread over equal servers.

    The toll is the derivative of the mean number of layers that wait, up to the busiest share.
    """
    rng = np.random.default_rng(1)
    trace, cluster = _equals_but_one(1.0)
    held = np.ones((3, 4, 6), bool)
    idle = idle_time(held, trace.model, cluster, trace)
    nowhere, everyone = np.zeros(3, bool), np.ones(3, bool)
    assert tolled_paths(idle, np.zeros(3), nowhere).tolist() == shortest_paths(idle).tolist()
    assert tolled_paths(idle, np.ones(3), everyone).tolist() == [[n] * 4 for n in range(3)]
    assert shortest_paths(idle)[:, 1].tolist() == [2, 2, 2]
    spread = tolled_paths(idle, np.full(3, 5.0), nowhere)
    work = [(spread == server).sum() for server in range(3)]
    assert max(work) <= 5  # of 12 layers; 4 each would be even, and the last one is faster

    def waiting(busy: float) -> float:
        return busy**2 / (2 * (1 - busy))

    for busy in rng.uniform(0, 0.94, 20):
        slope = (waiting(busy + 1e-6) - waiting(busy - 1e-6)) / 2e-6
        assert _toll(np.array([busy]))[0] == pytest.approx(slope, rel=1e-5)
    assert (np.diff(_toll(np.linspace(0, 3, 50))) > 0).all()


# ------------------------------------------------------------------------------------------ memory


def test_kv_caches_lie_where_layers_execute() -> None:
    """1,000 tokens of s0 and 10 of s1; two of s0's three MoE layers execute on s1."""
    model = a_model(3, kv_bytes_per_token=401, num_decoder_layers=5)
    assert model.decoder_layers_by_layer == (2, 1, 2)
    servers = tuple(Server(f"s{n}", (Gpu(slots=9),), kv_tokens=k) for n, k in ((0, 1000), (1, 10)))
    cluster = Cluster("c", servers)
    assert kv_bytes(cluster, model) == (401_000, 4_010)
    table = np.array([[0, 1, 1], [1, 1, 1]], np.int32)
    kept = (2 * 1000 * 401 / 5, 3 * 1000 * 401 / 5 + 4_010)
    assert kv_bytes(cluster, model, table) == tuple(int(np.ceil(k)) for k in kept)
    assert sum(kv_bytes(cluster, model, table)) >= sum(kv_bytes(cluster, model))


def _in_memory(kv_tokens: int) -> tuple[Trace, Cluster]:
    """Two servers: the first is slow and asks for all; the second has the room and is fast."""
    model = a_model(4, 6, kv_bytes_per_token=5_000, expert_bytes=10**6)
    servers = (
        Server(
            "slow", (Gpu(memory_bytes=24 * 10**6, memory_bandwidth_gbs=0.5, tflops=0.1),),
            tasks={"x": 1.0}, arrival_interval_s=10.0, kv_tokens=kv_tokens,
        ),
        Server("fast", (Gpu(memory_bytes=28 * 10**6, memory_bandwidth_gbs=500, tflops=50),)),
    )  # fmt: skip
    return a_trace(model), Cluster("c", servers, Link(bandwidth_mbps=10_000, rtt_ms=0.01))


def test_slots_are_counted_with_the_table() -> None:
    """The cache of layers that move away is taken from where they go, and the plan made again."""
    trace, cluster = _in_memory(1000)  # 5 MB of cache: five experts' room
    instance = Instance.build(trace, cluster)
    placement = solve(instance, "exact+paths")
    assert placement.execution is not None
    moved = gpu_capacity(cluster, trace.model, placement.execution)
    assert moved != instance.gpu_capacity
    held = placement.on_gpu.sum(axis=(1, 2)).tolist()
    assert all(count <= slots for count, (slots,) in zip(held, moved, strict=True))
    assert (
        violations(placement, instance=instance.with_execution(placement.execution, trace.model))
        == []
    )
    assert placement.kv_tokens == {"slow": 1000}


def test_without_a_table_the_plan_is_that_at_home() -> None:
    """Where no table fits beside its caches: the solver's own plan, bound and all, with the reason.

    At home 19.1 MB of the slow server and 5.1 MB of the fast one are left for 24 experts of 1 MB;
    each decoder layer that moves takes 1.2 MB along, and fractions of experts are lost.
    """
    trace, cluster = _in_memory(1200)
    servers = tuple(
        dataclasses.replace(
            server, gpus=(dataclasses.replace(server.gpus[0], memory_bytes=memory),)
        )
        for server, memory in zip(cluster.servers, (29_100_000, 9_100_000), strict=True)
    )
    cluster = dataclasses.replace(cluster, servers=servers)
    instance = Instance.build(trace, cluster)
    home, found = solve(instance, "exact"), solve(instance, "exact+paths")
    assert found.execution is None
    assert (found.on_gpu == home.on_gpu).all()
    assert found.gpu_capacity == home.gpu_capacity
    assert (found.plan.bound, found.plan.termination) == (home.plan.bound, "optimal")
    assert "KV caches" in found.plan.extra["at_home_because"]


@pytest.mark.parametrize("solver", ["exact+paths", "pipeline"])
def test_a_cache_that_fits_elsewhere_alone(solver: str) -> None:
    """25 MB of cache, of which the home server has 20: the layers execute where they fit."""
    trace, cluster = _in_memory(5000)
    fast = cluster.servers[1]
    gpu = dataclasses.replace(fast.gpus[0], memory_bytes=60 * 10**6)
    fast = dataclasses.replace(fast, gpus=(gpu,))
    cluster = dataclasses.replace(cluster, servers=(cluster.servers[0], fast))
    with pytest.raises(Infeasible, match="'slow'"):
        Instance.build(trace, cluster)
    found = solve(Instance.build(trace, cluster, reserve_kv=False), solver)
    assert found.execution_table[0].tolist() == [1] * 4
    counted = Instance.build(trace, cluster, execution=found.execution)
    assert violations(found, instance=counted) == []


def test_a_cache_that_fits_nowhere() -> None:
    """Exit code 3 with the server and its bytes."""
    trace, cluster = _in_memory(6000)  # 30 MB, where 20 are left
    with pytest.raises(Infeasible, match=r"'slow' gpu\[0\]: 24,000,000 usable bytes do not hold"):
        solve(Instance.build(trace, cluster), "exact+paths")


# ---------------------------------------------------------------------------------------- bad input


def test_names_with_paths() -> None:
    """An unknown solver with paths is named; an instance without links and steps is refused."""
    trace, cluster = _in_memory(0)
    instance = Instance.build(trace, cluster)
    with pytest.raises(
        InputError, match=r"unknown solver 'exakt\+paths', did you mean 'exact\+paths'"
    ):
        solve(instance, "exakt+paths")
    with pytest.raises(UnsupportedFeature, match=r"needs the links of a cluster"):
        solve(instance.replace(cluster=None), "exact+paths")
