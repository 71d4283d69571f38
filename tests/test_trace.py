"""Tests of traces in memory: totals, checks of expert ids, and splitting by request."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prism_plan import compiled_loops
from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import TokenBatch, Trace, first_invalid_selection, trace_from_batches
from prism_plan.trace_totals import RequestCounter, TraceTotals


def tiny_model(layers: int = 2, experts: int = 4, top_k: int = 2) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        moe_layers=tuple(range(3, 3 + layers)),
        num_experts=experts,
        top_k=top_k,
        hidden_size=8,
        dtype_bytes=2,
        expert_bytes=100,
        dense_bytes=0,
        kv_bytes_per_token=0,
    )


def draw_experts(rng: np.random.Generator, tokens: int, model: ModelSpec) -> np.ndarray:
    """Uint16 [T, L, K], K different experts for each token and layer."""
    order = rng.random((tokens, model.num_layers, model.num_experts)).argsort(axis=2)
    return order[:, :, : model.top_k].astype(np.uint16)


def random_trace(
    seed: int, model: ModelSpec, requests_of: dict[str, int], *, batch: int = 37
) -> Trace:
    """Requests of 1 to 9 tokens, their rows shuffled over the trace and cut into batches."""
    rng = np.random.default_rng(seed)
    tasks = rng.permutation(np.repeat(np.arange(len(requests_of)), list(requests_of.values())))
    length = rng.integers(1, 10, len(tasks))
    request = np.repeat(np.arange(len(tasks)), length)
    position = np.concatenate([np.arange(n) for n in length])
    rows = rng.permutation(len(request))
    request, position = request[rows].astype(np.int32), position[rows].astype(np.int32)
    whole = TokenBatch(
        request=request,
        position=position,
        phase=rng.integers(0, 3, len(rows)).astype(np.int8),
        task=tasks[request].astype(np.int32),
        experts=draw_experts(rng, len(rows), model),
        weights=rng.random((len(rows), model.num_layers, model.top_k)).astype(np.float16),
    )
    cuts = [np.arange(a, min(a + batch, len(rows))) for a in range(0, len(rows), batch)]
    return trace_from_batches(model, requests_of, [whole.rows(cut) for cut in cuts], name="random")


def frame(trace: Trace) -> pd.DataFrame:
    """One row per selection: request, position, phase, task (name), layer, expert, weight."""
    assert trace.batches is not None
    parts = []
    for batch in trace.batches():
        tokens, layers, top_k = batch.experts.shape
        columns = {
            name: np.repeat(getattr(batch, name), layers * top_k)
            for name in ("request", "position", "phase", "task")
        }
        columns["layer"] = np.tile(np.repeat(np.arange(layers), top_k), tokens)
        columns["expert"] = batch.experts.ravel()
        if batch.weights is not None:
            columns["weight"] = batch.weights.ravel()
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    table["task"] = [trace.tasks[code] for code in table["task"]]
    return table


def check_totals(trace: Trace) -> None:
    """Counts, tokens and requests of a trace are what its batches hold."""
    table = frame(trace)
    for index, task in enumerate(trace.tasks):
        rows = table[table["task"] == task]
        tokens = rows[["request", "position"]].drop_duplicates()
        assert trace.tokens[index] == len(tokens)
        assert trace.requests is not None
        assert trace.requests[index] == tokens["request"].nunique()
        pairs = rows["layer"] * trace.model.num_experts + rows["expert"]
        counts = np.bincount(pairs, minlength=trace.model.num_pairs)
        np.testing.assert_array_equal(trace.counts[index].ravel(), counts)


# --------------------------------------------------------------------------------- totals


@pytest.mark.parametrize("batch", [1, 37, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_totals(seed: int, batch: int) -> None:
    """Totals equal a recount by pandas, however the rows are ordered and cut into batches."""
    check_totals(random_trace(seed, tiny_model(3, 7, 3), {"b": 9, "a": 1, "c": 5}, batch=batch))


def test_calls_per_token_and_mean_tokens() -> None:
    """p_t is calls by tokens and sums to K in each layer; m_t is tokens by requests."""
    trace = random_trace(0, tiny_model(3, 7, 3), {"a": 4, "b": 8})
    table = frame(trace)
    calls = trace.calls_per_token()
    for t, task in enumerate(trace.tasks):
        rows = table[table["task"] == task]
        tokens = len(rows) // (3 * 3)
        assert trace.mean_tokens()[t] == tokens / rows["request"].nunique()
        for layer, expert in itertools.product(range(3), range(7)):
            times = ((rows["layer"] == layer) & (rows["expert"] == expert)).sum()
            assert calls[t, layer, expert] == times / tokens
    np.testing.assert_allclose(calls.sum(axis=2), 3)


def test_task_without_tokens() -> None:
    """A task that has no tokens calls nothing and has no mean, rather than NaN."""
    model = tiny_model()
    trace = trace_from_batches(model, ["a", "b"], [one_batch(model, 3)])
    assert trace.tokens.tolist() == [3, 0]
    assert trace.requests is not None
    assert trace.requests.tolist() == [1, 0]
    assert not trace.calls_per_token()[1].any()
    assert trace.mean_tokens().tolist() == [3, 0]


def test_counts_only() -> None:
    """A counts-only trace has no requests: its mean tokens per request are one."""
    model = tiny_model()
    counts = np.array([[[4, 4, 2, 0], [5, 5, 0, 0]]])
    trace = Trace(model, ("a",), counts, np.array([5]))
    assert trace.kind == "counts"
    assert trace.mean_tokens().tolist() == [1.0]
    np.testing.assert_allclose(trace.calls_per_token(), counts / 5)


def one_batch(model: ModelSpec, tokens: int, *, request: int = 0, task: int = 0) -> TokenBatch:
    return TokenBatch(
        request=np.full(tokens, request, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        phase=np.zeros(tokens, np.int8),
        task=np.full(tokens, task, np.int32),
        experts=draw_experts(np.random.default_rng(request), tokens, model),
    )


def test_arrays_are_read_only() -> None:
    """The totals of a trace cannot be written."""
    trace = random_trace(0, tiny_model(), {"a": 2, "b": 2})
    for array in (trace.counts, trace.tokens, trace.requests):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_counts_of_another_shape() -> None:
    """Counts that do not fit model and tasks make no trace."""
    with pytest.raises(ValueError, match=r"\(1, 2, 5\), expected \(1, 2, 4\)"):
        Trace(tiny_model(), ("a",), np.zeros((1, 2, 5), np.int64), np.array([1]))


def test_batches_anew() -> None:
    """Each call of ``batches`` gives all tokens from the start."""
    trace = random_trace(0, tiny_model(), {"a": 9, "b": 9})
    assert trace.batches is not None
    first = trace.batches()
    next(first)
    pd.testing.assert_frame_equal(frame(trace), frame(trace))


@pytest.mark.parametrize("weights", [[True, True], [True, False], [False, False]])
def test_has_weights(weights: list[bool]) -> None:
    """A trace has weights if each of its batches has."""
    model = tiny_model()
    batches = []
    for request, given_weights in enumerate(weights):
        batch = one_batch(model, 2, request=request)
        gates = np.zeros((2, 2, 2), np.float16) if given_weights else None
        batches.append(TokenBatch(batch.request, batch.position, batch.phase, batch.task,
                                  batch.experts, gates))  # fmt: skip
    assert trace_from_batches(model, ["a"], batches).has_weights == all(weights)


def test_rows() -> None:
    """Rows by a mask and by indices are the same rows of every column."""
    trace = random_trace(0, tiny_model(), {"a": 4}, batch=10**6)
    assert trace.batches is not None
    (whole,) = trace.batches()
    mask = np.random.default_rng(0).random(len(whole)) < 0.5
    for part in (whole.rows(mask), whole.rows(np.flatnonzero(mask))):
        assert len(part) == mask.sum()
        for name in ("request", "position", "phase", "task", "experts", "weights"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[mask])


def add(totals: TraceTotals, batch: TokenBatch) -> None:
    totals.add(batch.experts, batch.task, batch.request)


def test_totals_grow() -> None:
    """Tasks that appear while reading get room, and what was counted stays."""
    model = tiny_model()
    totals = TraceTotals(model)
    assert totals.requests().tolist() == []
    add(totals, one_batch(model, 0))
    add(totals, one_batch(model, 3, request=0, task=1))
    add(totals, one_batch(model, 4, request=1, task=2))
    add(totals, one_batch(model, 2, request=2, task=1))
    assert totals.tokens.tolist() == [0, 5, 4]
    assert totals.requests().tolist() == [0, 2, 1]
    assert totals.counts.sum(axis=(1, 2)).tolist() == [0, 5 * 4, 4 * 4]


# --------------------------------------------------------------------------------- bad selections


def first_bad(experts: np.ndarray, num_experts: int) -> tuple[int, int] | None:
    """Row and layer of the first bad selection, by plain loops."""
    for row, layers in enumerate(experts.tolist()):
        for layer, ids in enumerate(layers):
            if max(ids) >= num_experts or len(set(ids)) < len(ids):
                return row, layer
    return None


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


@given(st.data(), SHAPES, st.integers(1, 12))
@settings(max_examples=150)
def test_first_invalid_selection(
    data: st.DataObject, shape: tuple[int, int, int], experts: int
) -> None:
    """The first bad selection, if any, is the one that plain loops find, also while counting."""
    ids = data.draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, experts)))
    wanted = first_bad(ids, experts)
    assert first_invalid_selection(ids, experts) == wanted
    tokens, layers, top_k = shape
    if experts < top_k:
        return  # no model has so few
    totals = TraceTotals(tiny_model(layers, experts, top_k))
    task = np.arange(tokens, dtype=np.int32) % 2
    assert totals.add(ids, task, np.arange(tokens, dtype=np.int32)) == wanted
    if wanted is None:
        counts = np.zeros((min(tokens, 2), layers, experts), np.int64)
        np.add.at(counts, (task[:, None, None], np.arange(layers)[:, None], ids), 1)
        np.testing.assert_array_equal(totals.counts, counts)


def test_steps_are_numbered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than their numbers reach neither hide an expert named twice nor invent one."""
    monkeypatch.setattr("prism_plan.compiled_loops.MAX_STEP", 5)
    count: Any = compiled_loops.count_selections
    find: Any = compiled_loops.find_invalid_selection
    model = tiny_model(layers=2)
    ids = draw_experts(np.random.default_rng(0), 30, model)
    task, scratch = np.zeros(30, np.int32), np.empty(4, np.int32)
    counts = np.zeros((1, 2, 4), np.int64)
    assert count.py_func(ids, task, counts, scratch) == (-1, -1)
    assert counts.sum() == ids.size
    assert find.py_func(ids, scratch) == (-1, -1)
    ids[29, 1] = 3
    assert count.py_func(ids, task, counts, scratch) == (29, 1)
    assert find.py_func(ids, scratch) == (29, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=30), st.integers(1, 8))
