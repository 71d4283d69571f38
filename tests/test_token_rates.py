"""Tests of token rates and expected calls per server, against plain recomputation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.sampling import sample_requests
from prism_plan.token_rates import activations, expected_token_rates, require_users
from prism_plan.trace import TokenBatch, Trace, trace_from_batches

MODEL = ModelSpec(
    name="tiny",
    moe_layers=(1, 2, 3),
    num_experts=5,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
TASKS = ("law", "code", "chat")


def mixed_trace(seed: int = 0) -> Trace:
    """Requests of the tasks in turn, of 1 to 20 tokens, longer for the later tasks."""
    rng = np.random.default_rng(seed)
    batches = []
    for request in range(30):
        task = int(rng.integers(3)) if request >= 3 else request
        tokens = int(rng.integers(1, 8 * (task + 1)))
        order = rng.random((tokens, 3, 5)).argsort(axis=2)
        batches.append(
            TokenBatch(
                request=np.full(tokens, request, np.int32),
                position=np.arange(tokens, dtype=np.int32),
                phase=np.zeros(tokens, np.int8),
                task=np.full(tokens, task, np.int32),
                experts=order[:, :, :2].astype(np.uint16),
            )
        )
    return trace_from_batches(MODEL, TASKS, batches, name="mixed")


def counts_only(trace: Trace) -> Trace:
    return Trace(trace.model, trace.tasks, trace.counts, trace.tokens, name="counts")


def cluster(*servers: dict[str, object]) -> Cluster:
    gpus = (Gpu(slots=1),)
    return Cluster(
        "c",
        tuple(Server(f"s{n}", gpus, **server) for n, server in enumerate(servers)),  # type: ignore[arg-type]
    )


def calls(trace: Trace, servers: Cluster) -> np.ndarray:
    return activations(trace, expected_token_rates(trace, servers))


def recomputed(trace: Trace, server: Server) -> dict[tuple[int, int], float]:
    """f[l, e] of one server by docs/design.md, section 1, in loops over every selection."""
    assert trace.batches is not None
    selections: Counter[tuple[str, int, int]] = Counter()
    tokens: Counter[str] = Counter()
    requests: dict[str, set[int]] = {task: set() for task in trace.tasks}
    for batch in trace.batches():
        for row, code in enumerate(batch.task.tolist()):
            task = trace.tasks[code]
            tokens[task] += 1
            requests[task].add(int(batch.request[row]))
            for layer, ids in enumerate(batch.experts[row].tolist()):
                for expert in ids:
                    selections[task, layer, expert] += 1
    mean = {task: tokens[task] / len(requests[task]) for task in trace.tasks}
    demand = sum(share * mean[task] for task, share in server.tasks.items())
    result = {}
    for layer in range(trace.model.num_layers):
        for expert in range(trace.model.num_experts):
            total = sum(
                share * mean[task] * selections[task, layer, expert] / tokens[task]
                for task, share in server.tasks.items()
            )
            if server.weight is not None:
                result[layer, expert] = server.weight * total / demand
            else:
                assert server.arrival_interval_s is not None
                result[layer, expert] = total / server.arrival_interval_s
    return result


SHARES = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)


@given(
    seed=st.integers(0, 3),
    servers=st.lists(
        st.tuples(SHARES, st.floats(0.01, 100), st.none() | st.floats(0.0, 100)),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=40)
def test_activations(seed: int, servers: list[tuple[list[int], float, float | None]]) -> None:
    """f[n] = r·Σ s·m·p, or weight·(Σ s·m·p)/(Σ s·m), for any mix of tasks at each server."""
    trace = mixed_trace(seed)
    sites = cluster(
        *(
            {
                "tasks": {t: s / sum(shares) for t, s in zip(TASKS, shares, strict=True) if s},
                "arrival_interval_s": interval,
                "weight": weight,
            }
            for shares, interval, weight in servers
        )
    )
    found = calls(trace, sites)
    for n, server in enumerate(sites.servers):
        for (layer, expert), value in recomputed(trace, server).items():
            assert found[n, layer, expert] == pytest.approx(value, rel=1e-12, abs=1e-15)


def test_rates() -> None:
    """Token rates are requests per second by share of requests by mean tokens of the task."""
    trace = mixed_trace()
    shares = {"law": 0.5, "chat": 0.5}
    token_rates = expected_token_rates(trace, cluster({"tasks": shares, "arrival_interval_s": 4.0}))
    mean = dict(zip(TASKS, trace.mean_tokens(), strict=True))
    assert token_rates.tasks == TASKS
    np.testing.assert_allclose(token_rates.rates, [[mean["law"] / 8, 0, mean["chat"] / 8]])
    with pytest.raises(ValueError, match="read-only"):
        token_rates.rates[0] = 0


@pytest.mark.parametrize("weight", [None, 0.25, 3.0])
def test_calls_of_a_layer(weight: float | None) -> None:
    """In every layer the calls sum to K times the server's token rate, or to K·weight."""
    trace = mixed_trace()
    site = {"tasks": {"law": 0.2, "code": 0.8}, "arrival_interval_s": 10.0, "weight": weight}
    mean = trace.mean_tokens()
    rate = (0.2 * mean[0] + 0.8 * mean[1]) / 10.0 if weight is None else weight
    np.testing.assert_allclose(calls(trace, cluster(site)).sum(axis=2), 2 * rate)


