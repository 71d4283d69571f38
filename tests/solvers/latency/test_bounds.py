"""Lower bounds: no plan is below, whatever its experts, tables, GPUs, links, prompts and sizes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.solvers.latency.bounds import all_plans_bound_s, whole_layers_bound_s
from prism_plan.solvers.latency.layer_times import least_layer_s
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.paths import shortest_paths
from prism_plan.trace import Trace
from tests.profiling.synthetic import synthetic_trace
from tests.solvers.latency.drawn import (
    counts_of,
    drawn_cluster,
    drawn_experts,
    drawn_model,
    drawn_table,
    drawn_trace,
    idle_s,
    in_bytes,
    planned,
    problem_of,
    with_unequal_sizes,
)
from tests.solvers.test_paths import a_model, a_trace
from tests.solvers.test_pipeline import single_gpus

SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(["tokens", "counts", "unequal sizes"])


def drawn_problem(rng: np.random.Generator, kind: str) -> LatencyProblem:
    """1 to 4 servers and layers, 2 to 6 experts; a trace of tokens, of counts, or unequal sizes."""
    layers, experts = int(rng.integers(1, 5)), int(rng.integers(2, 7))
    servers = int(rng.integers(1, 5))
    model = drawn_model(rng, layers, experts)
    cluster = drawn_cluster(rng, servers, layers * experts, weight=1.0)
    if kind == "unequal sizes":
        model = with_unequal_sizes(rng, model)
        cluster = in_bytes(cluster, model)
    trace = drawn_trace(rng, model)
    return problem_of(counts_of(trace) if kind == "counts" else trace, cluster)


@settings(max_examples=50)
@given(seed=SEEDS, kind=KINDS)
def test_no_drawn_plan_is_below_the_bound_of_all(seed: int, kind: str) -> None:
    """Random experts with random tables, and with the tables of least idle time for them."""
    rng = np.random.default_rng(seed)
    problem = drawn_problem(rng, kind)
    bound = all_plans_bound_s(problem)
    assert 0 < bound < np.inf
    for _ in range(6):
        held = drawn_experts(rng, problem)
        if not held.any(axis=0).all():
            continue
        best = shortest_paths(problem.measure.idle_time(held), problem.at_home)
        for table in (drawn_table(rng, problem), best):
            assert idle_s(problem, planned(problem, held, table)) >= bound * (1 - 1e-9)


@settings(max_examples=5)
@given(seed=SEEDS, kind=st.sampled_from(["tokens", "counts"]))
def test_no_plan_at_all_is_below_the_bound_of_all(seed: int, kind: str) -> None:
    """Two servers of one GPU, 2 layers of 3 experts: every placement, with its best table."""
    rng = np.random.default_rng(seed)
    model = drawn_model(rng, 2, 3)
    cluster = drawn_cluster(rng, 2, 6, weight=1.0)
    slots = [sum(gpu.slots or 0 for gpu in server.gpus) for server in cluster.servers]
    trace = drawn_trace(rng, model)
    problem = problem_of(
        counts_of(trace) if kind == "counts" else trace, single_gpus(cluster, slots)
    )
    bound = all_plans_bound_s(problem)
    room = [sum(gpus) for gpus in problem.instance.gpu_capacity]
    for owners in itertools.product((1, 2, 3), repeat=6):  # on the first, the second, or both
        held = np.array([[bool(o & 1) for o in owners], [bool(o & 2) for o in owners]])
        if (held.sum(axis=1) <= room).all():
            held = held.reshape(2, 2, 3)
            table = shortest_paths(problem.measure.idle_time(held), problem.at_home)
            assert idle_s(problem, planned(problem, held, table)) >= bound * (1 - 1e-9)


def whole_plans(
    rng: np.random.Generator, problem: LatencyProblem, number: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random experts [G, L, E] of whole layers, and which server holds which [N, L].

    Experts of a layer are on any of their server's GPUs with room, one after the other.
    """
    instance, size = problem.instance, problem.instance.expert_size
    servers, layers, experts = instance.activations.shape
    offset = problem.site.gpu_start
    for _ in range(number):
        free = [list(gpus) for gpus in instance.gpu_capacity]
        on_gpu = np.zeros((int(offset[-1]), layers, experts), bool)
        whole = np.zeros((servers, layers), bool)
        for layer in [*rng.permutation(layers), *np.repeat(rng.permutation(layers), 2)]:
            able = [m for m in range(servers) if not whole[m, layer]]
            if not able:
                continue
            m = int(rng.choice(able))
            left, part = list(free[m]), np.zeros((len(free[m]), experts), bool)
            for expert in rng.permutation(experts):
                gpus = [g for g, room in enumerate(left) if room >= size[layer]]
                if not gpus:
                    break
                gpu = int(rng.choice(gpus))
                left[gpu] -= int(size[layer])
                part[gpu, expert] = True
            if part.any(axis=0).all():
                free[m], whole[m, layer] = left, True
                on_gpu[offset[m] : offset[m + 1], layer] = part
        if whole.any(axis=0).all():
            yield on_gpu, whole


