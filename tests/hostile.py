"""Files from strangers: small, and declaring sizes that no machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_plan.io.sweep import COLUMNS, METADATA_KEY

#: Rows of a Parquet file that are written at a time.
_CHUNK = 1_000_000


def write_bombs(folder: Path) -> list[Path]:
    """One file for each kind of size that a reader could believe; together below 20 MB."""
    for name, text in _texts().items():
        (folder / name).write_text(text)
    _write_counts(folder / "counts.parquet", _model(20_000, 65_536), ["t"])
    _write_counts(folder / "counts-in-bounds.parquet", _model(64, 65_536), list("abcdefghijk"))
    _write_counts(folder / "tasks.parquet", _model(1, 2), [f"t{i}" for i in range(40_000)])
    _write_tokens(folder / "rows.parquet", 40)
    _write_long_task(folder / "word.parquet")
    _write_sweep(folder / "sweep.parquet")
    _write_footer(folder / "footer.parquet")
    return sorted(folder.iterdir())


def _texts() -> dict[str, str]:
    return {
        "placement.json": json.dumps(placement(1000, 65_536, 40)),
        # each size within its own bound, the product of the three beyond
        "places.json": json.dumps(placement(64, 65_536, 65)),
        "servers.json": json.dumps(
            {
                **placement(1, 2, 1),
                "servers": [{"name": f"s{i}", "gpus": []} for i in range(10_001)],
            }
        ),
        "integer.json": '{"format": "prism-plan/placement", "version": ' + "1" * 2_000_000 + "}",
        "nested.json": "[" * 2_000_000,
        "keys.json": "{" + ",".join(f'"k{i}":1' for i in range(300_000)) + "}",
        "lists.json": "[" + "[]," * 6_000_000 + "1]",
        "pins.toml": '[[server]]\nname = "a"\npin = ['
        + ",".join(f"[{i // 1000}, {i % 1000}]" for i in range(40_000))
        + "]\n[[server.gpu]]\nslots = 1\n",
        "dots.toml": "a" + ".a" * 60_000 + " = 1\n",
        "headers.toml": "".join("[a" + ".a" * k + "]\n" for k in range(1, 1500)),
        "wide-headers.toml": "".join(f"[k{i}" + ".a" * 60 + "]\n" for i in range(20_000)),
        "servers.toml": "".join(
            f'[[server]]\nname = "s{i}"\n[[server.gpu]]\nslots = 1\n' for i in range(20_000)
        ),
        "tables.toml": "".join(f"k{i} = {{}}\n" for i in range(700_000)),
        "nested.toml": "a = " + "[" * 100_000 + "]" * 100_000,
        "quotes.toml": '"' + '\\"' * 500_000,
        "escapes.toml": 'a = "' + "\\u0041" * 200_000 + '"\n',
        "spaces.toml": "name" + " " * 200_000 + "x\n",
        "name.toml": f'[[server]]\nname = "{"x" * 1001}"\n[[server.gpu]]\nslots = 1\n',
    }


def placement(layers: int, experts: int, gpus: int) -> dict[str, Any]:
    """A placement of one server whose GPUs hold one expert each."""
    return {
        "format": "prism-plan/placement",
        "version": 1,
        "model": {
            "name": "m",
            "moe_layers": list(range(layers)),
            "num_experts": experts,
            "top_k": 1,
            "expert_bytes": 1,
        },
        "servers": [{"name": "a", "gpus": [{"slots": 1, "experts": {"0": [0]}}] * gpus}],
        "plan": {
            "solver": "exact",
            "objective": "remote",
            "remote_share": 0.1,
            "bound": 0.1,
            "termination": "optimal",
            "seed": 0,
            "runtime_s": 0.1,
            "min_replicas": 1,
        },
        "inputs": {},
    }


def _model(layers: int, experts: int) -> dict[str, Any]:
    return {
        **placement(layers, experts, 1)["model"],
        "hidden_size": 4,
        "dtype_bytes": 2,
        "dense_bytes": 0,
        "kv_bytes_per_token": 0,
    }


def _header(kind: str, model: dict[str, Any], **more: Any) -> dict[bytes, bytes]:
    values = {"format": "prism-plan/trace", "version": 1, "kind": kind, "model": model}
    return {b"prism_plan": json.dumps({**values, "provenance": {}, **more}).encode()}


def _words(words: list[str], rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(words))


def _write_counts(path: Path, model: dict[str, Any], tasks: list[str]) -> None:
    zeros = np.zeros(len(tasks), np.int32)
    table = pa.table(
        {
            "task": pa.array(tasks).dictionary_encode(),
            "layer": pa.array(zeros),
            "expert": pa.array(zeros),
            "count": pa.array(np.ones(len(tasks), np.int64)),
        }
    )
    header = _header("counts", model, tokens=dict.fromkeys(tasks, 10))
    pq.write_table(table.replace_schema_metadata(header), path)


def _tokens(rows: int, task: str) -> pa.Table:
    """Equal tokens, which take no space in a file."""
    zeros = pa.array(np.zeros(rows, np.int32))
    element = pa.field("element", pa.uint16(), nullable=False)
    flat = pa.array(np.zeros(rows, np.uint16))
    columns = {
        "request": zeros,
        "position": zeros,
        "phase": _words(["decode"], rows),
        "task": _words([task], rows),
        "experts": pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(element, 1)),
    }
    return pa.table(columns).replace_schema_metadata(_header("tokens", _model(1, 2)))


def _write_tokens(path: Path, chunks: int) -> None:
    table = _tokens(_CHUNK, "t")
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(chunks):
            writer.write_table(table, row_group_size=_CHUNK)


def _write_long_task(path: Path) -> None:
    """One task of a million characters in every row; without Arrow's schema it is plain text."""
    table = _tokens(20_000, "t" * 1_000_000)
    pq.write_table(table, path, compression="zstd", store_schema=False)


def _write_sweep(path: Path) -> None:
    rows = 3 * _CHUNK
    values: dict[str, Any] = {}
    for name, kind in COLUMNS.items():
        one = "ok" if kind is str else 1
        values[name] = pa.array(
            [one], {int: pa.int64(), float: pa.float64(), str: pa.string()}[kind]
        ).take(pa.array(np.zeros(rows, np.int32)))
    table = pa.table(values).replace_schema_metadata({METADATA_KEY: b'{"version": 1}'})
    pq.write_table(table, path, compression="zstd")


def _write_footer(path: Path) -> None:
    """A footer of 17 MiB, which would be parsed whole."""
    table = pa.table({"a": [1]}).replace_schema_metadata({"x": "y" * 17 * 2**20})
    pq.write_table(table, path)