def test_one_task() -> None:
    """A server of one task and weight 1 has that task's calls per token."""
    trace = mixed_trace()
    sites = cluster(*({"tasks": {task: 1.0}, "weight": 1.0} for task in TASKS))
    for t in range(3):
        expected = trace.counts[t] / trace.tokens[t]
        np.testing.assert_allclose(calls(trace, sites)[t], expected)


def test_longer_requests_weigh_more() -> None:
    """Shares are of requests, so a task of longer requests has more than its share of tokens."""
    trace = mixed_trace()
    sites = cluster({"tasks": {"law": 0.5, "chat": 0.5}, "weight": 1.0})
    rates = expected_token_rates(trace, sites).rates[0]
    mean = trace.mean_tokens()
    assert mean[2] > mean[0]
    assert rates.sum() == pytest.approx(1)
    assert rates[2] / rates[0] == pytest.approx(mean[2] / mean[0])


def test_counts_only() -> None:
    """Counts know no tokens per request: m_t is 1, so shares are shares of tokens."""
    trace = counts_only(mixed_trace())
    sites = cluster({"tasks": {"law": 0.25, "chat": 0.75}, "weight": 2.0})
    np.testing.assert_allclose(expected_token_rates(trace, sites).rates, [[0.5, 0, 1.5]])
    p = trace.counts / trace.tokens[:, None, None]
    np.testing.assert_allclose(calls(trace, sites)[0], 2 * (0.25 * p[0] + 0.75 * p[2]))


def test_counts_only_needs_weight() -> None:
    """A rate of requests says nothing of tokens where the trace has counts only.

    Where a server gives neither, both are requested at once, by the planner and by the simulator.
    """
    trace = counts_only(mixed_trace())
    sites = cluster({}, {"tasks": {"law": 1.0}, "arrival_interval_s": 10.0})
    with pytest.raises(InputError, match="has tasks but no weight; expected weight") as caught:
        expected_token_rates(trace, sites)
    assert caught.value.place == "server[1]"
    with pytest.raises(InputError, match="has tasks but no weight; expected weight"):
        require_users(sites, counts_only=True)
    require_users(sites)
    neither = cluster({}, {"tasks": {"law": 1.0}})
    with pytest.raises(InputError, match=r"no weight and no arrival_interval_s; expected weight"):
        require_users(neither, counts_only=True)
    with pytest.raises(InputError, match=r"no times.*counts-only trace `weight` too") as caught:
        sample_requests(trace, neither)
    assert caught.value.place == "server[1].arrival_interval_s"


@pytest.mark.parametrize("kind", ["tokens", "counts"])
@pytest.mark.parametrize(
    "idle",
    [
        {},
        {"weight": 5.0},
        {"arrival_interval_s": 1.0},
        {"tasks": {"law": 0.0}},
        {"tasks": {"law": 1.0}, "weight": 0.0},
    ],
    ids=["nothing", "weight", "interval", "no-share", "weight-zero"],
)
def test_server_without_users(kind: str, idle: dict[str, object]) -> None:
    """A server without tasks, or of weight zero, calls nothing and needs no rate."""
    trace = mixed_trace() if kind == "tokens" else counts_only(mixed_trace())
    found = calls(trace, cluster(idle, {"tasks": {"law": 1.0}, "weight": 1.0}))
    assert not found[0].any()
    assert found[1].any()


@pytest.mark.parametrize(
    ("server", "place", "message"),
    [
        ({"tasks": {"law": 1.0, "cod": 0.0}}, "server[1].tasks", "did you mean 'code'"),
        ({"tasks": {"law": 1.0}}, "server[1]", "has tasks but no arrival rate"),
        ({"tasks": {"silent": 1.0}, "weight": 1.0}, "server[1].tasks", "'silent' has no tokens"),
    ],
    ids=["unknown-task", "no-rate", "no-tokens"],
)
def test_refused(server: dict[str, object], place: str, message: str) -> None:
    """Unknown tasks, tasks without tokens and missing rates are refused at their place."""
    trace = mixed_trace()
    assert trace.batches is not None
    with_silent = trace_from_batches(MODEL, (*TASKS, "silent"), trace.batches())
    with pytest.raises(InputError, match=message) as caught:
        expected_token_rates(with_silent, cluster({}, server))
    assert caught.value.place == place


def test_task_without_tokens_may_be_named() -> None:
    """A task without tokens at share zero does no harm."""
    trace = mixed_trace()
    assert trace.batches is not None
    with_silent = trace_from_batches(MODEL, (*TASKS, "silent"), trace.batches())
    sites = cluster({"tasks": {"law": 1.0, "silent": 0.0}, "weight": 1.0})
    np.testing.assert_array_equal(
        calls(with_silent, sites), calls(trace, cluster({"tasks": {"law": 1.0}, "weight": 1.0}))
    )
