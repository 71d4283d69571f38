"""The scheduler's view of a run: its servers that are up, and the experts that they hold."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.instance import Instance
from prism_plan.placement import Placement
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_entries import Bounds, LogEntry, LogMessage, NewLog
from runtime_adapter.control.scheduler_config import SchedulerConfig
from runtime_adapter.weights.expert_map import ExpertMap

__all__ = ["RunState", "SchedulerConfig", "surviving_cluster", "surviving_instance"]


class RunState:
    """What the parts of a scheduler share.

    ``now`` is a clock in seconds. ``placement`` is the last one that was reached, with its plan's
    provenance; what is held is in ``expert_map``. ``alive`` are the servers that are up, in order,
    ``changed_s`` is when that changed last, and ``last_was_loss`` whether by a loss. ``hung`` are
    servers whose workers answer, but whose driver, which acknowledges drops, does not; the
    ``absent`` have not joined yet since the store was started. ``joined`` are servers that came
    back, or came anew, and were not looked at by a repair since. ``placement_known`` is false if
    moves may have been made by a scheduler of which nothing is left.

    ``read`` is the number of entries of the log that were read, ``last_change`` that of the last
    one that changed who is up or what is held (-1: none).
    """

    def __init__(
        self, config: SchedulerConfig, log: EventLog, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.log = log
        log.expect(Bounds.of(config.placement))  # the drivers report skipped entries
        self.now = now
        self.expert_map = ExpertMap(config.placement)
        self.placement = config.placement
        self.placement_known = True
        #: The execution table that new requests use, int32 [N, L].
        self.table = config.placement.execution_table
        #: Whether drivers may execute by another table, and the log does not say which it is.
        self._table_in_doubt = False
        self._table_in_log = False
        self.alive: list[int] = []
        self.left: set[int] = set()
        self.absent: set[int] = set()
        self.joined: set[int] = set()
        self.hung: set[int] = set()
        self.changed_s = now()
        self.last_was_loss = False
        self.begun = False
        self.start_s: float | None = None
        self.all_finished = False
        self.read = 0
        self.last_change = -1
        self._num_logs = 0
        self._incarnations = [0] * config.placement.num_servers
        self._reported: set[str] = set()

    # ------------------------------------------------------------------------------------- the log

    def begin_log(self, new: NewLog) -> None:
        """Forget what is known of servers and experts for what a new log begins with."""
        self.read = new.number + 1
        self.last_change = -1
        self._num_logs += 1
        if new.execution is not None:
            self.table = np.array(new.execution, np.int32)
        self._table_in_log = new.execution is not None
        self._table_in_doubt = self._num_logs > 1
        held: list[list[tuple[int, int]]] = [[] for _ in self._incarnations]
        for server, gpu, pair, _ in new.held:
            held[server].append((gpu, pair))
        self.alive = []
        self.absent.clear()
        for server, member in enumerate(new.members):
            self._incarnations[server] = int(member["incarnation"])
            if self._num_logs == 1 and self._incarnations[server] > 1:
                self.placement_known = False  # unless an earlier scheduler has left it in the store
                self._table_in_doubt = True
            if member["state"] == "up":
                self._set_up(server, held[server])
            else:
                self._set_down(server, left=member["state"] == "left")
                if member["state"] in ("absent", "joining"):
                    self.absent.add(server)
        self.changed_s, self.last_was_loss = self.now(), False

    def apply(self, entry: LogEntry) -> list[int]:
        """Apply an entry; returns the servers that came or went by it."""
        if entry.number >= 0:
            self.read = entry.number + 1
        match entry:
            case log_entries.ServerJoined():
                if self._num_logs == 1 and entry.incarnation > self._incarnations[entry.server] + 1:
                    self.placement_known = False  # it was up before this store and this scheduler
                    self._table_in_doubt = True
                self._incarnations[entry.server] = entry.incarnation
                self._set_up(entry.server, [(gpu, pair) for gpu, pair, _ in entry.experts])
            case log_entries.ServerDown() | log_entries.ServerLeft():
                if entry.incarnation < self._incarnations[entry.server]:
                    return []
                self._incarnations[entry.server] = entry.incarnation
                self._set_down(entry.server, left=isinstance(entry, log_entries.ServerLeft))
            case log_entries.ExpertsLoaded() | log_entries.DropsAnnounced():
                loaded = isinstance(entry, log_entries.ExpertsLoaded)
                for change in entry.experts:
                    self.expert_map.change(change.gpu, change.pair, loaded)
                self.last_change = entry.number
                return []
            case _:
                return []
        self.last_change = entry.number
        self.changed_s = self.now()
        self.last_was_loss = isinstance(entry, log_entries.ServerDown)
        return [entry.server]

    def _set_up(self, server: int, held: list[tuple[int, int]]) -> None:
        self.expert_map.set_up(server, held)
        self.alive = sorted({*self.alive, server})
        self.joined.add(server)
        self.left.discard(server)
        self.absent.discard(server)
        self.hung.discard(server)

    def _set_down(self, server: int, *, left: bool) -> None:
        (self.left.add if left else self.left.discard)(server)
        self.expert_map.set_down(server)
        self.alive = [n for n in self.alive if n != server]
        self.joined.discard(server)
        self.absent.discard(server)
        self.hung.discard(server)

    # ------------------------------------------------------------------------------------- the run

    def report(self, text: str, *, once: bool = False) -> None:
        """Write a line to the first server's log, or only the first time that it comes up."""
        if once and text in self._reported:
            return
        self._reported.add(text)
        self.log.append(LogMessage(text[: log_entries.MAX_TEXT]))

    def tell_table(self) -> None:
        """Let drivers from before this log agree on the table with those that come anew."""
        if self._table_in_doubt and not self._table_in_log:
            self.log.append(log_entries.TableBegan(0, self.table.tolist()))
            self._table_in_log = True

    def adopt_placement(self) -> None:
        """Take what is held for what servers are to hold, where that is not known.

        All servers are up, and none is about to get experts that it lacks.
        """
        if not self.placement_known and self.all_up:
            self.placement = self.held_placement(self.instance)
            self.placement_known = True

    @property
    def all_up(self) -> bool:
        """Whether every server of the run is up."""
        return len(self.alive) == self.config.placement.num_servers

    def hung_text(self, server: int) -> str:
        """The line about a server whose driver hangs."""
        name = self.config.placement.servers[server]
        return f"the process that serves the requests of {name!r} has sent no heartbeat"

    @property
    def instance(self) -> Instance:
        """Capacities and rules of the servers that are up, of which there is one at least."""
        min_replicas = self.placement.plan.min_replicas
        return surviving_instance(self.config.instance, self.alive, min_replicas)

    def held_placement(self, instance: Instance) -> Placement:
        """What the servers of :attr:`instance` hold now."""
        return self.part_of(self.expert_map.on_gpu(), instance)

    def part_of(self, on_gpu: npt.NDArray[np.bool_], instance: Instance) -> Placement:
        """The placement on the servers of :attr:`instance`, of bool [G, J] of all servers."""
        own = np.concatenate([self.config.placement.gpus_of(n) for n in self.alive])
        held = on_gpu[own].reshape(len(own), *instance.activations.shape[1:])
        return self.placement.replace(
            servers=instance.servers,
            gpu_capacity=instance.gpu_capacity,
            on_gpu=held,
            # of some of the servers there is no table: their requests go around the others
            execution=self.table if self.all_up else None,
        )


