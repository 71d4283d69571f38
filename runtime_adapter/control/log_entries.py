"""The entries of a run's log: one dataclass a kind, and the ranges of their fields.

==================  ==========================================================================
written by          entries
==================  ==========================================================================
the scheduler       MigrationStarted, StopRequested, MigrationFinished, ReviewStarted,
                    MoveFinished, LogMessage
a GPU's server      ExpertsLoaded, DropsAnnounced, SlotsFreed, StepFailed, ServerStopped
a driver            DropsAcknowledged, CallsReported
the command `move`  MoveRequested
==================  ==========================================================================

Whoever reaches the store can write to the log, so readers skip what no server of the run can have
written: bytes that are not JSON, an unknown kind, a field that is missing or of another type, a
server, GPU or expert that the run does not have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_type_hints

from prism_plan.errors import InputError
from prism_plan.placement import Placement
from runtime_adapter.transport.tcp_store import parse_value

#: Names and texts are at most so long.
MAX_TEXT = 4000
#: Plans, reviews, steps and slots are numbered from 0, and never up to this.
MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Bounds:
    """Numbers of servers, GPUs of all servers and (layer, expert) pairs of a run."""

    servers: int = MAX_COUNT
    gpus: int = MAX_COUNT
    pairs: int = MAX_COUNT

    @classmethod
    def of(cls, placement: Placement) -> Self:
        """The bounds of the run that begins with a placement."""
        return cls(placement.num_servers, placement.on_gpu.shape[0], placement.model.num_pairs)


class ExpertChange(NamedTuple):
    """A step that loads or drops an expert.

    GPUs are counted over all servers in order, slots within their GPU (0 for drops).
    """

    step: int
    gpu: int
    pair: int
    slot: int


Check = Callable[[Any, Bounds], bool]


def _below(value: Any, bound: int) -> bool:
    return type(value) is int and 0 <= value < bound


def _is_count(value: Any, bounds: Bounds) -> bool:
    return _below(value, MAX_COUNT)


def _is_server(value: Any, bounds: Bounds) -> bool:
    return _below(value, bounds.servers)


def _is_text(value: Any, bounds: Bounds) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def _is_flag(value: Any, bounds: Bounds) -> bool:
    return type(value) is bool


def _is_exit_code(value: Any, bounds: Bounds) -> bool:
    return _below(value, 256)


def _are_steps(value: Any, bounds: Bounds) -> bool:
    return type(value) is list and all(_below(step, MAX_COUNT) for step in value)


def _are_changes(value: Any, bounds: Bounds) -> bool:
    limits = (MAX_COUNT, bounds.gpus, bounds.pairs, MAX_COUNT)
    return type(value) is list and all(
        type(change) is list and len(change) == 4 and all(map(_below, change, limits))
        for change in value
    )


Count = Annotated[int, _is_count]
Server = Annotated[int, _is_server]
Text = Annotated[str, _is_text]
Flag = Annotated[bool, _is_flag]
ExitCode = Annotated[int, _is_exit_code]
Steps = Annotated[list[int], _are_steps]
Changes = Annotated[list[ExpertChange], _are_changes]


@dataclass(frozen=True)
class LogEntry:
    """An entry of the log; by itself one of a kind that this reader has no use for.

    ``number`` is its place in the log, -1 before it is appended.
    """

    kind: ClassVar[str] = ""
    number: int = field(default=-1, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """The values that the store holds."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "number"}
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class WakeUp(LogEntry):
    """Not in the log: a reader's own threads wake it up with this."""


@dataclass(frozen=True)
class _OfMigration(LogEntry):
    """An entry about the migration of a plan, which the store holds under ``plan/<plan>``."""

    plan: Count


@dataclass(frozen=True)
class MigrationStarted(_OfMigration):
    """Servers begin the plan's steps."""

    kind = "migration_started"


@dataclass(frozen=True)
class ExpertsLoaded(_OfMigration):
    """A server's GPUs serve these experts from now on."""

    kind = "experts_loaded"
    experts: Changes


@dataclass(frozen=True)
class DropsAnnounced(_OfMigration):
    """A server is about to drop these experts: drivers send it no new calls for them."""

    kind = "drops_announced"
    experts: Changes


@dataclass(frozen=True)
class DropsAcknowledged(_OfMigration):
    """No call of a driver depends any longer on the experts that these steps drop."""

    kind = "drops_acknowledged"
    server: Server
    steps: Steps


@dataclass(frozen=True)
class SlotsFreed(_OfMigration):
    """These steps' experts are dropped, and their slots can be loaded into."""

    kind = "slots_freed"
    steps: Steps


@dataclass(frozen=True)
class StepFailed(_OfMigration):
    """A server, called by its name, cannot do a step."""

    kind = "step_failed"
    step: Count
    server: Text
    reason: Text


@dataclass(frozen=True)
class StopRequested(_OfMigration):
    """Servers begin no further step."""

    kind = "stop_requested"
    reason: Text


@dataclass(frozen=True)
class ServerStopped(_OfMigration):
    """A server has no step in progress any more."""

    kind = "server_stopped"
    server: Server


@dataclass(frozen=True)
class MigrationFinished(_OfMigration):
    """The migration is complete, or abandoned."""

    kind = "migration_finished"
    complete: Flag
    text: Text


@dataclass(frozen=True)
class ReviewStarted(LogEntry):
    """Drivers report their calls."""

    kind = "review_started"
    review: Count


@dataclass(frozen=True)
class CallsReported(LogEntry):
    """A driver's calls are at ``calls/<server>/<review>``, its times at ``times/...``."""

    kind = "calls_reported"
    review: Count
    server: Server


@dataclass(frozen=True)
class MoveRequested(LogEntry):
    """Somebody asks for the placement at ``move/<move>``."""

    kind = "move_requested"
    move: Text


@dataclass(frozen=True)
class MoveFinished(LogEntry):
    """How a requested move ended: the exit code of the command, and a text."""

    kind = "move_finished"
    move: Text
    code: ExitCode
    text: Text


@dataclass(frozen=True)
class LogMessage(LogEntry):
    """A text for the first server's log."""

    kind = "log_message"
    text: Text


_KINDS = (
    MigrationStarted, ExpertsLoaded, DropsAnnounced, DropsAcknowledged, SlotsFreed, StepFailed,
    StopRequested, ServerStopped, MigrationFinished, ReviewStarted, CallsReported, MoveRequested,
    MoveFinished, LogMessage,
)  # fmt: skip
#: The entries' classes by kind, and the check of each of their fields.
KINDS: dict[str, type[LogEntry]] = {entry.kind: entry for entry in _KINDS}
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
    return json.dumps({**entry.to_json(), "by": writer})


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
        known["experts"] = [ExpertChange(*change) for change in known["experts"]]
    return KINDS[kind](**known, number=number)
