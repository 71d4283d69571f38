"""JSON texts as values, within bounds of memory and time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_NESTING, MAX_VALUE_BYTES

#: How TOML begins, and JSON does not: a comment, a table, a key with a value.
_TOML = re.compile(r"""\s*(?:#|\[\[|\[[A-Za-z"]|[\w.-]+\s*=)""")
#: A half of a surrogate pair, which only an escape can spell in JSON.
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
#: Up to the next bracket that is not in a string. Possessive, and matched from bracket to bracket,
#: so that a text is passed over once.
_TO_BRACKET = re.compile(r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[\]{}])', re.DOTALL)
#: Bytes of memory that each of these characters stands for at most, about.
_JSON_BYTES = {",": 32, ":": 120, "{": 240, "[": 72, '"': 20}


def _check_bounds(text: str, source: object) -> None:
    """Refuse JSON whose values would take too much memory, or that is nested too deeply.

    Linear in the text, which is not parsed: characters are counted, also those of strings.

    Raises
    ------
    InputError
        See ``MAX_VALUE_BYTES`` and ``MAX_NESTING`` of :mod:`prism_plan.input_limits`.
    """
    if sum(text.count(word) * size for word, size in _JSON_BYTES.items()) > MAX_VALUE_BYTES:
        raise InputError(
            f"more values than {MAX_VALUE_BYTES:,} bytes of memory hold",
            source=source,
            expected="one of our files",
        )
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return
    depth = position = 0
    while found := _TO_BRACKET.match(text, position):
        depth += 1 if found[1] in "[{" else -1
        position = found.end()
        if depth > MAX_NESTING:
            raise InputError(
                "nested too deeply", source=source, expected=f"at most {MAX_NESTING} levels"
            )


def _refuse_lone_surrogates(values: Any, source: object, place: str) -> None:
    if isinstance(values, dict):
        for key, value in values.items():
            _refuse_lone_surrogates(key, source, place)
            _refuse_lone_surrogates(value, source, f"{place}.{key}" if place else key)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            _refuse_lone_surrogates(value, source, f"{place}[{index}]")
    elif isinstance(values, str) and _SURROGATE.search(values):
        raise InputError(
            f"{values!r:.60} has an unpaired surrogate",
            source=source,
            place=place,
            expected="text that UTF-8 can hold",
        )


class _NonFinite(str):
    """``NaN``, ``Infinity`` or ``-Infinity`` where a number should stand."""


def _find_non_finite(values: Any, key: str) -> tuple[str, str] | None:
    """The first non-finite number in ``values``, and its key."""
    if isinstance(values, _NonFinite):
        return str(values), key
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(values, dict):
        inner = ((f"{key}.{name}" if key else name, value) for name, value in values.items())
    elif isinstance(values, list):
        inner = ((f"{key}[{index}]", value) for index, value in enumerate(values))
    return next(filter(None, (_find_non_finite(value, at) for at, value in inner)), None)


def parse_json(text: str, source: object, *, non_finite: bool = False) -> Any:
    """Parse JSON; duplicate keys, NaN, infinities and lone surrogates are refused.

    ``non_finite`` is for files of others: Python's ``json`` writes ``NaN``, ``Infinity`` and
    ``-Infinity``, and they are then read as the numbers that Python reads.

    Raises
    ------
    InputError
        Names line and column of a syntax error, or the key that is duplicate or not finite; or see
        :func:`_check_bounds`.
    """
    _check_bounds(text, source)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InputError(
                    f"key {key!r} is duplicated in one object",
                    source=source,
                    remedy="remove one of the two",
                )
            seen[key] = value
        return seen

    refused: list[_NonFinite] = []

    def constant(word: str) -> Any:
        if non_finite:
            return float(word)
        refused.append(_NonFinite(word))
        return refused[-1]

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if refused and (found := _find_non_finite(values, "")):
            raise InputError(
                f"{found[0]} is not JSON" + (f", under key {found[1]!r:.80}" if found[1] else ""),
                source=source,
                expected="finite numbers",
                remedy="write a number in its place",
            )
        if _ESCAPED_SURROGATE.search(text):
            _refuse_lone_surrogates(values, source, "")
        return values
    except json.JSONDecodeError as error:
        if _TOML.match(text):
            raise InputError("looks like TOML", source=source, expected="a JSON file") from error
        raise InputError(
            f"not JSON: {error.msg}",
            source=source,
            place=f"line {error.lineno} column {error.colno}",
            remedy="the file may be truncated; write it again",
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(
            f"not JSON: a whole number of more than {sys.get_int_max_str_digits():,} digits",
            source=source,
            expected="numbers of fewer digits",
        ) from error
    except RecursionError as error:
        raise InputError("nested too deeply", source=source, expected="one of our files") from error