def surviving_instance(instance: Instance, alive: Sequence[int], min_replicas: int) -> Instance:
    """The instance of the servers that are alive; replicas are limited to their number."""
    if len(alive) == instance.num_servers:
        return instance.replace(min_replicas=min_replicas)
    index = {n: i for i, n in enumerate(alive)}

    def surviving(rules: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
        return tuple((index[n], layer, e) for n, layer, e in rules if n in index)

    return instance.replace(
        servers=tuple(instance.servers[n] for n in alive),
        cluster=None if instance.cluster is None else surviving_cluster(instance.cluster, alive),
        activations=instance.activations[list(alive)],
        gpu_capacity=tuple(instance.gpu_capacity[n] for n in alive),
        layer_caps=tuple(instance.layer_caps[n] for n in alive),
        pinned=surviving(instance.pinned),
        forbidden=surviving(instance.forbidden),
        min_replicas=min(min_replicas, len(alive)),
    )


def surviving_cluster(cluster: Cluster, alive: Sequence[int]) -> Cluster:
    """The cluster of the servers that are alive, with the links between them."""
    index = {n: i for i, n in enumerate(alive)}
    return dataclasses.replace(
        cluster,
        servers=tuple(cluster.servers[n] for n in alive),
        pair_links=tuple(
            dataclasses.replace(link, a=index[link.a], b=index[link.b])
            for link in cluster.pair_links
            if link.a in index and link.b in index
        ),
    )
