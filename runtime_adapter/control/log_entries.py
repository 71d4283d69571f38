"""What an entry of a run's log may say: its kinds, their fields and the ranges of those.

Whoever reaches the store can write to the log, so readers skip what no server of the run can have
written: bytes that are no JSON, an unknown kind, a field that is missing or of another type, a
server, GPU or expert that the run does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from prism_plan.errors import InputError
from prism_plan.placement import Placement
from runtime_adapter.transport.rendezvous import read_json

#: Longer names and texts are none of ours.
MAX_TEXT = 4000
#: Plans, reviews, steps and slots are counted from 0, and never up to this.
MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Entry:
    """One entry of the log and its number."""

    number: int
    what: str
    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


@dataclass(frozen=True)
class Bounds:
    """Of a run: how many servers, GPUs of all servers and (layer, expert) pairs there are."""

    servers: int = MAX_COUNT
    gpus: int = MAX_COUNT
    pairs: int = MAX_COUNT

    @classmethod
    def of(cls, placement: Placement) -> Self:
        """Of the run that begins with a placement."""
        return cls(placement.num_servers, placement.on_gpu.shape[0], placement.model.num_pairs)


Check = Callable[[Any, Bounds], bool]


def _below(value: Any, bound: int) -> bool:
    return type(value) is int and 0 <= value < bound


def _count(value: Any, bounds: Bounds) -> bool:
    return _below(value, MAX_COUNT)


def _server(value: Any, bounds: Bounds) -> bool:
    return _below(value, bounds.servers)


def _text(value: Any, bounds: Bounds) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def _flag(value: Any, bounds: Bounds) -> bool:
    return type(value) is bool


def _code(value: Any, bounds: Bounds) -> bool:
    return _below(value, 256)


def _steps(value: Any, bounds: Bounds) -> bool:
    return type(value) is list and all(_below(step, MAX_COUNT) for step in value)


def _experts(value: Any, bounds: Bounds) -> bool:
    """[step, gpu, pair, slot] of each."""
    limits = (MAX_COUNT, bounds.gpus, bounds.pairs, MAX_COUNT)
    return type(value) is list and all(
        type(expert) is list and len(expert) == 4 and all(map(_below, expert, limits))
        for expert in value
    )


#: Kind: its fields; see :mod:`~runtime_adapter.control.event_log` for what they mean.
KINDS: dict[str, dict[str, Check]] = {
    "plan": {"plan": _count},
    "load": {"plan": _count, "experts": _experts},
    "drop": {"plan": _count, "experts": _experts},
    "seen": {"server": _server, "plan": _count, "steps": _steps},
    "dropped": {"plan": _count, "steps": _steps},
    "failed": {"plan": _count, "step": _count, "server": _text, "reason": _text},
    "stop": {"plan": _count, "reason": _text},
    "halted": {"plan": _count, "server": _server},
    "over": {"plan": _count, "done": _flag, "text": _text},
    "review": {"review": _count},
    "calls": {"review": _count, "server": _server},
    "move": {"move": _text},
    "moved": {"move": _text, "code": _code, "text": _text},
    "note": {"text": _text},
}


def read_entry(number: int, raw: bytes, bounds: Bounds | None = None) -> Entry:
    """The entry that stands at a place of the log.

    A reader that does not know the run has no ``bounds``, and no use for kinds that are not known.

    Raises
    ------
    InputError
        No server of the run writes such an entry.
    """
    source = f"entry {number} of the run's log"
    values = read_json(raw, f"log/{number}")
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60}", source=source, expected="an object")
    what = values.pop("what", None)
    fields = KINDS.get(what) if isinstance(what, str) else None
    if fields is None and bounds is None and isinstance(what, str):
        return Entry(number, what, values)
    if fields is None:
        raise InputError(f"{what!r:.60}", source=source, place="what", expected="a known kind")
    for name, right in fields.items():
        if name not in values:
            raise InputError(f"no {name!r}", source=source, place=what)
        if not right(values[name], bounds or Bounds()):
            raise InputError(f"{values[name]!r:.60}", source=source, place=f"{what}.{name}")
    return Entry(number, what, values)
