"""The committed golden values: where they stand, how they are written and read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.golden.catalogue import Case
from tests.golden.values import recorded, without

#: The commit whose behaviour is golden.
COMMIT = "41342e8"
VALUES = Path(__file__).resolve().parent / "values"
#: How much floats may differ from the recorded ones, relative: another processor or another
#: release of numpy rounds the last digits of logarithms in another way.
TOLERANCE = 1e-9


def write_values(cases: Iterable[Case], outcomes: Mapping[str, Any], folder: Path = VALUES) -> None:
    """Write the recorded form of all outcomes, a file for each group of cases, a line a value."""
    groups: dict[str, dict[str, Any]] = {}
    for case in cases:
        values = recorded(without(outcomes[case.name], case.same_machine))
        groups.setdefault(case.name.partition("/")[0], {})[case.name] = values
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    for group, values in groups.items():
        lines = [f"{json.dumps(name)}: {_compact(value)}" for name, value in values.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (folder / f"{group}.json").write_text(text, encoding="utf-8")


def _compact(values: Mapping[str, Any]) -> str:
    """A line for each file of a case, so that changes of them show in a comparison of texts."""
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    return "{\n " + ",\n ".join(parts) + "}"


def read_values(folder: Path = VALUES) -> dict[str, Any]:
    """The recorded outcomes of all cases, by name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found
