"""What a report says of lost servers: times before, during and after, and what requests met.

A request belongs to *during* if any moment from its arrival to its last token lies between a loss
and the end of the migration that repairs it: the one after the return of the server, if it returns.
It belongs to *before* if it was answered before the first loss, else to *after*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.simulate.losses import HELD_NOWHERE, LOST, WAITED_TOO_LONG, LossOutcome

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WHEN = ("before", "during", "after")
#: Reasons of failed requests, as reports spell them, by code.
REASONS = {
    HELD_NOWHERE: "needs an expert that no server holds",
    WAITED_TOO_LONG: "waited too long for an expert that no server held",
}


@dataclass(frozen=True)
class LossRecord:
    """One loss as it went; times in seconds from the start, ``None`` where it did not come to it.

    ``noticed_s`` is when the other servers knew; ``repaired_s`` and ``restored_s`` when the
    migrations after the notice and after the return were complete. ``over_s`` is when the last of
    these was, or another migration that took its place.
    """

    server: str
    at_s: float
    return_s: float | None = None
    noticed_s: float | None = None
    repaired_s: float | None = None
    restored_s: float | None = None
    over_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in a simulation report."""
        return {name: value for name, value in vars(self).items() if name != "over_s"}


def when(records: Sequence[LossRecord], arrival_s: Floats, done_s: Floats) -> dict[str, Bools]:
    """Which of the answered requests belong to which of :data:`WHEN`, bool [R] each.

    ``arrival_s`` and ``done_s`` [R] are seconds from the start; NaN in the second is no answer.
    """
    answered = np.isfinite(done_s)
    during = np.zeros(len(arrival_s), bool)
    first_s = min((record.at_s for record in records), default=np.inf)
    for record in records:
        over_s = np.inf if record.over_s is None else record.over_s
        during |= (done_s >= record.at_s) & (arrival_s <= over_s)
    before = answered & ~during & (done_s < first_s)
    return {
        "before": before,
        "during": answered & during,
        "after": answered & ~during & ~before,
    }


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a run, and what they did to its requests.

    ``not_served`` counts requests that would have arrived at a home server while it was away.
    """

    records: tuple[LossRecord, ...]
    outcome: LossOutcome
    not_served: int

    def when(self, arrival_s: Floats, done_s: Floats) -> dict[str, Bools]:
        """:func:`when` of the requests of this run."""
        return when(self.records, arrival_s, done_s)

    def counts(self) -> dict[str, Any]:
        """How many requests were lost, failed or started again, and why they failed."""
        why = self.outcome.why
        return {
            "not_served": self.not_served,
            "lost_requests": int((why == LOST).sum()),
            "failed_requests": int(np.isin(why, list(REASONS)).sum()),
            "failures": [
                {"reason": text, "requests": int((why == code).sum())}
                for code, text in REASONS.items()
                if (why == code).any()
            ],
            "restarted_requests": int((self.outcome.restarts > 0).sum()),
            "repeated_calls": self.outcome.repeated_calls,
        }
