"""The control of a run in one process, without its requests: executors, followers, scheduler."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.io.placement import placement_to_json
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.failure_detector import WORKER_HEARTBEAT
from runtime_adapter.control.log_entries import (
    DropsAnnounced,
    ExpertsLoaded,
    LogEntry,
    MoveFinished,
    MoveRequested,
)
from runtime_adapter.control.log_follower import LogFollower
from runtime_adapter.control.migration_executor import MigrationExecutor
from runtime_adapter.control.run_state import SchedulerConfig
from runtime_adapter.control.scheduler import Scheduler
from runtime_adapter.moe.counters import Counters
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.transport.tcp_store import listen
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change
from tests.limits import HANG_S
from tests.runtime_adapter.replays import RESOLVER, free_port

os.environ.setdefault("RES_OPTIONS", RESOLVER)

MODEL = ModelShape(
    name="tiny", moe_layers=(1, 3), num_experts=6, top_k=2, expert_bytes=(1_000_000,) * 2
)
PATIENCE_S = HANG_S
Kind = TypeVar("Kind", bound=LogEntry)


def placement(held: npt.ArrayLike, capacity: Sequence[Sequence[int]], **plan: Any) -> Placement:
    """Servers s0, s1 ... from bool [G, J]."""
    return Placement(
        model=MODEL,
        servers=tuple(f"s{n}" for n in range(len(capacity))),
        gpu_capacity=tuple(map(tuple, capacity)),
        on_gpu=np.asarray(held, bool).reshape(-1, 2, 6),
        plan=SolveReport("hand", **plan),
    )


def drawn(seed: int, capacity: Sequence[Sequence[int]]) -> Placement:
    """Every expert somewhere, and whatever else there is room for with probability a half."""
    rng = np.random.default_rng(seed)
    slots = [n for gpus in capacity for n in gpus]
    held = np.zeros((len(slots), MODEL.num_pairs), bool)
    for pair in rng.permutation(MODEL.num_pairs):
        room = np.flatnonzero(held.sum(axis=1) < slots)
        held[rng.choice(room), pair] = True
    for g, n in enumerate(slots):
        free = rng.permutation(np.flatnonzero(~held[g]))[: n - int(held[g].sum())]
        held[g, free[rng.random(len(free)) < 0.5]] = True
    return placement(held, capacity)


class FakeLoader:
    """Loads that take no time, may fail, and are noted; a GPU never holds more than its slots."""

    def __init__(self, held: npt.NDArray[np.bool_], slots: Sequence[int]) -> None:
        self.held = held.copy()
        self.slots = slots
        self.log: list[tuple[str, int, int]] = []
        self.wrong: list[str] = []
        self.fails: Callable[[int, int], bool] = lambda pair, gpu: False
        self.hold = threading.Event()
        self.hold.set()
        self.loading = [0] * len(slots)
        self.most_loading = [0] * len(slots)
        self._lock = threading.Lock()

    def connect(self, rendezvous: Rendezvous, expert_map: ExpertMap) -> None:
        """It needs no other server."""

    def load(self, pair: int, gpu: int) -> Change:
        """When ``hold`` lets it."""
        with self._lock:
            self.loading[gpu] += 1
            self.most_loading[gpu] = max(self.most_loading[gpu], self.loading[gpu])
        self.hold.wait(PATIENCE_S)
        with self._lock:
            self.loading[gpu] -= 1
            if self.fails(pair, gpu):
                raise InputError("missing tensor", source="model.safetensors")
            if self.held[gpu].sum() >= self.slots[gpu]:
                self.wrong.append(f"load of {pair} on {gpu}: no free slot")
            if self.held[gpu, pair]:
                self.wrong.append(f"load of {pair} on {gpu}: it is there")
            self.held[gpu, pair] = True
            self.log.append(("load", pair, gpu))
        return Change("load", pair, gpu, 0)

    def drop(self, pair: int, gpu: int) -> None:
        """At once."""
        with self._lock:
            if not self.held[gpu, pair]:
                self.wrong.append(f"drop of {pair} on {gpu}: it is not there")
            self.held[gpu, pair] = False
            self.log.append(("drop", pair, gpu))


class FakeCompute:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def use(self, expert_map: ExpertMap) -> None:
        """It needs no map."""

    def apply(self, change: Change) -> None:
        """Note it."""
        self.changes.append(change)

    def partial_sums(self, batch: Any) -> Any:
        """Is not asked for."""

    def dense(self, tokens: int) -> None:
        """Is not asked for."""


@dataclass
class FakeLane:
    """Layers that begin and end when a test says so."""

    layer: int = 0
    passes: int = 0


@dataclass(eq=False)
class FakeServer:
    """One server's part of the control."""

    loader: FakeLoader
    worker_map: ExpertMap
    driver_map: ExpertMap
    compute: FakeCompute
    lane: FakeLane
    said: list[str] = field(default_factory=list)
    sends_heartbeats: bool = True


