"""A server's own part of a migration: it loads and drops what the plan says of its GPUs.

Runs in the worker process. A load is announced when it is complete; a drop when it begins, and the
slot is free once every driver has said that none of its calls counts on the expert any more. Each
step waits for those that the plan says it needs, so a plan that stops anywhere leaves every expert
covered.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from prism_plan.errors import InputError, PrismError
from prism_plan.io.migration import migration_from_json
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement, gpu_offsets
from runtime_adapter.control.event_log import EventLog, StoreLost
from runtime_adapter.control.log_entries import Bounds, Entry
from runtime_adapter.moe.compute import TimedCompute
from runtime_adapter.moe.emulated_gpu import GpuClock, wait_until
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_store import Change

#: Between two looks at what is waited for, while something is.
POLL_INTERVAL_S = 0.1
#: Between two looks at what can be begun or told, so that one entry tells of several steps: all
#: servers read all entries, and with many short ones a large move takes two to three times as long.
BATCH_INTERVAL_S = 0.01
#: A driver that says nothing may still have a call under way; it is then told that nothing is here.
DRAIN_S = 0.05
#: Characters of the reason why a step cannot be done, as it is told to others.
MAX_REASON = 380


class Loader(Protocol):
    """Brings experts to a server's GPUs, counted from 0, and takes them away."""

    def connect(self, rendezvous: Rendezvous, table: ExpertMap) -> None:
        """Called once before all, in the worker, whose ``table`` says who holds what.

        Raises
        ------
        RuntimeFailure
            Whom it needs is not there in time.
        """

    def load(self, pair: int, gpu: int) -> Change:
        """Returns when the expert can be computed with.

        Raises
        ------
        PrismError
            It cannot be loaded; nothing has changed.
        """

    def drop(self, pair: int, gpu: int) -> None:
        """Free the expert's place; nobody computes with it any more."""


class TimedLoader:
    """Loads take the time that the cluster file says, without loading anything.

    ``load_s`` seconds of an expert by GPU and layer position; ``blocks`` by GPU, whether a load
    occupies the GPU as well.
    """

    def __init__(
        self, compute: TimedCompute, load_s: list[list[float]], blocks: list[bool]
    ) -> None:
        self.compute = compute
        self.load_s = load_s
        self.blocks = blocks
        self._free_s = [0.0] * len(load_s)

    def connect(self, rendezvous: Rendezvous, table: ExpertMap) -> None:
        """It needs nobody."""

    def load(self, pair: int, gpu: int) -> Change:
        seconds = self.load_s[gpu][pair // self.compute.num_experts]
        # from where the load before ended, if this one was waiting for it: sleeps end late
        now = time.monotonic()
        begin_s = self._free_s[gpu] if now - self._free_s[gpu] < 1e-3 else now
        self._free_s[gpu] = begin_s + seconds
        if self.blocks[gpu]:
            clock: GpuClock = self.compute.clock
            self._free_s[gpu] = clock.reserve([(gpu, seconds)])
        wait_until(self._free_s[gpu])
        change = Change("load", pair, gpu, 0)
        self.compute.apply(change)
        return change

    def drop(self, pair: int, gpu: int) -> None:
        self.compute.apply(Change("drop", pair, gpu, 0))


def gpu_numbers(
    names: tuple[str, ...], gpus: tuple[int, ...], servers: tuple[str, ...],
    first_gpu: tuple[int, ...],
) -> list[int]:  # fmt: skip
    """Numbers in the run of the GPUs of a plan, whose servers may be fewer and in another order.

    ``names`` and ``gpus`` are the plan's, ``servers`` and the ``first_gpu`` of each the run's.
    """
    return [
        first_gpu[servers.index(name)] + g
        for name, number in zip(names, gpus, strict=True)
        for g in range(number)
    ]


def require_plan_of(placement: Placement, plan: MigrationPlan) -> None:
    """Refuse a plan that is not of the servers, GPUs and experts of a run.

    Raises
    ------
    InputError
        Names what differs.
    """
    number = {
        name: len(gpus)
        for name, gpus in zip(placement.servers, placement.gpu_capacity, strict=True)
    }
    source = "the plan of a migration"
    model, own = plan.model, placement.model
    if (model.moe_layers, model.num_experts) != (own.moe_layers, own.num_experts):
        raise InputError(f"{model.name:.60}", source=source, place="model", expected=own.name)
    for name, gpus in zip(plan.servers, plan.gpus, strict=True):
        if number.get(name) != gpus:
            raise InputError(
                f"server {name!r:.60} with {gpus} GPUs",
                source=source,
                expected=f"of {', '.join(f'{name}: {n}' for name, n in number.items())}",
            )


@dataclass(eq=False)
class _Work:
    """A plan and how far this server is with its own steps; ``gpu`` by step is that of the run."""

    plan: int
    steps: tuple[MigrationStep, ...]
    gpu: list[int]
    waiting: list[int]
    done: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)
    stopped: bool = False


