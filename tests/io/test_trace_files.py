"""Tests of trace files: exact round trips, the documented columns, size, and interruption."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_plan
from prism_plan.errors import InputError, OutputError
from prism_plan.io.trace_reader import read_header, read_trace
from prism_plan.io.trace_schema import BATCH_ROWS, counts_schema, token_schema
from prism_plan.io.trace_writer import TraceWriter, write_trace
from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.provenance import stamped
from prism_plan.trace import PHASES, TokenBatch, Trace, trace_from_batches

TINY = ModelSpec(
    name="tiny",
    moe_layers=(2, 10),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=(100, 50),
    dense_bytes=0,
    kv_bytes_per_token=0,
)
COLUMNS = ("request", "position", "phase", "task", "experts")
PROVENANCE = {"tool": "test", "nested": {"list": [1, 2.5, None, "é"]}}


def draw_experts(
    rng: np.random.Generator, tokens: int, model: ModelSpec, skew: float = 0.0
) -> np.ndarray:
    """Uint16 [T, L, K], different experts; popularity is normal in the logit with that skew."""
    shape = (model.num_layers, model.num_experts)
    noise = skew * rng.normal(size=shape) + rng.gumbel(size=(tokens, *shape))
    return noise.argsort(axis=2)[:, :, : -model.top_k - 1 : -1].astype(np.uint16)


def random_batch(
    rng: np.random.Generator,
    tokens: int,
    model: ModelSpec,
    tasks: int,
    *,
    weights: bool,
    first: int = 0,
    skew: float = 0.0,
) -> TokenBatch:
    """Requests ``first``, ``first + 1``, ... of eight tokens; request r is of task r mod tasks."""
    request = first + np.arange(tokens) // 8
    experts = draw_experts(rng, tokens, model, skew)
    return TokenBatch(
        request=request.astype(np.int32),
        position=(np.arange(tokens) % 8).astype(np.int32),
        phase=rng.integers(0, len(PHASES), tokens).astype(np.int8),
        task=(request % tasks).astype(np.int32),
        experts=experts,
        weights=rng.random(experts.shape).astype(np.float16) if weights else None,
    )


def rows_of(trace: Trace) -> dict[str, Any]:
    """All tokens of a trace in one array per column; tasks and phases by name."""
    assert trace.batches is not None
    parts = list(trace.batches())
    columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS}
    columns["task"] = np.array(trace.tasks)[columns["task"]]
    columns["phase"] = np.array(PHASES)[columns["phase"]]
    if parts[0].weights is not None:
        gates = np.concatenate([p.weights for p in parts if p.weights is not None])
        columns["weights"] = gates.view(np.uint16)  # bit by bit
    return columns


def check_same(found: Trace, wanted: Trace) -> None:
    """Two traces agree in everything but the file they come from."""
    assert found.kind == wanted.kind
    assert found.model == wanted.model
    assert found.tasks == wanted.tasks
    assert found.provenance == wanted.provenance
    assert found.has_weights == wanted.has_weights
    for name in ("counts", "tokens", "requests"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    if wanted.kind == "tokens":
        ours, theirs = rows_of(found), rows_of(wanted)
        assert ours.keys() == theirs.keys()
        for name, column in theirs.items():
            assert ours[name].dtype == column.dtype
            np.testing.assert_array_equal(ours[name], column)


def round_trip(path: Path, trace: Trace) -> Trace:
    write_trace(path, trace)
    return read_trace(path)


# --------------------------------------------------------------------------------- round trips


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    tasks=st.lists(
        st.text(min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=3, unique=True
    ),
    weights=st.booleans(),
)
@settings(max_examples=40)
def test_tokens_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    tokens: list[int],
    tasks: list[str],
    weights: bool,
) -> None:
    """A token-level trace comes back row by row, with or without weights."""
    rng = np.random.default_rng(seed)
    batches = []
    for number, size in enumerate(tokens):
        first = 12 * number  # a multiple of one, two and three tasks: they appear in order
        batch = random_batch(rng, size, TINY, len(tasks), weights=weights, first=first)
        batches.append(batch)
    used = max(int(batch.task.max()) for batch in batches) + 1
    trace = trace_from_batches(TINY, tasks[:used], batches, provenance=PROVENANCE)
    check_same(round_trip(tmp_path_factory.mktemp("trace") / "t.parquet", trace), trace)


@pytest.mark.parametrize("weights", [False, True])
def test_several_row_groups(tmp_path: Path, weights: bool) -> None:
    """A trace of several row groups comes back whole, in batches of at most 16,384 rows."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, 60_001, TINY, 3, weights=weights)
    trace = trace_from_batches(TINY, ["z", "a", "m"], [batch], provenance=PROVENANCE)
    path = tmp_path / "t.parquet"
    found = round_trip(path, trace)
    check_same(found, trace)
    assert pq.ParquetFile(path).metadata.num_row_groups >= 3
    assert found.batches is not None
    assert max(len(b) for b in found.batches()) <= BATCH_ROWS == 16_384