class Fleet:
    """All servers of a placement; ``silent`` ones have no driver that follows the log."""

    def __init__(
        self, start: Placement, *, silent: Sequence[int] = (), timeout_s: float = 5.0,
        folder: str | None = None, min_replicas: int = 1,
    ) -> None:  # fmt: skip
        self.start = start
        servers = len(start.servers)
        self.rendezvous = Rendezvous(
            servers, 0, port=free_port(), timeout_s=timeout_s, rendezvous_timeout_s=PATIENCE_S
        )
        self._host = dist.TCPStore(
            self.rendezvous.host, self.rendezvous.port, None, True, wait_for_workers=False,
            timeout=datetime.timedelta(seconds=PATIENCE_S),
            master_listen_fd=listen(self.rendezvous).detach(),
        )  # fmt: skip
        self.servers = []
        for n in range(servers):
            gpus = start.gpus_of(n)
            server = FakeServer(
                FakeLoader(
                    start.on_gpu[gpus].reshape(len(gpus), -1), start.gpu_capacity[n]
                ),
                ExpertMap(start), ExpertMap(start), FakeCompute(), FakeLane(),
            )  # fmt: skip
            self.servers.append(server)
            MigrationExecutor(
                n, start, server.loader, server.worker_map, self.log(f"worker {n}"), timeout_s
            ).start()
            if n not in silent:
                LogFollower(
                    n, start, server.driver_map, server.compute, Counters(2, 6), [server.lane],
                    self.log(f"driver {n}"), server.said.append,
                ).start()  # fmt: skip
        instance = Instance(
            MODEL, start.servers, np.zeros((servers, 2, 6)), start.gpu_capacity,
            min_replicas=min_replicas,
        )  # fmt: skip
        config = SchedulerConfig(self.rendezvous, start, instance, placements_dir=folder)
        own = self.log("scheduler")
        own.follow()
        self.scheduler = Scheduler(config, own)
        self.asking = self.log("move")
        self.reading = self.log("reader")
        self.reading.follow()
        self.entries: list[LogEntry] = []
        self._host.set("start", str(time.time()))
        self._heartbeat = 0

    def log(self, by: str) -> EventLog:
        """A client of the log."""
        return EventLog(self.rendezvous, by)

    def ask(self, target: Placement, name: str = "1") -> None:
        """Ask for a placement, as the command does."""
        self.asking.put(f"move/{name}", placement_to_json(target))
        self.asking.append(MoveRequested(name))

    def until(self, condition: Callable[[], Any]) -> None:
        """Let the scheduler run until something has happened."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline
            self._heartbeat += 1
            for n, server in enumerate(self.servers):
                if server.sends_heartbeats:
                    self._host.set(WORKER_HEARTBEAT.format(n), str(self._heartbeat))
            self.scheduler.run_once(0.005)
            while not self.reading.caught_up():
                entry = self.reading.next(0)
                if entry is not None:  # one that is none is skipped
                    self.entries.append(entry)

    def moved(self, name: str = "1") -> tuple[int, str]:
        """How the move that was asked for ended."""
        self.until(lambda: self._answers(name))
        entry = self._answers(name)[0]
        return entry.code, entry.text

    def _answers(self, name: str) -> list[MoveFinished]:
        return [e for e in self.entries_of(MoveFinished) if e.move == name]

    def entries_of(self, kind: type[Kind]) -> list[Kind]:
        """Entries of a kind so far, in order."""
        return [entry for entry in self.entries if isinstance(entry, kind)]

    def held(self) -> npt.NDArray[np.bool_]:
        """What the loaders say that the GPUs hold, bool [G, J]."""
        return np.concatenate([server.loader.held for server in self.servers])

    def wrong(self) -> list[str]:
        """What no loader should have been asked for."""
        return [text for server in self.servers for text in server.loader.wrong]

    def min_replicas(self) -> int:
        """Over the whole log, the least number of servers that any expert was called on."""
        expert_map = ExpertMap(self.start)
        least = int(expert_map.num_replicas.min())
        for entry in self.entries:
            if isinstance(entry, (ExpertsLoaded, DropsAnnounced)):
                for change in entry.experts:
                    loaded = isinstance(entry, ExpertsLoaded)
                    expert_map.change(change.gpu, change.pair, loaded)
                    least = min(least, int(expert_map.num_replicas.min()))
        return least
