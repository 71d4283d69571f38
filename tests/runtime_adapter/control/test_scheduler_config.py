"""What servers tell the scheduler of their run, as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import InputError
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.control.scheduler_config import OPTIONS, SchedulerConfig

MODEL = ModelSpec(
    name="tiny", moe_layers=(1, 3), num_experts=6, top_k=2, expert_bytes=1000,
    hidden_size=8, dtype_bytes=2, dense_bytes=100, kv_bytes_per_token=4,
)  # fmt: skip
CLUSTER = Cluster(
    "edge",
    (
        Server("a", (Gpu(slots=8, tflops=20.0, assumed=frozenset({"load_gbs"})),),
               tasks={"chat": 1.0}, pin=((1, 2),), layer_cap=5),
        Server("b", (Gpu(slots=4), Gpu(slots=4, dense=True)), forbid=((3, 0),), weight=0.5),
    ),
    Link(bandwidth_mbps=100.0, assumed=frozenset({"rtt_ms"})),
    (PairLink(0, 1, rtt_ms=3.0),),
)  # fmt: skip


def config(**options: Any) -> SchedulerConfig:
    """A scheduler's configuration with all its parts."""
    held = np.zeros((3, 2, 6), bool)
    held[0, :, :4] = held[1, :, 4:] = True
    placement = Placement(
        MODEL.shape(), ("a", "b"), ((8,), (4, 4)), held, SolveReport("hand", min_replicas=1)
    )
    instance = Instance.of_cluster(CLUSTER, MODEL)
    return SchedulerConfig(
        placement,
        instance,
        MODEL,
        CLUSTER,
        SimulationOptions(**options),
        timeout_s=3.5,
        kv_tokens={"a": 25},
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"migrate": "prism", "migrate_every_s": 20.0, "half_life_s": math.inf, "seed": 3},
        {"migrate": "partial", "horizon_s": 60.0, "migration_cost": "max"},
    ],
)
def test_a_configuration_survives_json(options: dict[str, Any]) -> None:
    """Everything that a scheduler uses is the same again."""
    given = config(**options)
    text = json.dumps(given.to_json(), allow_nan=False)
    found = SchedulerConfig.from_json(json.loads(text), "folder")
    assert found.placements_dir == "folder"
    assert found.timeout_s == 3.5
    assert found.cluster == given.cluster
    assert found.model == given.model
    assert found.kv_tokens == {"a": 25}
    for name in OPTIONS:
        assert getattr(found.options, name) == getattr(given.options, name)
    assert (found.placement.on_gpu == given.placement.on_gpu).all()
    assert found.placement.plan == given.placement.plan
    for name in ("servers", "gpu_capacity", "pinned", "forbidden", "layer_caps", "min_replicas"):
        assert getattr(found.instance, name) == getattr(given.instance, name)
    assert found.instance.model == given.instance.model


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: values.pop("placement"),
        lambda values: values.update(placement=[]),
        lambda values: values.update(cluster={"name": "x"}),
        lambda values: values.update(options=None),
        lambda values: values["options"].update(migrate="sometimes"),
        lambda values: values.update(gpu_capacity=[[1]]),
        lambda values: values.update(pinned=[[0, 9, 9]]),
        lambda values: values.update(timeout_s="long"),
        lambda values: values.update(model={}),
    ],
)
def test_what_is_no_configuration(spoil: Any) -> None:
    """It is refused with a line that says what is wrong."""
    values = config().to_json()
    spoil(values)
    with pytest.raises(InputError) as error:
        SchedulerConfig.from_json(values)
    assert str(error.value).isprintable()