@settings(max_examples=50)
@given(seed=SEEDS, kind=KINDS)
def test_no_plan_of_whole_layers_is_below_its_bound(seed: int, kind: str) -> None:
    """Random whole layers, shared by GPUs in any way, with the best tables over them.

    The best table of each home is found by enumeration; the bound is asked for with that table and
    with another one, for any is allowed. A layer takes no less than the least at any server.
    """
    rng = np.random.default_rng(seed)
    problem = drawn_problem(rng, kind)
    least_s = least_layer_s(problem)
    servers = problem.instance.num_servers
    for on_gpu, whole in whole_plans(rng, problem, 3):
        idle = problem.measure.idle_time(on_gpu)
        table = np.repeat(np.arange(servers)[:, None], whole.shape[1], axis=1)
        for n in np.flatnonzero(idle.has_users & ~problem.at_home):
            request = idle.of_home(n)
            held = request.layer_s.T[whole]
            assert (held >= least_s[n].T[whole] * (1 - 1e-9)).all()
            rows = itertools.product(*(np.flatnonzero(column) for column in whole.T))
            table[n] = min((request.of_row(np.array(row)), row) for row in rows)[1]
        seconds = idle_s(problem, planned(problem, on_gpu, table))
        for known in (table, drawn_table(rng, problem)):
            bound = whole_layers_bound_s(problem, known.astype(np.int32))
            assert 0 <= bound <= seconds * (1 + 1e-9)


def test_bounds_are_met_where_nothing_stands_in_the_way() -> None:
    """One server of one GPU that holds everything: both bounds are the plan's seconds."""
    trace = a_trace(a_model())
    gpu = Gpu(slots=24, memory_bandwidth_gbs=10.0, tflops=1.0)
    cluster = Cluster("c", (Server("a", (gpu,), tasks={"x": 1.0}, weight=1.0),), Link())
    problem = problem_of(trace, cluster)
    table = np.zeros((1, 4), np.int32)
    seconds = idle_s(problem, planned(problem, np.ones((1, 4, 6), bool), table))
    assert whole_layers_bound_s(problem, table) == pytest.approx(seconds, rel=1e-9)
    assert all_plans_bound_s(problem) == pytest.approx(seconds, rel=0.2)  # experts of the prompt


def test_memory_makes_whole_layers_travel() -> None:
    """Two like servers of half the layers each: the bound has the hops that a pipeline needs."""
    trace = a_trace(a_model())
    gpu = Gpu(slots=12, memory_bandwidth_gbs=10.0, tflops=1.0)
    servers = tuple(Server(name, (gpu,), tasks={"x": 1.0}, weight=1.0) for name in "ab")
    problem = problem_of(trace, Cluster("c", servers, Link(bandwidth_mbps=100, rtt_ms=5.0)))
    held = np.zeros((2, 4, 6), bool)
    held[0, :2], held[1, 2:] = True, True
    table = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.int32)
    seconds = idle_s(problem, planned(problem, held, table))
    bound = whole_layers_bound_s(problem, table)
    assert bound <= seconds * (1 + 1e-9)
    assert bound >= 0.98 * seconds  # but for ids to the first span, by one of the homes
    enough = dataclasses.replace(gpu, slots=24)
    rich = tuple(dataclasses.replace(server, gpus=(enough,)) for server in servers)
    alone = problem_of(trace, Cluster("c", rich, Link(bandwidth_mbps=100, rtt_ms=5.0)))
    assert whole_layers_bound_s(alone, table) < 0.9 * bound
    assert all_plans_bound_s(alone) < all_plans_bound_s(problem) <= seconds


