"""A server's part of a migration: it does the plan's loads and drops on its own GPUs.

Runs in the worker process. A load is announced when it is complete, a drop when it begins; its slot
is freed by :mod:`~runtime_adapter.control.slot_release`. Each step waits for those that it needs
according to the plan, so a plan that stops anywhere leaves every expert covered.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, field

from prism_plan.errors import InputError, PrismError
from prism_plan.io.migration import migration_from_json
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import EventLog, StoreLost
from runtime_adapter.control.slot_release import SlotReleaser
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.loader_interface import Loader

#: How often progress is checked while drops or a stop are pending.
POLL_INTERVAL_S = 0.1
#: Progress is announced at most so often, several steps in one entry: all servers read all
#: entries, and with many short ones a large move takes two to three times as long.
BATCH_INTERVAL_S = 0.01
#: Characters of the reason why a step cannot be done, as others read it.
MAX_REASON = 380


def gpus_of_plan(plan: MigrationPlan, placement: Placement) -> list[int]:
    """The run's index of each GPU of a plan, whose servers may be fewer and in another order."""
    return [
        int(gpu)
        for name, num_gpus in zip(plan.servers, plan.gpus, strict=True)
        for gpu in placement.gpus_of(placement.servers.index(name))[:num_gpus]
    ]


def require_plan_of(placement: Placement, plan: MigrationPlan) -> None:
    """Refuse a plan that is not of the servers, GPUs and experts of a run.

    Raises
    ------
    InputError
        Names what differs.
    """
    num_gpus = {
        name: len(gpus)
        for name, gpus in zip(placement.servers, placement.gpu_capacity, strict=True)
    }
    source = "the plan of a migration"
    model, own = plan.model, placement.model
    if (model.moe_layers, model.num_experts) != (own.moe_layers, own.num_experts):
        raise InputError(f"{model.name:.60}", source=source, place="model", expected=own.name)
    for name, gpus in zip(plan.servers, plan.gpus, strict=True):
        if num_gpus.get(name) != gpus:
            raise InputError(
                f"server {name!r:.60} with {gpus} GPUs",
                source=source,
                expected=f"of {', '.join(f'{name}: {n}' for name, n in num_gpus.items())}",
            )


@dataclass(eq=False)
class _PlanProgress:
    """A plan, and the progress of this server's own steps; ``gpu`` is the run's, by step."""

    plan: int
    steps: tuple[MigrationStep, ...]
    gpu: list[int]
    waiting: list[int]
    done: set[int] = field(default_factory=set)
    in_progress: set[int] = field(default_factory=set)
    stopped: bool = False


