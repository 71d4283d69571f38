"""Sweep tables: what is written is read, as Parquet and as CSV; a bad value is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_plan.check.report import check_file
from prism_plan.errors import InputError
from prism_plan.io.sweep import (
    COLUMNS,
    METADATA_KEY,
    dump_sweep,
    read_sweep,
    sweep_from_csv,
    write_sweep,
)
from tests.evaluate.simulation_reports import failed, make_sweep

ROWS = make_sweep([4, 16], [100, None], [None, 8.0], [0.3], ["eplb", "exact"], seeds=2)
ROWS[3] = failed(ROWS[3], 'unstable: "edge-0", 1.3 times busy')


@pytest.mark.parametrize("name", ["r.parquet", "r.CSV"])
def test_written_is_read(tmp_path: Path, name: str) -> None:
    """Rows come back equal and of the same types, twice with the same bytes, and check knows it."""
    path = tmp_path / name
    write_sweep(path, ROWS)
    first = path.read_bytes()
    found = read_sweep(path)
    assert found == ROWS
    assert list(found[0]) == list(COLUMNS)
    for row, other in zip(found, ROWS, strict=True):
        assert [type(value) for value in row.values()] == [type(v) for v in other.values()]
    write_sweep(path, found)
    assert path.read_bytes() == first
    report = check_file(path)
    assert (report.kind, report.summary) == ("sweep", f"{len(ROWS)} runs, 1 of them failed")


def test_parquet_says_what_it_is(tmp_path: Path) -> None:
    """The metadata hold the version; a newer one is refused, a table without it taken."""
    path = tmp_path / "r.parquet"
    write_sweep(path, ROWS)
    table = pq.read_table(path)
    assert json.loads(table.schema.metadata[METADATA_KEY]) == {"version": 1}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b'{"version": 2}'}), path)
    with pytest.raises(InputError, match="prism_plan_sweep: 2; expected version 1"):
        read_sweep(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    assert read_sweep(path) == ROWS


@pytest.mark.parametrize("name", ["r.parquet", "r.csv"])
def test_tables_that_pandas_wrote(tmp_path: Path, name: str) -> None:
    """Whole numbers that pandas made 20.0, its missing values and another column do no harm."""
    frame = pd.DataFrame(ROWS).assign(mine=1)
    assert frame["requests"].dtype == float
    path = tmp_path / name
    if name.endswith("csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    assert read_sweep(path) == ROWS


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("gpus", 0, "row 2: gpus: 0; expected at least 1"),
        ("gpus", None, "row 2: gpus: null; expected a whole number"),
        (
            "bandwidth_mbps",
            float("nan"),
            "bandwidth_mbps: nan; expected a finite number",
        ),
        ("remote_share", 1.1, "remote_share: 1.1; expected at most 1"),
        ("events", 10**400, "row 2: events: 1000"),
        ("requests", None, "row 2: requests: null; expected a whole number"),
        ("solver", "", "row 2: solver: ''; expected a non-empty text"),
        ("bandwidth_mbps", 0.0, "bandwidth_mbps: 0.0"),
        ("memory_fraction", 1.5, "memory_fraction: 1.5; expected at most 1"),
        ("servers", 5, "row 2: servers: 5; expected at most gpus, 4"),
        ("destinations", 1.5, "row 2: destinations: 1.5; expected at most 1, other servers"),
        ("latency_p50_s", 8.5, "row 2: latency_p50_s: 8.5; expected at most latency_p95_s, 8"),
        ("latency_p95_s", 9.6, "row 2: latency_p95_s: 9.6; expected at most latency_p99_s, 9.5"),
        ("latency_p95_s", None, "latency_p95_s: null; expected a number exactly if latency_mean_s"),
        ("ttft_mean_s", 1e6, "row 2: ttft_mean_s: 1000000.0; expected at most latency_mean_s"),
        ("remote_share", 0.8, "row 2: remote_share: 0.8; expected at most waiting_share, 0.7"),
        ("solver", "exakt", "row 2: solver: 'exakt'; expected one of .*did you mean 'exact'"),
        ("status", "failed", "row 2: requests: 80; expected nothing, for the run failed"),
    ],
)
def test_a_bad_value_is_named(key: str, value: Any, words: str) -> None:
    """Writing refuses it with file, row and column."""
    with pytest.raises(InputError, match=words) as error:
        dump_sweep([ROWS[0], ROWS[1] | {key: value}], source="r.csv")
    assert str(error.value).startswith("r.csv: row 2")


def test_solvers_with_paths_are_known() -> None:
    """A solver that also plans where layers execute is called after both."""
    data = dump_sweep([ROWS[0] | {"solver": "layer-partition+paths"}])
    assert sweep_from_csv(data.decode())[0]["solver"] == "layer-partition+paths"


def test_a_damaged_page_is_noticed(tmp_path: Path) -> None:
    """Pages carry checksums: no changed byte of a column's pages gives other rows."""
    path = tmp_path / "r.parquet"
    write_sweep(path, ROWS)
    data = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(list(COLUMNS).index("gpus"))
    begin = column.dictionary_page_offset or column.data_page_offset
    silent = 0
    for at in range(begin, begin + column.total_compressed_size):
        broken = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            path.write_bytes(broken)
            assert read_sweep(path) == ROWS
        except InputError as error:
            assert "not a readable Parquet file" in str(error)  # noqa: PT017 - it may be read
        try:  # as tools read it that verify nothing
            silent += pq.read_table(pa.BufferReader(broken)).to_pylist() != ROWS
        except (pa.ArrowException, OSError):
            continue
    assert silent > 0


