"""Shrunk activations: bounds, closed forms, the errors of drawn requests, held-out real routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.solvers import shrinkage
from prism_plan.solvers.shrinkage import shrunk_activations, shrunk_calls_per_token
from prism_plan.token_rates import activations, expected_token_rates
from prism_plan.trace import TokenBatch, Trace, trace_from_batches

ROOT = Path(__file__).parents[2]
L, E, K = 2, 6, 2
MODEL = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=E,
    top_k=K,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
NAMES = ("law", "code", "chat", "poem")


def drawn_trace(
    rng: np.random.Generator, requests: list[int], *, tokens: int = 9, spread: float = 1.0
) -> Trace:
    """Requests of each task whose favourite experts differ by task, and by ``spread`` by request.

    A request has 1 to ``tokens`` tokens.
    """
    batches, number = [], 0
    for task, count in enumerate(requests):
        of_task = rng.normal(size=(L, E))
        for _ in range(count):
            length = int(rng.integers(1, tokens + 1))
            liking = of_task + spread * rng.normal(size=(L, E)) + rng.gumbel(size=(length, L, E))
            experts = (-liking).argsort(axis=2)[:, :, :K].astype(np.uint16)
            batches.append(
                TokenBatch(
                    request=np.full(length, number, np.int32),
                    position=np.arange(length, dtype=np.int32),
                    phase=np.zeros(length, np.int8),
                    task=np.full(length, task, np.int32),
                    experts=experts,
                )
            )
            number += 1
    return trace_from_batches(MODEL, NAMES[: len(requests)], batches)


def counts_only(trace: Trace, times: int = 1) -> Trace:
    """The calls alone, so many times over."""
    return Trace(MODEL, trace.tasks, trace.counts * times, trace.tokens * times)


traces = st.builds(
    lambda seed, requests, tokens, counts: (
        counts_only(trace) if counts else trace
        for trace in [drawn_trace(np.random.default_rng(seed), requests, tokens=tokens)]
    ),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 12),
    st.booleans(),
).map(next)


@given(traces)
def test_shares_stay_shares_between_those_of_the_tasks(trace: Trace) -> None:
    """Sums over experts are kept; each number is between its own and the others' raw ones.

    All tasks of a layer move toward one distribution, none of them beyond it.
    """
    raw, shrunk = trace.calls_per_token(), shrunk_calls_per_token(trace)
    np.testing.assert_allclose(shrunk.sum(axis=2), K, rtol=1e-12)
    tiny = 1e-12
    assert (shrunk >= raw.min(axis=0) - tiny).all()
    assert (shrunk <= raw.max(axis=0) + tiny).all()
    # z = weight of the own share: distances between two tasks' moves are those of one target
    weight, shared = shrinkage._credibility(raw / K, shrinkage._squared_error(trace, raw / K))
    assert ((weight >= 0) & (weight <= 1)).all()
    low, high = np.minimum(raw, K * shared), np.maximum(raw, K * shared)
    moved = weight[:, :, 0] < 1
    assert (shrunk >= low - tiny)[moved].all()
    assert (shrunk <= high + tiny)[moved].all()
    assert (shrunk == raw)[~moved].all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.booleans())
def test_one_task_is_not_shrunk(seed: int, requests: int, counts: bool) -> None:
    """With one task there is nothing to shrink toward: the very numbers of the trace."""
    trace = drawn_trace(np.random.default_rng(seed), [requests])
    trace = counts_only(trace) if counts else trace
    assert (shrunk_calls_per_token(trace) == trace.calls_per_token()).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_many_tokens_are_not_shrunk(seed: int) -> None:
    """The difference to the raw shares falls as the number of tokens, once tasks do differ."""
    trace = drawn_trace(np.random.default_rng(seed), [4, 4, 4], tokens=20)
    raw = trace.calls_per_token()
    off = [
        np.abs(shrunk_calls_per_token(counts_only(trace, times)) - raw).max()
        for times in (10**3, 10**6)
    ]
    assume(off[0] < 0.1)
    assert off[1] <= 2e-3 * off[0] + 1e-12


def test_tasks_that_differ_by_chance_alone_are_pooled() -> None:
    """Requests of one distribution under four names: nearly everything is shrunk away."""
    rng = np.random.default_rng(3)
    trace = drawn_trace(rng, [40], spread=0.5)
    assert trace.batches is not None
    named = [dataclasses.replace(batch, task=batch.request % 4) for batch in trace.batches()]
    four = trace_from_batches(MODEL, NAMES, named)
    raw, shrunk = four.calls_per_token(), shrunk_calls_per_token(four)
    assert shrunk.std(axis=0).mean() < 0.5 * raw.std(axis=0).mean()
    # taken for independent tokens, the requests' own likings pass for differences of tasks
    naive = shrunk_calls_per_token(counts_only(four))
    assert shrunk.std(axis=0).mean() < naive.std(axis=0).mean()


@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_equal_errors_give_the_estimator_of_james_and_stein(seed: int, tasks: int) -> None:
    """With one error for all, the weight is 1 - error (T - 1) / squared distances, at least 0."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(E), size=(tasks, L))
    error = rng.uniform(0.01, 0.5, L)
    weight, shared = shrinkage._credibility(share, np.tile(error, (tasks, 1)))
    mean = share.mean(axis=0)
    distance = ((share - mean) ** 2).sum(axis=(0, 2))
    stein = np.maximum(1 - error * (tasks - 1) / distance, 0.0)
    np.testing.assert_allclose(shared, mean)
    np.testing.assert_allclose(weight[:, :, 0], np.tile(stein, (tasks, 1)), atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_errors_are_those_of_drawn_traces(spread: float) -> None:
    """The estimated squared error is the variance of shares over many traces of the same task.

    With requests that differ (``spread``) it is a multiple of that of independent tokens.
    """
    rng = np.random.default_rng(5)
    likings = rng.normal(size=(2, L, E))
    shares, errors, naive = [], [], []
    for _ in range(300):
        batches = []
        for number, length in enumerate([3, 5, 10, 12] * 6):
            liking = likings[number // 12] + spread * rng.normal(size=(L, E))
            chosen = (-(liking + rng.gumbel(size=(length, L, E)))).argsort(axis=2)[:, :, :K]
            ids = np.full(length, number, np.int32)
            at = np.arange(length, dtype=np.int32)
            batches.append(
                TokenBatch(ids, at, np.zeros(length, np.int8), ids // 12, chosen.astype(np.uint16))
            )
        trace = trace_from_batches(MODEL, NAMES[:2], batches)
        share = trace.calls_per_token() / K
        shares.append(share)
        errors.append(shrinkage._squared_error(trace, share))
        naive.append(shrinkage._squared_error(counts_only(trace), share))
    true = np.var(shares, axis=0).sum(axis=2).mean()
    # 300 traces tell a variance to some percent; parts below 0 are cut off, which adds a little
    assert np.mean(errors) == pytest.approx(true, rel=0.15)
    if spread:
        assert np.mean(naive) < 0.5 * true
    else:
        assert np.mean(naive) == pytest.approx(true, rel=0.15)


def test_units_are_those_of_activations(slots_cluster: Callable[..., Cluster]) -> None:
    """Rates times calls per token; the calls of a server in a layer are those that are unshrunk."""
    trace = drawn_trace(np.random.default_rng(1), [3, 2, 4])
    cluster = slots_cluster(["law", "chat"], [[8], [8]])
    rates = expected_token_rates(trace, cluster)
    found, raw = shrunk_activations(trace, cluster), activations(trace, rates)
    assert found.dtype == np.float64
    assert found.shape == (2, L, E)
    np.testing.assert_allclose(found.sum(axis=2), raw.sum(axis=2), rtol=1e-12)
    np.testing.assert_array_equal(found, shrunk_activations(trace, cluster, rates))
    by_hand = np.einsum("nt,tle->nle", rates.rates, shrunk_calls_per_token(trace))
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)
    with pytest.raises(InputError, match="unknown task 'poem'"):
        shrunk_activations(trace, slots_cluster(["poem"], [[8]]))


def test_tasks_without_tokens_have_no_part() -> None:
    """A task that the trace names and does not have stays at 0 and changes no other."""
    trace = drawn_trace(np.random.default_rng(2), [3, 2])
    without = shrunk_calls_per_token(trace)
    assert trace.batches is not None
    more = trace_from_batches(MODEL, NAMES[:3], list(trace.batches()))
    found = shrunk_calls_per_token(more)
    assert (found[2] == 0).all()
    np.testing.assert_allclose(found[:2], without, rtol=1e-12)


def test_a_sample_of_the_requests_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where counts of all requests would fill the memory, evenly spaced ones tell the variances."""
    trace = drawn_trace(np.random.default_rng(4), [300, 200], tokens=6)
    full = shrunk_calls_per_token(trace)
    monkeypatch.setattr(shrinkage, "MAX_COUNTS", 2 * 100 * L * E)
    counted: list[int] = []
    calls = shrinkage._calls_of_requests

    def noted(of: Trace, keys: np.ndarray) -> np.ndarray:
        counted.append(len(keys))
        return calls(of, keys)

    monkeypatch.setattr(shrinkage, "_calls_of_requests", noted)
    some = shrunk_calls_per_token(trace)
    assert counted == [200]
    assert np.abs(some - full).max() < 0.1 * np.abs(full - trace.calls_per_token()).max() + 0.01


# ------------------------------------------------------------------------------------ real routing


def losses(trace: Trace, holdout: float, seed: int) -> tuple[float, float]:
    """Cross entropy of held-out calls under raw and shrunk shares of the other requests.

    Experts that were never called get a millionth of the mass, or raw shares would lose by
    infinity.
    """
    planned, held = trace.split(holdout, seed)
    target = held.calls_per_token() / trace.model.top_k
    raw, shrunk = (
        calls / trace.model.top_k
        for calls in (planned.calls_per_token(), shrunk_calls_per_token(planned))
    )
    floor, uniform = 1e-6, 1 / trace.model.num_experts

    def entropy(share: np.ndarray) -> float:
        smoothed = (1 - floor) * share + floor * uniform
        return float(-(target * np.log(smoothed)).sum(axis=2).mean())

    return entropy(raw), entropy(shrunk)


@pytest.mark.parametrize(("holdout", "gain"), [(0.985, 0.05), (0.9, 0.01), (0.5, 0.0)])
def test_held_out_requests_of_a_large_model(v2_trace: Trace, holdout: float, gain: float) -> None:
    """Planned on one request a task shares gain 0.05 nats a call, on half of them none is lost."""
    found = np.array([losses(v2_trace, holdout, seed) for seed in range(5)])
    raw, shrunk = found.mean(axis=0)
    assert shrunk <= raw - gain


def test_held_out_requests_of_a_tiny_model() -> None:
    """The same of the committed trace: better with one and two requests a task, equal with 20."""
    trace = read_trace(ROOT / "traces" / "tiny-deepseek-v2.parquet", keep_tokens=True)
    for holdout, gain in ((0.985, 0.01), (0.95, 0.0), (0.5, -1e-4)):
        found = np.array([losses(trace, holdout, seed) for seed in range(5)])
        raw, shrunk = found.mean(axis=0)
        assert shrunk <= raw - gain, holdout
