"""What a plan means for users, and whether servers would be faster without it."""

from __future__ import annotations

import dataclasses
from statistics import mean
from typing import Any
from unittest import mock

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.evaluate import user_figures as module
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.evaluate.user_figures import FIRST_SAMPLE, REQUESTS, user_figures, without_plan
from prism_plan.instance import Instance
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.short_run import short_run
from prism_plan.solvers import busy_servers, solve
from prism_plan.solvers.latency import selection
from tests.evaluate.simulation_material import small_cluster, small_trace


def with_intervals(cluster: Cluster, *intervals_s: float) -> Cluster:
    servers = zip(cluster.servers, intervals_s, strict=True)
    return dataclasses.replace(
        cluster,
        servers=tuple(dataclasses.replace(own, arrival_interval_s=s) for own, s in servers),
    )


def test_figures_are_those_of_simulations() -> None:
    """Mean of latency and first token over two samples, and tokens a second from the time of one.

    Of the same requests: by the report of a simulation, and by the run's own times. Homes have
    equal rates, so that every request counts alike.
    """
    trace, cluster = small_trace(), with_intervals(small_cluster(), 0.02, 0.02, 0.02)
    instance = Instance.build(trace, cluster)
    plans = [(name, solve(instance, name)) for name in ("prism", "pipeline")]
    found = user_figures(plans, cluster, trace, seed=3)
    assert list(found) == ["prism", "pipeline"]
    for name, plan in plans:
        reports, seconds, first = [], [], []
        for seed in (3 + FIRST_SAMPLE, 4 + FIRST_SAMPLE):
            requests = sample_requests(trace, cluster, requests_per_server=REQUESTS, seed=seed)
            run = simulate_placements([(name, plan)], requests, trace, cluster).to_json()["runs"][0]
            reports.append(run)
            outcome = short_run(plan, requests, cluster, trace.model)
            seconds.append(float((outcome.done_s - requests.arrival_s).mean()))
            first.append(float((outcome.first_token_s - requests.arrival_s).mean()))
        assert found[name].latency_s == pytest.approx(mean(seconds), rel=1e-9)
        assert found[name].ttft_s == pytest.approx(mean(first), rel=1e-9)
        tpot_s = mean(run["tpot_s"]["mean"] for run in reports)
        assert found[name].tokens_per_s == pytest.approx(1 / tpot_s, rel=1e-9)


def test_homes_count_by_their_rates() -> None:
    """With unequal rates figures are those of a simulation over time, in which rates show.

    They are means of homes weighted by their rates, and not those of the requests that were
    simulated, of which each home has equally many.
    """
    trace, cluster = small_trace(), with_intervals(small_cluster(), 0.5, 20.0, 40.0)
    plan = solve(Instance.build(trace, cluster), "prism")
    found = user_figures([("plan", plan)], cluster, trace)["plan"]
    share = np.array([1 / 0.5, 1 / 20, 1 / 40])
    weighted, plain = [], []
    for seed in (FIRST_SAMPLE, FIRST_SAMPLE + 1):
        requests = sample_requests(trace, cluster, requests_per_server=REQUESTS, seed=seed)
        seconds = short_run(plan, requests, cluster, trace.model).done_s - requests.arrival_s
        of_home = [float(seconds[requests.home == n].mean()) for n in range(3)]
        weighted.append(float(share @ of_home / share.sum()))
        plain.append(float(seconds.mean()))
    assert found.latency_s == pytest.approx(mean(weighted), rel=1e-9)
    long = sample_requests(trace, cluster, duration_s=2000.0, seed=7)
    seconds = short_run(plan, long, cluster, trace.model).done_s - long.arrival_s
    assert found.latency_s == pytest.approx(float(seconds.mean()), rel=0.05)
    assert found.latency_s != pytest.approx(mean(plain), rel=0.05)


def test_nothing_was_chosen_by_these_requests() -> None:
    """All samples that solvers simulate come before the first of those that figures are of."""
    assert sum(samples for samples, _ in selection.ROUNDS) <= FIRST_SAMPLE
    assert busy_servers.SAMPLES <= FIRST_SAMPLE


def test_answers_of_one_token_have_no_speed() -> None:
    """Prompts without decode steps: their first token is all there is."""
    trace, cluster = small_trace(decode_tokens=0), small_cluster()
    plan = solve(Instance.build(trace, cluster), "exact")
    figures = user_figures([("plan", plan)], cluster, trace)["plan"]
    assert figures.tokens_per_s is None
    assert figures.latency_s == pytest.approx(figures.ttft_s)


