"""The cells of the grid: clusters, loads, and the fixed quarter of them.

A cell is the testbed of the paper with other slots, links, GPUs or servers, under one load. Its
name is what ``--cells`` takes: ``832-100-0.2-65`` has 832 832 1664 slots, 100 Mbit/s, a round trip
of 0.2 ms, and arrivals that keep the busiest GPU of a pipeline busy for 65 % of the time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import prism_plan as pp
from studies.execution import changed, unequal_gpus

#: Slots for experts by server; the testbed's own are what its memory holds, 541 541 1234.
SLOTS = {
    "541": None,
    "832": (832, 832, 1664),
    "600": (600, 600, 600),
    "mixtral": (70, 70, 149),
}
MBPS = (100.0, 500.0, 10000.0)
RTT_MS = (0.2, 5.0)
#: Share of its time for which the busiest GPU of the pipeline that is best on an idle cluster would
#: execute layers, by the formula.
LOADS = {"idle": 0.01, "40": 0.40, "65": 0.65}
#: Regimes of their own, with 541 541 1234 slots, 500 Mbit/s and 1 ms, under the loads below.
OTHERS = ("weak-gpus", "unequal-gpus", "unequal-links", "12-servers", "48-servers")
LOADS_OF_OTHERS = ("idle", "40")
#: The Mixtral testbed's users, one task a server.
MIXTRAL_TASKS = ("college_medicine", "international_law", "high_school_mathematics")
#: Requests a server; with 48 servers fewer, so that a run has at most 2,400.
REQUESTS, MAX_REQUESTS = 200, 2400
#: Places a server: one where requests hardly meet; under load so many that places are never what
#: limits a good plan, for the grid is about GPUs and links.
IDLE_PLACES, PLACES = 1, 8


@dataclass(frozen=True)
class Cell:
    """One cell: a regime and a load of :data:`LOADS`."""

    name: str
    load: str
    slots: str = "541"
    mbps: float = 500.0
    rtt_ms: float = 1.0
    other: str = ""

    @property
    def busy_share(self) -> float:
        """For which share of its time the busiest GPU of a pipeline is to execute layers."""
        return LOADS[self.load]

    @property
    def places(self) -> int:
        """Requests that a home serves at once."""
        return IDLE_PLACES if self.load == "idle" else PLACES

    @property
    def servers(self) -> int:
        """N, the number of servers."""
        return int(self.other.split("-")[0]) if self.other.endswith("-servers") else 3

    @property
    def requests(self) -> int:
        """Requests of each server in a run."""
        return min(REQUESTS, MAX_REQUESTS // self.servers)

    @property
    def mixtral(self) -> bool:
        """Whether the model is Mixtral, whose trace is counts."""
        return self.slots == "mixtral"

    def cluster(self, interval_s: float) -> pp.Cluster:
        """The cell's cluster, with a request of each server's users every so many seconds."""
        weak = {"bandwidth_gbs": 205.0, "tflops": 30.0} if self.other == "weak-gpus" else {}
        found = changed(
            interval_s=interval_s,
            places=self.places,
            mbps=self.mbps,
            rtt_ms=self.rtt_ms,
            slots=SLOTS[self.slots],
            servers=self.servers,
            **weak,
        )
        if self.other == "unequal-gpus":
            return unequal_gpus(found)
        if self.other == "unequal-links":
            return dataclasses.replace(found, pair_links=UNEQUAL_LINKS)
        return with_tasks(found, MIXTRAL_TASKS) if self.mixtral else found


#: A slow line, the usual one and a fast one between three servers.
UNEQUAL_LINKS = (
    pp.PairLink(0, 1, bandwidth_mbps=2000.0, rtt_ms=0.2),
    pp.PairLink(0, 2, bandwidth_mbps=100.0, rtt_ms=5.0),
    pp.PairLink(1, 2, bandwidth_mbps=500.0, rtt_ms=1.0),
)


def with_tasks(cluster: pp.Cluster, tasks: Iterable[str]) -> pp.Cluster:
    """The cluster with one task a server."""
    servers = tuple(
        dataclasses.replace(server, tasks={task: 1.0})
        for server, task in zip(cluster.servers, tasks, strict=True)
    )
    return dataclasses.replace(cluster, servers=servers)


def all_cells() -> dict[str, Cell]:
    """Every cell by its name."""
    regular = [
        Cell(f"{slots}-{mbps:g}-{rtt_ms:g}-{load}", load, slots, mbps, rtt_ms)
        for slots, mbps, rtt_ms, load in itertools.product(SLOTS, MBPS, RTT_MS, LOADS)
    ]
    others = [
        Cell(f"{other}-{load}", load, other=other)
        for other, load in itertools.product(OTHERS, LOADS_OF_OTHERS)
    ]
    return {cell.name: cell for cell in (*regular, *others)}


def quarter() -> dict[str, Cell]:
    """A fixed quarter of the cells by name, and every other regime under one load.

    Every combination of bandwidth, round trip and load is there once; slots change with them so
    that every two values of two factors meet.
    """
    numbered = itertools.product(enumerate(MBPS), enumerate(RTT_MS), enumerate(LOADS))
    names = [
        f"{list(SLOTS)[(m + 2 * r + 3 * load) % len(SLOTS)]}-{mbps:g}-{rtt_ms:g}-{word}"
        for (m, mbps), (r, rtt_ms), (load, word) in numbered
    ]
    loads = itertools.cycle(reversed(LOADS_OF_OTHERS))
    names += [f"{other}-{load}" for other, load in zip(OTHERS, loads, strict=False)]
    cells = all_cells()
    return {name: cells[name] for name in cells if name in names}


def named(patterns: Iterable[str], cells: Mapping[str, Cell]) -> dict[str, Cell]:
    """The cells whose names fit one of the patterns; ``*`` and ``?`` stand for any text.

    Raises
    ------
    InputError
        A pattern fits no cell.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = [name for name in cells if fnmatchcase(name, pattern)]
        if not fitting:
            raise pp.InputError(
                f"{pattern!r} fits no cell",
                parameter="cells",
                expected=f"names such as {next(iter(cells))}, 832-* or {OTHERS[0]}-*",
            )
        found |= set(fitting)
    return {name: cells[name] for name in cells if name in found}
