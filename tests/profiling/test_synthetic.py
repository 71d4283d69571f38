"""Tests of synthetic traces: repeatable, well formed, and as uneven as documented."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.trace import PHASES, TokenBatch, Trace
from tests.profiling.synthetic import SyntheticSpread, synthetic_trace

TINY = ModelSpec(
    name="tiny",
    moe_layers=(2, 10),
    num_experts=6,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
COLUMNS = ("request", "position", "phase", "task", "experts")


def batches(trace: Trace) -> list[TokenBatch]:
    assert trace.batches is not None
    return list(trace.batches())


def entropy(shares: np.ndarray) -> np.ndarray:
    """In bits, over the last axis."""
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=-1)


def usage(trace: Trace) -> np.ndarray:
    """Shares of the calls of a layer, [tasks, L, E]."""
    return trace.counts / trace.counts.sum(axis=2, keepdims=True)


def divergence(trace: Trace) -> float:
    """Mean Jensen-Shannon divergence between tasks, over pairs and layers, in bits."""
    shares = usage(trace)
    pairs = itertools.combinations(range(len(trace.tasks)), 2)
    return float(
        np.mean(
            [
                entropy((shares[a] + shares[b]) / 2) - (entropy(shares[a]) + entropy(shares[b])) / 2
                for a, b in pairs
            ]
        )
    )


def test_same_seed() -> None:
    """The same seed gives the same trace, another seed another one."""
    first, again, other = (synthetic_trace(TINY, ["a", "b"], seed=seed) for seed in (3, 3, 4))
    for ours, theirs in zip(batches(first), batches(again), strict=True):
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (first.counts != other.counts).any()
    assert first.provenance["seed"] == 3


def test_form() -> None:
    """So many requests of each task, numbered through, each of prompt and then decode tokens."""
    trace = synthetic_trace(TINY, ["b", "a"], requests=3, prompt_tokens=5, decode_tokens=2)
    assert trace.tasks == ("b", "a")
    assert trace.requests is not None
    assert trace.requests.tolist() == [3, 3]
    assert trace.tokens.tolist() == [21, 21]
    assert not trace.has_weights
    for number, batch in enumerate(batches(trace)):
        assert set(batch.request.tolist()) == {number}
        assert batch.position.tolist() == list(range(7))
        assert [PHASES[code] for code in batch.phase] == ["prefill"] * 5 + ["decode"] * 2
        assert set(batch.task.tolist()) == {number // 3}
        assert batch.experts.shape == (7, 2, 2)
        for ids in batch.experts.reshape(-1, 2).tolist():
            assert len(set(ids)) == 2
            assert max(ids) < 6


@pytest.mark.parametrize("seed", range(3))
def test_documented_spread(seed: int) -> None:
    """For V2-Lite the defaults give 5.6 of 6 bits of entropy and 0.14 bits between tasks."""
    trace = synthetic_trace(PRESETS["deepseek-v2-lite"], ["a", "b", "c"], seed=seed)
    assert entropy(usage(trace)).mean() == pytest.approx(5.6, abs=0.05)
    assert divergence(trace) == pytest.approx(0.14, abs=0.01)


def test_no_spread() -> None:
    """Without any spread experts are used alike by all tasks, but for chance."""
    spread = SyntheticSpread(popularity=0, task=0, request=0)
    trace = synthetic_trace(TINY, ["a", "b"], requests=40, spread=spread)
    expected = 40 * 64 * 2 / 6
    assert np.abs(trace.counts - expected).max() < 6 * expected**0.5
    assert divergence(trace) < 0.002


@pytest.mark.parametrize("part", ["popularity", "task", "request"])
def test_parts_of_the_spread(part: str) -> None:
    """Popularity is common to tasks, the task's part is not, the request's averages out."""
    alone = {"popularity": 0.0, "task": 0.0, "request": 0.0, part: 1.5}
    trace = synthetic_trace(TINY, ["a", "b"], requests=100, spread=SyntheticSpread(**alone))
    bits = entropy(usage(trace)).mean()
    if part == "task":
        assert divergence(trace) > 0.05
    else:
        assert divergence(trace) < 0.02
    if part == "request":
        assert bits == pytest.approx(np.log2(6), abs=0.03)
        per_request = [np.bincount(b.experts[:, 0].ravel(), minlength=6) for b in batches(trace)]
        assert entropy(np.array(per_request) / 128).mean() < bits - 0.2
    else:
        assert bits < np.log2(6) - 0.1
    assert trace.provenance["spread"] == alone


@pytest.mark.traces
def test_real_traces_spread(v2_trace: Trace) -> None:
    """The real V2-Lite tasks differ by 0.16 bits, which is what the defaults stand for."""
    assert divergence(v2_trace) == pytest.approx(0.16, abs=0.01)