@dataclass(eq=False)
class _Drop:
    """A drop that was announced, and the drivers that have not confirmed it."""

    work: _Work
    step: int
    since_s: float
    waiting: set[int]


class MigrationExecutor:
    """Follows the log and does this server's steps.

    ``table`` is that by which this server's worker answers calls; it loses an expert only when
    nobody calls it any more. A driver that does not confirm a drop within ``timeout_s`` (it is
    lost, or hangs) is waited for no longer, but this server's own is.
    """

    def __init__(
        self, rank: int, placement: Placement, loader: Loader, table: ExpertMap, log: EventLog,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.placement = placement
        self.servers = placement.servers
        counts = [len(gpus) for gpus in placement.gpu_capacity]
        self.first_gpu = tuple(gpu_offsets(counts)[:-1].tolist())
        self.own_gpus = range(self.first_gpu[rank], self.first_gpu[rank] + counts[rank])
        self.loader = loader
        self.table = table
        self.log = log
        log.expect(Bounds.of(placement))  # the driver of this server tells of what is skipped
        self.timeout_s = timeout_s
        self._work: _Work | None = None
        self._lock = threading.Lock()  # of what is under way
        self._channels: dict[int, queue.SimpleQueue[tuple[_Work, int]]] = {}
        self._loaded: list[tuple[_Work, list[int]]] = []  # not announced yet
        self._drops: dict[tuple[int, int], _Drop] = {}  # by plan and step
        self._silent: set[int] = set()

    def start(self) -> None:
        """Begin, in threads of this process."""
        self.log.follow()
        for gpu in self.own_gpus:
            self._channels[gpu] = queue.SimpleQueue()
            threading.Thread(target=self._load_all, args=(gpu,), daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                busy = bool(self._drops) or (self._work is not None and self._work.stopped)
                entry = self.log.next(POLL_INTERVAL_S if busy else None)
                while entry is not None:
                    self._hear(entry)
                    entry = None if self.log.caught_up() else self.log.next(0)
                self._tell_loaded()
                self._free_dropped()
                self._begin_ready()
                self._halt_when_idle()
                if self._work is not None:
                    time.sleep(BATCH_INTERVAL_S)
        except StoreLost:
            if self._work is not None:  # no step can be announced; what is here stays
                self._work.stopped = True

    # ---------------------------------------------------------------------------------------- log

    def _hear(self, entry: Entry) -> None:
        work = self._work
        if entry.what == "plan":
            self._take(entry["plan"])
            return
        if entry.what == "seen":
            server = entry["server"]
            self._silent.discard(server)
            for step in entry["steps"]:
                drop = self._drops.get((entry["plan"], step))
                if drop is not None:
                    drop.waiting.discard(server)
            return
        if entry.what in ("load", "drop"):  # of others: a loader may ask them for weights
            for _, gpu, pair, _ in entry["experts"]:
                if gpu not in self.own_gpus:
                    self.table.change(gpu, pair, entry.what == "load")
        if work is None or entry.values.get("plan") != work.plan:
            return
        if entry.what == "load":
            work.done.update(step for step, *_ in entry["experts"])
        elif entry.what == "dropped":
            work.done.update(entry["steps"])
        elif entry.what in ("failed", "stop"):
            work.stopped = True
        elif entry.what == "over":
            self._work = None

    def _take(self, number: int) -> None:
        try:
            source = f"the run's store: plan/{number}"
            plan = migration_from_json(self.log.get(f"plan/{number}"), source)
            require_plan_of(self.placement, plan)
        except PrismError as error:
            if isinstance(error, StoreLost):
                raise
            self._fail(number, 0, error)
            return
        gpus = gpu_numbers(plan.servers, plan.gpus, self.servers, self.first_gpu)
        gpu = [gpus[step.gpu] for step in plan.steps]
        mine = [i for i, g in enumerate(gpu) if g in self.own_gpus]
        self._work = _Work(number, plan.steps, gpu, mine)

    def _fail(self, plan: int, step: int, error: Exception) -> None:
        """Tell that a step cannot be done."""
        logging.getLogger(__name__).debug("step", exc_info=error)
        reason = " ".join(str(error).split())[:MAX_REASON]
        self.log.tell("failed", plan=plan, step=step, server=self.servers[self.rank], reason=reason)

    # --------------------------------------------------------------------------------------- steps

    def _begin_ready(self) -> None:
        work = self._work
        if work is None or work.stopped:
            return
        ready = [i for i in work.waiting if work.done.issuperset(work.steps[i].needs)]
        if not ready:
            return
        begun = set(ready)
        work.waiting = [i for i in work.waiting if i not in begun]
        with self._lock:
            work.under_way |= begun
        drops = []
        for i in ready:
            if work.steps[i].kind == "load":
                self._channels[work.gpu[i]].put((work, i))
            else:
                drops.append([i, work.gpu[i], work.steps[i].pair, 0])
        if drops:
            for i, *_ in drops:
                drivers = set(range(len(self.servers)))
                self._drops[work.plan, i] = _Drop(work, i, time.monotonic(), drivers)
            self.log.tell("drop", plan=work.plan, experts=drops)

    def _load_all(self, gpu: int) -> None:
        """One load at a time, for a GPU has one channel."""
        while True:
            work, i = self._channels[gpu].get()
            try:
                if work.stopped or not self._load(work, i, gpu):
                    with self._lock:
                        work.under_way.discard(i)
            except StoreLost:
                return
            self.log.wake()

    def _load(self, work: _Work, i: int, gpu: int) -> bool:
        pair = work.steps[i].pair
        try:
            change = self.loader.load(pair, gpu - self.own_gpus[0])
        except Exception as error:
            self._fail(work.plan, i, error)
            return False
        self.table.change(gpu, pair, True)  # calls may come as soon as others know
        with self._lock:
            self._loaded.append((work, [i, gpu, pair, change.slot]))
        return True

    def _tell_loaded(self) -> None:
        with self._lock:
            loaded, self._loaded = self._loaded, []
        for work in dict.fromkeys(work for work, _ in loaded):  # there is never but one
            experts = [expert for of, expert in loaded if of is work]
            self.log.tell("load", plan=work.plan, experts=experts)
            with self._lock:
                work.under_way.difference_update(step for step, *_ in experts)

    def _free_dropped(self) -> None:
        now = time.monotonic()
        freed: dict[_Work, list[int]] = {}
        for key, drop in list(self._drops.items()):
            waited_for = drop.waiting - self._silent
            if waited_for and now - drop.since_s > self.timeout_s:
                self._silent |= waited_for - {self.rank}
                waited_for &= {self.rank}
            if waited_for:
                continue
            if self._silent:
                time.sleep(DRAIN_S)
            del self._drops[key]
            work, i = drop.work, drop.step
            gpu, pair = work.gpu[i], work.steps[i].pair
            self.table.change(gpu, pair, False)
            self.loader.drop(pair, gpu - self.own_gpus[0])
            freed.setdefault(work, []).append(i)
        for work, steps in freed.items():
            self.log.tell("dropped", plan=work.plan, steps=steps)
            with self._lock:
                work.under_way.difference_update(steps)

    def _halt_when_idle(self) -> None:
        work = self._work
        if work is None or not work.stopped:
            return
        with self._lock:
            idle = not work.under_way
        if idle:
            self.log.tell("halted", plan=work.plan, server=self.rank)
            self._work = None
