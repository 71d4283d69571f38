"""The global scheduler: reviews the placement of a run and leads it from one to the next.

A process of its own beside the first server's, so that neither answers nor requests wait for a
solver. It knows what stands by the log alone; it plans, announces, and waits until every step is
done. A server that is lost ends the migration that is under way; later ones are among the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError, PrismError, UnsupportedFeature
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.io.migration import migration_to_json
from prism_plan.io.placement import placement_from_json, write_placement
from prism_plan.migration.cost import call_seconds, gpu_load_gbs
from prism_plan.migration.order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.policy import Review, review
from prism_plan.model import ModelSpec, require_same_model
from prism_plan.placement import Placement, SolveReport, gpu_offsets
from prism_plan.placement_check import violations
from runtime_adapter.control.event_log import BEAT, EventLog, StoreLost
from runtime_adapter.control.liveness import BEAT_GRACE_S, SignsOfLife
from runtime_adapter.control.log_entries import Bounds, Entry
from runtime_adapter.control.migration_executor import gpu_numbers
from runtime_adapter.control.rules import cluster_among, rules_among
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.transport.rendezvous import MAX_START_S, Rendezvous, RuntimeFailure

#: Between two looks at clocks and signs of life.
POLL_INTERVAL_S = 0.05
BEATS_S = 0.25
#: A move of which no step is done for so long is abandoned: the longest that one load may take.
STALL_S = 900.0

#: Calls and microseconds between two reviews are fewer.
MAX_CALLS = 1 << 53

#: What errors call what stands, and where to.
NAMES = ("what the servers hold now", "the placement")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SchedulerConfig:
    """What the scheduler needs to know.

    ``instance`` has the capacities and rules that placements keep, its activations are not looked
    at; without a ``cluster`` there are no reviews, only moves that are asked for. Placements are
    written to ``placements_dir``, where one is given.
    """

    rendezvous: Rendezvous
    placement: Placement
    instance: Instance
    model: ModelSpec | None = None
    cluster: Cluster | None = None
    options: SimulationOptions = field(default_factory=SimulationOptions)
    placements_dir: str | None = None


def run_scheduler(config: SchedulerConfig) -> None:
    """Schedule until the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(BEATS_S)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        log, beating = (
            EventLog(config.rendezvous, "scheduler"),
            EventLog(config.rendezvous, "scheduler"),
        )
        log.follow()
        threading.Thread(target=_beat, args=(beating,), daemon=True).start()
        Scheduler(config, log).run()
    except RuntimeFailure:  # StoreLost as well: the run is over
        # Not by returning: when the interpreter ends, a thread that comes back from a call of the
        # store is ended inside C++, which aborts the process with a message of its own.
        os._exit(0)


def _beat(log: EventLog) -> None:
    """Signs of life for who waits for a move, also while a solver runs."""
    beats = 0
    with contextlib.suppress(StoreLost):
        while True:
            beats += 1
            log.put(BEAT, beats)
            time.sleep(BEATS_S)


@dataclass(eq=False)
class _ActiveMigration:
    """A migration that is under way; ``left`` are its steps that are not done yet."""

    number: int
    target: Placement
    left: set[int]
    loads: int
    loaded_bytes: int
    begun_s: float
    asked_by: str | None = None
    event: dict[str, Any] | None = None
    stopped_s: float | None = None
    reason: str = ""
    halted: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _PendingReview:
    """A review that waits for the servers' calls."""

    number: int
    at_s: float
    since_s: float
    calls: dict[int, Any] = field(default_factory=dict)
    times: dict[int, Any] = field(default_factory=dict)


