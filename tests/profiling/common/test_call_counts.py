"""Counts whose sum does not fit: refused by name, never a negative number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.call_counts import sum_calls
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.sources import Source
from prism_plan.profiling.trtllm import read_trtllm
from prism_plan.trace import Trace
from prism_plan.trace_totals import MAX_SUM
from tests.profiling.recordings import TINY, read, refusal, tiny

TOO_LARGE = "a sum too large to count"
MOST = 2**53 - 1


def table(path: Path, count: int, model: ModelSpec) -> Path:
    """A CSV of equal counts."""
    rows = (f"{n},{e},{count}" for n in range(2) for e in range(model.num_experts))
    path.write_text("\n".join(["layer,expert,count", *rows]))
    return path


def test_a_table_of_counts(tmp_path: Path) -> None:
    """2 x 4,096 counts of 2^53 - 1 wrap in 64 bits; their true sum is named."""
    model = tiny(num_experts=4096)
    message = refusal(read_counts, table(tmp_path / "c.csv", MOST, model), model=model)
    assert f"{2 * 4096 * MOST:,} calls together, {TOO_LARGE}" in message
    assert "-2048" not in message


def test_a_table_that_a_trace_file_cannot_hold(tmp_path: Path) -> None:
    """8 counts of 2^53 - 1 fit in 64 bits, but not as tokens of a trace file."""
    path = table(tmp_path / "c.csv", MOST, TINY)
    assert f"{4 * MOST:,} tokens, {TOO_LARGE}; expected fewer than" in refusal(read_counts, path)
    trace, *_ = read(read_counts, table(path, MOST // 4, TINY))
    assert trace.tokens.tolist() == [MOST // 4 * 4]
    write_trace(tmp_path / "t.parquet", trace)
    assert read_trace(tmp_path / "t.parquet").tokens.tolist() == trace.tokens.tolist()


@pytest.mark.parametrize(
    "cell", ["1e300", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
             "9007199254740992", "inf", "1.5", "1" * 400],
)  # fmt: skip
def test_values_that_are_no_counts(tmp_path: Path, cell: str) -> None:
    """Fractions, exponents and numbers from 2^53 on are refused with what is expected."""
    path = tmp_path / "c.csv"
    path.write_text(f"layer,expert,count\n0,0,{cell}\n")
    message = refusal(read_counts, path)
    assert "line 2 column 'count'" in message
    assert "expected a whole number of at least 0 and below 2^53" in message


@pytest.mark.parametrize("value", [2**62, 2**63 - 1])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_of_sglang(tmp_path: Path, value: int, passes: int) -> None:
    """Sums over passes, and over experts and layers, are refused whatever they wrap to."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"logical_count": [[[value] * 8] * 2] * passes}))
    assert TOO_LARGE in refusal(read_sglang, path)


def test_dumps_of_sglang(tmp_path: Path) -> None:
    """So are sums over dumps of one rank, and over ranks and passes of per_pass."""
    torch = pytest.importorskip("torch")
    files = [tmp_path / f"{name}.pt" for name in "abc"]
    for number, file in enumerate(files):
        counts = torch.full((2, 8), 2**58 - number, dtype=torch.int64)
        torch.save({"rank": 0, "logical_count": counts}, file)
    assert TOO_LARGE in refusal(read_sglang, *files)
    table = torch.arange(8).repeat(2, 1)

    def record(number: int, value: int) -> dict[str, Any]:
        counts = torch.full((2, 8), value, dtype=torch.int64)
        return {"forward_pass_id": number, "rank": 0, "global_physical_count": counts}

    for records in ([record(1, 2**60)], [record(n, 2**58 - n) for n in range(20)]):
        torch.save({"records": records, "last_physical_to_logical_map": table}, files[0])
        assert TOO_LARGE in refusal(read_sglang, files[0])


def test_iterations_of_trtllm(tmp_path: Path) -> None:
    """So are sums over more than 1,024 iterations of TensorRT-LLM."""
    numpy = pytest.importorskip("safetensors.numpy")
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    tensors = {f"{i}_{n}": np.full(8, MOST) for i in range(1025) for n in range(2)}
    numpy.save_file(tensors, folder / "rank0.safetensors")
    assert TOO_LARGE in refusal(read_trtllm, folder)


def test_a_trace_file(tmp_path: Path) -> None:
    """A trace file with counts of a large top-k, each allowed, is refused as their sum."""
    model = tiny(num_experts=4096, top_k=4096)
    path = tmp_path / "t.parquet"
    write_trace(path, Trace(model, ("a",), np.ones((1, 2, 4096), np.int64), np.array([1])))
    rows = pq.read_table(path)
    header = json.loads(rows.schema.metadata[b"prism_plan"])
    header["tokens"] = {"a": MOST}
    rows = rows.set_column(3, "count", pa.array(np.full(len(rows), MOST)))
    pq.write_table(rows.replace_schema_metadata({"prism_plan": json.dumps(header)}), path)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: {2 * 4096 * MOST:,} calls together")


def test_no_trace_holds_more() -> None:
    """A trace is made with sums up to 2^62 and no more, in calls and in tokens."""
    counts = np.zeros((2, 2, 8), np.int64)
    counts[0, 0, 0] = MAX_SUM
    trace = Trace(TINY, ("a", "b"), counts, np.array([1, 1]))
    assert trace.counts.sum() == MAX_SUM
    large = counts.copy()
    large[1, 1, 7] = 2**40
    with pytest.raises(InputError, match="calls together, a sum too large"):
        Trace(TINY, ("a", "b"), large, np.array([1, 1]))
    with pytest.raises(InputError, match="tokens together, a sum too large"):
        Trace(TINY, ("a", "b"), counts * 0, np.array([2**62, 2**62]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
def test_sums_are_exact(dtype: Any) -> None:
    """Up to the limit sums are exact in every type."""
    parts = np.full((3, 2, 8), 2**31 - 1, dtype)
    assert sum_calls(parts, Location("f")).tolist() == [[3 * (2**31 - 1)] * 8] * 2
    if dtype is np.uint64:
        with pytest.raises(InputError, match=f"f: {2**64 - 1:,} calls of one expert"):
            sum_calls(np.full((1, 2, 8), 2**64 - 1, dtype), Location("f"))


def test_sources_together(tmp_path: Path) -> None:
    """Tasks of several tables together are bounded too."""
    sources = [Source(table(tmp_path / f"{n}.csv", MOST // 4, TINY), str(n)) for n in range(200)]
    with pytest.raises(InputError, match=TOO_LARGE):
        read_counts(sources, TINY)
