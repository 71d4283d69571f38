"""A migration plan: the ordered loads and drops between two placements, and how long they take."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import TableChange
from prism_plan.migration_step import MigrationStep, ReplicaDip
from prism_plan.model_spec import ModelShape
from prism_plan.placement import InputFile


@dataclass(frozen=True)
class LoadTime:
    """Seconds that all expert loads of a migration plan take.

    ``sum_s``: one after the other. ``makespan_s``: all GPUs in parallel, one load at a time on
    each, including the time that loads wait for the steps they need.
    """

    sum_s: float
    makespan_s: float


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """Steps from one placement to another; each one needs only earlier ones.

    ``gpus`` is the number of GPUs of each server. Every order of the steps that respects their
    ``needs``, in parallel too, keeps every expert of the first placement held and every GPU
    within its capacity, and ends at the second. ``inputs`` names the two placements' files
    (``"from"``, ``"to"``); ``load_s`` is the time of loading where a cluster was given.
    ``min_replicas`` servers hold every expert at every moment, or as many as at first or in the
    end if that is less, but for the ``dips``: expert by expert in the order of the steps. Where the
    execution table changes too, ``change`` says when it begins, and which steps wait for requests
    on the old one; the orders meant above are those that respect it.
    """

    model: ModelShape
    servers: tuple[str, ...]
    gpus: tuple[int, ...]
    steps: tuple[MigrationStep, ...]
    inputs: Mapping[str, InputFile] = field(default_factory=dict)
    load_s: LoadTime | None = None
    change: TableChange | None = None
    min_replicas: int = 1
    dips: tuple[ReplicaDip, ...] = ()

    def replace(self, **changes: Any) -> MigrationPlan:
        """A changed copy."""
        return dataclasses.replace(self, **changes)

    @property
    def loads(self) -> int:
        """The number of load steps, extra ones included."""
        return sum(step.kind == "load" for step in self.steps)

    @property
    def drops(self) -> int:
        """The number of drop steps, with an extra one for each extra load."""
        return len(self.steps) - self.loads

    @property
    def extra_loads(self) -> int:
        """The number of loads beyond those that the two placements differ by."""
        return sum(step.kind == "load" and step.temporary for step in self.steps)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the extra loads."""
        return sum(
            self.bytes_of(step) for step in self.steps if step.kind == "load" and step.temporary
        )

    @property
    def server_of_gpu(self) -> npt.NDArray[np.int64]:
        """Index of the server of each GPU, int64 [G]."""
        return np.repeat(np.arange(len(self.gpus)), self.gpus)

    def bytes_of(self, step: MigrationStep) -> int:
        """Size of the step's expert."""
        return self.model.expert_bytes_by_layer[step.pair // self.model.num_experts]

    @property
    def moved_bytes(self) -> int:
        """Bytes of all loads, extra ones included."""
        return sum(self.bytes_of(step) for step in self.steps if step.kind == "load")

    def graph(self) -> Any:
        """The steps as a `networkx.DiGraph`: nodes are their indices, edges lead from needs."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.steps)))
        graph.add_edges_from((need, i) for i, step in enumerate(self.steps) for need in step.needs)
        return graph

    def loading_s(self, load_gbs: Sequence[float] | npt.NDArray[np.float64]) -> list[float]:
        """Seconds that each GPU loads, [G]; ``load_gbs`` [G] in GB/s (1e9 bytes)."""
        rates = self._rates(load_gbs)
        busy = [0.0] * len(rates)
        for step in self.steps:
            if step.kind == "load":
                busy[step.gpu] += self.bytes_of(step) / rates[step.gpu]
        return busy

    def load_seconds(self, load_gbs: Sequence[float] | npt.NDArray[np.float64]) -> LoadTime:
        """How long the loads take; ``load_gbs`` [G] in GB/s (1e9 bytes).

        In parallel, every GPU loads one expert at a time: whenever it is idle, the first step
        whose needs are complete. Drops take no time, and nothing waits for requests to end.
        """
        return LoadTime(sum(self.loading_s(load_gbs)), _makespan_s(self, self._rates(load_gbs)))

    def _rates(self, load_gbs: Sequence[float] | npt.NDArray[np.float64]) -> list[float]:
        """Bytes per second of each GPU."""
        rates = [1e9 * float(rate) for rate in load_gbs]
        if len(rates) != sum(self.gpus):
            raise ValueError(f"{len(rates)} load bandwidths for {sum(self.gpus)} GPUs")
        return rates


def _makespan_s(plan: MigrationPlan, rates: Sequence[float]) -> float:
    """When the last load is complete; ``rates`` [G] in bytes per second."""
    steps = plan.steps
    unmet_needs = [len(step.needs) for step in steps]
    dependents: list[list[int]] = [[] for _ in steps]
    for index, step in enumerate(steps):
        for need in step.needs:
            dependents[need].append(index)
    ready: list[list[int]] = [[] for _ in rates]  # heaps of loads that can start
    idle = [True] * len(rates)
    running: list[tuple[float, int]] = []
    now = 0.0
    startable = [index for index, count in enumerate(unmet_needs) if not count]
    changed_gpus: set[int] = set()
    while True:
        while startable:
            index = startable.pop()
            if steps[index].kind == "load":
                heapq.heappush(ready[steps[index].gpu], index)
                changed_gpus.add(steps[index].gpu)
            else:
                startable += _newly_startable(dependents[index], unmet_needs)
        for gpu in sorted(changed_gpus):
            if idle[gpu] and ready[gpu]:
                index = heapq.heappop(ready[gpu])
                heapq.heappush(running, (now + plan.bytes_of(steps[index]) / rates[gpu], index))
                idle[gpu] = False
        if not running:
            return now
        now, index = heapq.heappop(running)
        idle[steps[index].gpu] = True
        changed_gpus = {steps[index].gpu}
        startable = _newly_startable(dependents[index], unmet_needs)


def _newly_startable(dependents: Sequence[int], unmet_needs: list[int]) -> list[int]:
    """The dependents of a step that is now complete which wait for nothing else."""
    startable = []
    for index in dependents:
        unmet_needs[index] -= 1
        if not unmet_needs[index]:
            startable.append(index)
    return startable