def test_an_unknown_key_is_not_written() -> None:
    """A misspelt key would be lost; it is refused with the closest one."""
    with pytest.raises(InputError, match="row 1: key 'gpu', did you mean 'gpus'"):
        dump_sweep([{"gpu": 4}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "not CSV: an empty file"),
        (lambda text: text.partition("\n")[0], "no rows; expected a row for each run"),
        (lambda text: text.replace("bandwidth_", "bandwith_"), "did you mean 'bandwith_mbps'"),
        (lambda text: text.replace("servers", "gpus", 1), "column 'gpus' is duplicated"),
        (lambda text: text.replace("\n4,2,100.0", "\nfour,2,100.0", 1), "row 1: gpus: 'fou"),
        (lambda text: text.replace("\n4,2,", "\n4,", 1), "row 1: 22 values; expected 23"),
        (lambda text: text.replace("\n4,2,100.0", "\n4,2,nan", 1), "bandwidth_mbps: nan"),
        (lambda text: text + '"', "not CSV"),
    ],
)
def test_broken_csv(tmp_path: Path, change: Any, words: str) -> None:
    """Faults of a CSV file are named with file, row and column."""
    path = tmp_path / "r.csv"
    path.write_text(change(dump_sweep(ROWS).decode()))
    with pytest.raises(InputError, match=words) as error:
        read_sweep(path)
    assert str(error.value).startswith(str(path))


def test_broken_parquet(tmp_path: Path) -> None:
    """A cut file, another table, and columns of another kind are refused."""
    path = tmp_path / "r.parquet"
    write_sweep(path, ROWS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_sweep(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(InputError, match="no column 'gpus'"):
        read_sweep(path)
    table = pa.Table.from_pylist([row | {"gpus": [4]} for row in ROWS])
    pq.write_table(table, path)
    with pytest.raises(InputError, match=r"column 'gpus': type list.*; expected numbers or texts"):
        read_sweep(path)
    texts = [row | {"status": "x" * 10_001} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(texts), path)
    with pytest.raises(InputError, match="column 'status': 10,001 characters"):
        read_sweep(path)


@pytest.mark.parametrize("name", ["r.json", "r"])
def test_other_extensions_are_refused(tmp_path: Path, name: str) -> None:
    """Reading and writing know two extensions."""
    with pytest.raises(InputError, match=r"expected \.parquet or \.csv"):
        write_sweep(tmp_path / name, ROWS)
    with pytest.raises(InputError, match=r"expected \.parquet or \.csv"):
        read_sweep(tmp_path / name)
    assert not list(tmp_path.iterdir())
