"""Read values of JSON objects that responses and lines have in common."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_plan.io.location import Location
from prism_plan.printable_text import shown
from prism_plan.profiling.common.messages import TRUNCATED
from prism_plan.profiling.sources import default_task


def decode_base64(text: str, at: Location) -> bytes:
    """The bytes of base64 ``text``.

    Raises
    ------
    InputError
        It is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise at.error(f"{text[:20]!r} is not base64: {error}", remedy=TRUNCATED) from error


def optional_count(values: Mapping[str, Any], key: str, at: Location) -> int | None:
    """A number of tokens, or ``None`` where the key is absent or null.

    Raises
    ------
    InputError
        It is no whole number that fits into an int32.
    """
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        expected = f"a whole number from 0 to {2**31 - 1:,}"
        raise at.within(repr(key)).error(shown(value), expected)
    return value


def json_object(value: Any, at: Location) -> Mapping[str, Any]:
    """``value`` if it is a JSON object.

    Raises
    ------
    InputError
        It is none.
    """
    if not isinstance(value, dict):
        raise at.error(shown(value), "a JSON object")
    return value


def task_of(line: Mapping[str, Any], label: str | None, path: Path, at: Location) -> str:
    """The source's label, else the line's own ``task``, else the file's stem.

    Raises
    ------
    InputError
        The line's task is not a text.
    """
    if label is not None:
        return label
    task = line.get("task", default_task(path))
    if not isinstance(task, str) or not task:
        raise at.within("'task'").error(shown(task), "a non-empty text")
    return task
