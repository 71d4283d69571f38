"""TOML tables whose values are taken by name and kind, with errors that tell the place."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError, did_you_mean
from prism_plan.limits import (
    MAX_NAMES,
    MAX_NESTING,
    MAX_VALUE_BYTES,
    require_at_most,
    require_name,
)

#: No quantity of a file is smaller than this and not zero; products of some still are numbers.
LEAST = 1e-12


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


def parse_toml(text: str, source: object) -> Table:
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
    if _depth_exceeds(values, MAX_NESTING):
        raise _too_deep(source)
    return Table(values, "")


def _check_bounds(text: str, source: object) -> None:
    """Refuse TOML that would take ``tomllib`` too much memory or time.

    Its time grows with the square of the parts of a dotted key, and with the nesting of brackets
    it recurses. All that is done here is linear in the text.
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


def _depth_exceeds(values: Any, most: int) -> bool:
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


class Table:
    """A TOML table whose values are taken by name and kind; what is left over is an error."""

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, Mapping):
            raise InputError(f"{values!r:.60}", place=place, expected="a table")
        self.values = dict(values)
        self.place = place
        self.known: list[str] = []

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str) -> Any:
        self.known.append(key)
        return self.values.pop(key, None)

    def wrong(self, key: str, value: object, expected: str, remedy: str = "") -> InputError:
        return InputError(f"{value!r:.80}", place=self.at(key), expected=expected, remedy=remedy)

    def number(self, key: str, *, positive: bool = False, most: float = 1e12) -> float | None:
        """A number that is 0 (unless positive) or between :data:`LEAST` and ``most``."""
        value = self.take(key)
        if value is None:
            return None
        expected = f"a number {'above' if positive else 'of at least'} 0 and at most {most:g}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, value, expected)
        try:
            number = float(value)
        except OverflowError:
            raise self.wrong(key, value, expected) from None
        if not 0 <= number <= most or (positive and number == 0):
            raise self.wrong(key, value, expected)
        if 0 < number < LEAST:
            raise self.wrong(key, value, f"0 or a number of at least {LEAST:g}")
        return number

    def whole(self, key: str, *, least: int = 0) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not least <= value < 2**53  # beyond, floats and Parquet would lose digits
        ):
            raise self.wrong(key, value, f"a whole number of at least {least}")
        return value

    def text(self, key: str) -> str | None:
        value = self.take(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self.wrong(key, value, "a non-empty text")
        if value is not None:
            require_name(value, place=self.at(key))
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def table(self, key: str) -> Table:
        """A table inside this one; empty where it is not given."""
        value = self.take(key)
        return Table({} if value is None else value, self.at(key))

    def tables(self, key: str) -> list[Table]:
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, value, f"tables, each written as [[{self.at(key)}]]")
        return [Table(item, f"{self.at(key)}[{index}]") for index, item in enumerate(value)]

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        value = self.take(key)
        if value is None:
            return ()
        expected = "a list of [layer, expert] pairs"
        if not isinstance(value, list):
            raise self.wrong(key, value, expected)
        require_at_most(len(value), MAX_NAMES, "pairs", place=self.at(key))
        pairs: dict[tuple[int, int], None] = {}
        for index, item in enumerate(value):
            if (
                not isinstance(item, list)
                or len(item) != 2
                or any(not isinstance(x, int) or isinstance(x, bool) or x < 0 for x in item)
            ):
                raise self.wrong(f"{key}[{index}]", item, "[layer, expert]")
            pair = (item[0], item[1])
            if pair in pairs:
                raise self.wrong(f"{key}[{index}]", item, "each pair once")
            pairs[pair] = None
        return tuple(pairs)

    def end(self) -> None:
        for key in self.values:
            raise InputError(
                f"unknown key {key!r}{did_you_mean(key, self.known)}",
                place=self.place,
                expected=f"one of {', '.join(self.known)}",
            )
