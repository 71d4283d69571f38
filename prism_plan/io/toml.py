"""TOML texts as values, within bounds of memory and time."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_NESTING, MAX_VALUE_BYTES

#: A string, or a comment. Malformed ones end where ``tomllib`` will refuse them, or at the end of
#: the text. Possessive, so that a text is passed over once.
_OPAQUE = re.compile(
    r'''"""(?:[^"\\]++|\\.|"(?!""))*+(?:"{3,5}|\Z)'''
    r"""|'{3}(?:[^']++|'(?!''))*+(?:'{3,5}|\Z)"""
    r"""|"(?:[^"\\\n]++|\\.)*+["\n]?"""
    r"""|'[^'\n]*+['\n]?|\#[^\n]*+""",
    re.DOTALL,
)
#: More dots in a row than a key may have, once strings are words.
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_NESTING}}}")
#: A number with a point where a value stands, which is no dotted key.
_FRACTION = re.compile(r"[=,][ \t]*+[+-]?[\d_]++\.\d[\w+-]*+(?![ \t]*+[=.])")
_BRACKET = re.compile(r"[\[\]{}]")
#: Bytes of memory that each of these characters stands for, about; in strings and comments, and
#: outside of them. What takes memory takes ``tomllib`` time as well: 512 MiB are some ten seconds.
_TEXT_BYTES = {"\n": 30, "#": 80, '"': 80, "'": 80}
_VALUE_BYTES = {",": 80, "=": 150, "[": 150, "{": 900, ".": 1000}


def parse_toml(text: str, source: object) -> dict[str, Any]:
    """The outermost table of a TOML file.

    Raises
    ------
    InputError
        Not TOML, nested too deeply, or of more values than memory is taken for.
    """
    _check_bounds(text, source)
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"not TOML: {error}", source=source) from error
    if _is_deeper_than(values, MAX_NESTING):
        raise _too_deep(source)
    return values


def _check_bounds(text: str, source: object) -> None:
    """Refuse TOML that would take ``tomllib`` too much memory or time, before it is parsed.

    Memory is estimated from counts of characters and bounded by ``MAX_VALUE_BYTES``. Parts of a
    dotted key (time grows with their square) and brackets open at once (``tomllib`` recurses) are
    bounded by ``MAX_NESTING``. The check itself is linear in the text.
    """
    _check_size(text, _TEXT_BYTES, 0, source)
    plain = _OPAQUE.sub("s", text)
    fractions = sum(1 for _ in _FRACTION.finditer(plain))
    _check_size(plain, _VALUE_BYTES, -fractions * _VALUE_BYTES["."], source)
    if _LONG_KEY.search(plain):
        raise _too_deep(source)
    depth = 0
    for found in _BRACKET.finditer(plain):
        depth += 1 if found[0] in "[{" else -1
        if depth > MAX_NESTING:
            raise _too_deep(source)


def _check_size(text: str, sizes: Mapping[str, int], more: int, source: object) -> None:
    if sum(text.count(word) * size for word, size in sizes.items()) + more > MAX_VALUE_BYTES:
        raise InputError(
            f"more values than {MAX_VALUE_BYTES:,} bytes of memory hold",
            source=source,
            expected="one of our files",
        )


def _too_deep(source: object) -> InputError:
    return InputError("nested too deeply", source=source, expected=f"at most {MAX_NESTING} levels")


def _is_deeper_than(values: Any, most: int) -> bool:
    """Whether tables and lists stand more than ``most`` deep in each other."""
    level = [values]
    for _ in range(most):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
