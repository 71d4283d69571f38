"""Applies the event log to a driver: updates routing, acknowledges drops, reports call counts.

A drop is acknowledged when every pass through its layer that began before the drop was announced
has ended: then no call of this driver, to its own or another server, depends on the expert. So its
slot can be used again, and no call comes too late. A step of a long prompt delays the drops of the
layer that it is in, and no others.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from prism_plan.errors import InputError
from prism_plan.placement import Placement
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import EventLog, StoreLost
from runtime_adapter.moe.compute import Compute
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change

#: How often layers in progress are checked while drops wait for them.
POLL_INTERVAL_S = 0.005


class _AnnouncedDrop(NamedTuple):
    """A drop that this driver knows of, and the lanes that may still depend on its expert.

    Each lane with its ``passes``, odd inside of a layer, when the drop became known.
    """

    plan: int
    step: int
    gpu: int
    pair: int
    lanes_inside: tuple[tuple[RemoteDispatcher, int], ...]

    def settled(self) -> bool:
        """Whether all these lanes have left the layer."""
        return all(lane.passes != passes for lane, passes in self.lanes_inside)


class LogFollower:
    """Follows the log for one driver, in a thread of its own.

    ``lanes`` are this driver's; ``report`` gets lines for this server's log.
    """

    def __init__(
        self, rank: int, placement: Placement, expert_map: ExpertMap, compute: Compute,
        counters: Counters, lanes: Sequence[RemoteDispatcher], log: EventLog,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.rank = rank
        self.name = placement.servers[rank]
        self._bounds = log_entries.Bounds.of(placement)
        self.num_experts = placement.model.num_experts
        self.expert_map = expert_map
        self.compute = compute
        self.counters = counters
        self.lanes = lanes
        self.log = log
        self.report = report
        self.own_gpus: list[int] = placement.gpus_of(rank).tolist()
        self.migrating = False
        self._drops: list[_AnnouncedDrop] = []
        self._failed_plans: set[int] = set()
        self._open_plans: set[int] = set()
        self._reported_us = {"compute_us": 0, "waiting_us": 0}

    def start(self) -> None:
        """Begin to follow."""
        self.log.expect(self._bounds, self.report)
        self.log.follow()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                entry = self.log.next(POLL_INTERVAL_S if self._drops else None)
                if entry is not None:
                    self._handle_or_skip(entry)
                if self._drops and self.log.caught_up():
                    self._acknowledge_drops()
        except StoreLost:
            self.migrating = False

    def _handle_or_skip(self, entry: log_entries.LogEntry) -> None:
        """Handle an entry; one that fails (its slot does not exist) does not end the following."""
        try:
            self.handle(entry)
        except StoreLost:
            raise
        except Exception as error:
            where = f"entry {entry.number} of the run's log: {entry.kind}"
            self.log.skip(InputError(" ".join(str(error).split()), source=where))

    def handle(self, entry: log_entries.LogEntry) -> None:
        """Act on one entry."""
        match entry:
            case log_entries.ExpertsLoaded():
                for change in entry.experts:
                    self._apply_own("load", change.gpu, change.pair, change.slot)
                    self.expert_map.change(change.gpu, change.pair, True)
            case log_entries.DropsAnnounced():
                for change in entry.experts:
                    self.expert_map.change(change.gpu, change.pair, False)
                self._note_drops(entry)
            case log_entries.ReviewStarted():
                self._report_calls(entry.review)
            case log_entries.MigrationStarted():
                self._open_plans.add(entry.plan)
                self.migrating = True
            case log_entries.MigrationFinished():
                self._open_plans.discard(entry.plan)
                self.migrating = bool(self._open_plans)
            case log_entries.StepFailed():
                # loads that had begun by then fail as well, for the same reason
                if entry.server == self.name and entry.plan not in self._failed_plans:
                    self._failed_plans.add(entry.plan)
                    self.report(entry.reason)
            case log_entries.LogMessage() if self.rank == 0:
                self.report(entry.text)

    def _apply_own(self, kind: Literal["load", "drop"], gpu: int, pair: int, slot: int) -> None:
        if gpu in self.own_gpus:
            self.compute.apply(Change(kind, pair, self.own_gpus.index(gpu), slot))

    def _note_drops(self, entry: log_entries.DropsAnnounced) -> None:
        """Note which lanes are inside the layers of drops; routing no longer uses the experts."""
        inside: dict[int, list[tuple[RemoteDispatcher, int]]] = {}
        for lane in self.lanes:
            passes = lane.passes  # read before the layer: if it changes meanwhile, this pass ended
            if passes % 2:
                inside.setdefault(lane.layer, []).append((lane, passes))
        for step, gpu, pair, _ in entry.experts:
            lanes = inside.get(pair // self.num_experts, ())
            self._drops.append(_AnnouncedDrop(entry.plan, step, gpu, pair, tuple(lanes)))

    def _acknowledge_drops(self) -> None:
        """Acknowledge the drops on which no lane depends any longer."""
        settled: dict[int, list[int]] = {}
        unsettled = []
        for drop in self._drops:
            if not drop.settled():
                unsettled.append(drop)
                continue
            self._apply_own("drop", drop.gpu, drop.pair, 0)
            settled.setdefault(drop.plan, []).append(drop.step)
        self._drops = unsettled
        for plan, steps in settled.items():
            self.log.append(log_entries.DropsAcknowledged(plan, self.rank, steps))

    def _report_calls(self, review: int) -> None:
        called = self.counters.take_called().astype(np.int64)
        self.log.put_bytes(f"calls/{self.rank}/{review}", zlib.compress(called.tobytes(), 1))
        counted = self.counters.to_json()
        times = {name: counted[name] - before for name, before in self._reported_us.items()}
        self._reported_us = {name: counted[name] for name in times}
        self.log.put(f"times/{self.rank}/{review}", times)
        self.log.append(log_entries.CallsReported(review, self.rank))
