"""A phase schedule: how tasks and arrival rates change, e.g. "tasks A for 200 requests, then B"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prism_plan.errors import InputError


@dataclass(frozen=True)
class Phase:
    """The task shares and arrival interval during ``requests`` requests of each server.

    ``tasks`` are shares by task of the servers that change; the others keep what they had.
    ``arrival_interval_s`` holds for all servers from this phase on; ``None`` keeps it. Only the
    last phase may have ``requests`` of ``None``: it lasts until the end.
    """

    requests: int | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    arrival_interval_s: float | None = None


@dataclass(frozen=True)
class PhaseStart:
    """The times at which a phase of the schedule began in a simulation.

    Parameters
    ----------
    number
        Of the phase in its schedule, from 1.
    at_s
        Arrival of its first request, in seconds from the start.
    everywhere_at_s
        Arrival of its first request at the server that was the last to reach the phase.
    phase
        What changed.
    """

    number: int
    at_s: float
    everywhere_at_s: float
    phase: Phase

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in a simulation report."""
        return {
            "number": self.number,
            "at_s": self.at_s,
            "everywhere_at_s": self.everywhere_at_s,
            "tasks": {server: dict(shares) for server, shares in self.phase.tasks.items()},
            "arrival_interval_s": self.phase.arrival_interval_s,
        }


@dataclass(frozen=True)
class Schedule:
    """The phases of a simulation in order; ``source`` is their file, for errors.

    Raises
    ------
    InputError
        No phase, a phase of no request, a phase other than the last without ``requests``.
    """

    phases: tuple[Phase, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.phases:
            raise InputError(
                "no phases",
                source=self.source,
                place="phase",
                remedy="describe each one in a [[phase]] table",
            )
        for index, phase in enumerate(self.phases):
            last = index == len(self.phases) - 1
            if (phase.requests is None and not last) or (
                phase.requests is not None and phase.requests < 1
            ):
                raise InputError(
                    "not given" if phase.requests is None else f"{phase.requests}",
                    source=self.source,
                    place=f"phase[{index}].requests",
                    expected="a whole number of at least 1; only the last phase may leave it out",
                )
