"""Pipelines: order and lengths of runs, groups of servers, memory, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.execution_table import home_execution, spans
from prism_plan.instance import Instance
from prism_plan.latency.idle_time import IdleMeasure, MeanRequest, request_weights
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from prism_plan.solvers.pipeline_groups import _partitions_of
from prism_plan.solvers.pipeline_memory import deal_out
from prism_plan.solvers.pipeline_order import (
    MAX_EXACT,
    best_pipeline,
    pipeline_s,
    with_waiting,
)
from tests.solvers.test_paths import a_cluster, a_model, a_trace, drawn_request

SEEDS = st.integers(0, 2**32 - 1)


def drawn_limits(rng: np.random.Generator, servers: int, layers: int) -> np.ndarray:
    """``fits_until`` of layers of size 1 to 3 and servers of any room, int [N, L]."""
    until = np.concatenate([[0], np.cumsum(rng.integers(1, 4, layers))])
    room = rng.integers(0, until[-1] + 2, servers)
    return np.array([np.searchsorted(until, until[:-1] + r, side="right") - 1 for r in room])


def all_pipelines(fits_until: np.ndarray) -> Iterator[np.ndarray]:
    """Every row of contiguous runs, each server at most one, in which all runs fit."""
    servers, layers = fits_until.shape
    for number in range(1, min(servers, layers) + 1):
        for cuts in itertools.combinations(range(1, layers), number - 1):
            ends = [0, *cuts, layers]
            for order in itertools.permutations(range(servers), number):
                if all(fits_until[m, ends[i]] >= ends[i + 1] for i, m in enumerate(order)):
                    yield np.repeat(order, np.diff(ends))


def least_s(request: MeanRequest, fits_until: np.ndarray) -> float:
    """The least seconds of any pipeline, by enumeration; infinite where there is none."""
    return min((request.of_row(row) for row in all_pipelines(fits_until)), default=np.inf)


@settings(max_examples=100)
@given(seed=SEEDS, ties=st.booleans())
def test_one_group_is_optimal(seed: int, ties: bool) -> None:
    """No order of servers and lengths of runs that fit is faster, by enumeration of all."""
    rng = np.random.default_rng(seed)
    servers, layers = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    request = drawn_request(rng, servers, layers, ties)
    fits_until = drawn_limits(rng, servers, layers)
    row = best_pipeline(request, fits_until)
    least = least_s(request, fits_until)
    assert (np.inf if row is None else request.of_row(row)) == pytest.approx(least, abs=1e-12)


@settings(max_examples=60)
@given(seed=SEEDS)
def test_one_group_is_optimal_under_load(seed: int) -> None:
    """With the waiting for others too, which grows more than the work of a run does."""
    rng = np.random.default_rng(seed)
    servers, layers = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    request = drawn_request(rng, servers, layers, ties=False)
    fits_until = drawn_limits(rng, servers, layers)
    load = float(rng.choice([0.0, 0.1, 0.3, 1.0]))
    row = best_pipeline(request, fits_until, load)
    every = [pipeline_s(request, found, load) for found in all_pipelines(fits_until)]
    found = np.inf if row is None else pipeline_s(request, row, load)
    assert found == pytest.approx(min(every, default=np.inf), abs=1e-9)


def test_waiting() -> None:
    """That of an M/D/1 queue: of n layers of s seconds each waits for ρ s / (2 (1 - ρ))."""
    for rate, layers, seconds in ((0.5, 10, 0.05), (1.0, 4, 0.2), (0.01, 3, 0.1)):
        share = rate * layers * seconds
        each = share * seconds / (2 * (1 - share))
        work = layers * seconds
        assert with_waiting(work, rate) == pytest.approx(work + layers * each)
    runs = np.linspace(0.01, 3, 100)
    times = [with_waiting(float(run), 0.9) for run in runs]
    assert (np.diff(times) > 0).all()
    assert with_waiting(0.7, 0.0) == 0.7


@pytest.mark.parametrize("seed", range(3))
def test_one_group_is_optimal_on_five_servers_and_twelve_layers(seed: int) -> None:
    """The largest size that is promised: up to 33,000 orders and lengths."""
    rng = np.random.default_rng(seed)
    request = drawn_request(rng, 5, 12, ties=False)
    fits_until = np.minimum(np.arange(12) + rng.integers(3, 7, 5)[:, None], 12)
    row = best_pipeline(request, fits_until)
    assert row is not None
    assert request.of_row(row) == pytest.approx(least_s(request, fits_until), abs=1e-12)


def require_pipeline(row: np.ndarray, fits_until: np.ndarray) -> None:
    """Each server has one run, and it fits."""
    runs = spans(row)
    assert len({run.server for run in runs}) == len(runs)
    assert all(fits_until[run.server, run.first] > run.last for run in runs)


@settings(max_examples=40)
@given(seed=SEEDS)
def test_local_search_gives_pipelines(seed: int) -> None:
    """Beyond six servers every run fits, and exchanging two servers saves nothing.

    On servers of one size the search finds a pipeline wherever there is one.
    """
    rng = np.random.default_rng(seed)
    servers, layers = int(rng.integers(MAX_EXACT + 1, 12)), int(rng.integers(2, 16))
    request = drawn_request(rng, servers, layers, ties=False)
    most = int(rng.integers(1, 6))
    fits_until = np.minimum(np.repeat(np.arange(layers)[None] + most, servers, axis=0), layers)
    row = best_pipeline(request, fits_until)
    assert (row is None) == (most * servers < layers)
    if row is None:
        return
    require_pipeline(row, fits_until)
    for a, b in itertools.combinations(range(servers), 2):  # either may be unused
        exchanged = np.where(row == a, b, np.where(row == b, a, row))
        assert request.of_row(exchanged) >= request.of_row(row) - 1e-9


def test_partitions() -> None:
    """As many as Bell's numbers say, each with every server once."""
    for number, bell in enumerate([1, 1, 2, 5, 15, 52, 203]):
        found = [sorted(map(sorted, sets)) for sets in _partitions_of(range(number))]
        assert len({str(sets) for sets in found}) == len(found) == bell
        for sets in found:
            assert sorted(itertools.chain(*sets)) == list(range(number))