def test_extreme_values(tmp_path: Path) -> None:
    """The largest ids, request numbers, positions and the oddest weights come back exactly."""
    model = dataclasses.replace(TINY, num_experts=65536, top_k=2)
    gates = np.array([0.0, -0.0, 65504, 6e-8, 1e-5, 0.333, 1, 2], np.float16).reshape(2, 2, 2)
    batch = TokenBatch(
        request=np.array([2**31 - 1, 0], np.int32),
        position=np.array([2**31 - 1, 0], np.int32),
        phase=np.array([1, 0], np.int8),
        task=np.array([0, 0], np.int32),
        experts=np.array([0, 65535, 65535, 0, 1, 256, 255, 32768], np.uint16).reshape(2, 2, 2),
        weights=gates,
    )
    trace = trace_from_batches(model, ["a"], [batch])
    check_same(round_trip(tmp_path / "t.parquet", trace), trace)


def test_task_order(tmp_path: Path) -> None:
    """Tasks come back in the trace's order, also where their first tokens stand in another."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, 24, TINY, 3, weights=False, first=2)  # tasks 2, 0, 1
    trace = trace_from_batches(TINY, ["z", "a", "m"], [batch])
    check_same(round_trip(tmp_path / "t.parquet", trace), trace)


@pytest.mark.parametrize("tasks", [("a", "b", "none"), ("none", "a", "b"), ("a", "none", "b")])
def test_task_without_tokens(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    """A task that has no tokens is left out of a file; the others are as before."""
    whole = random_batch(np.random.default_rng(0), 64, TINY, 2, weights=False)
    codes = np.array([tasks.index("a"), tasks.index("b")], np.int32)
    trace = trace_from_batches(TINY, tasks, [dataclasses.replace(whole, task=codes[whole.task])])
    assert trace.tokens[tasks.index("none")] == 0
    found = round_trip(tmp_path / "t.parquet", trace)
    check_same(found, trace_from_batches(TINY, ["a", "b"], [whole]))


@pytest.mark.parametrize("size", [10, 5000])
def test_different_dictionaries(tmp_path: Path, size: int) -> None:
    """Batches may each have their own list of tasks; a name is the same task in all of them."""
    rng = np.random.default_rng(0)
    lists = [["a"], ["b", "a"], ["c", "b", "a"], ["a", "x", "y", "b"], ["b"]]
    path = tmp_path / "t.parquet"
    written: list[tuple[str, np.ndarray]] = []
    with TraceWriter(path, TINY) as writer:
        for number, names in enumerate(lists):
            first = number * 1000
            batch = random_batch(rng, size, TINY, len(names), weights=False, first=first)
            writer.write(batch, names)
            written += [(names[c], e) for c, e in zip(batch.task, batch.experts, strict=True)]
    trace = read_trace(path)
    assert trace.tasks == tuple(dict.fromkeys(name for name, _ in written))
    rows = rows_of(trace)
    assert rows["task"].tolist() == [name for name, _ in written]
    np.testing.assert_array_equal(rows["experts"], [experts for _, experts in written])
    for task, tokens in zip(trace.tasks, trace.tokens, strict=True):
        assert tokens == sum(name == task for name, _ in written)


@pytest.mark.parametrize("tasks", [("z", "a", "m"), ("only",)])
def test_counts_round_trip(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    """A counts-only trace comes back exactly: counts, tokens, order of tasks."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2**52, 2**53, len(tasks))
    counts = rng.integers(0, tokens[:, None, None] // 2, (len(tasks), 2, 4))  # top-2 of 4
    counts[0, 1] = 0
    trace = Trace(TINY, tasks, counts, tokens, provenance=PROVENANCE)
    check_same(round_trip(tmp_path / "c.parquet", trace), trace)


def test_large_counts_round_trip(tmp_path: Path) -> None:
    """A table of counts beyond one batch of rows comes back exactly."""
    rng = np.random.default_rng(0)
    model = dataclasses.replace(TINY, num_experts=5000)
    counts = rng.integers(0, 1000, (3, 2, 5000))
    tokens = np.array([2_000_000, 2_000_001, 2_000_002])
    trace = Trace(model, ("b", "a", "c"), counts, tokens)
    check_same(round_trip(tmp_path / "c.parquet", trace), trace)


def test_split_part_can_be_written(tmp_path: Path) -> None:
    """A part of a file that was split is a trace like any other."""
    rng = np.random.default_rng(0)
    trace = trace_from_batches(TINY, ["a", "b"], [random_batch(rng, 400, TINY, 2, weights=True)])
    planned, _ = round_trip(tmp_path / "t.parquet", trace).split(0.5, 0)
    ours, theirs = rows_of(round_trip(tmp_path / "part.parquet", planned)), rows_of(planned)
    for name, column in theirs.items():
        np.testing.assert_array_equal(ours[name], column)


def test_same_bytes(tmp_path: Path) -> None:
    """The same trace gives the same bytes."""
    rng = np.random.default_rng(0)
    trace = trace_from_batches(TINY, ["a", "b"], [random_batch(rng, 99, TINY, 2, weights=True)])
    counts = Trace(TINY, trace.tasks, trace.counts, trace.tokens)
    for each in (trace, counts):
        write_trace(tmp_path / "1", each)
        write_trace(tmp_path / "2", each)
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


# --------------------------------------------------------------------------------- streaming


def test_streamed_counts(tmp_path: Path) -> None:
    """Totals taken while reading equal numpy's bincount over all rows at once."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, 40_000, TINY, 2, weights=False, skew=1.0)
    path = tmp_path / "t.parquet"
    with TraceWriter(path, TINY) as writer:
        writer.write(batch, ["a", "b"])
    trace = read_trace(path)
    for task in (0, 1):
        for layer in (0, 1):
            ids = batch.experts[batch.task == task, layer].ravel()
            np.testing.assert_array_equal(trace.counts[task, layer], np.bincount(ids, minlength=4))
        assert trace.tokens[task] == np.bincount(batch.task)[task]
        assert trace.requests is not None
        assert trace.requests[task] == len(np.unique(batch.request[batch.task == task]))


def test_progress_name_and_identity(tmp_path: Path) -> None:
    """Progress goes up to the number of rows; name and SHA-256 are those of the file."""
    rng = np.random.default_rng(0)
    path = tmp_path / "some.parquet"
    trace = trace_from_batches(TINY, ["a"], [random_batch(rng, 20_000, TINY, 1, weights=False)])
    write_trace(path, trace)
    told: list[tuple[int, int]] = []
    found = read_trace(path, progress=lambda done, total: told.append((done, total)))
    assert told == [(16_384, 20_000), (20_000, 20_000)]
    assert found.name == "some.parquet"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------- the format


def test_columns_of_tokens(tmp_path: Path) -> None:
    """Columns and header are those of docs/design.md, section 6, read here by pyarrow alone."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, 50, TINY, 2, weights=True)
    path = tmp_path / "t.parquet"
    write_trace(path, trace_from_batches(TINY, ["a", "b"], [batch], provenance=PROVENANCE))
    table = pq.read_table(path)
    assert table.column_names == ["request", "position", "phase", "task", "experts", "weights"]
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    assert kinds["request"] == kinds["position"] == pa.int32()
    assert pa.types.is_dictionary(kinds["phase"])
    assert pa.types.is_dictionary(kinds["task"])
    for name, kind in (("experts", pa.uint16()), ("weights", pa.float16())):
        assert kinds[name].list_size == 4
        assert kinds[name].value_type == kind
    assert table["phase"].to_pylist() == [PHASES[code] for code in batch.phase]
    assert table["task"].to_pylist() == ["ab"[code] for code in batch.task]
    layer_major = [[*row[0], *row[1]] for row in batch.experts.tolist()]
    assert table["experts"].to_pylist() == layer_major
    header = json.loads(pq.ParquetFile(path).metadata.metadata[b"prism_plan"])
    assert header == {
        "format": "prism-plan/trace",
        "version": 1,
        "kind": "tokens",
        "model": TINY.to_json(),
        "provenance": PROVENANCE,
    }
    assert read_header(path) == header


@pytest.mark.parametrize("kind", ["counts", "tokens", "weights", "writer", "no rows"])
def test_metadata_are_seen_by_plain_pyarrow(tmp_path: Path, kind: str) -> None:
    """However a trace was written, every way to read Parquet shows the header and the types."""
    rng = np.random.default_rng(0)
    path = tmp_path / "t.parquet"
    weights = kind == "weights"
    if kind == "counts":
        write_trace(path, Trace(TINY, ("a",), np.ones((1, 2, 4), np.int64), np.array([2])))
    elif kind in ("tokens", "weights"):
        batch = random_batch(rng, 40, TINY, 2, weights=weights)
        write_trace(path, trace_from_batches(TINY, ["a", "b"], [batch], provenance=PROVENANCE))
    else:
        with TraceWriter(path, TINY, provenance=PROVENANCE) as writer:
            if kind == "writer":
                writer.write(random_batch(rng, 40, TINY, 2, weights=False), ["a", "b"])
            writer.provenance |= {"partial": True}  # as a run does that was interrupted
    header = read_header(path)
    assert header["kind"] == ("counts" if kind == "counts" else "tokens")
    assert ("partial" in header["provenance"]) == (kind in ("writer", "no rows"))
    with pq.ParquetFile(path) as parquet:
        schemas = [pq.read_table(path).schema, pq.read_schema(path), parquet.schema_arrow]
        assert json.loads(parquet.metadata.metadata[b"prism_plan"]) == header
    for schema in schemas:
        assert json.loads(schema.metadata[b"prism_plan"]) == header
        wanted = counts_schema() if kind == "counts" else token_schema(TINY, weights)
        assert schema.equals(wanted)


def test_files_without_metadata_in_the_schema_are_read(tmp_path: Path) -> None:
    """Earlier versions wrote the header into the file's metadata alone."""
    batch = random_batch(np.random.default_rng(0), 40, TINY, 2, weights=False)
    trace = trace_from_batches(TINY, ["a", "b"], [batch], provenance=PROVENANCE)
    path = tmp_path / "t.parquet"
    write_trace(path, trace)
    table = pq.read_table(path)
    header = table.schema.metadata[b"prism_plan"]
    table = table.replace_schema_metadata(None)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"prism_plan": header})
    assert not pq.read_table(path).schema.metadata
    check_same(read_trace(path), trace)


