"""An ordered migration: its steps, what they cost, and a replay that proves them."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.migration_step import MigrationStep
from prism_plan.model import ModelShape, require_same_model
from prism_plan.placement import InputFile, Placement

Bools = npt.NDArray[np.bool_]
Capacity = Sequence[Sequence[int]]
#: What errors call two placements that are no files.
NAMES = ("first placement", "second placement")


@dataclass(frozen=True)
class LoadTime:
    """Seconds of loading: one after the other, and with all GPUs side by side."""

    sum_s: float
    makespan_s: float


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """Steps from one placement to another; each one needs only earlier ones.

    ``gpus`` tells how many GPUs each server has. Every order of the steps that respects their
    ``needs``, side by side too, keeps every expert of the first placement held and every GPU
    within its capacity, and ends at the second. ``inputs`` names the two placements' files
    (``"from"``, ``"to"``); ``load_s`` is the time of loading where a cluster was given.
    """

    model: ModelShape
    servers: tuple[str, ...]
    gpus: tuple[int, ...]
    steps: tuple[MigrationStep, ...]
    inputs: Mapping[str, InputFile] = field(default_factory=dict)
    load_s: LoadTime | None = None

    def replace(self, **changes: Any) -> MigrationPlan:
        """A changed copy."""
        return dataclasses.replace(self, **changes)

    @property
    def loads(self) -> int:
        """Load steps, extra ones included."""
        return sum(step.kind == "load" for step in self.steps)

    @property
    def drops(self) -> int:
        """Drop steps; each extra load has an extra drop."""
        return len(self.steps) - self.loads

    @property
    def extra_loads(self) -> int:
        """Loads beyond those that the two placements differ by."""
        return sum(step.kind == "load" and step.temporary for step in self.steps)

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
        """The steps as a `networkx.DiGraph`: nodes are their indices, an edge leads from need."""
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

        Side by side, every GPU loads one expert at a time: whenever it is free, the first step
        whose needs are complete. Drops take no time.
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
    missing = [len(step.needs) for step in steps]
    followers: list[list[int]] = [[] for _ in steps]
    for index, step in enumerate(steps):
        for need in step.needs:
            followers[need].append(index)
    ready: list[list[int]] = [[] for _ in rates]  # heaps of loads that can start
    idle = [True] * len(rates)
    running: list[tuple[float, int]] = []
    now = 0.0
    free_to_go = [index for index, count in enumerate(missing) if not count]
    touched: set[int] = set()
    while True:
        while free_to_go:
            index = free_to_go.pop()
            if steps[index].kind == "load":
                heapq.heappush(ready[steps[index].gpu], index)
                touched.add(steps[index].gpu)
            else:
                free_to_go += _released(followers[index], missing)
        for gpu in sorted(touched):
            if idle[gpu] and ready[gpu]:
                index = heapq.heappop(ready[gpu])
                heapq.heappush(running, (now + plan.bytes_of(steps[index]) / rates[gpu], index))
                idle[gpu] = False
        if not running:
            return now
        now, index = heapq.heappop(running)
        idle[steps[index].gpu] = True
        touched = {steps[index].gpu}
        free_to_go = _released(followers[index], missing)


def _released(followers: Sequence[int], missing: list[int]) -> list[int]:
    """The followers of a complete step that now wait for nothing."""
    free = []
    for index in followers:
        missing[index] -= 1
        if not missing[index]:
            free.append(index)
    return free


# ----------------------------------------------------------------------------- the two placements


@dataclass(frozen=True, eq=False)
class Endpoints:
    """Both placements over the same GPUs, and what limits the way.

    ``had``, ``has`` are bool [G, J] with the servers in the order of the second placement;
    ``size`` int64 [J] and ``capacity`` int64 [G] are in slots, or in bytes where experts differ
    in size.
    """

    model: ModelShape
    servers: tuple[str, ...]
    gpus: tuple[int, ...]
    had: Bools
    has: Bools
    size: npt.NDArray[np.int64]
    capacity: npt.NDArray[np.int64]

    def gpu_text(self, gpu: int) -> str:
        """A GPU for a message."""
        server = int(np.repeat(np.arange(len(self.gpus)), self.gpus)[gpu])
        return f"server {self.servers[server]!r} gpu[{gpu - sum(self.gpus[:server])}]"


def endpoints(
    a: Placement,
    b: Placement,
    gpu_capacity: Capacity | None = None,
    names: tuple[str, str] = NAMES,
) -> Endpoints:
    """Match two placements; servers by name. Capacities are those of ``b`` if none are given.

    ``names`` are what errors call the two.

    Raises
    ------
    WrongModel
        They place different models.
    InputError
        They are of different servers or GPUs, one is over the capacity of a GPU, or an expert that
        ``a`` holds is nowhere in ``b``.
    """
    require_same_model(a.model, b.model, source=names[0], other=names[1])
    if set(a.servers) != set(b.servers):
        raise InputError(
            _names(a.servers, b.servers),
            source=names[0],
            place="servers",
            expected=f"{_names(b.servers, a.servers)} as in {names[1]}",
        )
    model, gpus = b.model, tuple(len(caps) for caps in b.gpu_capacity)
    order = []
    for n, server in enumerate(b.servers):
        own = a.gpus_of(a.servers.index(server))
        if len(own) != gpus[n]:
            raise InputError(
                f"{len(own)} GPUs",
                source=names[0],
                place=f"server {server!r}",
                expected=f"{gpus[n]} as in {names[1]}",
            )
        order += own.tolist()
    capacity = b.gpu_capacity if gpu_capacity is None else gpu_capacity
    if tuple(len(caps) for caps in capacity) != gpus:
        raise InputError(
            f"GPUs per server {[len(caps) for caps in capacity]}",
            place="gpu_capacity",
            expected=f"{list(gpus)}",
        )
    size = np.ones(model.num_layers) if model.equal_expert_bytes else model.expert_bytes_by_layer
    ends = Endpoints(
        model=model,
        servers=b.servers,
        gpus=gpus,
        had=a.on_gpu[order].reshape(len(order), -1),
        has=b.on_gpu.reshape(len(order), -1),
        size=np.repeat(np.asarray(size, np.int64), model.num_experts),
        capacity=np.array([cap for caps in capacity for cap in caps], np.int64),
    )
    unit = "slots" if model.equal_expert_bytes else "bytes"
    for name, held in zip(names, (ends.had, ends.has), strict=True):
        used = held @ ends.size
        for g in np.flatnonzero(used > ends.capacity)[:1]:
            raise InputError(
                f"{ends.gpu_text(int(g))} holds {used[g]:,} {unit} of experts",
                source=name,
                expected=f"at most its capacity of {ends.capacity[g]:,}",
            )
    for pair in np.flatnonzero(ends.had.any(axis=0) & ~ends.has.any(axis=0))[:1]:
        raise InputError(
            f"{model.pair_text(int(pair))} is held nowhere",
            source=names[1],
            expected=f"every expert that {names[0]} holds",
        )
    return ends


def _names(names: Sequence[str], others: Sequence[str]) -> str:
    """The names, those that the others lack first, cut to a few."""
    ordered = sorted(names, key=lambda name: name in set(others))
    return f"{ordered[:4]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
