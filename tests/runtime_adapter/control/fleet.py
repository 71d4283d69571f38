"""The control of a run in one process, without its requests: executors, followers, scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.io.placement import placement_to_json
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.control.event_log import EventLog, NewLog
from runtime_adapter.control.log_entries import (
    Bounds,
    DropsAnnounced,
    ExpertsLoaded,
    LogEntry,
    MoveFinished,
    MoveRequested,
    ServerDown,
    ServerJoined,
)
from runtime_adapter.control.log_follower import LogFollower, older_incarnation
from runtime_adapter.control.migration_executor import MigrationExecutor
from runtime_adapter.control.scheduler import Scheduler
from runtime_adapter.control.scheduler_config import SchedulerConfig
from runtime_adapter.moe.counters import Counters
from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change
from tests.limits import HANG_S
from tests.runtime_adapter.control.memory_store import MemoryStore, memory_log

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


def drawn(
    seed: int, capacity: Sequence[Sequence[int]], *, copies: int = 1, **plan: Any
) -> Placement:
    """Every expert on some servers, and on others with probability a half while there is room."""
    rng = np.random.default_rng(seed)
    slots = np.array([n for gpus in capacity for n in gpus])
    server = np.repeat(np.arange(len(capacity)), [len(gpus) for gpus in capacity])
    held = np.zeros((len(slots), MODEL.num_pairs), bool)
    for _ in range(copies):
        for pair in rng.permutation(MODEL.num_pairs):
            taken = [server[g] for g in np.flatnonzero(held[:, pair])]
            room = np.flatnonzero((held.sum(axis=1) < slots) & ~np.isin(server, taken))
            most = (slots - held.sum(axis=1))[room].max()  # so that it never ends without room
            held[rng.choice(room[(slots - held.sum(axis=1))[room] == most]), pair] = True
    for g, n in enumerate(slots):
        free = rng.permutation(np.flatnonzero(~held[g]))[: n - int(held[g].sum())]
        held[g, free[rng.random(len(free)) < 0.5]] = True
    return placement(held, capacity, min_replicas=copies, **plan)


class Memory:
    """What is in which slot of a server's GPUs; processes of a server share it."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = [[-1] * n for n in slots]
        self.wrong: list[str] = []
        self.compute: FakeCompute | None = None

    def write(self, gpu: int, slot: int, pair: int) -> None:
        """Overwrite a slot, which the driver must not compute with."""
        table = dict(self.compute.table) if self.compute is not None else {}
        for (other_gpu, other), other_slot in table.items():
            if (other_gpu, other_slot) == (gpu, slot):
                self.wrong.append(f"{pair} is written over {other}, which the driver uses")
        self.slots[gpu][slot] = pair


class FakeLoader:
    """Loads that take no time, may fail, and are noted; a GPU never holds more than its slots."""

    def __init__(self, memory: Memory, table: Mapping[tuple[int, int], int]) -> None:
        self.memory = memory
        self.table = dict(table)
        self.log: list[tuple[str, int, int]] = []
        self.wrong = memory.wrong
        self.fails: Callable[[int, int], bool] = lambda pair, gpu: False
        self.hold = threading.Event()
        self.hold.set()
        self.loading = [0] * len(memory.slots)
        self.most_loading = [0] * len(memory.slots)
        self._lock = threading.Lock()

    def connect(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, peers: Mapping[int, Peer]
    ) -> None:
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
            used = {slot for (g, _), slot in self.table.items() if g == gpu}
            free = [slot for slot in range(len(self.memory.slots[gpu])) if slot not in used]
            if not free:
                self.wrong.append(f"load of {pair} on {gpu}: no free slot")
                raise InputError("no free slot")
            if (gpu, pair) in self.table:
                self.wrong.append(f"load of {pair} on {gpu}: it is there")
            self.memory.write(gpu, free[-1], pair)
            self.table[gpu, pair] = free[-1]
            self.log.append(("load", pair, gpu))
        return Change("load", pair, gpu, free[-1])

    def drop(self, pair: int, gpu: int) -> None:
        """At once."""
        with self._lock:
            if (gpu, pair) not in self.table:
                self.wrong.append(f"drop of {pair} on {gpu}: it is not there")
            self.table.pop((gpu, pair), None)
            self.log.append(("drop", pair, gpu))

    def held(self) -> list[tuple[int, int, int]]:
        """The table."""
        with self._lock:
            return sorted((gpu, pair, slot) for (gpu, pair), slot in self.table.items())

    @property
    def rows(self) -> npt.NDArray[np.bool_]:
        """What the GPUs hold, bool [G, J]."""
        rows = np.zeros((len(self.memory.slots), MODEL.num_pairs), bool)
        for gpu, pair, _ in self.held():
            rows[gpu, pair] = True
        return rows


