"""The scheduler's view of a run: its servers that are alive, and the experts that they hold."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from runtime_adapter.control.event_log import EventLog
from runtime_adapter.control.log_entries import Bounds, LogMessage
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.transport.tcp_store import MAX_START_S
from runtime_adapter.weights.expert_map import ExpertMap


@dataclass(frozen=True, eq=False)
class SchedulerConfig:
    """The run that a scheduler serves, and how it reviews.

    ``instance`` has the capacities and rules that placements keep, its activations are not used;
    without a ``cluster`` there are no reviews, only moves that are requested. Placements are
    written to ``placements_dir``, where one is given.
    """

    rendezvous: Rendezvous
    placement: Placement
    instance: Instance
    model: ModelSpec | None = None
    cluster: Cluster | None = None
    options: SimulationOptions = field(default_factory=SimulationOptions)
    placements_dir: str | None = None


class RunState:
    """What the parts of a scheduler share.

    ``now`` is a clock in seconds. ``placement`` is the last one that was reached, with its plan's
    provenance; what is held is in ``expert_map``. ``hung`` are servers whose workers answer, but
    whose driver, which acknowledges drops, does not.
    """

    def __init__(
        self, config: SchedulerConfig, log: EventLog, now: Callable[[], float] = time.time
    ) -> None:
        self.config = config
        self.log = log
        log.expect(Bounds.of(config.placement))  # the drivers report skipped entries
        self.now = now
        self.expert_map = ExpertMap(config.placement)
        self.placement = config.placement
        self.alive = list(range(config.placement.num_servers))
        self.hung: set[int] = set()
        self.start_s: float | None = None
        self.all_finished = False
        self._reported: set[str] = set()

    def report(self, text: str, *, once: bool = False) -> None:
        """Write a line to the first server's log, or only the first time that it comes up."""
        if once and text in self._reported:
            return
        self._reported.add(text)
        self.log.append(LogMessage(text))

    def read_start(self) -> bool:
        """Read when the run begins, by this machine's clock; returns whether that is known."""
        if self.start_s is None and self.log.has("start"):
            self.start_s = self.now()
            try:
                start_s = self.log.get("start")
                if type(start_s) in (int, float) and abs(start_s - self.start_s) < MAX_START_S:
                    self.start_s = float(start_s)
            except InputError:
                pass  # the servers say what is wrong, and end
        return self.start_s is not None

    def hung_text(self, server: int) -> str:
        """The line about a server whose driver hangs."""
        name = self.config.placement.servers[server]
        return f"the process that serves the requests of {name!r} has sent no heartbeat"

    @property
    def instance(self) -> Instance:
        """Capacities and rules of the servers that are alive."""
        min_replicas = self.placement.plan.min_replicas
        return surviving_instance(self.config.instance, self.alive, min_replicas)

    def held_placement(self, instance: Instance) -> Placement:
        """What the servers of :attr:`instance` hold now."""
        own = np.concatenate([self.config.placement.gpus_of(n) for n in self.alive])
        held = self.expert_map.on_gpu()[own].reshape(len(own), *instance.activations.shape[1:])
        return self.placement.replace(
            servers=instance.servers, gpu_capacity=instance.gpu_capacity, on_gpu=held
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
