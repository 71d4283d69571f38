"""What recent calls say of the requests behind them: tasks, arrivals, messages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.latency.idle_time import idle_time
from prism_plan.migration.recent_requests import requests_behind, task_shares
from prism_plan.token_rates import TokenRates, activations, expected_token_rates
from prism_plan.trace import Trace
from tests.evaluate.simulation_material import SPEC, counts_of, small_cluster, small_trace

ON_GPU = np.ones((4, 3, 8), bool)


def rates_of(trace: Trace, cluster: Cluster) -> np.ndarray:
    """Calls per second that the tasks and arrivals of the cluster cause, [N, L, E]."""
    return activations(trace, expected_token_rates(trace, cluster))


def test_expected_calls_give_back_tasks_and_arrivals() -> None:
    """The rates that a cluster's users cause lead back to their shares and intervals."""
    trace = small_trace()
    cluster = small_cluster(
        ("tasks = { x = 0.5, z = 0.5 }", "tasks = { x = 0.25, z = 0.75 }"),
    )
    found = requests_behind(rates_of(trace, cluster), cluster, trace, ON_GPU)
    shares = [[server.tasks.get(task, 0.0) for task in "xyz"] for server in found.cluster.servers]
    expected = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]
    assert np.array(shares) == pytest.approx(np.array(expected), abs=0.02)
    assert found.arrivals == pytest.approx([50.0, 50.0, 25.0])  # all tasks have 10 tokens
    intervals = [server.arrival_interval_s for server in found.cluster.servers]
    assert intervals == pytest.approx([0.02, 0.02, 0.04])


@pytest.mark.parametrize("seed", range(10))
def test_drawn_mixtures(seed: int) -> None:
    """Shares are of requests, whose lengths differ by task; counts that are drawn come close."""
    rng = np.random.default_rng(seed)
    trace = small_trace(requests=40)
    # requests of y are twice as long as counted ones
    trace = dataclasses.replace(trace, requests=trace.requests // np.array([1, 2, 1]))
    shares = rng.dirichlet(np.ones(3), size=3)
    tokens = TokenRates(trace.tasks, shares * trace.mean_tokens())
    rates = activations(trace, tokens)
    assert task_shares(rates, trace) == pytest.approx(shares, abs=0.03)
    counted = rng.poisson(rates * 200).astype(float)
    assert task_shares(counted, trace) == pytest.approx(shares, abs=0.1)


def test_arrivals_and_messages_by_hand() -> None:
    """Calls / (L · top_k) / tokens of a request; seconds of a mean request's messages each."""
    trace, cluster = small_trace(), small_cluster()
    rates = np.zeros((3, 3, 8))
    rates[1] = trace.calls_per_token()[1] * 7 * 10  # 7 requests per second of 10 tokens of task y
    found = requests_behind(rates, cluster, trace, ON_GPU)
    assert found.arrivals == pytest.approx([0.0, 7.0, 0.0])
    assert [server.has_users for server in found.cluster.servers] == [False, True, False]
    table = np.array([[0, 0, 0], [1, 2, 2], [2, 2, 2]], np.int32)
    link = found.cluster.link
    per_byte = 8 / (link.bandwidth_mbps * 1e6)
    latency_s = 1e-3 * (link.call_overhead_ms + link.rtt_ms / 2)
    # 5 passes: hidden states of 10 tokens to the second span; four ids begin a pass, one goes home
    by_hand = 5 * latency_s + 10 * 128 * per_byte + 5 * (latency_s + 4 * per_byte)
    assert found.messages_s(table, 300.0) == pytest.approx(300 * 7 * by_hand)
    assert found.messages_s(None, 300.0) == 0.0
    idle = idle_time(ON_GPU, SPEC, found.cluster, trace)
    assert found.messages_s(table, 2.0) == pytest.approx(14 * idle.messages_s(table)[1])


def test_nobody_called() -> None:
    """No calls, or only of experts that no task calls: no users, and no message."""
    trace, cluster = small_trace(), small_cluster()
    counts = trace.counts.copy()
    counts[:, 0, 5] = 0
    trace = dataclasses.replace(trace, counts=counts)
    rates = np.zeros((3, 3, 8))
    for calls in (0.0, 4.0):
        rates[0, 0, 5] = calls
        found = requests_behind(rates, cluster, trace, ON_GPU)
        assert not found.arrivals.any()
        assert not any(server.has_users for server in found.cluster.servers)
        assert found.messages_s(np.full((3, 3), 1), 300.0) == 0.0


def test_homes_that_a_window_has_nearly_forgotten() -> None:
    """They have no users in the cluster that tables are planned for; their messages still count."""
    trace, cluster = small_trace(), small_cluster()
    rates = rates_of(trace, cluster)
    rates[0] *= 1e-6
    found = requests_behind(rates, cluster, trace, ON_GPU)
    assert [server.has_users for server in found.cluster.servers] == [False, True, True]
    assert found.arrivals[0] == pytest.approx(50e-6)
    only_a = np.array([[1, 1, 1], [1, 1, 1], [2, 2, 2]], np.int32)
    assert found.messages_s(only_a, 1.0) > 0


def test_counts_only_traces() -> None:
    """Requests of such a trace have the prompts that are drawn for it."""
    trace, cluster = counts_of(small_trace()), small_cluster()
    rates = np.zeros((3, 3, 8))
    rates[0] = trace.calls_per_token()[0] * 320
    found = requests_behind(rates, cluster, trace, ON_GPU)
    assert found.arrivals == pytest.approx([2.0, 0.0, 0.0])  # of 160 tokens each