class FakeCompute:
    """Notes what it is told; what it computes with is in its slot."""

    def __init__(
        self, memory: Memory | None = None, table: Mapping[tuple[int, int], int] | None = None
    ) -> None:
        self.changes: list[Change] = []
        self.memory = memory
        self.table = dict(table or {})

    def use(self, expert_map: ExpertMap) -> None:
        """It needs no map."""

    def apply(self, change: Change) -> None:
        """Note it."""
        self.changes.append(change)
        if change.kind == "drop":
            self.table.pop((change.gpu, change.pair), None)
            return
        if self.memory is not None and self.memory.slots[change.gpu][change.slot] != change.pair:
            self.memory.wrong.append(f"{change} is not in its slot")
        self.table[change.gpu, change.pair] = change.slot

    def held(self) -> list[tuple[int, int, int]]:
        """The table."""
        return sorted((gpu, pair, slot) for (gpu, pair), slot in list(self.table.items()))

    def partial_sums(self, batch: Any) -> Any:
        """Is not asked for."""

    def dense(self, layer: int, tokens: int, context: int | None = None) -> None:
        """Is not asked for."""


class FakeLane:
    """Layers that begin and end when a test says so."""

    def __init__(self) -> None:
        self.layer = 0
        self.passes = 0


class FakeServer:
    """One server's part of the control, from its start until it is killed."""

    def __init__(
        self, fleet: Fleet, n: int, held: npt.NDArray[np.bool_], *, silent: bool = False,
        at: int = 0,
    ) -> None:  # fmt: skip
        start = fleet.start
        self.fleet, self.n, self.silent = fleet, n, silent
        self.memory = Memory(start.gpu_capacity[n])
        table: dict[tuple[int, int], int] = {}
        for gpu, pair in np.argwhere(held).tolist():
            slot = sum(g == gpu for g, _ in table)
            table[gpu, pair] = slot
            self.memory.slots[gpu][slot] = pair
        self.loader = FakeLoader(self.memory, table)
        self.compute = FakeCompute(self.memory, table)
        self.memory.compute = None if silent else self.compute
        self.worker_map, self.driver_map = ExpertMap(start), ExpertMap(start)
        self.lane: Any = FakeLane()
        self.said: list[str] = []
        self.sends_heartbeats = True
        self.finished = False
        self.suspects: set[int] = set()
        self.replaced = False
        self.executor = MigrationExecutor(
            n, start, fleet.log(f"worker {n}"), self.loader, self.worker_map,
            lambda: ("127.0.0.1", 1000 + n + 100 * at), fleet.timeout_s,
            report=self.said.append, on_replaced=self._note_replaced,
        )  # fmt: skip
        self.follower = LogFollower(
            n, start, self.driver_map, self.compute, Counters(2, 6), lambda: [self.lane],
            fleet.log(f"driver {n}"), self.said.append,
            older=older_incarnation(fleet.log(f"driver {n}").client, n),
        )  # fmt: skip
        self.executor.start()
        if not silent:
            self.follower.start()

    def _note_replaced(self) -> None:
        self.replaced = True

    def kill(self) -> None:
        """End all threads, like a process that is killed; the others do not get an answer."""
        self.sends_heartbeats = False
        self.executor.close()
        self.follower.close()

    def send_heartbeat(self) -> None:
        """The driver's; the worker sends its own."""
        if self.sends_heartbeats:
            self.fleet.store.call(
                "heartbeat", f"driver {self.n}", server=self.n, incarnation=0, kind="driver",
                info={"suspects": sorted(self.suspects), "finished": self.finished},
            )  # fmt: skip


