"""The per-request table: one row a request of each run, the same requests in all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_plan.errors import OutputError
from prism_plan.evaluate.request_table import write_request_table
from tests.evaluate.simulation_material import simulated, small_cluster, small_trace

TYPES = {
    "run": pa.int32(),
    "placement": pa.dictionary(pa.int32(), pa.string()),
    "request": pa.int64(),
    "server": pa.dictionary(pa.int32(), pa.string()),
    "task": pa.dictionary(pa.int32(), pa.string()),
    "trace_request": pa.int32(),
    "prefill_tokens": pa.int32(),
    "decode_tokens": pa.int32(),
    "arrival_s": pa.float64(),
    "start_s": pa.float64(),
    "first_token_s": pa.float64(),
    "done_s": pa.float64(),
}


def test_columns_and_values(tmp_path: Path) -> None:
    """Columns have the documented names and types; times follow each other; tasks fit servers."""
    trace, cluster = small_trace(), small_cluster()
    write_request_table(tmp_path / "r.parquet", simulated(trace, cluster, "exact", "uniform"))
    table = pq.read_table(tmp_path / "r.parquet")
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == TYPES
    assert table.num_rows == 2 * 3 * 40
    rows = table.to_pydict()
    assert rows["placement"] == ["exact"] * 120 + ["uniform"] * 120
    assert rows["run"] == [0] * 120 + [1] * 120
    assert rows["request"] == list(range(120)) * 2
    assert {(s, t) for s, t in zip(rows["server"], rows["task"], strict=True)} == {
        ("a", "x"), ("b", "y"), ("c", "x"), ("c", "z"),
    }  # fmt: skip
    task_of = {}
    for batch in trace.batches():  # type: ignore[misc]
        task_of.update(zip(batch.request.tolist(), batch.task.tolist(), strict=True))
    for task, request in zip(rows["task"], rows["trace_request"], strict=True):
        assert trace.tasks[task_of[request]] == task
    times = np.array([rows[name] for name in ("arrival_s", "start_s", "first_token_s", "done_s")])
    assert (np.diff(times, axis=0) >= 0).all()


def test_all_runs_have_the_same_requests(tmp_path: Path) -> None:
    """What was asked for is equal in every run; only what became of it differs."""
    result = simulated(small_trace(), small_cluster(), "exact", "uniform", "prism")
    write_request_table(tmp_path / "r.parquet", result)
    table = pq.read_table(tmp_path / "r.parquet").to_pandas()
    asked = ["request", "server", "task", "trace_request", "prefill_tokens", "decode_tokens",
             "arrival_s"]  # fmt: skip
    parts = [part.reset_index(drop=True) for _, part in table.groupby("run")]
    for part in parts[1:]:
        assert part[asked].equals(parts[0][asked])
        assert not part["done_s"].equals(parts[0]["done_s"])


def test_what_did_not_come_to_pass_is_null(tmp_path: Path) -> None:
    """Of a run that was truncated, times that never came are null, not NaN."""
    result = simulated(
        small_trace(), small_cluster(), "exact",
        number=1000, engine="reference", time_limit_s=1e-9,
    )  # fmt: skip
    write_request_table(tmp_path / "r.parquet", result)
    table = pq.read_table(tmp_path / "r.parquet")
    finished = result.to_json()["runs"][0]["finished"]
    done = table["done_s"]
    assert 0 < finished < len(done)
    assert done.null_count == len(done) - finished
    assert not np.isnan(done.drop_null().to_numpy()).any()
    assert table["arrival_s"].null_count == 0


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where it cannot be written one error says so, and no file appears."""
    with pytest.raises(OutputError):
        write_request_table(
            tmp_path / "missing" / "r.parquet", simulated(small_trace(), small_cluster(), "exact")
        )
    assert not list(tmp_path.iterdir())
