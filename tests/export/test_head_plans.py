"""What a plan for one head takes in time and in memory, as engines have it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prism_plan.expert_capacity import bytes_for_experts
from prism_plan.export.engine_memory import with_dense_on_every_gpu, with_whole_layers_a_gpu
from prism_plan.export.head_plans import HeadPlans
from prism_plan.export.stages import Stage
from prism_plan.io.cluster import parse_cluster
from tests.evaluate.simulation_material import SPEC, small_trace

#: Of each request of the trace: one of the prompt, and four of a token each.
PASSES = 5


def three(rtt_ms: float = 0.0, mbps: float = 1e6) -> Any:
    text = ['name = "three"', "[link]", f"bandwidth_mbps = {mbps}", f"rtt_ms = {rtt_ms}"]
    text.append("call_overhead_ms = 0")
    for n, gpus in enumerate((1, 2, 1)):
        text += ["[[server]]", f'name = "s{n}"', "arrival_interval_s = 500.0"]
        text += [f"tasks = {{ {'xyz'[n]} = 1.0 }}"]
        text += ["[[server.gpu]]", "slots = 24"] * gpus
    return parse_cluster("\n".join(text) + "\n")


@pytest.mark.parametrize(
    ("stages", "remote"),
    [
        ([Stage(1, 0, 0, 1), Stage(1, 1, 2, 2), Stage(0, 0, 3, 3)], 2),
        ([Stage(0, 0, 0, 0), Stage(1, 0, 1, 2), Stage(2, 0, 3, 3)], 2),
        ([Stage(0, 0, 0, 3)], 0),
    ],
)
def test_a_round_trip_a_run_where_the_head_relays(stages: list[Stage], remote: int) -> None:
    """Two milliseconds more of round trip are two for each pass and each run away from the head.

    Bytes too: all tokens' states there and back, of the last run one a pass.
    """
    counts = [stage.num_layers for stage in stages]

    def seconds(**link: float) -> float:
        plans = HeadPlans(small_trace(), three(**link), "s0", 16, relayed=True)
        return plans.seconds_of_counts(counts, stages)

    base = seconds()
    assert seconds(rtt_ms=2.0) - base == pytest.approx(2e-3 * PASSES * remote, rel=1e-4)
    state = 4 * SPEC.hidden_size
    sent = sum(
        10 + (PASSES if stage is stages[-1] else 10) for stage in stages if stage.server != 0
    )
    slower = seconds(mbps=100.0) - base
    assert slower == pytest.approx(sent * state * 8 * (1 / 100e6 - 1 / 1e12), rel=1e-2)


def test_gpus_beside_the_first_hold_the_dense_part_too() -> None:
    """Engines have dense weights and caches where layers execute, not once a server."""
    text = ['name = "two"', "[[server]]", 'name = "a"', "tasks = { x = 1.0 }"]
    text += ["[[server.gpu]]", "memory_gb = 0.1"] * 2
    (server,) = parse_cluster("\n".join(text) + "\n").servers
    model = dataclasses.replace(SPEC, kv_bytes_per_token=7)
    charged = with_dense_on_every_gpu(server, model, 16)
    kept = 7 * 16
    first, second = (
        bytes_for_experts(model, one, gpu, kept) for one, gpu in ((server, 0), (charged, 1))
    )
    assert first == second == 100_000_000 - model.dense_bytes - kept
    whole = with_whole_layers_a_gpu(charged, model, 16)
    layer = model.num_experts * max(model.expert_bytes_by_layer)
    for gpu in (0, 1):
        left = bytes_for_experts(model, whole, gpu, kept)
        assert left % layer == 0
        assert first - layer < left <= first
