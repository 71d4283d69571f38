"""Arrivals at fixed times, from JSON Lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from prism_plan.errors import InputError, did_you_mean
from prism_plan.files import lines_of, parse_json, read_text
from prism_plan.limits import MAX_ARRIVALS, require_at_most

KEYS = ("server", "at_s", "task", "request")
#: Times beyond this, in seconds, are a mistake.
MOST_S = 1e12


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: where and when; its task and its id in the trace where they are given.

    Raises
    ------
    InputError
        The time is negative, NaN, infinite or beyond :data:`MOST_S`.
    """

    server: str
    at_s: float
    task: str | None = None
    request: int | None = None
    line: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.at_s <= MOST_S:  # NaN is neither
            raise InputError(
                f"{self.at_s}",
                place=f"line {self.line}: at_s",
                expected=f"seconds from the start, 0 to {MOST_S:g}",
            )


@dataclass(frozen=True)
class FixedArrivals:
    """Requests at fixed times, in any order; ``source`` is the file, for errors."""

    arrivals: tuple[Arrival, ...]
    source: str = ""


def read_arrivals(path: str | os.PathLike[str]) -> FixedArrivals:
    """Read and check a file of arrivals; blank lines are skipped.

    A line is ``{"server": "edge-0", "at_s": 1.5, "task": "law", "request": 17}``. ``task`` may be
    left out (it is drawn by the server's shares) and ``request``, the id of a request of the trace
    (it is drawn from the task's).

    Raises
    ------
    InputError
        Names the file, the line, the value and what was expected. Servers, tasks and ids are
        looked up later, where cluster and trace are known.
    """
    return parse_arrivals(read_text(path), source=path)


def parse_arrivals(text: str, source: object = "") -> FixedArrivals:
    """Arrivals from the text of a file; see :func:`read_arrivals`."""
    arrivals = []
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            arrivals.append(_arrival(line, number, source))
            require_at_most(len(arrivals), MAX_ARRIVALS, "arrivals", source=source)
    if not arrivals:
        raise InputError("no arrivals", source=source, expected='lines {"server": …, "at_s": …}')
    return FixedArrivals(tuple(arrivals), source=str(source))


def _arrival(line: str, number: int, source: object) -> Arrival:
    place = f"line {number}"
    try:
        values = parse_json(line, "")
    except InputError as error:
        raise InputError(
            error.found,
            source=source,
            place=place,
            expected=error.expected or "one JSON object a line",
        ) from error
    if not isinstance(values, Mapping):
        raise InputError(
            f"{values!r:.60}", source=source, place=place, expected="one JSON object a line"
        )

    def wrong(key: str, expected: str) -> InputError:
        found = f"{values[key]!r:.60}" if key in values else "not given"
        return InputError(found, source=source, place=f"{place}: {key}", expected=expected)

    for key in values:
        if key not in KEYS:
            raise InputError(
                f"unknown key {key!r:.60}{did_you_mean(key, KEYS)}",
                source=source,
                place=place,
                expected=f"keys {', '.join(KEYS)}",
            )
    server, task, request = (values.get(key) for key in ("server", "task", "request"))
    if not isinstance(server, str) or not server.strip():
        raise wrong("server", "the name of a server")
    at_s = values.get("at_s")
    if not isinstance(at_s, int | float) or isinstance(at_s, bool):
        raise wrong("at_s", f"seconds from the start, 0 to {MOST_S:g}")
    if task is not None and (not isinstance(task, str) or not task.strip()):
        raise wrong("task", "the name of a task")
    if request is not None and (
        not isinstance(request, int) or isinstance(request, bool) or not 0 <= request < 2**31
    ):
        raise wrong("request", "the id of a request of the trace")
    try:
        task = None if task is None else sys.intern(task)
        return Arrival(sys.intern(server), at_s, task, request, number)
    except InputError as error:
        raise error.within(source) from error
