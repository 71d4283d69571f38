"""The optimum of a small instance: the parts that it consists of, and its proof.

The idle time of a mean request splits into layers and the messages between them, and a layer's
seconds depend on the plan by little: the servers that execute it (a *column* of the table, one
server a home), and where its experts lie. :mod:`.layer_tables` has the least seconds by column and
by how many experts each server holds; :mod:`.program` then finds the best choice of all layers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.latency.idle_time import (
    IdleMeasure,
    IdleTime,
    _prompts_by_task,
    request_weights,
)
from prism_plan.simulate.requests import Requests
from prism_plan.solvers.paths import shortest_paths
from studies.small_instances.instances import SmallInstance
from studies.small_instances.layer_tables import TIES, LayerTable, Ties, layer_table, steps_of_layer
from studies.small_instances.program import Messages, best_choices

#: Sums of the same numbers in another order differ by less than this share.
ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


#: Seconds by the measure, experts bool [N, L, E] and table int32 [N, L].
Plan = tuple[float, npt.NDArray[np.bool_], npt.NDArray[np.int32]]


class Measure:
    """The measure of an instance: idle seconds of a mean request of all homes."""

    def __init__(self, small: SmallInstance) -> None:
        self._cluster = small.cluster
        self._measure = IdleMeasure(small.trace.model, small.cluster, small.trace)
        model = small.trace.model
        everywhere = np.ones((small.cluster.num_servers, model.num_layers, model.num_experts), bool)
        #: Its shares of tasks, weights and messages are those of every placement.
        self.anywhere: IdleTime = self._measure.idle_time(everywhere)
        self.weights: Floats = request_weights(self.anywhere, small.cluster)
        tasks = np.flatnonzero(self.anywhere.shares.any(axis=0))
        #: The prompts that the measure looks at; each task is a home of its own.
        self.prompts: Requests = _prompts_by_task(small.trace, tasks, len(self.weights), seed=0)

    def idle_time(self, on_gpu: npt.NDArray[np.bool_]) -> IdleTime:
        """The idle time under a placement bool [N, L, E]; servers have one GPU each."""
        return self._measure.idle_time(on_gpu)

    def value_s(self, on_gpu: npt.NDArray[np.bool_], table: npt.NDArray[np.integer]) -> float:
        """Seconds of a plan, experts bool [N, L, E] on servers of one GPU and a table [N, L]."""
        return float(self.weights @ self.idle_time(on_gpu).of_table(table))


@dataclass(frozen=True, eq=False)
class Parts:
    """An instance in parts: ``columns`` int64 [C, N], tables by layer, messages and slots."""

    columns: npt.NDArray[np.int64]
    tables: Sequence[LayerTable]
    messages: Messages
    slots: tuple[int, ...]

    @classmethod
    def of(cls, small: SmallInstance, measure: Measure, ties: Ties = "better") -> Parts:
        """The parts of an instance; homes without users execute at home.

        ``ties``: where a token calls that has the choice (:mod:`.layer_tables`).
        """
        servers, model = small.cluster.num_servers, small.trace.model
        users = np.flatnonzero(measure.anywhere.has_users).tolist()
        columns = np.array(
            [
                column
                for column in itertools.product(range(servers), repeat=servers)
                if all(column[n] == n for n in range(servers) if n not in users)
            ],
            np.int64,
        )
        shares = measure.weights[:, None] * measure.anywhere.shares
        tables = [
            layer_table(
                steps_of_layer(measure.prompts, len(small.trace.tasks), layer), shares, columns,
                small.slots, model, small.cluster, ties,
            )
            for layer in range(model.num_layers)
        ]  # fmt: skip
        start_s, hop_s, id_s = (np.zeros((len(columns),) * d) for d in (1, 2, 2))
        for n in users:
            request, at = measure.anywhere.of_home(n), columns[:, n]
            start_s += measure.weights[n] * request.start_s[at]
            hop_s += measure.weights[n] * request.hop_s[at[:, None], at]
            id_s += measure.weights[n] * request.id_s[at[:, None], at]
        return cls(columns, tables, Messages(start_s, hop_s, id_s), small.slots)

    def plan(
        self, chosen: Sequence[tuple[int, int]]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
        """Experts bool [N, L, E] and table int32 [N, L] of a choice for each layer."""
        local = [
            table.local(column, index)
            for table, (column, index) in zip(self.tables, chosen, strict=True)
        ]
        table = self.columns[[column for column, _ in chosen]].T
        return np.stack(local, axis=1), np.ascontiguousarray(table, np.int32)


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best plan that was found, experts bool [N, L, E] and table int32 [N, L].

    ``bound_s`` is a lower bound on the measure of every plan, ``value_s`` the measure of this one.
    Where they are equal this plan is an optimum. ``seconds`` is the time it took.
    """

    local: npt.NDArray[np.bool_]
    table: npt.NDArray[np.int32]
    value_s: float
    bound_s: float
    seconds: float


def optimum(small: SmallInstance) -> Optimum:
    """The optimum of an instance, or the best plan and the bound that ties leave.

    With ties to the better server the programme gives the bound, and in most instances a plan of
    just this value. Where that plan has ties, those of the mean and of the worse server are tried,
    in which no copies only make ties, and a local search by the measure ends that.
    """
    begin = time.perf_counter()
    measure = Measure(small)
    bound_s = 0.0
    best: Plan | None = None
    for ties in TIES:
        parts = Parts.of(small, measure, ties)
        chosen, seconds = best_choices(parts.tables, parts.messages, parts.slots)
        if ties == "better":
            bound_s = seconds
        local, table = parts.plan(chosen)
        value_s = measure.value_s(local, table)
        if best is None or value_s < best[0]:
            best = value_s, local, table
        if best[0] <= bound_s * (1 + ROUNDING):
            break
    assert best is not None
    if best[0] > bound_s * (1 + ROUNDING):
        best = _improved(small, measure, best)
    value_s, local, table = best
    return Optimum(local, table, value_s, bound_s, time.perf_counter() - begin)


def _improved(small: SmallInstance, measure: Measure, found: Plan) -> Plan:
    """A plan that no copy added, dropped or moved improves, each with its best table."""
    better = True
    while better:
        better = False
        for server, layer, expert in np.ndindex(found[1].shape):
            for other in range(len(found[1])):  # the same server: its copy is added or dropped
                changed = found[1].copy()
                changed[server, layer, expert] ^= True
                if other != server:
                    changed[other, layer, expert] ^= True
                fits = (changed.sum(axis=(1, 2)) <= small.slots).all()
                if not fits or not changed[:, layer, expert].any():
                    continue
                table = shortest_paths(measure.idle_time(changed))
                seconds = measure.value_s(changed, table)
                if seconds < found[0] * (1 - ROUNDING):
                    found, better = (seconds, changed, table), True
    return found
