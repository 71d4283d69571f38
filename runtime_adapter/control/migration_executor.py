"""A server as a member of its run: it joins, and does its part of migrations on its own GPUs.

Runs in the worker process. A load is announced when it is complete, a drop when it begins; its slot
is freed by :mod:`~runtime_adapter.control.slot_release`. Each step waits for those that it needs
according to the plan, so a plan that stops anywhere leaves every expert covered.

What a server holds is known to the others from the entry by which it joined, and from what it has
announced since. Where a log begins anew (the store was restarted), or says that this server is
down, the server gives up what it was doing and joins again with what it holds then.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prism_plan.errors import InputError, PrismError
from prism_plan.io.migration import migration_from_json
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import (
    EventLog,
    NewLog,
    StoreRestartedError,
    StoreUnavailable,
)
from runtime_adapter.control.membership import Members, MemberStates, NoMembers, pairs_of
from runtime_adapter.control.slot_release import SlotReleaser
from runtime_adapter.control.worker_heartbeat import send_heartbeats
from runtime_adapter.transport.rendezvous import NameTaken, RuntimeFailure
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.loader_interface import Loader

#: How often progress is checked while drops or a stop are pending, or this server has to join.
POLL_INTERVAL_S = 0.1
#: How long the store may take to let a server join, before that is tried again.
JOIN_S = 10.0
#: Heartbeats are sent at least so often.
HEARTBEAT_INTERVAL_S = 0.5
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
    """A plan, and the progress of this server's own steps; ``gpu`` is the run's, by step.

    Loads of a plan that was given up are undone when they end, for nobody knows of them, except
    those of (GPU, pair) in ``given_up``: with these the server has joined anew.
    """

    plan: int
    steps: tuple[MigrationStep, ...]
    gpu: list[int]
    waiting: list[int]
    done: set[int] = field(default_factory=set)
    in_progress: set[int] = field(default_factory=set)
    stopped: bool = False
    given_up: frozenset[tuple[int, int]] | None = None


class MigrationExecutor:
    """Follows the log and does this server's steps, in threads of its own.

    ``expert_map`` is the one by which this server's worker answers calls; it loses an expert only
    when nobody calls it any more. ``joining`` gives the address at which the worker answers.
    ``timeout_s`` as in :class:`SlotReleaser`. ``members`` is told who comes and goes, ``report``
    gets lines for this server's log, and ``on_replaced`` is called if another process has joined
    as this server. ``incarnation`` is this server's last one, 0 before it has joined, ``after``
    that of a worker in whose place this one was started. ``on_join`` is called with whether this
    server has joined, when it has or another process that is alive has its name.
    """

    def __init__(
        self, rank: int, placement: Placement, log: EventLog, loader: Loader,
        expert_map: ExpertMap, joining: Callable[[], tuple[str, int]], timeout_s: float,
        members: Members | None = None, report: Callable[[str], None] = lambda text: None,
        on_replaced: Callable[[], None] = lambda: None, after: int = 0,
        on_join: Callable[[bool], None] = lambda joined: None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.placement = placement
        self.own_gpus: list[int] = placement.gpus_of(rank).tolist()
        self.loader = loader
        self.expert_map = expert_map
        self.log = log
        self.joining = joining
        self.timeout_s = timeout_s
        self.report = report
        self.on_replaced = on_replaced
        self.on_join = on_join
        self.incarnation = 0
        self._after = after
        log.expect(
            log_entries.Bounds.of(placement)
        )  # the driver of this server reports skipped entries
        self._states = MemberStates(placement.num_servers, members or NoMembers())
        self._has_log = False
        self._has_joined = False  # this incarnation, in the log that is followed
        self._is_member = False  # the entry of that has been read
        self._replaced = False
        self._last_change = -1  # the last entry that changed who is up or what is held
        self._refused_as = ""
        self._progress: _PlanProgress | None = None
        self._lock = threading.Lock()  # of the steps in progress and of loads to announce
        self._load_queues: dict[int, queue.SimpleQueue[tuple[_PlanProgress, int] | None]] = {}
        self._unannounced: list[tuple[_PlanProgress, log_entries.ExpertChange]] = []
        self._releaser = SlotReleaser(rank, self.own_gpus[0], loader, expert_map, timeout_s)
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the threads: for the log, for each GPU's load channel, and for heartbeats."""
        self.log.follow()
        for gpu in self.own_gpus:
            self._load_queues[gpu] = queue.SimpleQueue()
            threading.Thread(target=self._load_all, args=(gpu,), daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()
        interval_s = min(self.timeout_s / 4, HEARTBEAT_INTERVAL_S)
        threading.Thread(
            target=send_heartbeats,
            args=(self.log.client, self.rank, self._joined_as, self._handle_heartbeat, interval_s,
                  self._ended),
            daemon=True,
        ).start()  # fmt: skip

    def close(self) -> None:
        """End the threads, but for loads in progress."""
        self._ended.set()
        self.log.close()
        self.log.wake()
        for loads in self._load_queues.values():
            loads.put(None)

    def leave(self) -> None:
        """Leave the run in good order, if this server is in it.

        Raises
        ------
        RuntimeFailure
            The store does not answer.
        """
        self._ended.set()
        if self.incarnation:
            self.log.client.leave(self.rank, self.incarnation, self.timeout_s)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._run_once()
            except StoreRestartedError:
                pass  # what was to be announced is told when this server joins the new log
            except StoreUnavailable:
                return
            except PrismError as error:  # the store refuses it: it is full
                self.report(f"the store does not take what this server announces: {error}")
                self._has_joined = self._is_member = False
                self._ended.wait(1.0)

    def _run_once(self) -> None:
        stopping = self._progress is not None and self._progress.stopped
        joining = self._has_log and not self._has_joined and not self._replaced
        busy = bool(self._releaser) or stopping or joining
        entry = self.log.next(POLL_INTERVAL_S if busy else None)
        while entry is not None and not self._ended.is_set():
            self._handle_or_skip(entry)
            entry = None if self.log.caught_up() else self.log.next(0)
        if self._ended.is_set():
            return
        if self._has_log and not self._has_joined and not self._replaced:
            self._join()
        if not self._is_member:
            return
        self._announce_loads()
        self._release_slots()
        self._begin_ready_steps()
        self._stop_when_idle()
        if self._progress is not None:
            time.sleep(BATCH_INTERVAL_S)

    # ----------------------------------------------------------------------------- being a member

    def _join(self) -> None:
        """Give up what is in progress and join with what this server holds now."""
        self._releaser.cancel()  # the experts are there, and count as held
        with self._lock:
            held = [(self.own_gpus[gpu], pair, slot) for gpu, pair, slot in self.loader.held()]
            own = frozenset((gpu, pair) for gpu, pair, _ in held)
            if self._progress is not None:
                self._progress.stopped, self._progress.given_up = True, own
                self._progress = None
            self._unannounced = []
            self.expert_map.set_up(self.rank, own)
        host, port = self.joining()
        try:
            self.incarnation = self.log.client.join(
                self.rank, host, port, held, max(self.incarnation, self._after), JOIN_S
            )
        except StoreUnavailable:
            if self._ended.is_set():
                raise
        except (InputError, RuntimeFailure) as error:
            if isinstance(error, NameTaken):
                self.on_join(False)
            elif str(error) != self._refused_as:
                self._refused_as = str(error)
                self.report(f"the store does not let this server join: {error}")
        else:
            self._refused_as = ""
            self._has_joined = True
            self.on_join(True)

    def _joined_as(self) -> int:
        return self.incarnation if self._has_joined else 0

    def _handle_heartbeat(self, incarnation: int, state: str) -> None:
        """Join anew where the store says that this incarnation is down."""
        if state == "down" and self._is_member and incarnation == self.incarnation:
            self._has_joined = self._is_member = False
            self.log.wake()

    def _begin_log(self, new: NewLog) -> None:
        states = self._states
        up, down = states.begin(new)
        others = {n: pairs_of(held) for n, held in up.items() if n != self.rank}
        self.expert_map.set_all(others, [n for n in down if n != self.rank])
        self._has_log = True
        self._replaced = False
        self._last_change = -1
        is_up = self.rank in states.up and states.incarnations[self.rank] == self.incarnation
        idle = self._progress is None and not self._releaser and not new.open_plans
        self._has_joined = self._is_member = self.incarnation > 0 and is_up and idle

    def _handle_member(self, entry: log_entries.LogEntry) -> None:
        """Somebody comes or goes: the migration in progress ends, and no drop is begun by it."""
        match entry:
            case log_entries.ServerJoined():
                address = (entry.host, entry.port)
                if entry.server != self.rank:  # what this server holds it knows best
                    self.expert_map.set_up(entry.server, pairs_of(entry.experts))
                self._states.join(entry.server, entry.incarnation, address)
                self._releaser.driver_joined(entry.server, entry.number)
                if entry.server == self.rank:
                    self._handle_own_join(entry.incarnation, address)
            case log_entries.ServerDown() | log_entries.ServerLeft():
                reason = entry.reason if isinstance(entry, log_entries.ServerDown) else None
                if not self._states.end(entry.server, entry.incarnation, reason):
                    return
                if entry.server == self.rank:
                    if entry.incarnation >= self.incarnation:
                        self._has_joined = self._is_member = self._replaced = False
                        if reason is None and self.incarnation:
                            self._ended.set()  # its driver needs it no more
                else:
                    self.expert_map.set_down(entry.server)
                    self._releaser.driver_lost(entry.server)
                    self._cancel_drops()
        self._last_change = entry.number
        if self._progress is not None:
            self._progress.stopped = True

    def _handle_own_join(self, incarnation: int, address: tuple[str, int]) -> None:
        if incarnation == self.incarnation:
            self._is_member = self._has_joined
        elif incarnation > self.incarnation:
            if address == tuple(self.joining()):  # the answer to this was lost
                self.incarnation = incarnation
                self._has_joined = self._is_member = False
            else:
                self._replaced, self._has_joined, self._is_member = True, False, False
                if self.incarnation:  # whose place was taken before it joined is told so then
                    self.on_replaced()

    def _cancel_drops(self) -> None:
        """Keep what is not dropped yet, for a holder of it may be gone, and say so."""
        cancelled = self._releaser.cancel()
        if not cancelled:
            return
        slots = {(gpu, pair): slot for gpu, pair, slot in self.loader.held()}
        kept = [
            log_entries.ExpertChange(
                log_entries.NO_STEP, gpu, pair, slots[gpu - self.own_gpus[0], pair]
            )
            for _, _, gpu, pair in cancelled
        ]
        if self._progress is not None:
            with self._lock:
                self._progress.in_progress.difference_update(step for _, step, _, _ in cancelled)
        self.log.append(log_entries.ExpertsLoaded(cancelled[0][0], kept))

    # ---------------------------------------------------------------------------------------- log

    def _handle_or_skip(self, entry: log_entries.LogEntry | NewLog) -> None:
        """Handle an entry; one that fails, as none of this run does, does not end the following."""
        try:
            self._handle(entry)
        except RuntimeFailure:
            raise
        except Exception as error:
            logging.getLogger(__name__).debug("entry", exc_info=error)
            self.log.skip(InputError(" ".join(str(error).split()), source="the run's log"))

    def _handle(self, entry: log_entries.LogEntry | NewLog) -> None:
        match entry:
            case NewLog():
                self._begin_log(entry)
            case log_entries.ServerJoined() | log_entries.ServerDown() | log_entries.ServerLeft():
                self._handle_member(entry)
            case log_entries.DropsAcknowledged():
                self._releaser.acknowledge(entry)
            case log_entries.DriverSynced():
                self._releaser.synchronise(entry)
            case log_entries.MigrationStarted():
                # all servers read the same entries before this one, and so decide the same
                if self._is_member and self._last_change < entry.read:
                    self._start_plan(entry.plan)
            case _:
                self._handle_progress(entry)

    def _handle_progress(self, entry: log_entries.LogEntry) -> None:
        progress = self._progress
        if isinstance(entry, (log_entries.ExpertsLoaded, log_entries.DropsAnnounced)):
            self._last_change = entry.number
            # also those of other servers, whom a loader may ask for weights
            for change in entry.experts:
                if change.gpu not in self.own_gpus:
                    loaded = isinstance(entry, log_entries.ExpertsLoaded)
                    self.expert_map.change(change.gpu, change.pair, loaded)
        if progress is None or getattr(entry, "plan", None) != progress.plan:
            if isinstance(entry, log_entries.StopRequested) and self._is_member:
                # of a migration of which this server has no step in progress
                self.log.append(log_entries.ServerStopped(entry.plan, self.rank))
            return
        match entry:
            case log_entries.ExpertsLoaded():
                progress.done.update(change.step for change in entry.experts)
            case log_entries.SlotsFreed():
                progress.done.update(entry.steps)
            case log_entries.StepFailed() | log_entries.StopRequested():
                progress.stopped = True
            case log_entries.MigrationFinished():
                self._give_up()

    def _give_up(self) -> None:
        """End the plan; a load that is still in progress is undone when it ends."""
        with self._lock:
            if self._progress is not None:
                self._progress.stopped, self._progress.given_up = True, frozenset()
            self._progress = None

    def _start_plan(self, number: int) -> None:
        if self._progress is not None and self._progress.plan == number:
            return
        self._give_up()
        try:
            source = f"the run's store: plan/{number}"
            plan = migration_from_json(self.log.get(f"plan/{number}"), source)
            require_plan_of(self.placement, plan)
        except PrismError as error:
            if isinstance(error, RuntimeFailure):
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
        drops = [
            log_entries.ExpertChange(i, progress.gpu[i], progress.steps[i].pair, 0)
            for i in ready
            if progress.steps[i].kind == "drop"
        ]
        for drop in drops:
            try:
                self._require_droppable(drop)
            except InputError as error:
                progress.stopped = True
                self._report_failure(progress.plan, drop.step, error)
                return
        begun = set(ready)
        progress.waiting = [i for i in progress.waiting if i not in begun]
        with self._lock:
            progress.in_progress |= begun
        for i in ready:
            if progress.steps[i].kind == "load":
                self._load_queues[progress.gpu[i]].put((progress, i))
        if drops:
            self._releaser.add(progress.plan, drops, self._states.up)
            number = self.log.append(log_entries.DropsAnnounced(progress.plan, drops))
            self._releaser.announced(progress.plan, drops, number)

    def _require_droppable(self, drop: log_entries.ExpertChange) -> None:
        """Refuse a drop that no plan has which was made for what servers hold now."""
        text = self.placement.model.pair_text(drop.pair)
        held = self.expert_map.held_by(self.rank)[:, drop.pair]
        if not held[drop.gpu - self.own_gpus[0]]:
            raise InputError(f"GPU {drop.gpu} does not hold {text}")
        if held.sum() == 1 and self.expert_map.num_replicas[drop.pair] <= 1:
            raise InputError(f"GPU {drop.gpu} has the only copy of {text} that is left")

    def _load_all(self, gpu: int) -> None:
        """Do the loads of one GPU, one at a time, for it has one load channel."""
        while (load := self._load_queues[gpu].get()) is not None:
            progress, i = load
            try:
                if progress.stopped or not self._load(progress, i, gpu):
                    with self._lock:
                        progress.in_progress.discard(i)
            except StoreUnavailable:
                return
            except PrismError:  # the failure could not be announced
                with self._lock:
                    progress.in_progress.discard(i)
            self.log.wake()

    def _load(self, progress: _PlanProgress, i: int, gpu: int) -> bool:
        pair = progress.steps[i].pair
        try:
            change = self.loader.load(pair, gpu - self.own_gpus[0])
        except Exception as error:
            if progress.given_up is None:
                self._report_failure(progress.plan, i, error)
            return False
        with self._lock:
            given_up = progress.given_up
            if given_up is None or (gpu, pair) in given_up:
                self.expert_map.change(gpu, pair, True)  # before others know and call
            if given_up is None:
                self._unannounced.append(
                    (progress, log_entries.ExpertChange(i, gpu, pair, change.slot))
                )
                return True
        if (gpu, pair) not in given_up:  # nobody knows of it
            self.loader.drop(pair, gpu - self.own_gpus[0])
        return False

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