def test_figures_of_a_part_are_not_given() -> None:
    """Ctrl-C in a simulation, which then ends with what it has, is Ctrl-C here too."""
    trace, cluster = small_trace(), small_cluster()
    plan = solve(Instance.build(trace, cluster), "exact")

    def interrupted(*arguments: Any) -> Any:
        return dataclasses.replace(simulate_placements(*arguments), interrupted=True)

    patched = mock.patch.object(module, "simulate_placements", interrupted)
    with patched, pytest.raises(KeyboardInterrupt):
        user_figures([("plan", plan)], cluster, trace)


def one_large(slots: int, interval_s: float | None = 10.0, **changes: Any) -> Cluster:
    """A slow server and a fast one of so many slots, far from each other."""
    slow = Gpu(slots=12, memory_bandwidth_gbs=0.5, tflops=0.5, load_gbs=0.5)
    fast = Gpu(slots=slots, memory_bandwidth_gbs=100.0, tflops=50.0, load_gbs=0.5)
    servers = (
        Server("slow", (slow,), tasks={"x": 1.0}, arrival_interval_s=interval_s, weight=1.0),
        Server(
            "fast", (fast,), tasks={"y": 0.5, "z": 0.5}, arrival_interval_s=interval_s, weight=1.0
        ),
    )
    servers = (dataclasses.replace(servers[0], **changes), servers[1])
    return Cluster("c", servers, Link(bandwidth_mbps=1.0, rtt_ms=100.0))


def test_one_server_for_all() -> None:
    """One that holds all experts and is fast serves everybody's users as it would its own.

    As fast as a plan of that server with all tasks, at the rate of all, but for the messages of the
    other server's users, half of all: a round trip and two overheads. Their tokens come at the same
    speed. Faster than each for itself; with fewer slots it loads experts.
    """
    trace, cluster = small_trace(), one_large(24)
    found = without_plan(cluster, trace)
    assert set(found) == {"each server for itself", "fast for all"}
    alone = dataclasses.replace(
        cluster.servers[1], tasks={"x": 0.5, "y": 0.25, "z": 0.25}, arrival_interval_s=5.0,
        concurrency=2,
    )  # fmt: skip
    site = Cluster("alone", (alone,))
    plan = solve(Instance.build(trace, site), "exact")
    assert plan.local.all()
    wanted = user_figures([("plan", plan)], site, trace)["plan"]
    one = found["fast for all"]
    reach_s = 0.5 * (0.1 + 2 * 0.2e-3)
    assert one.latency_s == pytest.approx(wanted.latency_s + reach_s)
    assert one.ttft_s == pytest.approx(wanted.ttft_s + reach_s)
    assert one.tokens_per_s == pytest.approx(wanted.tokens_per_s)
    assert one.latency_s < found["each server for itself"].latency_s
    fewer = without_plan(one_large(20), trace)["fast for all"]
    assert fewer.latency_s > one.latency_s


def test_a_plan_finds_the_server_that_is_best_for_all() -> None:
    """It executes everything there, and is as fast but for the time in which messages are sent."""
    trace, cluster = small_trace(), one_large(24)
    joint = solve(Instance.build(trace, cluster), "latency")
    assert (joint.execution_table == 1).all()
    one = without_plan(cluster, trace)["fast for all"].latency_s
    with_plan = user_figures([("plan", joint)], cluster, trace)["plan"].latency_s
    assert one < with_plan < 1.01 * one


def test_users_that_stay_at_home_are_served_by_nobody_else() -> None:
    """With ``execute_at_home`` of another server there is no server for all."""
    kept = one_large(24, execute_at_home=True)
    assert set(without_plan(kept, small_trace())) == {"each server for itself"}
    nobody = one_large(24, execute_at_home=True, tasks={})
    assert set(without_plan(nobody, small_trace())) == {"each server for itself", "fast for all"}


def test_where_nothing_can_be_said() -> None:
    """No rates, or experts of unequal size: nothing."""
    trace = small_trace()
    assert without_plan(one_large(24, None), trace) == {}
    sizes = (1_000_000, 2_000_000, 1_000_000)
    unequal = dataclasses.replace(trace, model=dataclasses.replace(trace.model, expert_bytes=sizes))
    assert without_plan(one_large(24), unequal) == {}
