"""The protocol of the two simulation engines, and the measurements that they return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import TableChange
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate.events import Log
from prism_plan.simulate.losses import LossOutcome

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The measurements of a run; times in seconds.

    Of R requests: ``start_s``, ``first_token_s`` and ``done_s`` [R], NaN where it did not
    happen. Of N servers, by home: ``calls``, ``remote_calls`` (expert calls), ``steps`` (token and
    layer), ``waiting`` of them with a remote expert, ``destinations`` (servers that tokens were
    sent to); ``present_s``, the integral over time of the requests at the server. By place:
    ``bytes_out``, ``bytes_in``, ``up_busy_s``, ``down_busy_s`` [N], ``messages`` [N, N] calls sent
    from row to column, ``gpu_busy_s`` [G], ``served`` [G] expert calls computed. ``layer_steps``
    and ``layer_s`` [K + 1]: layers of decode steps by number of remote experts, and the sum of
    their times. ``loads`` and ``loaded_bytes`` count experts brought from host memory.
    """

    start_s: Floats
    first_token_s: Floats
    done_s: Floats
    calls: Ints
    remote_calls: Ints
    steps: Ints
    waiting: Ints
    destinations: Ints
    present_s: Floats
    bytes_out: Ints
    bytes_in: Ints
    up_busy_s: Floats
    down_busy_s: Floats
    messages: Ints
    hops: Ints
    gpu_busy_s: Floats
    served: Ints
    layer_steps: Ints
    layer_s: Floats
    loads: int
    loaded_bytes: int
    events: int
    now_s: float


def step_dependencies(
    steps: Sequence[MigrationStep], change: TableChange | None = None
) -> tuple[list[int], list[list[int]]]:
    """How many needs each step of a migration has, and which steps need it.

    Steps that wait for requests on older tables have one need more.
    """
    dependents: list[list[int]] = [[] for _ in steps]
    for index, step in enumerate(steps):
        for need in set(step.needs):
            dependents[need].append(index)
    waits_from = len(steps) if change is None else change.waits_from
    num_needs = [len(set(step.needs)) + (i >= waits_from) for i, step in enumerate(steps)]
    return num_needs, dependents


class Engine(Protocol):
    """Runs a scenario from its first arrival to its last event."""

    def advance(self, until_s: float = math.inf, max_events: int | None = None) -> bool:
        """Process all events up to and including ``until_s``, at most ``max_events`` of them.

        Returns False if ``max_events`` ended it, else True; the time is then ``until_s``, if that
        is finite.
        """

    @property
    def all_finished(self) -> bool:
        """Whether every request has been answered."""

    @property
    def num_finished(self) -> int:
        """How many requests have been answered."""

    @property
    def migrating(self) -> bool:
        """Whether steps of a migration are not yet complete."""

    def migrate(self, steps: Sequence[MigrationStep], change: TableChange | None = None) -> None:
        """Start a migration now; the one before must be complete.

        A step starts when those that it needs are complete and, for a load, when the GPU's load
        channel is free. A loaded expert serves from then on; a dropped one receives no new calls,
        and those under way to it are answered. ``change`` begins a new execution table for the
        requests that are admitted from then on; an event that ends the last request on an older
        table first admits the next one, and then starts the steps that waited for it.
        """

    def tables_in_use(self) -> npt.NDArray[np.int32]:
        """The execution tables of admitted requests, int32 [tables, N, L]; the newest comes first.

        It is the one that the next request gets, whether a request runs on it or not.
        """

    @property
    def migration_end_s(self) -> float:
        """Time at which the last step of the latest migration was complete."""

    def take_calls(self) -> Ints:
        """Expert calls by home server since the last call of this method, [N, L, E]."""

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        """Whether each GPU holds each expert now, bool [G, L, E].

        An expert counts once it is loaded. Of copies on one server only the first GPU's computes.
        Where servers offload, this stays the initial placement.
        """

    def outcome(self) -> Outcome:
        """The measurements so far."""

    def log(self) -> Log:
        """The events so far, if logging was asked for."""


class EngineWithLosses(Engine, Protocol):
    """An engine whose servers may be lost and come back (docs/design.md, section 4).

    What these methods do follows the events of the time that the run was advanced to. Pairs that a
    step needs and nobody holds make it wait or fail; everything else is as without losses. No
    request of the scenario arrives at a server while that is lost
    (:meth:`prism_plan.simulate.losses.LossPlan.served`).
    """

    @property
    def all_finished(self) -> bool:
        """Whether every request has been answered, or has left without an answer."""

    def lose(self, server: int) -> None:
        """A server stops: it computes, sends and receives nothing, and loses its own requests."""

    def notice(
        self, server: int, steps: Sequence[MigrationStep], table: npt.NDArray[np.int32],
        later: npt.NDArray[np.int32] | None = None,
    ) -> None:  # fmt: skip
        """All others know of a loss: nobody routes there, and what waits there is done again.

        The migration under way is given up, and one of ``steps`` begins (see
        :meth:`Engine.migrate`). Requests that are admitted or started again from now on have the
        execution ``table`` int32 [N, L], which sends no layer to a server that is known to be lost;
        those that are admitted once all steps are complete have ``later``.
        """

    def rejoin(
        self, server: int, steps: Sequence[MigrationStep], table: npt.NDArray[np.int32],
        later: npt.NDArray[np.int32] | None = None,
    ) -> None:  # fmt: skip
        """A lost server is back, without experts; a migration begins as in :meth:`notice`."""

    def losses(self) -> LossOutcome:
        """What losses did to the requests so far."""