class MigrationExecutor:
    """Follows the log and does this server's steps, in threads of its own.

    ``expert_map`` is the one by which this server's worker answers calls; it loses an expert only
    when nobody calls it any more. ``timeout_s`` as in :class:`SlotReleaser`.
    """

    def __init__(
        self, rank: int, placement: Placement, loader: Loader, expert_map: ExpertMap,
        log: EventLog, timeout_s: float,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.placement = placement
        self.own_gpus: list[int] = placement.gpus_of(rank).tolist()
        self.loader = loader
        self.expert_map = expert_map
        self.log = log
        log.expect(
            log_entries.Bounds.of(placement)
        )  # the driver of this server reports skipped entries
        self._progress: _PlanProgress | None = None
        self._lock = threading.Lock()  # of the steps in progress and of loads to announce
        self._load_queues: dict[int, queue.SimpleQueue[tuple[_PlanProgress, int]]] = {}
        self._unannounced: list[tuple[_PlanProgress, log_entries.ExpertChange]] = []
        self._releaser = SlotReleaser(
            rank, placement.num_servers, self.own_gpus[0], loader, expert_map, timeout_s
        )

    def start(self) -> None:
        """Start the threads: one for the log, and one for each GPU's load channel."""
        self.log.follow()
        for gpu in self.own_gpus:
            self._load_queues[gpu] = queue.SimpleQueue()
            threading.Thread(target=self._load_all, args=(gpu,), daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                stopping = self._progress is not None and self._progress.stopped
                busy = bool(self._releaser) or stopping
                entry = self.log.next(POLL_INTERVAL_S if busy else None)
                while entry is not None:
                    self._handle(entry)
                    entry = None if self.log.caught_up() else self.log.next(0)
                self._announce_loads()
                self._release_slots()
                self._begin_ready_steps()
                self._stop_when_idle()
                if self._progress is not None:
                    time.sleep(BATCH_INTERVAL_S)
        except StoreLost:
            if self._progress is not None:  # no step can be announced; experts here stay
                self._progress.stopped = True

    # ---------------------------------------------------------------------------------------- log

    def _handle(self, entry: log_entries.LogEntry) -> None:
        progress = self._progress
        if isinstance(entry, log_entries.MigrationStarted):
            self._start_plan(entry.plan)
            return
        if isinstance(entry, log_entries.DropsAcknowledged):
            self._releaser.acknowledge(entry)
            return
        if isinstance(entry, (log_entries.ExpertsLoaded, log_entries.DropsAnnounced)):
            # also those of other servers, whom a loader may ask for weights
            for change in entry.experts:
                if change.gpu not in self.own_gpus:
                    loaded = isinstance(entry, log_entries.ExpertsLoaded)
                    self.expert_map.change(change.gpu, change.pair, loaded)
        if progress is None or getattr(entry, "plan", None) != progress.plan:
            return
        match entry:
            case log_entries.ExpertsLoaded():
                progress.done.update(change.step for change in entry.experts)
            case log_entries.SlotsFreed():
                progress.done.update(entry.steps)
            case log_entries.StepFailed() | log_entries.StopRequested():
                progress.stopped = True
            case log_entries.MigrationFinished():
                self._progress = None

    def _start_plan(self, number: int) -> None:
        try:
            source = f"the run's store: plan/{number}"
            plan = migration_from_json(self.log.get(f"plan/{number}"), source)
            require_plan_of(self.placement, plan)
        except PrismError as error:
            if isinstance(error, StoreLost):
                raise
            self._report_failure(number, 0, error)
            return
        gpus = gpus_of_plan(plan, self.placement)
        gpu = [gpus[step.gpu] for step in plan.steps]
        own_steps = [i for i, g in enumerate(gpu) if g in self.own_gpus]
        self._progress = _PlanProgress(number, plan.steps, gpu, own_steps)

    def _report_failure(self, plan: int, step: int, error: Exception) -> None:
        logging.getLogger(__name__).debug("step", exc_info=error)
        reason = " ".join(str(error).split())[:MAX_REASON]
        self.log.append(
            log_entries.StepFailed(plan, step, self.placement.servers[self.rank], reason)
        )

    # --------------------------------------------------------------------------------------- steps

    def _begin_ready_steps(self) -> None:
        progress = self._progress
        if progress is None or progress.stopped:
            return
        ready = [i for i in progress.waiting if progress.done.issuperset(progress.steps[i].needs)]
        if not ready:
            return
        begun = set(ready)
        progress.waiting = [i for i in progress.waiting if i not in begun]
        with self._lock:
            progress.in_progress |= begun
        drops = []
        for i in ready:
            if progress.steps[i].kind == "load":
                self._load_queues[progress.gpu[i]].put((progress, i))
            else:
                drops.append(
                    log_entries.ExpertChange(i, progress.gpu[i], progress.steps[i].pair, 0)
                )
        if drops:
            self._releaser.add(progress.plan, drops)
            self.log.append(log_entries.DropsAnnounced(progress.plan, drops))

    def _load_all(self, gpu: int) -> None:
        """Do the loads of one GPU, one at a time, for it has one load channel."""
        while True:
            progress, i = self._load_queues[gpu].get()
            try:
                if progress.stopped or not self._load(progress, i, gpu):
                    with self._lock:
                        progress.in_progress.discard(i)
            except StoreLost:
                return
            self.log.wake()

    def _load(self, progress: _PlanProgress, i: int, gpu: int) -> bool:
        pair = progress.steps[i].pair
        try:
            change = self.loader.load(pair, gpu - self.own_gpus[0])
        except Exception as error:
            self._report_failure(progress.plan, i, error)
            return False
        self.expert_map.change(gpu, pair, True)  # before others know and call
        with self._lock:
            self._unannounced.append(
                (progress, log_entries.ExpertChange(i, gpu, pair, change.slot))
            )
        return True

    def _announce_loads(self) -> None:
        with self._lock:
            loads, self._unannounced = self._unannounced, []
        for progress in dict.fromkeys(progress for progress, _ in loads):  # never more than one
            experts = [change for of, change in loads if of is progress]
            self.log.append(log_entries.ExpertsLoaded(progress.plan, experts))
            with self._lock:
                progress.in_progress.difference_update(change.step for change in experts)

    def _release_slots(self) -> None:
        for plan, steps in self._releaser.release().items():
            self.log.append(log_entries.SlotsFreed(plan, steps))
            if self._progress is not None and self._progress.plan == plan:
                with self._lock:
                    self._progress.in_progress.difference_update(steps)

    def _stop_when_idle(self) -> None:
        progress = self._progress
        if progress is None or not progress.stopped:
            return
        with self._lock:
            idle = not progress.in_progress
        if idle:
            self.log.append(log_entries.ServerStopped(progress.plan, self.rank))
            self._progress = None