class Scheduler:
    """One run's scheduler. ``now`` is a clock in seconds; time zero of the run is its start."""

    def __init__(
        self, config: SchedulerConfig, log: EventLog, now: Callable[[], float] = time.time
    ) -> None:
        self.config = config
        self.log = log
        log.expect(Bounds.of(config.placement))  # the drivers tell of what is skipped
        self.now = now
        self.table = ExpertMap(config.placement)
        self.standing = config.placement  # how it came about; what is held is in the table
        self.alive = list(range(len(config.placement.servers)))
        counts = [len(gpus) for gpus in config.placement.gpu_capacity]
        self.first_gpu = tuple(gpu_offsets(counts)[:-1].tolist())
        self.events: list[dict[str, Any]] = []
        shape = config.instance.activations.shape
        self._statistics = config.options.counting().start(shape)
        self._rates: Floats = np.zeros(shape)
        self._reviews = 0
        self._reviewed_s = 0.0
        self._start_s: float | None = None
        self._asking: _PendingReview | None = None
        self._move: _ActiveMigration | None = None
        self._moves = 0
        self._files = 0
        self._asked: list[str] = []
        self._noted: set[str] = set()
        self._signs = SignsOfLife(now)
        #: Servers whose experts answer, but whose driver, which confirms drops, is silent.
        self._hung: set[int] = set()
        self._looked_s = 0.0
        self._over = False

    # ---------------------------------------------------------------------------------------- loop

    def run(self) -> None:
        """Schedule until the store is gone."""
        while True:
            self.turn(POLL_INTERVAL_S)

    def turn(self, patience_s: float) -> None:
        """Hear what there is to hear, and do what is due."""
        entry = self.log.next(patience_s)
        while entry is not None:
            self._hear(entry)
            entry = None if self.log.caught_up() else self.log.next(0)
        self._look_after_servers()
        if self._asking is not None:
            self._review_when_told()
        self._end_move()
        if self._move is None and self._asking is None and self._asked:
            self._move_as_asked(self._asked.pop(0))
        if self._asking is None:
            self._ask_when_due()

    def _hear(self, entry: Entry) -> None:
        move = self._move
        if entry.what in ("load", "drop"):
            for _, gpu, pair, _ in entry["experts"]:
                self.table.change(gpu, pair, entry.what == "load")
        elif entry.what == "move":
            self._asked.append(entry["move"])
        elif entry.what == "calls":
            self._take_calls(entry)
        elif entry.what == "plan" and entry["plan"] > self._moves:  # drivers would wait for its end
            text = "a migration that the scheduler has not planned"
            self.log.tell("over", plan=entry["plan"], done=False, text=text)
        if move is None or entry.values.get("plan") != move.number:
            return
        if entry.what == "load":
            move.left.difference_update(step for step, *_ in entry["experts"])
        elif entry.what == "dropped":
            move.left.difference_update(entry["steps"])
        elif entry.what == "failed":
            self._stop(f"server {entry['server']!r}: {entry['reason']}")
        elif entry.what == "halted":
            move.halted.add(entry["server"])

    def _note(self, text: str, *, once: bool = False) -> None:
        if once and text in self._noted:
            return
        self._noted.add(text)
        self.log.tell("note", text=text)

    # ------------------------------------------------------------------------------------- servers

    def _look_after_servers(self) -> None:
        now = self.now()
        if now - self._looked_s < BEATS_S:
            return
        self._looked_s = now
        if self._start_s is None:
            if not self.log.there("start"):
                return
            self._start_s = self._reviewed_s = self._read_start()
        self._over = self.log.there(*(f"finished/{n}" for n in self.alive))
        timeout_s = self.config.rendezvous.timeout_s
        for n in list(self.alive):
            if self._silent_s(f"beat/{n}") > timeout_s:
                self._lose(n)
            elif self.log.there(f"driver/{n}") and (
                self._silent_s(f"driver/{n}") > timeout_s + BEAT_GRACE_S
            ):
                self._hung.add(n)
                self._stop(self._hangs(n))
            else:
                self._hung.discard(n)
        move = self._move
        if (
            move is not None
            and self._signs.silent_s(("move", move.number), len(move.left)) > STALL_S
        ):
            self._stop(f"no step was done for {STALL_S:g} s")

    def _silent_s(self, key: str) -> float:
        """For how long a process of a server that is there has given no sign of life."""
        there = self.log.there(key)
        return self._signs.silent_s(key, self.log.get_bytes(key) if there else b"")

    def _read_start(self) -> float:
        """When the run began, by this machine's clock."""
        try:
            start_s = self.log.get("start")
            if type(start_s) in (int, float) and abs(start_s - self.now()) < MAX_START_S:
                return float(start_s)
        except InputError:
            pass  # the servers say what is wrong, and end
        return self.now()

    def _hangs(self, server: int) -> str:
        name = self.config.placement.servers[server]
        return f"the process that serves the requests of {name!r} gives no sign of life"

    def _lose(self, server: int) -> None:
        self.alive.remove(server)
        self._hung.discard(server)
        self.table.lose(server)
        if self._move is not None:
            name = self.config.placement.servers[server]
            self._stop(f"server {name!r} is lost")

    @property
    def _rules(self) -> Instance:
        """Capacities and rules of the servers that are left."""
        return rules_among(self.config.instance, self.alive, self.standing.plan.min_replicas)

    def _stands(self, rules: Instance) -> Placement:
        """What the servers that are left hold."""
        own = np.concatenate([self.config.placement.gpus_of(n) for n in self.alive])
        held = self.table.on_gpu()[own].reshape(len(own), *rules.activations.shape[1:])
        return self.standing.replace(
            servers=rules.servers, gpu_capacity=rules.gpu_capacity, on_gpu=held
        )

    # ------------------------------------------------------------------------------------- reviews

    def _ask_when_due(self) -> None:
        every_s = self.config.options.migrate_every_s
        if self.config.options.migrate == "never" or self._start_s is None or self._over:
            return
        now = self.now()
        if now < self._start_s + (self._reviews + 1) * every_s:
            return
        self._reviews = int((now - self._start_s) / every_s)  # none twice, after a long solve
        self._asking = _PendingReview(self._reviews, now - self._start_s, now)
        self.log.tell("review", review=self._reviews)

    def _take_calls(self, entry: Entry) -> None:
        asking, server = self._asking, entry["server"]
        if asking is None or asking.number != entry["review"]:
            return
        try:
            calls = self._read_calls(f"calls/{server}/{asking.number}")
            times = self._read_times(f"times/{server}/{asking.number}")
        except InputError as error:
            self._note(f"calls of a server are not counted: {error}", once=True)
            calls, times = np.zeros(self.config.instance.activations.shape[1:], np.int64), None
        asking.calls[server] = calls
        if times is not None:
            asking.times[server] = times

    def _read_calls(self, key: str) -> Any:
        """Calls of a server since the last review, int64 [L, E]."""
        shape = self.config.instance.activations.shape[1:]
        size = 8 * int(np.prod(shape))
        source = f"the run's store: {key}"
        try:
            unpacked = zlib.decompressobj()
            raw = unpacked.decompress(self.log.get_bytes(key), size)
        except zlib.error as error:
            raise InputError(str(error), source=source) from error
        if len(raw) != size:
            raise InputError(f"{len(raw):,} bytes", source=source, expected=f"{size:,}")
        found = np.frombuffer(raw, np.int64).reshape(shape)
        if (found < 0).any() or (found > MAX_CALLS).any():
            raise InputError("numbers of calls", source=source, expected=f"0 to {MAX_CALLS:,}")
        return found

    def _read_times(self, key: str) -> dict[str, int]:
        """Microseconds of a server's work and waiting since the last review."""
        found = self.log.get(key)
        names = ("compute_us", "waiting_us")
        if not isinstance(found, dict) or any(
            type(found.get(name)) is not int or not 0 <= found[name] < MAX_CALLS for name in names
        ):
            raise InputError(
                f"{found!r:.60}", source=f"the run's store: {key}", expected=" and ".join(names)
            )
        return found

    def _review_when_told(self) -> None:
        asking = self._asking
        assert asking is not None
        now = self.now()
        lacking = [n for n in self.alive if n not in asking.calls]
        if lacking and now - asking.since_s < self.config.rendezvous.timeout_s:
            return
        self._asking = None
        calls = np.zeros(self.config.instance.activations.shape, np.int64)
        for n, counted in asking.calls.items():
            calls[n] = counted
        self._statistics.add(calls, asking.since_s - self._reviewed_s)
        self._reviewed_s = asking.since_s
        self._rates = self._statistics.rates()
        event: dict[str, Any] = {
            "at_s": round(asking.at_s, 6),
            "moved_experts": 0,
            "moved_bytes": 0,
            "decision": "busy",
            "saving_s": None,
            "cost_s": None,
            "finished_at_s": None,
            "servers": [
                {
                    "name": self.config.placement.servers[n],
                    "calls": int(calls[n].sum()),
                    "compute_s": 1e-6 * times["compute_us"],
                    "waiting_s": 1e-6 * times["waiting_us"],
                }
                for n, times in sorted(asking.times.items())
            ],
        }
        if self._move is None and not self._over:
            self._decide(event)
        self.events.append(event)
        self._write_events()

    def _decide(self, event: dict[str, Any]) -> None:
        """Review what stands, and begin to move where that pays."""
        rules, model = self._rules, self.config.model
        assert model is not None
        assert self.config.cluster is not None
        event["decision"] = "stay"
        for n in sorted(self._hung):
            self._note(f"no review: {self._hangs(n)}", once=True)
            return
        current = self._stands(rules)
        for violation in violations(current, instance=rules)[:1]:
            lost = "; reviews have ended" if len(self.alive) < len(self.table.servers) else ""
            self._note(f"no review: {violation.message}{lost}", once=True)
            return
        cluster = cluster_among(self.config.cluster, self.alive)
        rates = self._rates[self.alive]
        try:
            found: Review = review(
                self.config.options.policy(), current, rates, rules,
                call_seconds(cluster, model), gpu_load_gbs(cluster),
            )  # fmt: skip
            event |= {"saving_s": found.saving_s, "cost_s": found.cost_s}
            if found.target is None:
                return
            plan = migration_plan(
                current, found.target, gpu_capacity=rules.gpu_capacity,
                forbidden=rules.mask(rules.forbidden), priority=rates,
            )  # fmt: skip
        except (Infeasible, InputError, UnsupportedFeature) as error:
            self._note(f"a move was not made: {error}", once=True)
            return
        event |= {
            "decision": "move",
            "moved_experts": found.moved_experts,
            "moved_bytes": found.moved_bytes,
        }
        self._statistics.moved()
        self._begin(plan, found.target, event=event)

    def _write_events(self) -> None:
        self.log.put("migrations", self.events)

    # --------------------------------------------------------------------------------------- moves

    def _move_as_asked(self, name: str) -> None:
        try:
            rules = self._rules
            target = self._asked_target(placement_from_json(self.log.get(f"move/{name}")), rules)
            plan = migration_plan(
                self._stands(rules), target, gpu_capacity=rules.gpu_capacity,
                forbidden=rules.mask(rules.forbidden), priority=self._rates[self.alive],
                names=NAMES,
            )  # fmt: skip
        except StoreLost:
            raise
        except PrismError as error:
            self._answer(name, error.exit_code, f"refused: {error}")
            return
        if self._over:
            self._answer(name, 5, "refused: the run is ending")
            return
        for n in sorted(self._hung):
            self._answer(name, 5, f"refused: {self._hangs(n)}")
            return
        self._begin(plan, target, asked_by=name)

    def _asked_target(self, asked: Placement, rules: Instance) -> Placement:
        """The placement over the servers of the run in their order, if they can hold it."""
        require_same_model(asked.model, rules.model, source=NAMES[1], other=NAMES[0])
        lost = [name for name in self.table.servers if name not in rules.servers]
        if set(asked.servers) != set(rules.servers):
            raise InputError(
                f"{sorted(asked.servers)}",
                source=NAMES[1],
                place="servers",
                expected=f"{sorted(rules.servers)}"
                + (f", for {', '.join(lost)} is lost" if lost else ""),
            )
        order = [asked.servers.index(name) for name in rules.servers]
        gpus = np.concatenate([asked.gpus_of(n) for n in order])
        target = asked.replace(
            servers=rules.servers,
            gpu_capacity=tuple(asked.gpu_capacity[n] for n in order),
            on_gpu=asked.on_gpu[gpus],
        )
        replicas = rules.replace(min_replicas=asked.plan.min_replicas)
        for violation in violations(target, instance=replicas)[:1]:
            raise InputError(violation.message, source=NAMES[1], place="servers")
        return target.replace(gpu_capacity=rules.gpu_capacity)

    def _answer(self, name: str, code: int, text: str) -> None:
        self.log.tell("moved", move=name, code=code, text=text)

    def _begin(
        self, plan: MigrationPlan, target: Placement, *, asked_by: str | None = None,
        event: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._moves += 1
        self._move = _ActiveMigration(
            self._moves, target, set(range(len(plan.steps))), plan.loads, plan.moved_bytes,
            self.now(), asked_by, event,
        )  # fmt: skip
        assert gpu_numbers(plan.servers, plan.gpus, self.table.servers, self.first_gpu)
        self.log.put(f"plan/{self._moves}", migration_to_json(plan))
        self.log.tell("plan", plan=self._moves)

    def _stop(self, reason: str) -> None:
        move = self._move
        if move is None or move.stopped_s is not None:
            return
        move.stopped_s, move.reason = self.now(), reason
        self.log.tell("stop", plan=move.number, reason=reason)

    def _end_move(self) -> None:
        """Done when every step is; stopped when no server is at a step any more."""
        move, now = self._move, self.now()
        if move is None or (move.left and move.stopped_s is None):
            return
        if move.left and move.stopped_s is not None:
            patience_s = 2 * self.config.rendezvous.timeout_s
            waiting = set(self.alive) - move.halted
            if waiting and now - move.stopped_s < patience_s:
                return
        self._move = None
        done = not move.left
        seconds = now - move.begun_s
        if done:
            self.standing = move.target
            text = (
                f"migration {move.number} is done: {move.loads} experts loaded, "
                f"{move.loaded_bytes:,} bytes, in {seconds:.2f} s"
            )
        else:
            self.standing = self.standing.replace(plan=self._interrupted())
            text = (
                f"migration {move.number} is abandoned, {len(move.left)} steps were left: "
                f"{move.reason}"
            )
        written = self._write()
        self.log.tell("over", plan=move.number, done=done, text=text)
        self._note(text + (f"; {written}" if written else ""))
        if move.event is not None:
            if done and self._start_s is not None:
                move.event["finished_at_s"] = round(now - self._start_s, 6)
            self._write_events()
        if move.asked_by is not None:
            self._answer(move.asked_by, 0 if done else 5, text)

    def _interrupted(self) -> SolveReport:
        old = self.standing.plan
        return SolveReport(solver="interrupted", seed=old.seed, min_replicas=old.min_replicas)

    def _write(self) -> str:
        """What stands, as a file of its own; returns its name or what went wrong."""
        folder = self.config.placements_dir
        if folder is None:
            return ""
        self._files += 1
        path = Path(folder) / f"placement-{self._files}.json"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_placement(path, self._stands(self._rules))
        except (OSError, PrismError) as error:
            return f"{path}: {error}"
        return str(path)