@settings(max_examples=100)
def test_request_lengths(rows: list[tuple[int, int]], batch: int) -> None:
    """Requests come by task and id with their numbers of tokens, however the rows are mixed."""
    counter = RequestCounter()
    for start in range(0, len(rows), batch):
        part = np.array(rows[start : start + batch], np.int32)
        counter.add(part[:, 0], part[:, 1])
        counter.add(part[:0, 0], part[:0, 1])  # a batch without tokens changes nothing
    lengths = counter.lengths()
    found = zip(
        lengths.task.tolist(), lengths.request.tolist(), lengths.tokens.tolist(), strict=True
    )
    assert list(found) == [(*key, number) for key, number in sorted(Counter(rows).items())]
    first = [sum(task < t for task, _ in set(rows)) for t in range(4)]
    assert lengths.first(3).tolist() == first


@given(st.data(), st.integers(0, 2**32 - 1))
@settings(max_examples=150)
def test_planted_fault_is_found(data: st.DataObject, seed: int) -> None:
    """An id out of range or an expert named twice is found wherever it stands."""
    rng = np.random.default_rng(seed)
    model = tiny_model(int(rng.integers(1, 5)), int(rng.integers(4, 300)), int(rng.integers(2, 5)))
    ids = draw_experts(rng, int(rng.integers(1, 30)), model)
    assert first_invalid_selection(ids, model.num_experts) is None
    row, layer, k = (data.draw(st.integers(0, size - 1)) for size in ids.shape)
    if data.draw(st.booleans()):
        ids[row, layer, k] = data.draw(st.integers(model.num_experts, 65535))
    else:
        other = data.draw(st.integers(0, model.top_k - 1).filter(lambda other: other != k))
        ids[row, layer, k] = ids[row, layer, other]
    assert first_invalid_selection(ids, model.num_experts) == (row, layer)


