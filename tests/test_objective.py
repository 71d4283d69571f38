"""Remote share, waiting share and destinations against plain definitions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster
from prism_plan.compiled_loops import smallest_cover
from prism_plan.errors import WrongModel
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape, ModelSpec
from prism_plan.objective import largest_share, remote_score, score, step_score, step_scores
from prism_plan.placement import Placement, SolveReport
from prism_plan.token_rates import TokenRates, expected_token_rates
from prism_plan.trace import TokenBatch, Trace
from tests.profiling.synthetic import synthetic_trace

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2, 5),
    num_experts=6,
    top_k=3,
    hidden_size=16,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=1000,
    kv_bytes_per_token=10,
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Two tasks, nine requests, tokens of six experts in three layers."""
    return synthetic_trace(SPEC, ["a", "b"], requests=5, prompt_tokens=6, decode_tokens=3, seed=4)


def plain_steps(
    local: np.ndarray, trace: Trace, token_rates: TokenRates
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, waiting steps and destinations per server, token by token as docs/design.md says."""
    assert trace.batches is not None
    servers = len(local)
    steps, waiting, destinations = (np.zeros(servers) for _ in range(3))
    for batch in trace.batches():
        for t, n in itertools.product(range(len(batch)), range(servers)):
            task = batch.task[t]
            weight = token_rates.rates[n, task] / trace.tokens[task]
            for layer, experts in enumerate(batch.experts[t]):
                steps[n] += weight
                missing = {int(e) for e in experts if not local[n, layer, e]}
                if not missing:
                    continue
                waiting[n] += weight
                others = [m for m in range(servers) if m != n]
                for size in range(1, servers):
                    if any(
                        all(any(local[m, layer, e] for m in chosen) for e in missing)
                        for chosen in itertools.combinations(others, size)
                    ):
                        destinations[n] += weight * size
                        break
    return steps, waiting, destinations


@pytest.mark.parametrize("seed", range(8))
def test_steps_against_the_definition(trace: Trace, seed: int) -> None:
    """Waiting and destinations equal a token-by-token count with all sets of servers tried."""
    rng = np.random.default_rng(seed)
    servers = int(rng.integers(1, 6))
    local = rng.random((servers, 3, 6)) < rng.uniform(0.2, 0.9)
    local[0] |= ~local.any(axis=0)
    rates = rng.random((servers, 2)) * (rng.random((servers, 2)) < 0.7)
    token_rates = TokenRates(trace.tasks, rates)
    got = step_score(local, trace, token_rates)
    steps, waiting, destinations = plain_steps(local, trace, token_rates)
    assert got.steps == pytest.approx(steps)
    assert got.waiting == pytest.approx(waiting)
    assert got.destinations == pytest.approx(destinations)
    assert got.greedy_share == 0
    if steps.sum():
        assert got.waiting_share == pytest.approx(waiting.sum() / steps.sum())
        assert got.mean_destinations == pytest.approx(destinations.sum() / steps.sum())


@pytest.mark.parametrize("seed", range(5))
def test_remote_share_is_the_share_of_tokens_calls(
    trace: Trace, slots_cluster: Callable[..., Cluster], seed: int
) -> None:
    """The remote share from activations equals remote calls counted token by token."""
    rng = np.random.default_rng(seed)
    cluster = slots_cluster(["a", "b", "a"], [[9], [9], [9]])
    instance = Instance.build(trace, cluster)
    token_rates = expected_token_rates(trace, cluster)
    local = rng.random((3, 3, 6)) < 0.5
    remote = calls = 0.0
    assert trace.batches is not None
    for batch in trace.batches():
        for t, n in itertools.product(range(len(batch)), range(3)):
            weight = token_rates.rates[n, batch.task[t]] / trace.tokens[batch.task[t]]
            for layer, experts in enumerate(batch.experts[t]):
                calls += weight * len(experts)
                remote += weight * sum(not local[n, layer, e] for e in experts)
    assert remote_score(instance.activations, local).share == pytest.approx(remote / calls)


def test_extremes(trace: Trace, slots_cluster: Callable[..., Cluster]) -> None:
    """Everything local: nothing waits. Nothing local but one server: all others wait, on one."""
    token_rates = expected_token_rates(trace, slots_cluster(["a", "b"], [[18], [18]]))
    everything = np.ones((2, 3, 6), bool)
    assert step_score(everything, trace, token_rates).waiting_share == 0
    assert step_score(everything, trace, token_rates).mean_destinations == 0
    everything[1] = False
    got = step_score(everything, trace, token_rates)
    assert got.waiting_by_server == [0.0, 1.0]
    assert got.destinations_by_server == [0.0, 1.0]
    assert largest_share(got.waiting_by_server) == (1, 1.0)


def test_an_expert_held_nowhere_waits_and_goes_nowhere(trace: Trace) -> None:
    """Uncovered experts make steps wait and add no destination."""
    token_rates = TokenRates(trace.tasks, np.ones((1, 2)))
    got = step_score(np.zeros((1, 3, 6), bool), trace, token_rates)
    assert (got.waiting_share, got.mean_destinations) == (1.0, 0.0)


def test_counts_only_has_no_steps(mixtral_trace: Trace) -> None:
    """A counts-only trace does not record which experts are called together."""
    with pytest.raises(ValueError, match="called together"):
        step_score(np.ones((1, 32, 8), bool), mixtral_trace, TokenRates((), np.ones((1, 7))))


def best_cover(masks: list[int], full: int) -> list[int] | None:
    """Positions of the lexicographically first smallest cover, by trying all sets."""
    for size in range(1, len(masks) + 1):
        for chosen in itertools.combinations(range(len(masks)), size):
            union = 0
            for i in chosen:
                union |= masks[i]
            if union == full:
                return list(chosen)
    return None


@settings(max_examples=200)
@given(st.lists(st.integers(1, 255), min_size=1, max_size=9))
def test_smallest_cover(masks: list[int]) -> None:
    """Enumeration finds the smallest set, ties to the lowest indices; greedy covers as well."""
    full = 0
    for mask in masks:
        full |= mask
    chosen = np.zeros(len(masks) + 1, np.int64)
    array = np.array(masks, np.int64)
    size = smallest_cover(array, len(masks), full, 16, chosen)
    assert chosen[:size].tolist() == best_cover(masks, full)
    greedy = smallest_cover(array, len(masks), full, 0, chosen)
    union = 0
    for i in chosen[:greedy]:
        union |= masks[i]
    assert union == full
    assert greedy >= size
    assert greedy <= size * (1 + np.log(8))


def test_greedy_beyond_sixteen_servers_is_reported() -> None:
    """With more than 16 candidate servers the report says that destinations are greedy."""
    spec = ModelSpec(
        name="wide",
        moe_layers=(0,),
        num_experts=40,
        top_k=2,
        hidden_size=1,
        dtype_bytes=2,
        expert_bytes=1,
        dense_bytes=0,
        kv_bytes_per_token=0,
    )
    trace = synthetic_trace(spec, ["a"], requests=4, seed=1)
    local = np.random.default_rng(0).random((40, 1, 40)) < 0.6
    got = step_score(local, trace, TokenRates(("a",), np.ones((40, 1))))
    assert 0 < got.greedy_share <= 1
    few = step_score(local[:10], trace, TokenRates(("a",), np.ones((10, 1))))
    assert few.greedy_share == 0


def test_shares_of_servers_without_calls() -> None:
    """A server that calls nothing has no share and is never the worst; no calls at all are 0."""
    f = np.zeros((2, 1, 2))
    f[0] = [[1, 3]]
    got = remote_score(f, np.array([[[True, False]], [[False, True]]]))
    assert got.by_server == [0.75, None]
    assert largest_share(got.by_server) == (0, 0.75)
    assert largest_share([None, None]) is None
    assert remote_score(np.zeros((1, 1, 2)), np.zeros((1, 1, 2), bool)).share == 0.0


def test_another_model_is_refused() -> None:
    """A placement is never scored on another model's problem."""
    held = np.ones((1, 2, 2), bool)
    placement = Placement(
        ModelShape("m", (3, 4), 2, 1, 7), ("s0",), ((4,),), held, SolveReport("hand")
    )
    model = ModelShape("other", (3, 4), 2, 1, 7)
    instance = Instance(model, ("s0",), np.ones((1, 2, 2)), ((4,),))
    with pytest.raises(WrongModel, match="name is 'm'; expected 'other'"):
        score(placement, instance)


def test_several_placements_in_one_pass(trace: Trace) -> None:
    """Scores of several placements at once are those of each alone; the tokens are read once."""
    rng = np.random.default_rng(0)
    placements = [rng.random((4, 3, 6)) < share for share in (0.2, 0.5, 0.9)]
    token_rates = TokenRates(trace.tasks, rng.random((4, 2)))
    passes = 0

    def counted() -> Iterator[TokenBatch]:
        nonlocal passes
        assert trace.batches is not None
        passes += 1
        yield from trace.batches()

    watched = dataclasses.replace(trace, batches=counted)
    together = step_scores(placements, watched, token_rates)
    assert passes == 1
    for local, found in zip(placements, together, strict=True):
        alone = step_score(local, trace, token_rates)
        for name in ("steps", "waiting", "destinations", "greedy"):
            assert getattr(found, name).tolist() == getattr(alone, name).tolist()
    assert step_scores([], watched, token_rates) == []
    assert passes == 1
