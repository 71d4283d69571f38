"""Differences between two outcomes of the cases, and the exceptions that are listed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.golden.values import key_place, recorded

EXCEPTIONS = Path(__file__).resolve().parent / "exceptions.toml"
#: What :class:`Difference` says of a value that is not there.
ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """One value that is not what it was."""

    case: str
    place: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.case}: {self.place}: was {_short(self.was)}, is {_short(self.now)}"


@dataclass
class ListedException:
    """A difference that is demanded: where, by which sentence, and perhaps what is right now.

    ``now`` is a value, or for a long list its digest, as recorded values have it.
    """

    case: str
    place: str
    sentence: str
    now: Any = None
    used: bool = False

    def covers(self, difference: Difference) -> bool:
        """Whether this is the difference that was listed; notes that it was met."""
        found = (
            fnmatchcase(difference.case, self.case)
            and fnmatchcase(difference.place, self.place)
            and (
                self.now is None
                or _equal(self.now, difference.now, 0.0)
                or _equal(self.now, recorded(difference.now), 0.0)
            )
        )
        self.used |= found
        return found


def read_exceptions(path: Path = EXCEPTIONS) -> list[ListedException]:
    """The listed exceptions.

    Raises
    ------
    ValueError
        A key is unknown, missing or empty.

    """
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    if set(values) - {"exception"}:
        raise ValueError(f"{path}: {sorted(values)}: only [[exception]] tables are known")
    found = []
    for number, table in enumerate(values.get("exception", []), 1):
        required = {"case", "place", "sentence"}
        if not required <= set(table) <= required | {"now"}:
            raise ValueError(f"{path}: exception {number}: keys are case, place, sentence, now")
        for key in required:
            if not isinstance(table[key], str) or not table[key].strip():
                raise ValueError(f"{path}: exception {number}: {key} has to be a text")
        if not table["case"].strip("*/") or "." not in table["sentence"]:
            raise ValueError(
                f"{path}: exception {number}: name the cases, and give a whole sentence"
            )
        found.append(ListedException(**table))
    return found


def differences(
    was: Mapping[str, Any], now: Mapping[str, Any], *, tolerance: float = 0.0
) -> list[Difference]:
    """Every difference between two outcomes of the same cases, by name of the case.

    Numbers are equal if their kind (whole or not) and their value are: floats bit for bit, or
    within the relative ``tolerance``.
    """
    found = []
    for case in sorted({*was, *now}):
        for name in (key for key in (case,) if key not in was or key not in now):
            found.append(
                Difference(name, "case", *("there" if name in s else ABSENT for s in (was, now)))
            )
        if case in was and case in now:
            found += [
                Difference(case, place, old, new)
                for place, old, new in _walk(was[case], now[case], "", tolerance)
            ]
    return found


def _walk(was: Any, now: Any, place: str, tolerance: float) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in (*was, *(key for key in now if key not in was)):
            inside = key_place(place, str(key))
            if key not in was or key not in now:
                yield inside, was.get(key, ABSENT), now.get(key, ABSENT)
            else:
                yield from _walk(was[key], now[key], inside, tolerance)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from _walk(old, new, f"{place}[{index}]", tolerance)
    elif not _equal(was, now, tolerance):
        yield place, was, now


def _equal(was: Any, now: Any, tolerance: float) -> bool:
    if isinstance(was, float) and isinstance(now, float):
        if was != was or now != now:
            return was != was and now != now
        return abs(was - now) <= tolerance * max(abs(was), abs(now)) if was != now else True
    if type(was) is not type(now):
        return False
    return bool(was == now)


def judge(
    found: Iterable[Difference],
    exceptions: Sequence[ListedException],
    ran: Iterable[str],
    left_out: Iterable[str] = (),
) -> tuple[list[str], list[str]]:
    """What is wrong, one line each, and what was excepted.

    An exception that no difference has met is wrong too, unless none of the cases that it names
    ``ran``, or some of them were ``left_out``.
    """
    wrong, excepted = [], []
    for difference in found:
        covering = [one for one in exceptions if one.covers(difference)]
        if covering:
            excepted.append(f"{difference} [{covering[0].sentence}]")
        else:
            wrong.append(str(difference))
    names, others = list(ran), list(left_out)
    for one in exceptions:
        met, missed = (any(fnmatchcase(n, one.case) for n in of) for of in (names, others))
        if met and not missed and not one.used:
            wrong.append(
                f"exceptions.toml: {one.case}: {one.place}: meets no difference; remove it"
            )
    return wrong, excepted


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."
