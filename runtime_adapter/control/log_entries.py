"""The entries of a run's log: one dataclass a kind, and the ranges of their fields.

==================  ==========================================================================
written by          entries
==================  ==========================================================================
the store           ServerJoined, ServerDown, ServerLeft
the scheduler       SchedulerStarted, MigrationStarted, StopRequested, MigrationFinished,
                    TableBegan, ReviewStarted, MoveFinished, LogMessage
a GPU's server      ExpertsLoaded, DropsAnnounced, SlotsFreed, StepFailed, ServerStopped
a driver            DropsAcknowledged, DriverSynced, CallsReported
the command `move`  MoveRequested
==================  ==========================================================================

Readers skip what no server of the run can have written: bytes that are not JSON, an unknown kind, a
field that is missing or of another type, a server, GPU or expert that the run does not have.

:class:`NewLog` is not written: a reader gets it where a log begins for it, with what its entries up
to there have led to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_type_hints

from prism_plan.errors import InputError
from prism_plan.placement import Placement
from runtime_adapter.control.json_values import parse_value

#: Names and texts are at most so long.
MAX_TEXT = 4000
#: Plans, reviews, steps and slots are numbered from 0, and never up to this.
MAX_COUNT = 1 << 40
#: The step of an expert whose drop was announced and is cancelled: it is loaded, by no step.
NO_STEP = MAX_COUNT - 1
#: Why an incarnation is down where the next entry is the next incarnation's.
JOINS_ANEW = "it joins anew"


@dataclass(frozen=True)
class Bounds:
    """Numbers of servers, GPUs of all servers, (layer, expert) pairs and MoE layers of a run."""

    servers: int = MAX_COUNT
    gpus: int = MAX_COUNT
    pairs: int = MAX_COUNT
    layers: int = MAX_COUNT

    @classmethod
    def of(cls, placement: Placement) -> Self:
        """The bounds of the run that begins with a placement."""
        model = placement.model
        return cls(
            placement.num_servers, placement.on_gpu.shape[0], model.num_pairs, model.num_layers
        )


class ExpertChange(NamedTuple):
    """A step that loads or drops an expert.

    GPUs are counted over all servers in order, slots within their GPU (0 for drops).
    """

    step: int
    gpu: int
    pair: int
    slot: int


class HeldExpert(NamedTuple):
    """An expert in a slot of a GPU; numbers as in :class:`ExpertChange`."""

    gpu: int
    pair: int
    slot: int


Check = Callable[[Any, Bounds], bool]


def _below(value: Any, bound: int) -> bool:
    return type(value) is int and 0 <= value < bound


def _are_steps(value: Any, bounds: Bounds) -> bool:
    return type(value) is list and all(_below(step, MAX_COUNT) for step in value)


def _are_changes(value: Any, bounds: Bounds) -> bool:
    limits = (MAX_COUNT, bounds.gpus, bounds.pairs, MAX_COUNT)
    return type(value) is list and all(
        type(change) is list and len(change) == 4 and all(map(_below, change, limits))
        for change in value
    )


def _are_held(value: Any, bounds: Bounds) -> bool:
    limits = (bounds.gpus, bounds.pairs, MAX_COUNT)
    return type(value) is list and all(
        type(held) is list and len(held) == 3 and all(map(_below, held, limits)) for held in value
    )


def _is_table(value: Any, bounds: Bounds) -> bool:
    if type(value) is not list or (bounds.servers < MAX_COUNT and len(value) != bounds.servers):
        return False
    layers = bounds.layers if bounds.layers < MAX_COUNT else None
    return all(
        type(row) is list
        and len(row) == (layers or len(row))
        and all(_below(server, bounds.servers) for server in row)
        for row in value
    )


# types of fields, each with its check
Count = Annotated[int, lambda value, bounds: _below(value, MAX_COUNT)]
Server = Annotated[int, lambda value, bounds: _below(value, bounds.servers)]
ExitCode = Annotated[int, lambda value, bounds: _below(value, 256)]
Flag = Annotated[bool, lambda value, bounds: type(value) is bool]
Text = Annotated[str, lambda value, bounds: type(value) is str and len(value) <= MAX_TEXT]
Steps = Annotated[list[int], _are_steps]
Changes = Annotated[list[ExpertChange], _are_changes]
Port = Annotated[int, lambda value, bounds: _below(value, 1 << 16)]
Held = Annotated[list[HeldExpert], _are_held]
Table = Annotated[list[list[int]], _is_table]

#: The classes of entries by kind.
KINDS: dict[str, type[LogEntry]] = {}


@dataclass(frozen=True)
class LogEntry:
    """An entry of the log; by itself one that its reader has no use for.

    ``kind`` is the class's name in snake case; ``number`` is the entry's place in the log, -1
    before it is appended. Entries about a migration have its ``plan``, whose steps the store holds
    under ``plan/<plan>``.
    """

    kind: ClassVar[str] = ""
    number: int = field(default=-1, kw_only=True)

    def __init_subclass__(cls) -> None:
        cls.kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        KINDS[cls.kind] = cls


@dataclass(frozen=True)
class ServerJoined(LogEntry):
    """A server is up: its worker answers at an address, and its GPUs hold these experts alone.

    ``incarnation`` is greater than that of any earlier time at which it joined.
    """

    server: Server
    incarnation: Count
    host: Text
    port: Port
    experts: Held


@dataclass(frozen=True)
class ServerDown(LogEntry):
    """An incarnation of a server is not used any more; the server may join again."""

    server: Server
    incarnation: Count
    reason: Text


@dataclass(frozen=True)
class ServerLeft(LogEntry):
    """A server has left in good order."""

    server: Server
    incarnation: Count


@dataclass(frozen=True)
class SchedulerStarted(LogEntry):
    """A scheduler begins to read; of what was written before it knows only what is held."""


@dataclass(frozen=True)
class MigrationStarted(LogEntry):
    """Servers begin the plan's steps.

    The scheduler that planned had read all entries of numbers below ``read``. If a later one,
    before this, changes who is up or what is held, then the plan is void and no server begins it.
    """

    plan: Count
    read: Count


@dataclass(frozen=True)
class ExpertsLoaded(LogEntry):
    """A server's GPUs serve these experts from now on."""

    plan: Count
    experts: Changes


