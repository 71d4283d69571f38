"""The file of what was found, ``studies/small_instances.json``; instances by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "small_instances.json"


def read_record() -> dict[str, Any]:
    """What the file holds; without it no instances."""
    if not FILE.exists():
        return {"instances": {}}
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def write_record(values: dict[str, Any]) -> None:
    """Write the file anew, one line a plan; whole or not at all."""
    instances = sorted(values["instances"].items(), key=lambda item: int(item[0]))
    values = {**values, "instances": dict(instances)}
    unfinished = FILE.with_suffix(".part")
    unfinished.write_text(_lines(values) + "\n", encoding="utf-8")
    unfinished.replace(FILE)


def _lines(value: Any, depth: int = 0) -> str:
    """JSON in which the parts of an instance are a line each."""
    if depth < 4 and isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
        inner = ",\n".join(
            " " * (depth + 1) + json.dumps(key) + ": " + _lines(own, depth + 1)
            for key, own in value.items()
        )
        return "{\n" + inner + "\n" + " " * depth + "}"
    return json.dumps(value, allow_nan=False)
