"""Report keys of a response that look like routing and were not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from prism_plan.io.location import Location

#: Keys with this in their name certainly hold rows of routing.
ROWS = "routed_experts"
#: Keys that may hold routing. Numbers and short texts under such a key (num_experts) are settings.
_MAY_BE_ROUTING = re.compile(r"expert|topk_ids|moe_routing|router_logits", re.IGNORECASE)
_MIN_ROWS_TEXT = 64


def find_unread_routing(line: Mapping[str, Any], read: Collection[str], at: Location) -> set[str]:
    """Names of keys that look like routing and are not at one of the paths ``read``.

    Paths are written as in ``choices[0].routed_experts``.

    Raises
    ------
    InputError
        One of them certainly holds rows.
    """
    found = set()
    for path, key in _candidates(line, ""):
        if path in read:
            continue
        if ROWS in key:
            raise at.error(
                f"key {path!r:.120} is not read",
                f"rows of routing at {' or '.join(sorted(read))} alone",
                "its rows would be lost; move or remove it",
            )
        found.add(key)
    return found


def _candidates(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, key) of everything under a key that looks like routing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if _MAY_BE_ROUTING.search(str(key)) and _holds_rows(inner):
                yield where, str(key)
            else:
                yield from _candidates(inner, where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            if isinstance(inner, dict):
                yield from _candidates(inner, f"{path}[{index}]")


def _holds_rows(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) >= _MIN_ROWS_TEXT
    return isinstance(value, list | dict) and bool(value)
