"""What a driver does with the log of a run: its routes change, it confirms, it reports its calls.

A drop is confirmed when no run of its layer is under way any more that began before it was known:
then no call of this driver, at home or elsewhere, counts on the expert. So the slot can be used
again, and no call comes too late. A step of a long prompt holds up the drops of the layer that it
is in, and no others.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from prism_plan.errors import InputError
from prism_plan.placement import Placement
from runtime_adapter.control.event_log import EventLog, StoreLost
from runtime_adapter.control.log_entries import Bounds, Entry
from runtime_adapter.moe.compute import Compute
from runtime_adapter.moe.counters import Counters
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change

#: Between two looks at layers that are under way, while drops wait for them.
POLL_INTERVAL_S = 0.005


class Lane(Protocol):
    """What runs layers: odd ``passes`` say that it is inside of one, whose position is ``layer``.

    ``layer`` is set before ``passes`` becomes odd.
    """

    layer: int
    passes: int


class Dropping(NamedTuple):
    """A drop that this driver knows of; ``inside`` are lanes that may count on the expert still.

    Each with its ``passes`` at the time.
    """

    plan: int
    step: int
    gpu: int
    pair: int
    inside: tuple[tuple[Lane, int], ...]

    def settled(self) -> bool:
        """Whether all lanes have left the layer."""
        return all(lane.passes != passes for lane, passes in self.inside)


class LogFollower:
    """Applies the log to a driver's table and computing, in a thread of its own.

    ``lanes`` run the layers of this driver; ``report`` is told what a reader of this server's log
    has to know.
    """

    def __init__(
        self, rank: int, placement: Placement, table: ExpertMap, compute: Compute,
        counters: Counters, lanes: Sequence[Lane], log: EventLog, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.rank = rank
        self.name = placement.servers[rank]
        self._bounds = Bounds.of(placement)
        self.num_experts = placement.model.num_experts
        self.table = table
        self.compute = compute
        self.counters = counters
        self.lanes = lanes
        self.log = log
        self.report = report
        self.own_gpus = placement.gpus_of(rank).tolist()
        self.migrating = False
        self._dropped: list[Dropping] = []
        self._failed: set[int] = set()
        self._plans: set[int] = set()  # that are under way
        self._reported = {"compute_us": 0, "waiting_us": 0}

    def start(self) -> None:
        """Begin to follow."""
        self.log.expect(self._bounds, self.report)
        self.log.follow()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                entry = self.log.next(POLL_INTERVAL_S if self._dropped else None)
                if entry is not None:
                    self._hear_or_skip(entry)
                if self._dropped and self.log.caught_up():
                    self._confirm()
        except StoreLost:
            self.migrating = False

    def _hear_or_skip(self, entry: Entry) -> None:
        """Act on one entry; one that cannot be acted on (a slot is not there) ends no others."""
        try:
            self.hear(entry)
        except StoreLost:
            raise
        except Exception as error:
            where = f"entry {entry.number} of the run's log: {entry.what}"
            self.log.skip(InputError(" ".join(str(error).split()), source=where))

    def hear(self, entry: Entry) -> None:
        """Act on one entry."""
        if entry.what == "load":
            for _, gpu, pair, slot in entry["experts"]:
                self._apply_own("load", gpu, pair, slot)
                self.table.change(gpu, pair, True)
        elif entry.what == "drop":
            for _, gpu, pair, _ in entry["experts"]:
                self.table.change(gpu, pair, False)
            self._watch(entry)
        elif entry.what == "review":
            self._tell_calls(entry["review"])
        elif entry.what == "plan":
            self._plans.add(entry["plan"])
            self.migrating = True
        elif entry.what == "over":
            self._plans.discard(entry["plan"])
            self.migrating = bool(self._plans)
        elif entry.what == "failed":
            # loads that had begun by then fail as well, for the same reason
            if entry["server"] == self.name and entry["plan"] not in self._failed:
                self._failed.add(entry["plan"])
                self.report(entry["reason"])
        elif entry.what == "note" and self.rank == 0:
            self.report(entry["text"])

    def _apply_own(self, kind: Literal["load", "drop"], gpu: int, pair: int, slot: int) -> None:
        if gpu in self.own_gpus:
            self.compute.apply(Change(kind, pair, self.own_gpus.index(gpu), slot))

    def _watch(self, entry: Entry) -> None:
        """Note who is in the layers of drops, now that nobody begins to count on them any more."""
        inside: dict[int, list[tuple[Lane, int]]] = {}
        for lane in self.lanes:
            passes = lane.passes  # before the layer: if that changes meanwhile, this run is over
            if passes % 2:
                inside.setdefault(lane.layer, []).append((lane, passes))
        for step, gpu, pair, _ in entry["experts"]:
            waited_for = inside.get(pair // self.num_experts, ())
            self._dropped.append(Dropping(entry["plan"], step, gpu, pair, tuple(waited_for)))

    def _confirm(self) -> None:
        """Tell of the drops that nobody here counts on any more."""
        settled: dict[int, list[int]] = {}
        left = []
        for drop in self._dropped:
            if not drop.settled():
                left.append(drop)
                continue
            self._apply_own("drop", drop.gpu, drop.pair, 0)
            settled.setdefault(drop.plan, []).append(drop.step)
        self._dropped = left
        for plan, steps in settled.items():
            self.log.tell("seen", server=self.rank, plan=plan, steps=steps)

    def _tell_calls(self, review: int) -> None:
        key = f"calls/{self.rank}/{review}"
        called = self.counters.take_called().astype(np.int64)
        self.log.put_bytes(key, zlib.compress(called.tobytes(), 1))
        now = self.counters.to_json()
        times = {name: now[name] - before for name, before in self._reported.items()}
        self._reported = {name: now[name] for name in times}
        self.log.put(f"times/{self.rank}/{review}", times)
        self.log.tell("calls", review=review, server=self.rank)
