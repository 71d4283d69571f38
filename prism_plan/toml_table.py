"""TOML tables whose values are taken by name and kind, with errors that tell the place."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError, did_you_mean

#: No quantity of a file is smaller than this and not zero; products of some still are numbers.
LEAST = 1e-12


def parse_toml(text: str, source: object) -> Table:
    """The outermost table of a TOML file.

    Raises
    ------
    InputError
        Not TOML.
    """
    try:
        return Table(tomllib.loads(text), "")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"not TOML: {error}", source=source) from error


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
        pairs = []
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
            pairs.append(pair)
        return tuple(pairs)

    def end(self) -> None:
        for key in self.values:
            raise InputError(
                f"unknown key {key!r}{did_you_mean(key, self.known)}",
                place=self.place,
                expected=f"one of {', '.join(self.known)}",
            )
