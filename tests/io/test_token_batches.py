"""Tokens that are kept in memory are those of the file, and are kept whole or not at all."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest

from prism_plan.io.open_file import OpenFile
from prism_plan.io.token_batches import KeptTokens
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_schema import BATCH_ROWS
from prism_plan.io.trace_writer import TraceWriter, write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import TokenBatch, Trace, concatenate_batches
from tests.profiling.synthetic import synthetic_trace

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=8,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)


def tokens_of(trace: Trace) -> TokenBatch:
    assert trace.batches is not None
    return concatenate_batches(list(trace.batches()))


def assert_equal(found: TokenBatch, wanted: TokenBatch) -> None:
    for name in ("request", "position", "phase", "task", "experts"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("experts", [8, 256, 257, 65_536])
def test_kept_tokens_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    """Kept and decoded tokens are equal in every column, for ids of one byte and of two."""
    monkeypatch.setattr("prism_plan.io.token_batches.MAX_BATCH_SELECTIONS", 1000)
    model = dataclasses.replace(SPEC, num_experts=experts)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, experts, (600, 2, 2)).astype(np.uint16)
    ids[:, :, 1] = (ids[:, :, 0].astype(int) + rng.integers(1, experts, (600, 2))) % experts
    ids[0, 0] = [0, experts - 1]
    batch = TokenBatch(
        request=(np.arange(600) // 10).astype(np.int32),
        position=(np.arange(600) % 10).astype(np.int32),
        phase=rng.integers(0, 3, 600).astype(np.int8),
        task=(np.arange(600) // 10 % 3).astype(np.int32),
        experts=ids,
    )
    path = tmp_path / "t.parquet"
    with TraceWriter(path, model) as writer:
        writer.write(batch, ["a", "b", "c"])
    kept, decoded = read_trace(path, keep_tokens=True), read_trace(path)
    assert_equal(tokens_of(kept), tokens_of(decoded))
    assert_equal(tokens_of(kept), batch)
    np.testing.assert_array_equal(kept.counts, decoded.counts)
    assert kept.batches is not None
    assert len(list(kept.batches())) == 3  # of at most 250 tokens


def test_words_without_tokens_are_no_tasks(tmp_path: Path) -> None:
    """Task codes of kept tokens are the trace's, also where the file names further tasks."""
    trace = synthetic_trace(SPEC, ["x", "y"], requests=3)
    path = tmp_path / "t.parquet"
    with TraceWriter(path, SPEC) as writer:
        batch = tokens_of(trace)
        writer.write(dataclasses.replace(batch, task=batch.task * 2 + 1), ["-", "x", "--", "y"])
    kept = read_trace(path, keep_tokens=True)
    assert kept.tasks == ("x", "y")
    assert_equal(tokens_of(kept), batch)
    assert_equal(tokens_of(read_trace(path)), batch)
    assert kept.request_lengths().first(2).tolist() == [0, 3, 6]


def test_kept_tokens_have_no_gate_weights(tmp_path: Path) -> None:
    """Gate weights are checked, but neither kept nor decoded again, and the trace says so."""
    batch = tokens_of(synthetic_trace(SPEC, ["x"], requests=2))
    gates = np.full(batch.experts.shape, 0.5, np.float16)
    path = tmp_path / "t.parquet"
    with TraceWriter(path, SPEC, weights=True) as writer:
        writer.write(dataclasses.replace(batch, weights=gates), ["x"])
    kept = read_trace(path, keep_tokens=True)
    assert not kept.has_weights
    assert tokens_of(kept).weights is None
    assert read_trace(path).has_weights


def test_bound_on_kept_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of two ids of a byte and eleven bytes more a token are counted, to the byte."""
    monkeypatch.setattr("prism_plan.io.token_batches.MAX_KEPT_BYTES", 15 * 7)
    assert KeptTokens.of(SPEC, 7) is not None
    assert KeptTokens.of(SPEC, 8) is None
    wide = dataclasses.replace(SPEC, num_experts=257)
    assert KeptTokens.of(wide, 5) is not None
    assert KeptTokens.of(wide, 6) is None


def test_sent_to_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace is sent without its tokens, which are kept there from the first whole pass on."""
    trace = synthetic_trace(SPEC, ["x", "y"], requests=50)
    path = tmp_path / "t.parquet"
    write_trace(path, trace)
    kept = read_trace(path, keep_tokens=True)
    sent = pickle.dumps(kept.batches)
    assert len(sent) < 10_000 < tokens_of(trace).experts.nbytes
    batches = pickle.loads(sent)
    monkeypatch.setattr("prism_plan.io.token_batches.MAX_BATCH_SELECTIONS", 100)
    next(iter(batches()))  # one that is broken off keeps nothing
    assert_equal(concatenate_batches(list(batches())), tokens_of(trace))
    path.unlink()
    with open(path, "wb"):
        pass
    assert_equal(concatenate_batches(list(batches())), tokens_of(trace))


def test_row_groups_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens are there when only their row group was read, so that memory is flat."""
    rng = np.random.default_rng(0)
    path = tmp_path / "t.parquet"
    groups = 10
    with TraceWriter(path, SPEC) as writer:
        for group in range(groups):
            first = rng.integers(0, 8, (BATCH_ROWS, 2, 1))
            second = (first + rng.integers(1, 8, first.shape)) % 8
            batch = TokenBatch(
                request=np.full(BATCH_ROWS, group, np.int32),
                position=np.arange(BATCH_ROWS, dtype=np.int32),
                phase=np.zeros(BATCH_ROWS, np.int8),
                task=np.zeros(BATCH_ROWS, np.int32),
                experts=np.concatenate([first, second], axis=2).astype(np.uint16),
            )
            writer.write(batch, ["x"])
    trace = read_trace(path)
    assert trace.batches is not None
    size = 0
    read = OpenFile.pread

    def counted(file: OpenFile, length: int, position: int) -> bytes:
        nonlocal size
        data = read(file, length, position)
        size += len(data)
        return data

    monkeypatch.setattr(OpenFile, "pread", counted)
    next(iter(trace.batches()))
    assert 0 < size < path.stat().st_size / 3