# ------------------------------------------------------------------------------------- the solver


def single_gpus(cluster: Cluster, slots: Sequence[int], **changes: Any) -> Cluster:
    """The cluster with one GPU a server of so many slots."""
    return dataclasses.replace(
        cluster,
        servers=tuple(
            dataclasses.replace(
                server, gpus=(dataclasses.replace(server.gpus[0], slots=room),), **changes
            )
            for server, room in zip(cluster.servers, slots, strict=True)
        ),
    )


@settings(max_examples=25)
@given(seed=SEEDS)
def test_groups_are_optimal(seed: int) -> None:
    """No partition of the servers into pipelines takes less idle time, by enumeration of all.

    The time is that of the placement as it is written: of the experts where they lie.
    """
    rng = np.random.default_rng(seed)
    model = a_model(int(rng.integers(1, 5)), experts=3)
    servers, layers = int(rng.integers(1, 4)), model.num_layers
    room = rng.integers(0, layers * 3 + 3, servers)
    cluster = single_gpus(a_cluster(rng, servers), room.tolist())
    if rng.random() < 0.5:  # groups are worth it
        cluster = dataclasses.replace(cluster, link=Link(bandwidth_mbps=5.0, rtt_ms=30.0))
    trace = a_trace(model)
    instance = Instance.build(trace, cluster)
    measure = IdleMeasure(model, cluster, trace)
    fits_until = np.minimum(np.arange(layers) + (room // 3)[:, None], layers)
    best = np.inf
    for sets in _partitions_of(range(servers)):
        choices = [list(all_pipelines(fits_until[group])) for group in sets]
        for rows in itertools.product(*choices):
            held = np.zeros((servers, layers, 3), bool)
            table = home_execution(servers, layers)
            for group, row in zip(sets, rows, strict=True):
                table[group] = np.array(group)[row]
                held[np.array(group)[row], np.arange(layers)] = True
            idle = measure.idle_time(held)
            best = min(best, request_weights(idle, cluster) @ idle.of_table(table))
    if best == np.inf:
        with pytest.raises(Infeasible):
            solve(instance, "pipeline")
        return
    plan = solve(instance, "pipeline").plan
    assert plan.extra["expected_latency_s"] == pytest.approx(best, rel=1e-9)
    assert (plan.objective, plan.bound, plan.remote_share) == ("latency", None, 0.0)


def test_a_server_that_keeps_its_layers_at_home_calls_the_pipeline() -> None:
    """Its row is home and its cost that of remote calls, which decide who holds what.

    Server a is fast and far from c, which executes at home; b is slow and near. With c's users
    alone the calls decide, and b holds the layers.
    """
    model = a_model(2, experts=4)
    fast, slow = (Gpu(slots=8, memory_bandwidth_gbs=x, tflops=x) for x in (20.0, 5.0))
    users = Server(
        "c", (dataclasses.replace(slow, slots=0),), tasks={"x": 1.0}, arrival_interval_s=10.0,
        execute_at_home=True,
    )  # fmt: skip
    link = Link(bandwidth_mbps=1000, rtt_ms=0.1, call_overhead_ms=0.2)
    servers = (Server("a", (fast,)), Server("b", (slow,)), users)
    cluster = Cluster("c", servers, link, (PairLink(0, 2, bandwidth_mbps=50, rtt_ms=20.0),))
    trace = a_trace(model)
    placement = solve(Instance.build(trace, cluster), "pipeline")
    assert placement.local.any(axis=2).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert placement.execution_table[2].tolist() == [2, 2]


@settings(max_examples=40)
@given(seed=SEEDS)
def test_memory_with_caches_and_unequal_layers(seed: int) -> None:
    """Several GPUs, KV caches where layers execute, experts of unequal size: nothing is broken."""
    rng = np.random.default_rng(seed)
    model = a_model(4, experts=3, kv_bytes_per_token=int(rng.integers(0, 3000)))
    if rng.random() < 0.5:
        sizes = tuple(int(x) for x in rng.integers(1, 4, 4) * 10**6)
        model = dataclasses.replace(model, expert_bytes=sizes)
    servers = tuple(
        dataclasses.replace(
            server,
            kv_tokens=int(rng.integers(0, 1500)),
            execute_at_home=bool(rng.random() < 0.2),
            gpus=tuple(
                dataclasses.replace(gpu, slots=None, memory_bytes=int(rng.integers(6, 30) * 10**6))
                for gpu in server.gpus
            ),
        )
        for server in a_cluster(rng, 3).servers
    )
    cluster = Cluster("c", servers, Link(bandwidth_mbps=300))
    trace = a_trace(model)
    try:
        instance = Instance.build(trace, cluster)
        placement = solve(instance, "pipeline")
    except Infeasible:
        return
    counted = instance.with_execution(placement.execution, model)
    assert violations(placement, instance=counted) == []
    for home, row in enumerate(placement.execution_table):
        if servers[home].execute_at_home:
            assert (row == home).all()
        else:
            assert placement.local[row, np.arange(4)].all()


@settings(max_examples=60)
@given(seed=SEEDS)
def test_layers_are_dealt_out_in_proportion(seed: int) -> None:
    """Each expert on one GPU, within its room; GPUs of equal room differ by one expert a layer."""
    rng = np.random.default_rng(seed)
    model = a_model(int(rng.integers(1, 5)), experts=int(rng.integers(2, 8)))
    room = [int(x) for x in rng.integers(0, 20, int(rng.integers(1, 4)))]
    cluster = Cluster(
        "c", (Server("a", tuple(Gpu(slots=r) for r in room), tasks={"x": 1.0}, weight=1.0),)
    )
    instance = Instance.of_cluster(cluster, model)
    layers = list(range(min(sum(room) // model.num_experts, model.num_layers)))
    load = rng.random((model.num_layers, model.num_experts))
    held = deal_out(room, layers, instance, load)
    assert (held[:, layers].sum(axis=0) == 1).all()
    assert (held.sum(axis=(1, 2)) <= room).all()
    if len(set(room)) == 1:
        each = held[:, layers].sum(axis=2)
        assert (each.max(axis=0) - each.min(axis=0) <= 1).all()


def _equals(interval_s: float) -> tuple[Instance, Cluster]:
    """Three servers that hold everything on a fast link; the last one is a little faster."""
    servers = tuple(
        Server(
            f"s{n}",
            (Gpu(slots=24, memory_bandwidth_gbs=1.1 if n == 2 else 1.0, tflops=1.0),),
            tasks={"x": 1.0},
            arrival_interval_s=interval_s,
            concurrency=8,
        )
        for n in range(3)
    )
    link = Link(bandwidth_mbps=10**6, rtt_ms=0.0, call_overhead_ms=0.0)
    cluster = Cluster("c", servers, link)
    return Instance.build(a_trace(a_model()), cluster), cluster


def test_busy_servers_are_simulated() -> None:
    """All homes gain by the fast server, until they queue there: then there are several groups."""
    rarely, _ = _equals(1e4)
    idle = solve(rarely, "pipeline")
    assert idle.plan.extra["groups"] == [["s2"]]
    assert "simulated_s" not in idle.plan.extra
    often, _ = _equals(0.15)
    busy = solve(often, "pipeline")
    assert len(busy.plan.extra["groups"]) > 1
    simulated = busy.plan.extra["simulated_s"]
    assert busy.plan.extra["simulated_latency_s"] == min(simulated.values())
    assert simulated["3 groups"] < 0.5 * simulated["1 group"]


def test_bad_input() -> None:
    """Too little for whole layers, no links, paths on top, features without a rule: one line."""
    rng = np.random.default_rng(0)
    trace = a_trace(a_model(4, experts=6))
    instance = Instance.build(trace, single_gpus(a_cluster(rng, 3), [11, 11, 11]))
    with pytest.raises(Infeasible, match="all 4 layers: they hold 3 whole layers") as caught:
        solve(instance, "pipeline")
    assert (caught.value.shortfall, caught.value.unit) == (1, "layers")
    with pytest.raises(UnsupportedFeature, match="needs the links of a cluster"):
        solve(instance.replace(cluster=None), "pipeline")
    with pytest.raises(InputError, match="plans by itself where layers execute"):
        solve(instance, "pipeline+paths")
    pinned = instance.replace(pinned=((0, 0, 0),))
    with pytest.raises(UnsupportedFeature, match="does not support pinned experts"):
        solve(pinned, "pipeline")