def test_widest_ids() -> None:
    """With 65,536 experts every uint16 is an id."""
    assert first_invalid_selection(np.array([[[0, 65535]]], np.uint16), 65536) is None
    assert first_invalid_selection(np.array([[[0, 65535]]], np.uint16), 65535) == (0, 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4], "row 1 (request 7, position 1) layer 4: expert 4; expected ids 0..3 of tiny"),
        ([3, 3], "row 1 (request 7, position 1) layer 4: experts [3, 3] name one expert twice"),
    ],
)
def test_bad_selection_is_named(ids: list[int], message: str) -> None:
    """The error names row, request, position, decoder layer and what is wrong."""
    batch = one_batch(tiny_model(), 3, request=7)
    batch.experts[1, 1] = ids
    with pytest.raises(InputError) as caught:
        trace_from_batches(tiny_model(), ["a"], [batch], name="x")
    assert str(caught.value).startswith(f"x: {message}")


# --------------------------------------------------------------------------------- split


@given(
    seed=st.integers(0, 2**31),
    holdout=st.floats(0.001, 0.999),
    requests=st.lists(st.integers(2, 12), min_size=1, max_size=3),
)
@settings(max_examples=30)
def test_split(seed: int, holdout: float, requests: list[int]) -> None:
    """A split keeps requests whole, in one part each, by task in the required share."""
    model = tiny_model()
    trace = random_trace(seed, model, {f"task{i}": n for i, n in enumerate(requests)})
    planned, held = trace.split(holdout, seed)
    table, of_planned, of_held = frame(trace), frame(planned), frame(held)
    ours, theirs = set(of_planned["request"]), set(of_held["request"])
    assert not ours & theirs
    for part, ids in ((of_planned, ours), (of_held, theirs)):
        expected = table[table["request"].isin(ids)].reset_index(drop=True)
        pd.testing.assert_frame_equal(part, expected)  # every row, in its order
    assert len(of_planned) + len(of_held) == len(table)
    for part in (planned, held):
        assert part.tasks == trace.tasks
        check_totals(part)
        lengths = part.request_lengths()
        counted = dataclasses.replace(part, lengths=None).request_lengths()
        np.testing.assert_array_equal(lengths.key, counted.key)
        np.testing.assert_array_equal(lengths.tokens, counted.tokens)
    assert planned.requests is not None
    assert held.requests is not None
    for kept, total in zip(held.requests.tolist(), requests, strict=True):
        assert 1 <= kept <= total - 1
        assert abs(kept - holdout * total) <= 0.5 or kept in (1, total - 1)
    np.testing.assert_array_equal(planned.counts + held.counts, trace.counts)
    np.testing.assert_array_equal(planned.tokens + held.tokens, trace.tokens)
    np.testing.assert_array_equal(planned.requests + held.requests, requests)


