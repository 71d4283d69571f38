"""What a front does with the news of a run: its routes change, it confirms, it reports its calls.

A drop is confirmed when no layer is under way any more that began before it was known: then no
call of this front, at home or elsewhere, counts on the expert. So the slot can be used again, and
no call comes too late.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from prism_plan.placement import Placement
from runtime_adapter.changes import Entry, News, StoreLost
from runtime_adapter.compute import Compute
from runtime_adapter.counters import Counters
from runtime_adapter.experts import Change
from runtime_adapter.table import HolderTable

#: Between two looks at layers that are under way.
LOOK_S = 0.0005


class Lane(Protocol):
    """What runs layers: odd ``passes`` say that it is inside of one."""

    passes: int


def settle(lanes: Sequence[Lane]) -> None:
    """Wait until every layer that is under way now has ended."""
    under_way = [(lane, lane.passes) for lane in lanes if lane.passes % 2]
    while any(lane.passes == passes for lane, passes in under_way):
        time.sleep(LOOK_S)


class Follower:
    """Applies the log to a front's table and computing, in a thread of its own.

    ``lanes`` run the layers of this front; ``report`` is told what a reader of this server's log
    has to know.
    """

    def __init__(
        self, me: int, placement: Placement, table: HolderTable, compute: Compute,
        counters: Counters, lanes: Sequence[Lane], news: News, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.me = me
        self.name = placement.servers[me]
        self.table = table
        self.compute = compute
        self.counters = counters
        self.lanes = lanes
        self.news = news
        self.report = report
        self.own_gpus = placement.gpus_of(me).tolist()
        self.migrating = False
        self._dropped: list[Entry] = []
        self._reported = {"compute_us": 0, "waiting_us": 0}

    def start(self) -> None:
        """Begin to follow."""
        self.news.follow()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                entry = self.news.next()
                assert entry is not None
                self.hear(entry)
                if self._dropped and self.news.caught_up():
                    self._confirm()
        except StoreLost:
            self.migrating = False

    def hear(self, entry: Entry) -> None:
        """Act on one entry."""
        if entry.what == "load":
            self._apply_own(entry)
            for _, gpu, pair, _ in entry["experts"]:
                self.table.change(gpu, pair, True)
        elif entry.what == "drop":
            for _, gpu, pair, _ in entry["experts"]:
                self.table.change(gpu, pair, False)
            self._dropped.append(entry)
        elif entry.what == "review":
            self._tell_calls(entry["review"])
        elif entry.what == "plan":
            self.migrating = True
        elif entry.what == "over":
            self.migrating = False
        elif (entry.what == "failed" and entry["server"] == self.name) or (
            entry.what == "note" and self.me == 0
        ):
            self.report(entry["reason"] if entry.what == "failed" else entry["text"])

    def _apply_own(self, entry: Entry) -> None:
        kind: Literal["load", "drop"] = "load" if entry.what == "load" else "drop"
        for _, gpu, pair, slot in entry["experts"]:
            if gpu in self.own_gpus:
                self.compute.apply(Change(kind, pair, self.own_gpus.index(gpu), slot))

    def _confirm(self) -> None:
        settle(self.lanes)
        for entry in self._dropped:
            self._apply_own(entry)
        self.news.tell("seen", server=self.me, number=self._dropped[-1].number)
        self._dropped = []

    def _tell_calls(self, review: int) -> None:
        key = f"calls/{self.me}/{review}"
        called = self.counters.take_called().astype(np.int64)
        self.news.put_bytes(key, zlib.compress(called.tobytes(), 1))
        now = self.counters.to_json()
        times = {name: now[name] - before for name, before in self._reported.items()}
        self._reported = {name: now[name] for name in times}
        self.news.put(f"times/{self.me}/{review}", times)
        self.news.tell("calls", review=review, server=self.me)