def test_columns_of_counts(tmp_path: Path) -> None:
    """A counts-only file has one row per task, decoder layer and expert."""
    counts = np.arange(16).reshape(2, 2, 4)
    path = tmp_path / "c.parquet"
    write_trace(path, Trace(TINY, ("b", "a"), counts, np.array([20, 30])))
    table = pq.read_table(path)
    assert table.schema.field("count").type == pa.int64()
    assert table.to_pylist() == [
        {"task": task, "layer": layer, "expert": e, "count": int(counts[t, position, e])}
        for t, task in enumerate("ba")
        for position, layer in enumerate((2, 10))
        for e in range(4)
    ]
    header = json.loads(table.schema.metadata[b"prism_plan"])
    assert (header["kind"], header["tokens"]) == ("counts", {"b": 20, "a": 30})


def foreign_table(**changes: Any) -> pa.Table:
    """Three tokens as another tool might write them: plain text, rows of any order."""
    columns: dict[str, Any] = {
        "request": pa.array([5, 0, 5], pa.int32()),
        "position": pa.array([1, 0, 0], pa.int32()),
        "phase": pa.array(["decode", "unknown", "prefill"]),
        "task": pa.array(["b", "a", "b"]),
        "experts": pa.array([[0, 1, 2, 3], [3, 0, 1, 0], [1, 0, 0, 2]], pa.list_(pa.uint16(), 4)),
    }
    columns.update(changes)
    return pa.table({name: column for name, column in columns.items() if column is not None})


