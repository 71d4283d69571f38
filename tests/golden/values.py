"""What is compared of a file: its values, without times, dates and wording."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

#: Keys and columns that tell when, where or how fast something ran.
TIMES = frozenset({"runtime_s", "solve_s", "date", "tool", "machine", "pid"})
#: Keys and columns with sentences: only how many there are, or that there is one, is compared.
WORDING = frozenset({"summary", "note", "notes", "problems", "status"})
#: Words under such keys that programs read.
STATES = frozenset({"ok"})
#: Metadata of Parquet that is the writer's, not ours.
WRITER_KEYS = frozenset({b"ARROW:schema", b"pandas"})
#: Lists of more values are recorded as a digest.
LONGEST = 12


def read_file(path: Path) -> Any:
    """The values of a file, by its ending; of a figure only that it is not empty."""
    if path.suffix == ".json":
        return read_json(path.read_text(encoding="utf-8"))
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return [plain(row) for row in rows]
    return {"empty": path.stat().st_size == 0}


def read_json(text: str) -> Any:
    """The values of a JSON text; what is no JSON is so called."""
    try:
        return plain(json.loads(text))
    except ValueError:
        return "no JSON"


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    table = file.read()
    columns = {
        name: {"type": str(column.type), "values": column.to_pylist()}
        for name, column in zip(table.column_names, table.columns, strict=True)
        if name not in TIMES
    }
    for name in WORDING & set(columns):
        columns[name]["values"] = [_wording(value) for value in columns[name]["values"]]
    metadata = {
        key.decode(): read_json(value.decode("utf-8"))
        for key, value in (file.metadata.metadata or {}).items()
        if key not in WRITER_KEYS
    }
    return {"rows": len(table), "columns": columns, "metadata": metadata}


def plain(value: Any) -> Any:
    """Values without times, and with wording as its number."""
    if isinstance(value, dict):
        return {
            key: _wording(inner) if key in WORDING else plain(inner)
            for key, inner in value.items()
            if key not in TIMES
        }
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def _wording(value: Any) -> Any:
    if isinstance(value, list):
        return f"{len(value)} sentences"
    if isinstance(value, str) and value and value not in STATES:
        return "a sentence"
    return value


def recorded(value: Any) -> Any:
    """Values as they are committed: long lists as a digest.

    The digest is of numbers of ten digits, for the last digits of a float may differ with the
    processor.
    """
    if isinstance(value, dict):
        return {key: recorded(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) <= LONGEST:
        return [recorded(inner) for inner in value]
    digest = hashlib.sha256(json.dumps(_rounded(value)).encode()).hexdigest()[:16]
    numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
    span = f" from {min(numbers):.10g} to {max(numbers):.10g}" if numbers else ""
    return f"{len(value)} values{span}, sha256 {digest}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value


def without(value: Any, patterns: Iterable[str]) -> Any:
    """The outcome of a case without the places that the patterns name."""
    patterns = tuple(patterns)
    return _pruned(value, "", lambda place: any(fnmatchcase(place, p) for p in patterns))


def _pruned(value: Any, place: str, dropped: Callable[[str], bool]) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        inside = key_place(place, key)
        if key == "exit" or not dropped(inside):
            kept[key] = _pruned(inner, inside, dropped)
    return kept


def key_place(place: str, key: str) -> str:
    """The name of what stands under a key: ``file``, ``file:key``, ``file:key.key``."""
    if not place:
        return key
    return f"{place}.{key}" if ":" in place else f"{place}:{key}"
