"""How often commands decode a trace: once where its tokens are kept, and few times otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_plan.io.trace_file import TraceFile
from prism_plan.io.trace_writer import write_trace
from prism_plan.solvers import SOLVER_NAMES
from tests.evaluate.simulation_material import CLUSTER, invoke, small_trace, without_times

KEPT, TOO_LARGE = 2**28, 0
SOLVERS = ",".join(SOLVER_NAMES)
COMPARE = ("compare", "t.parquet", "--cluster", "c.toml", "--solvers", SOLVERS, "--json")
SIMULATE = ("simulate", "--trace", "t.parquet", "--cluster", "c.toml", "--solvers",
            "exact,prism,uniform", "--json")  # fmt: skip


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every record batch that is decoded, in order."""
    rows: list[int] = []
    decode = TraceFile.record_batches

    def counted(
        file: TraceFile, at_a_time: int, columns: Sequence[str] | None = None
    ) -> Iterator[Any]:
        for batch in decode(file, at_a_time, columns):
            rows.append(len(batch))
            yield batch

    monkeypatch.setattr(TraceFile, "record_batches", counted)
    return rows


@pytest.mark.parametrize(
    ("command", "most_kept_bytes", "reads"),
    [
        # checked and counted
        (COMPARE, KEPT, 1),
        ((*COMPARE, "--holdout", "0.5"), KEPT, 1),
        (SIMULATE, KEPT, 1),
        ((*SIMULATE, "--holdout", "0.5"), KEPT, 1),
        # and scored, searched for the prompts that were drawn, or both: for each of three samples
        (COMPARE, TOO_LARGE, 5),
        (SIMULATE, TOO_LARGE, 2),
        # and before that split
        ((*COMPARE, "--holdout", "0.5"), TOO_LARGE, 6),
        ((*SIMULATE, "--holdout", "0.5"), TOO_LARGE, 3),
    ],
)
def test_each_row_is_decoded_so_many_times(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows_read: list[int],
    command: Sequence[str],
    most_kept_bytes: int,
    reads: int,
) -> None:
    """However many solvers are compared or simulated, a trace is decoded once if it is kept.

    Larger ones are decoded again for each use, to the same results.
    """
    trace = small_trace()
    write_trace(tmp_path / "t.parquet", trace)
    (tmp_path / "c.toml").write_text(CLUSTER)
    monkeypatch.setattr("prism_plan.io.token_batches.MAX_KEPT_BYTES", most_kept_bytes)
    result = invoke(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    assert sum(rows_read) == reads * trace.tokens.sum()
    monkeypatch.setattr("prism_plan.io.token_batches.MAX_KEPT_BYTES", KEPT - most_kept_bytes)
    other = invoke(tmp_path, *command)
    assert without_times(json.loads(other.stdout)) == without_times(json.loads(result.stdout))