def foreign_file(path: Path, table: pa.Table, **changes: Any) -> Path:
    header = {"format": "prism-plan/trace", "version": 1, "kind": "tokens",
              "model": TINY.to_json(), "provenance": {}, **changes}  # fmt: skip
    metadata = {"prism_plan": json.dumps(header)}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_file_of_another_tool(tmp_path: Path) -> None:
    """A file with the documented columns is read whoever wrote it: plain text for dictionaries."""
    trace = read_trace(foreign_file(tmp_path / "f.parquet", foreign_table()))
    assert trace.tasks == ("b", "a")
    assert trace.tokens.tolist() == [2, 1]
    assert trace.requests is not None
    assert trace.requests.tolist() == [1, 1]
    assert trace.counts.tolist() == [[[2, 2, 0, 0], [1, 0, 2, 1]], [[1, 0, 0, 1], [1, 1, 0, 0]]]
    rows = rows_of(trace)
    assert rows["phase"].tolist() == ["decode", "unknown", "prefill"]
    assert rows["task"].tolist() == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": pa.array([1, 0, 1], pa.int32())}, "request 5 position 1 is duplicated"),
        ({"task": pa.array(["b", "a", "a"])}, "request 5 has tasks 'b' and 'a'"),
        ({"request": pa.array([5, -1, 5], pa.int32())}, "row 1 column 'request': -1"),
        ({"phase": pa.array(["decode", "Decode", "prefill"])}, "phase 'Decode'"),
        ({"task": pa.array(["b", None, "b"])}, "column 'task' has an empty value"),
        ({"extra": pa.array([1, 2, 3])}, "unknown column 'extra'"),
        ({"task": None}, "column 'task' is missing"),
        ({"position": pa.array([1, 0, 0], pa.int64())}, "column 'position': type int64"),
        (
            {"experts": pa.array([[0, 1, 2, 3], [3, 0, 1, 1], [1, 0, 0, 2]],
                                 pa.list_(pa.uint16(), 4))},
            "row 1 (request 0, position 0) layer 10: experts [1, 1] name one expert twice",
        ),
        (
            {"weights": pa.array([[1.0] * 4, [1.0] * 4, [1.0, float("inf"), 1.0, 1.0]],
                                 pa.list_(pa.float16(), 4))},
            "rows 0..2: a gate weight is negative, NaN or infinite",
        ),
    ],
    ids=["duplicate", "two-tasks", "negative", "phase", "null", "extra", "missing", "type",
         "expert", "weight"],
)  # fmt: skip
def test_wrong_rows(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """What a row must not hold is refused, with the place."""
    path = foreign_file(tmp_path / "f.parquet", foreign_table(**changes))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_trace(path)
    assert caught.value.source == str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: 2; expected 1"),
        ({"format": "prism-plan/placement"}, "format: 'prism-plan/placement'"),
        ({"kind": "words"}, "kind: 'words'"),
        ({"provenance": []}, "provenance: []"),
        ({"model": {}}, "model: keys 'name', 'moe_layers', 'num_experts'"),
    ],
)
def test_wrong_header(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A header of another version, format or kind is refused, with the place."""
    path = foreign_file(tmp_path / "f.parquet", foreign_table(), **changes)
    with pytest.raises(InputError, match=re.escape(message)):
        read_trace(path)


def test_empty_trace(tmp_path: Path) -> None:
    """A trace without rows is refused when it is read."""
    path = tmp_path / "e.parquet"
    with TraceWriter(path, TINY):
        pass
    with pytest.raises(InputError, match="no rows"):
        read_trace(path)


def test_cut_short(tmp_path: Path) -> None:
    """A file cut anywhere is refused, never read in part."""
    path = foreign_file(tmp_path / "f.parquet", foreign_table())
    data = path.read_bytes()
    for size in [0, 1, 4, 8, *range(16, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="not a readable Parquet file"):
            read_trace(path)


# --------------------------------------------------------------------------------- size

MANY_EXPERTS = ModelSpec(
    name="many-experts",
    moe_layers=tuple(range(3, 23)),
    num_experts=256,
    top_k=8,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)


def bytes_per_selection(path: Path, model: ModelSpec, batches: Sequence[TokenBatch]) -> float:
    weights = batches[0].weights is not None
    with TraceWriter(path, model, weights=weights) as writer:
        for batch in batches:
            writer.write(batch, ["a", "b"])
    selections = sum(len(batch) for batch in batches) * model.num_layers * model.top_k
    return path.stat().st_size / selections


@pytest.mark.parametrize(
    ("model", "weights", "most"),
    [
        (PRESETS["deepseek-v2-lite"], False, 1.0),
        (PRESETS["deepseek-v2-lite"], True, 3.0),
        # 256 ids at random leave nothing to compress: one byte, and 2 % for all else in the row
        (MANY_EXPERTS, False, 1.02),
        (MANY_EXPERTS, True, 3.0),
    ],
    ids=["64-experts", "64-experts-weights", "256-experts", "256-experts-weights"],
)
def test_file_size(tmp_path: Path, model: ModelSpec, weights: bool, most: float) -> None:
    """Up to 256 experts a selection takes one byte, and at most three with its weight.

    Even where all experts are used alike, and weights are random.
    """
    rng = np.random.default_rng(0)
    batch = random_batch(rng, 3000, model, 2, weights=weights)
    assert bytes_per_selection(tmp_path / "t.parquet", model, [batch]) <= most


@pytest.mark.parametrize(("weights", "most"), [(False, 1.0), (True, 3.0)])
def test_file_size_of_small_batches(tmp_path: Path, weights: bool, most: float) -> None:
    """The size does not grow where rows come in small batches, request by request."""
    rng = np.random.default_rng(0)
    model = PRESETS["deepseek-v2-lite"]
    batches = [
        random_batch(rng, 8, model, 2, weights=weights, first=number, skew=0.7)
        for number in range(300)
    ]
    assert bytes_per_selection(tmp_path / "t.parquet", model, batches) <= most


# --------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("old", [b"old", None])
def test_interrupted_writer(tmp_path: Path, error: type[BaseException], old: bytes | None) -> None:
    """A writer that is interrupted leaves nothing of its own, and an earlier file as it was."""
    path = tmp_path / "t.parquet"
    if old is not None:
        path.write_bytes(old)
    batch = random_batch(np.random.default_rng(0), 20_000, TINY, 1, weights=False)

    def interrupted() -> None:
        with TraceWriter(path, TINY) as writer:
            writer.write(batch, ["a"])
            assert path.exists() == (old is not None)
            raise error

    with pytest.raises(error):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["t.parquet"])
    assert old is None or path.read_bytes() == old


def test_writer_refuses_bad_selection(tmp_path: Path) -> None:
    """A selection that is none is refused on writing, and no file appears."""
    batch = random_batch(np.random.default_rng(0), 10, TINY, 1, weights=False)
    batch.experts[7, 1, 0] = 4
    with (
        pytest.raises(InputError, match=r"row 7 \(request 0, position 7\) layer 10: expert 4"),
        TraceWriter(tmp_path / "t.parquet", TINY) as writer,
    ):
        writer.write(batch, ["a"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tokens", "counts"])
def test_broken_pipe(tmp_path: Path, kind: str) -> None:
    """A pipe that does not take the trace is an output error, and is still there."""
    rng = np.random.default_rng(0)
    if kind == "tokens":
        batch = random_batch(rng, 30_000, TINY, 1, weights=True)
        trace = trace_from_batches(TINY, ["a"], [batch])
    else:
        counts = rng.integers(0, 2**40, (3, 2, 5000))
        tokens = np.full(3, 2**40)
        trace = Trace(dataclasses.replace(TINY, num_experts=5000), ("a", "b", "c"), counts, tokens)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.open("rb").close(), daemon=True).start()
    with pytest.raises(OutputError, match="pipe: cannot be written"):
        write_trace(pipe, trace)  # more than a pipe holds
    assert pipe.is_fifo()


@pytest.mark.parametrize("call", ["__init__", "write_table", "close"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A disk that is full at the first, a middle or the last byte is an output error.

    The earlier file stands and no other is left.
    """

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "t.parquet"
    path.write_bytes(b"old")
    trace = trace_from_batches(
        TINY, ["a"], [random_batch(np.random.default_rng(0), 10, TINY, 1, weights=False)]
    )
    monkeypatch.setattr(pq.ParquetWriter, call, fail)
    with pytest.raises(OutputError, match="cannot be written: no space left"):
        write_trace(path, trace)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]
    assert path.read_bytes() == b"old"


# --------------------------------------------------------------------------------- provenance


def test_source_date_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """SOURCE_DATE_EPOCH fixes the date, so that the same inputs give the same bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert stamped({"source": "esft", "n": 1}) == {
        "tool": f"prism-plan {prism_plan.__version__}",
        "source": "esft",
        "n": 1,
        "date": "1970-01-02T00:00:00+00:00",
    }


@pytest.mark.parametrize("epoch", [None, "", "soon"])
def test_date_is_now(monkeypatch: pytest.MonkeyPatch, epoch: str | None) -> None:
    """Without SOURCE_DATE_EPOCH, or with one that is no number, the date is now, in UTC."""
    if epoch is None:
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    else:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    before = datetime.now(UTC).replace(microsecond=0)
    date = datetime.fromisoformat(stamped({})["date"])
    assert before <= date <= datetime.now(UTC)
    assert date.utcoffset() == timedelta(0)
