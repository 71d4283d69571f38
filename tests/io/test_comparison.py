"""Comparison files: what is written is read; values that cannot be are named with their place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from prism_plan.errors import InputError
from prism_plan.io.comparison import (
    comparison_from_json,
    read_comparison,
)
from prism_plan.io.shared_fields import shipped_schema

GOLDEN = Path(__file__).parents[1] / "golden" / "comparison-v1.json"
VALUES: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_golden_file_is_read_for_ever() -> None:
    """A file of version 1 gives all its values, and the shipped schema allows it."""
    assert read_comparison(GOLDEN) == VALUES
    jsonschema.Draft202012Validator.check_schema(shipped_schema("comparison-1"))
    jsonschema.validate(VALUES, shipped_schema("comparison-1"))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The golden values with another value at ``rows.0.key``; ``...`` removes the key."""
    values = copy.deepcopy(VALUES)
    *parents, last = path.split(".")
    inner: Any = values
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("nonsense", 1, r"unknown key 'nonsense'"),
        ("rows.0.nonsense", 1, r"rows\[0\]: .*unknown key 'nonsense'"),
        ("seed", ..., "key 'seed' is missing"),
        ("version", 2, "version: 2; expected 1"),
        ("scored_requests", None, "scored_requests: null; expected a whole number"),
        ("holdout", 1, "holdout: 1; expected less than 1"),
        ("kind", "counts", "planned_requests: 60; expected null, for the trace is counts-only"),
        ("rows.0.remote_share", 1e15, r"rows\[0\].remote_share: 1000000000000000.0; expected a"),
        ("rows.0.remote_share", 0.7, r"rows\[0\].remote_share: 0.7; expected 0.572148 to 0.674824"),
        ("rows.0.remote_share", None, r"rows\[0\].remote_share_by_server: .*; expected null"),
        ("rows.0.waiting_share", None, r"rows\[0\].destinations: .*; expected null"),
        (
            "rows.0.waiting_share",
            2.0,
            r"rows\[0\].waiting_share: 2.0; expected at most 1",
        ),
        ("rows.0.worst_server", "edge-0", r"worst_server: 'edge-0'; expected a server whose"),
        ("rows.0.worst_server", "edge-9", r"worst_server: 'edge-9'; expected a server whose"),
        ("rows.0.worst_server_share", 0.6, "worst_server_share: 0.6; expected 0.6748.*largest"),
        ("rows.0.worst_waiting_share", 0.9, "worst_waiting_share: 0.9; expected 0.9134"),
        ("rows.0.destinations", 1.8, r"destinations: 1.8; expected at most 1.77083"),
        (
            "rows.0.remote_share_by_server.edge-0",
            1.5,
            "edge-0: 1.5; expected at most 1",
        ),
        ("rows.0.waiting_share_by_server.edge-9", 0.1, "waiting_share_by_server: other servers"),
        ("rows", [], "rows: no row with a remote_share"),
    ],
)
def test_what_cannot_be_is_refused(path: str, value: Any, words: str) -> None:
    """Types, ranges, foreign keys, and values that contradict each other: file, place, value."""
    with pytest.raises(InputError, match=words) as error:
        comparison_from_json(changed(path, value), source="r.json")
    assert str(error.value).startswith("r.json: ")


def test_rows_without_a_placement_are_read() -> None:
    """A solver that refused has nulls and a note."""
    values = copy.deepcopy(VALUES)
    values["rows"][0] = {
        key: None if key not in ("name", "violations", "note") else value
        for key, value in values["rows"][0].items()
    } | {"note": "it does not support that"}
    assert comparison_from_json(values) == values
