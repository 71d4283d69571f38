"""Comparison files: the JSON that ``prism-plan compare -o`` writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError
from prism_plan.files import parse_json, read_text

FORMAT = "prism-plan/comparison"
VERSION = 1
NUMBERS = ("remote_share", "worst_server_share", "waiting_share", "destinations")


def read_comparison(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a comparison file, as far as plots need them.

    Raises
    ------
    InputError
        Not a comparison, or a row without name or with something else than numbers.
    """
    return comparison_from_json(parse_json(read_text(path), path), source=path)


def comparison_from_json(values: Any, source: object = "") -> dict[str, Any]:
    """The same from the values of the file; see :func:`read_comparison`."""
    form = values.get("format") if isinstance(values, Mapping) else None
    if form != FORMAT or values.get("version") != VERSION:
        raise InputError(
            f"{form!r:.60}",
            source=source,
            place="format",
            expected=f"{FORMAT!r} version {VERSION}",
            remedy="make comparisons with prism-plan compare -o",
        )
    rows = values.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("no list of rows", source=source, place="rows")
    for index, row in enumerate(rows):
        if not isinstance(row.get("name"), str):
            raise InputError("no name", source=source, place=f"rows[{index}]")
        for key in NUMBERS:
            number = row.get(key)
            if number is not None and (
                not isinstance(number, int | float)
                or isinstance(number, bool)
                or not 0 <= number < float("inf")
            ):
                raise InputError(
                    f"{number!r:.60}",
                    source=source,
                    place=f"rows[{index}].{key}",
                    expected="a number of at least 0, or null",
                )
    if not any(row.get("remote_share") is not None for row in rows):
        raise InputError("no row with a remote_share", source=source, place="rows")
    return {
        "trace": str(values.get("trace", "")),
        "cluster": str(values.get("cluster", "")),
        "rows": [{"remote_share": None, **row} for row in rows],
    }
