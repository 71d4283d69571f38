"""What reviews and moves that change where layers execute need beside those of experts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError
from prism_plan.execution_table import executed_elsewhere
from prism_plan.expert_capacity import gpu_capacity
from prism_plan.instance import Instance
from prism_plan.printable_text import quantity
from prism_plan.solvers.registry import plans_tables
from runtime_adapter.control.run_state import RunState, surviving_cluster
from runtime_adapter.control.scheduler_config import SchedulerConfig

Table = npt.NDArray[np.int32]


def reviewed_instance(state: RunState) -> Instance:
    """Capacities and rules of the servers that are up, with what a review of tables reads.

    Servers have the slots that they have started with, whatever the cluster file leaves of their
    memory.

    Raises
    ------
    InputError
        A table is planned for all servers, or the one that runs is of all, and some are not up; the
        store has no trace.
    """
    config, instance = state.config, state.instance
    options = config.options
    assert config.cluster is not None
    has_table = bool(executed_elsewhere(state.table).any())
    planned = options.migrate == "prism" and plans_tables(options.migrate_solver)
    if not has_table and not planned:
        return instance
    if not state.all_up:
        lost = [name for name in config.placement.servers if name not in instance.servers]
        raise InputError(
            f"{', '.join(lost)} not up, and layers execute by a table of all servers",
            expected="all servers up",
        )
    if options.migrate == "prism" and config.trace is None:
        raise InputError(
            "the store has no trace, which reviews of where layers execute need",
            parameter="trace",
            remedy="start the store, or the first server, with one",
        )
    cluster = surviving_cluster(config.cluster, state.alive)
    if instance.in_slots:
        cluster = _with_slots(cluster, instance.gpu_capacity)
    return instance.replace(cluster=cluster, trace=config.trace)


def _with_slots(cluster: Cluster, capacity: Sequence[Sequence[int]]) -> Cluster:
    """The cluster whose GPUs have so many slots, whatever is cached beside them."""
    servers = [
        dataclasses.replace(
            server,
            gpus=tuple(
                dataclasses.replace(gpu, slots=slots, memory_bytes=None)
                for gpu, slots in zip(server.gpus, own, strict=True)
            ),
        )
        for server, own in zip(cluster.servers, capacity, strict=True)
    ]
    return dataclasses.replace(cluster, servers=tuple(servers))


def require_cache_memory(config: SchedulerConfig, tables: Sequence[Table]) -> None:
    """Refuse a table whose KV caches do not fit beside the experts' slots, which are taken already.

    ``tables`` int32 [N, L] are those that requests run on, and the new one. Nothing is known where
    the run has no cluster file, and nothing is short where that gives slots in place of memory.

    Raises
    ------
    Infeasible
        Names the first GPU that is too small.
    """
    if config.cluster is None or config.model is None:
        return
    left = gpu_capacity(config.cluster, config.model, np.stack(tables))
    unit = "experts" if config.instance.in_slots else "bytes"
    for name, has, needed in zip(
        config.placement.servers, left, config.instance.gpu_capacity, strict=True
    ):
        for g, (room, slots) in enumerate(zip(has, needed, strict=True)):
            if room < slots:
                raise Infeasible(
                    f"server {name!r} gpu[{g}]: KV caches of the new table leave room for "
                    f"{quantity(room, unit.removesuffix('s'))}, and it has started with {slots:,}",
                    shortfall=slots - room,
                    unit=unit,
                    remedy="start with fewer slots, or with less kv_tokens",
                )
