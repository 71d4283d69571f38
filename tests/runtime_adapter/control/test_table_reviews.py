"""What reviews of execution tables need of a run, and what they refuse."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import Infeasible, InputError, WrongModel
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.control.run_state import RunState
from runtime_adapter.control.scheduler_config import SchedulerConfig
from runtime_adapter.control.table_reviews import require_cache_memory, reviewed_instance
from tests.evaluate.simulation_material import SPEC, small_trace

#: Bytes of a token's keys and values in all four decoder layers; an expert has 1,000,000.
KV = 40_000
MODEL = dataclasses.replace(SPEC, kv_bytes_per_token=KV)
HOME = np.array([[0, 0, 0], [1, 1, 1]], np.int32)
AWAY = np.array([[1, 1, 1], [1, 1, 1]], np.int32)


def config(memory: int | None = None, *, trace: bool = True, **options: Any) -> SchedulerConfig:
    """Two servers of one GPU with 12 slots each; 25 tokens in flight take an expert's bytes."""
    spec = MODEL
    dense, kept = spec.dense_bytes, 25 * KV
    size = None if memory is None else dense + kept + memory
    gpu = Gpu(slots=12) if size is None else Gpu(memory_bytes=size)
    servers = (Server("a", (gpu,), kv_tokens=25), Server("b", (gpu,), kv_tokens=25))
    cluster = Cluster("edge", servers)
    held = np.zeros((2, 3, 8), bool)
    held[0, :, :4] = held[1, :, 4:] = True
    placement = Placement(
        spec.shape(), ("a", "b"), ((12,), (12,)), held, SolveReport("hand", min_replicas=1)
    )
    instance = Instance.of_cluster(cluster, spec).replace(gpu_capacity=((12,), (12,)))
    found = dataclasses.replace(small_trace(), model=dataclasses.replace(spec, name="another"))
    given = SchedulerConfig(placement, instance, spec, cluster, SimulationOptions(**options))
    return SchedulerConfig.from_json(given.to_json(), None, found if trace else None)


def state_of(given: SchedulerConfig, alive: list[int], table: Any = HOME) -> RunState:
    state = RunState(given, SimpleNamespace(expect=lambda bounds: None))  # type: ignore[arg-type]
    state.alive, state.table = alive, table
    return state


LATENCY = {"migrate": "prism", "migrate_solver": "latency"}
PARTIAL = {"migrate": "partial"}


def test_reviews_keep_the_slots_that_servers_have() -> None:
    """Whatever the cluster file leaves; a trace may call the model otherwise than the run."""
    given = config(30_000_000, **LATENCY)
    assert Instance.of_cluster(given.cluster, MODEL).gpu_capacity == ((30,), (30,))
    instance = reviewed_instance(state_of(given, [0, 1]))
    assert instance.trace is not None
    for table in (HOME, AWAY):
        assert instance.with_execution(table, MODEL).gpu_capacity == ((12,), (12,))
    with pytest.raises(WrongModel, match="the store's trace"):
        other = dataclasses.replace(given.trace.model, top_k=1)
        SchedulerConfig.from_json(
            given.to_json(), None, dataclasses.replace(given.trace, model=other)
        )


def test_what_reviews_of_tables_refuse() -> None:
    """No trace; servers that are not up. Reviews of experts alone need neither."""
    with pytest.raises(InputError, match="the store has no trace"):
        reviewed_instance(state_of(config(trace=False, **LATENCY), [0, 1]))
    with pytest.raises(InputError, match="b not up"):
        reviewed_instance(state_of(config(**LATENCY), [0]))
    with pytest.raises(InputError, match="a not up"):
        reviewed_instance(state_of(config(**PARTIAL), [1], AWAY))
    reviewed_instance(state_of(config(trace=False, **PARTIAL), [0, 1], AWAY))
    assert reviewed_instance(state_of(config(**PARTIAL), [1])).servers == ("b",)


def test_caches_of_a_new_table_beside_the_old() -> None:
    """Server b keeps the tokens of both homes while requests run on either table."""
    tables = [HOME, AWAY]
    require_cache_memory(config(), tables)  # slots say nothing of memory
    require_cache_memory(config(13_000_000), tables)
    with pytest.raises(Infeasible) as caught:
        require_cache_memory(config(12_000_000), tables)
    assert "server 'b' gpu[0]: KV caches of the new table leave room for 11 experts" in str(
        caught.value
    )
    assert caught.value.shortfall == 1