def decode_only(layers: int, tokens: int) -> Trace:
    return synthetic_trace(
        a_model(layers, experts=4, attention_flops=0, kv_bytes_per_token=0, hidden_size=4096),
        ["x"], requests=2, prompt_tokens=0, decode_tokens=tokens,
    )  # fmt: skip


def test_gpus_share_the_experts_of_a_token() -> None:
    """Two GPUs, each token's two experts on different ones: both bounds are met exactly.

    Each expert is on a GPU of its own: an expert takes as long as two of them.
    """
    trace = decode_only(2, 5)
    gpu = Gpu(slots=2, memory_bandwidth_gbs=1.0, tflops=1.0)
    cluster = Cluster("c", (Server("a", (gpu,) * 4, tasks={"x": 1.0}, weight=1.0),), Link())
    problem = problem_of(trace, cluster)
    held = np.zeros((4, 2, 4), bool)
    for expert in range(4):
        held[expert, :, expert] = True
    table = np.zeros((1, 2), np.int32)
    seconds = idle_s(problem, planned(problem, held, table))
    assert all_plans_bound_s(problem) == pytest.approx(seconds, rel=1e-9)
    assert whole_layers_bound_s(problem, table) == pytest.approx(seconds, rel=1e-9)


def test_messages_that_no_plan_does_without() -> None:
    """Servers without end, memory for a layer each: a token takes a hop and an id, but for one id.

    Calls take longer here. With faster calls than hops the bound is that of calls.
    """
    trace = decode_only(2, 5)
    gpu = Gpu(slots=4, memory_bandwidth_gbs=1e7, tflops=1e7, launch_overhead_us=0.0)
    servers = tuple(Server(name, (gpu,), tasks={"x": 1.0}, weight=1.0) for name in "ab")
    for overhead_ms, hop_overhead_ms, with_hops in ((9.0, 1.0, True), (0.0, 99.0, False)):
        link = Link(100.0, 1.0, overhead_ms, hop_overhead_ms=hop_overhead_ms)
        problem = problem_of(trace, Cluster("c", servers, link))
        best = np.inf
        held = np.zeros((2, 2, 4), bool)
        held[0, 0], held[1, 1] = True, True
        for rows in itertools.product((0, 1), repeat=4):
            table = np.array(rows).reshape(2, 2)
            best = min(best, idle_s(problem, planned(problem, held, table)))
        bound = all_plans_bound_s(problem)
        id_s = (0.5 + hop_overhead_ms) * 1e-3
        assert bound <= best
        assert bound >= (best - 1.01 * id_s if with_hops else 0.5 * best)


def test_prices_of_memory() -> None:
    """A fast server of two of four layers, a slow one of all: two layers run on the slow one.

    Hops cost nothing, so that the bound is that of two fast and two slow layers.
    """
    trace = decode_only(4, 5)
    fast, slow = (
        Gpu(slots=slots, memory_bandwidth_gbs=speed, tflops=1.0, launch_overhead_us=0.0)
        for slots, speed in ((8, 10.0), (16, 1.0))
    )
    servers = (
        Server("fast", (fast,), tasks={"x": 1.0}, weight=1.0),
        Server("slow", (slow,)),
    )
    problem = problem_of(trace, Cluster("c", servers, Link(10**6, 0.0, 0.0)))
    held = np.ones((2, 4, 4), bool)
    held[0, 2:] = False
    table = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], np.int32)
    seconds = idle_s(problem, planned(problem, held, table))
    bound = whole_layers_bound_s(problem, table)
    assert 0.999 * seconds <= bound <= seconds * (1 + 1e-9)
    everywhere = idle_s(problem, planned(problem, np.ones((2, 4, 4), bool), 0 * table))
    assert everywhere < 0.3 * bound