@dataclass(frozen=True)
class DropsAnnounced(LogEntry):
    """A server is about to drop these experts: drivers send it no new calls for them."""

    plan: Count
    experts: Changes


@dataclass(frozen=True)
class DropsAcknowledged(LogEntry):
    """No call of a driver depends any longer on the experts that these steps drop."""

    plan: Count
    server: Server
    steps: Steps


@dataclass(frozen=True)
class DriverSynced(LogEntry):
    """No call of a driver depends on an expert whose drop was announced up to ``read`` entries.

    A driver writes it that did not read them one by one, but began with a :class:`NewLog`.
    """

    server: Server
    read: Count


@dataclass(frozen=True)
class SlotsFreed(LogEntry):
    """These steps' experts are dropped, and their slots can be loaded into."""

    plan: Count
    steps: Steps


@dataclass(frozen=True)
class StepFailed(LogEntry):
    """A server, called by its name, cannot do a step."""

    plan: Count
    step: Count
    server: Text
    reason: Text


@dataclass(frozen=True)
class StopRequested(LogEntry):
    """Servers begin no further step."""

    plan: Count
    reason: Text


@dataclass(frozen=True)
class ServerStopped(LogEntry):
    """A server has no step in progress any more."""

    plan: Count
    server: Server


@dataclass(frozen=True)
class MigrationFinished(LogEntry):
    """The migration is complete, or abandoned."""

    plan: Count
    complete: Flag
    text: Text


@dataclass(frozen=True)
class TableBegan(LogEntry):
    """Requests that start from now on execute by this table; those that run keep theirs.

    ``execution`` [N][L] is the server of each MoE layer for each home.
    """

    plan: Count
    execution: Table


@dataclass(frozen=True)
class ReviewStarted(LogEntry):
    """Drivers report their calls."""

    review: Count


@dataclass(frozen=True)
class CallsReported(LogEntry):
    """A driver's calls are at ``calls/<server>/<review>``, its times at ``times/...``."""

    review: Count
    server: Server


@dataclass(frozen=True)
class MoveRequested(LogEntry):
    """Somebody asks for the placement at ``move/<move>``."""

    move: Text


@dataclass(frozen=True)
class MoveFinished(LogEntry):
    """How a requested move ended: the exit code of the command, and a text."""

    move: Text
    code: ExitCode
    text: Text


@dataclass(frozen=True)
class LogMessage(LogEntry):
    """A text for the first server's log."""

    text: Text


@dataclass(frozen=True)
class NewLog:
    """Where a log begins for its reader: at first, after a restart of the store, or after a gap.

    ``number`` is that of the last entry that it covers (-1: none) of the log of the store's
    ``epoch``. ``members`` has an object for each server (``state``, ``incarnation``, ``address``
    and others, as ``StoreClient.members`` gives them), ``held`` a list [server, GPU, pair, slot]
    for each expert on a GPU of a server that is up (GPUs are counted over all servers),
    ``open_plans`` the migrations that were started and have not finished, ``execution`` the table
    that began last, None where it is that of the placement with which the run began.
    """

    epoch: str
    number: int
    members: list[dict[str, Any]]
    held: list[list[int]]
    open_plans: list[int]
    execution: list[list[int]] | None = None


_CHECKS: dict[str, dict[str, Check]] = {
    kind: {
        name: hint.__metadata__[0]
        for name, hint in get_type_hints(entry, include_extras=True).items()
        if name not in ("kind", "number")
    }
    for kind, entry in KINDS.items()
}


def write_entry(entry: LogEntry, writer: str) -> str:
    """The JSON of an entry; ``writer`` is for a person who reads the store."""
    values = {name: getattr(entry, name) for name in _CHECKS[entry.kind]}
    return json.dumps({"kind": entry.kind, **values, "by": writer})


def read_entry(number: int, raw: bytes, bounds: Bounds | None = None) -> LogEntry:
    """Parse and check the entry at a place of the log.

    A reader that does not know the run has no ``bounds``, and no use for unknown kinds.

    Raises
    ------
    InputError
        No server of the run writes such an entry.
    """
    source = f"entry {number} of the run's log"
    values = parse_value(raw, f"log/{number}")
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60}", source=source, expected="an object")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        if bounds is None and isinstance(kind, str):
            return LogEntry(number=number)
        raise InputError(f"{kind!r:.60}", source=source, place="kind", expected="a known kind")
    known: dict[str, Any] = {}
    for name, check in _CHECKS[kind].items():
        if name not in values:
            raise InputError(f"no {name!r}", source=source, place=kind)
        if not check(values[name], bounds or Bounds()):
            raise InputError(f"{values[name]!r:.60}", source=source, place=f"{kind}.{name}")
        known[name] = values[name]
    if "experts" in known:
        item = HeldExpert if kind == ServerJoined.kind else ExpertChange
        known["experts"] = [item(*values) for values in known["experts"]]
    return KINDS[kind](**known, number=number)