def held_requests(trace: Trace, seed: int) -> frozenset[int]:
    return frozenset(frame(trace.split(0.5, seed)[1])["request"].tolist())


def test_split_by_seed() -> None:
    """The same seed gives the same split, whatever the batches; other seeds give others."""
    few, many = (
        random_trace(0, tiny_model(), {"a": 20, "b": 20}, batch=batch) for batch in (10**6, 3)
    )
    splits = [held_requests(few, seed) for seed in range(20)]
    assert splits == [held_requests(many, seed) for seed in range(20)]
    assert len(set(splits)) == 20


def test_split_is_at_random() -> None:
    """Over seeds each request is held back about as often as the share says."""
    trace = random_trace(0, tiny_model(), {"a": 8, "b": 8})
    times = np.zeros(16)
    for seed in range(200):
        times[list(held_requests(trace, seed))] += 1
    assert times.sum() == 200 * 8
    assert np.abs(times - 100).max() < 35  # five standard deviations


def test_split_of_split() -> None:
    """A part can be split again."""
    trace = random_trace(0, tiny_model(), {"a": 8, "b": 8})
    planned, _ = trace.split(0.5, 0)
    first, second = planned.split(0.5, 1)
    check_totals(first)
    check_totals(second)
    np.testing.assert_array_equal(first.counts + second.counts, planned.counts)


def test_split_refused() -> None:
    """No split of counts, of a task with one request, or by a share of nothing or everything."""
    model = tiny_model()
    trace = random_trace(0, model, {"a": 8, "lonely": 1})
    with pytest.raises(InputError, match="task 'lonely' has 1 request;"):
        trace.split(0.5, 0)
    counts = Trace(model, ("a",), np.ones((1, 2, 4), np.int64), np.array([2]))
    with pytest.raises(InputError, match="no requests to split"):
        counts.split(0.5, 0)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="above 0 and below 1"):
            trace.split(share, 0)


def test_split_streams() -> None:
    """A split reads batch by batch and holds none of them back."""
    model = tiny_model()
    trace = random_trace(0, model, {"a": 20}, batch=5)
    open_batches = 0

    def counted() -> Iterator[TokenBatch]:
        nonlocal open_batches
        assert trace.batches is not None
        for batch in trace.batches():
            open_batches += 1
            yield batch

    lazy = Trace(model, trace.tasks, trace.counts, trace.tokens, trace.requests, counted)
    planned, _ = lazy.split(0.5, 0)
    assert planned.batches is not None
    open_batches = 0
    next(planned.batches())
    assert open_batches <= 2