#: The fleets of a test, whose threads end with it (conftest.py).
OPEN: list[Fleet] = []


class Fleet:
    """All servers of a placement; ``silent`` ones have no driver that follows the log."""

    def __init__(
        self, start: Placement, *, silent: Sequence[int] = (), timeout_s: float = 5.0,
        folder: str | None = None, min_replicas: int = 1, movable: bool = True,
    ) -> None:  # fmt: skip
        OPEN.append(self)
        self.start = start
        self.timeout_s = timeout_s
        servers = len(start.servers)
        instance = Instance(
            MODEL, start.servers, np.zeros((servers, 2, 6)), start.gpu_capacity,
            min_replicas=min_replicas,
        )  # fmt: skip
        self.folder = folder
        config = SchedulerConfig(start, instance, timeout_s=timeout_s).to_json()
        self.store = MemoryStore({
            "facts": {}, "servers": list(start.servers), "timeout_s": timeout_s,
            "bounds": [start.on_gpu.shape[0], MODEL.num_pairs],
            "gpus": [len(gpus) for gpus in start.gpu_capacity],
            "movable": movable, "scheduler": config,
        })  # fmt: skip
        self._config = config
        self.all_servers: list[FakeServer] = []
        self.servers: list[FakeServer] = []
        self.scheduler = self._new_scheduler()
        self.asking = self.log("move")
        self.reading = self.log("reader")
        self.reading.expect(Bounds.of(start))
        self.reading.follow()
        self.entries: list[LogEntry] = []
        self._skipped = -1  # up to this entry the reader has a snapshot
        self.least_copies = int(ExpertMap(start).num_replicas.min())
        self.map = ExpertMap(start)
        for n in range(servers):
            rows = start.on_gpu[start.gpus_of(n)].reshape(-1, MODEL.num_pairs)
            self.servers.append(self._add(FakeServer(self, n, rows, silent=n in silent)))
        self.until(lambda: self.scheduler.state.begun and self.scheduler.state.all_up)

    def _add(self, server: FakeServer) -> FakeServer:
        self.all_servers.append(server)
        return server

    def _new_scheduler(self) -> Scheduler:
        log = self.log("scheduler")
        log.follow()
        return Scheduler(SchedulerConfig.from_json(self._config, self.folder), log)

    def restart_scheduler(self) -> None:
        """As if its process was killed and started again."""
        self.scheduler.log.close()
        self.scheduler = self._new_scheduler()

    def kill(self, n: int) -> None:
        """A server dies, and does not answer the others any more."""
        self.servers[n].kill()
        for other in self.servers:
            other.suspects.add(n)

    def start_again(self, n: int, *, empty: bool = True) -> None:
        """A server that was killed is started again, without experts or with those it had."""
        old = self.servers[n]
        held = np.zeros_like(old.loader.rows) if empty else old.loader.rows
        self.servers[n] = self._add(FakeServer(self, n, held, at=len(self.all_servers)))
        for other in self.servers:
            other.suspects.discard(n)

    def log(self, by: str) -> EventLog:
        """A client of the log."""
        return memory_log(self.store, by)

    def ask(self, target: Placement, name: str = "1") -> None:
        """Ask for a placement, as the command does."""
        self.asking = self.log("move")  # for the store may have been restarted
        self.asking.put(f"move/{name}", placement_to_json(target))
        self.asking.append(MoveRequested(name))

    def until(self, condition: Callable[[], Any]) -> None:
        """Let the scheduler run until something has happened."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline
            self.step()

    def step(self) -> None:
        """One round of the scheduler, of the store and of the drivers' heartbeats."""
        if self.store.away:  # the scheduler would wait for it, in this thread
            time.sleep(0.01)
            return
        for server in self.servers:
            server.send_heartbeat()
        self.store.tick()
        self.scheduler.run_once(0.005)
        while not self.reading.caught_up():
            entry = self.reading.next(0)
            if isinstance(entry, NewLog):
                self._skipped = entry.number
                for n in range(len(self.servers)):
                    self.map.set_down(n)
            elif entry is not None:  # one that is none is skipped
                self.entries.append(entry)
                self._apply(entry)

    def _apply(self, entry: LogEntry) -> None:
        """Keep a map as the log has it; count copies while all are there."""
        match entry:
            case ServerJoined():
                self.map.set_up(entry.server, [(gpu, pair) for gpu, pair, _ in entry.experts])
            case ServerDown():
                self.map.set_down(entry.server)
            case ExpertsLoaded() | DropsAnnounced():
                for change in entry.experts:
                    self.map.change(change.gpu, change.pair, isinstance(entry, ExpertsLoaded))
            case _:
                return
        if not self.map.down_names():
            self.least_copies = min(self.least_copies, int(self.map.num_replicas.min()))

    def moved(self, name: str = "1") -> tuple[int, str]:
        """How the move that was asked for ended."""
        self.until(lambda: self.answers(name))
        entry = self.answers(name)[0]
        return entry.code, entry.text

    def answers(self, name: str) -> list[MoveFinished]:
        """How the move ended, if it has; also where that was before a new log began for us."""
        entries = [*self.entries, *self.store.past]
        if self.reading._epoch == self.store.methods.epoch:
            entries += [e for e in self.store.entries() if e.number <= self._skipped]
        return [e for e in entries if isinstance(e, MoveFinished) and e.move == name]

    def entries_of(self, kind: type[Kind]) -> list[Kind]:
        """Entries of a kind so far, in order."""
        return [entry for entry in self.entries if isinstance(entry, kind)]

    def held(self) -> npt.NDArray[np.bool_]:
        """What the loaders say that the GPUs hold, bool [G, J]."""
        return np.concatenate([server.loader.rows for server in self.servers])

    def wrong(self) -> list[str]:
        """What no loader should have been asked for, and no driver may have computed with."""
        return [text for server in self.all_servers for text in server.loader.wrong]

    def min_replicas(self) -> int:
        """Over the whole log, the least number of servers that any expert was called on."""
        return self.least_copies

    def agrees(self) -> bool:
        """Whether all live maps and tables are what the loaders of the live servers hold."""
        live = [server for server in self.servers if server.sends_heartbeats]
        held = self.held()
        for n, server in enumerate(self.servers):
            if not server.sends_heartbeats:
                held[self.start.gpus_of(n)] = False
        for server in live:
            if (server.driver_map.on_gpu() != held).any():
                return False
            if (server.worker_map.on_gpu() != held).any():
                return False
            if server.compute.held() != server.loader.held():
                return False
        return bool((self.scheduler.state.expert_map.on_gpu() == held).all())

    def knows_all(self) -> bool:
        """Whether the scheduler follows the log of now, and has those up who live."""
        live = [n for n, server in enumerate(self.servers) if server.sends_heartbeats]
        is_new = self.scheduler.log._epoch == self.store.methods.epoch
        return is_new and self.scheduler.state.alive == live

    def settle(self) -> None:
        """Let everything come to rest: no migration, no repair, and all agree."""
        self.until(
            lambda: (
                self.knows_all()
                and self.scheduler.migrations.active is None
                and not self.scheduler.repairs.pending
                and self.scheduler.reviews.pending is None
                and self.agrees()
            )
        )

    def close(self) -> None:
        """End all threads."""
        for server in self.all_servers:
            server.kill()
        for log in (self.scheduler.log, self.asking, self.reading):
            log.close()
