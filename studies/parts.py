"""A study of several parts: runs those that are named, and keeps the others of its file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studies.machine import commit


def six_digits(values: Any) -> Any:
    """JSON values with numbers of six digits."""
    text = json.dumps(values, allow_nan=False)
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))


def compact(values: Any, depth: int = 0) -> str:
    """JSON text with a line for each value at depth five; numbers of six digits."""
    if depth < 5 and isinstance(values, dict):
        inner = ",\n".join(
            " " * (depth + 1) + json.dumps(key) + ": " + compact(value, depth + 1)
            for key, value in values.items()
        )
        return "{\n" + inner + "\n" + " " * depth + "}"
    return json.dumps(six_digits(values))


def run_parts(
    file: Path,
    parts: Mapping[str, Callable[[], dict[str, Any]]],
    tables: Callable[[Mapping[str, Any]], str],
    written: Callable[[Any], str],
) -> int:
    """Run the parts named as arguments, or all; with ``--tables`` print what the file has.

    ``written`` makes the text of the file from its values, after each part.
    """
    values = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    if sys.argv[1:] == ["--tables"]:
        print(tables(values))
        return 0
    for part in sys.argv[1:] or parts:
        values["parts"][part] = parts[part]()
        values["commit"] = commit()
        file.write_text(written(values) + "\n", encoding="utf-8")
    return 0
