"""EPLB against the published example and the published algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.solvers import solve
from prism_plan.solvers.eplb import (
    balanced_packing,
    layer_slots,
    replicate_experts,
)
from tests.solvers.published_eplb import rebalance_experts

LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)


def test_readme_example() -> None:
    """The README example of deepseek-ai/EPLB: 16 replicas, 4 groups, 2 nodes, 8 GPUs."""
    assert rebalance_experts(LOAD, 16, 4, 2, 8).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def published(weight: np.ndarray, num_physical: int, num_gpus: int) -> list[list[int]]:
    """EPLB's global policy on one layer, written from its description in plain Python."""
    copies = [1] * len(weight)
    physical = list(range(len(weight)))
    while len(physical) < num_physical:
        loads = [w / c for w, c in zip(weight, copies, strict=True)]
        expert = loads.index(max(loads))
        copies[expert] += 1
        physical.append(expert)
    load = [weight[e] / copies[e] for e in physical]
    per_gpu = num_physical // num_gpus
    gpus: list[list[int]] = [[] for _ in range(num_gpus)]
    if per_gpu == 1:
        return [[e] for e in physical]
    totals = [0.0] * num_gpus
    for item in sorted(range(num_physical), key=lambda i: -load[i]):
        open_ = [g for g in range(num_gpus) if len(gpus[g]) < per_gpu]
        chosen = min(open_, key=lambda g: totals[g])
        gpus[chosen].append(physical[item])
        totals[chosen] += load[item]
    return gpus


@settings(max_examples=150)
@given(data=st.data())
def test_equal_servers_equal_the_published_algorithm(data: st.DataObject) -> None:
    """On equal servers replication and packing are EPLB's, copy by copy, in order."""
    gpus = data.draw(st.integers(1, 6))
    per_gpu = data.draw(st.integers(1, 5))
    experts = data.draw(st.integers(1, gpus * per_gpu))
    numbers = st.integers(0, 50).map(float) | st.floats(0, 100)
    weight = np.array(data.draw(st.lists(numbers, min_size=experts, max_size=experts)))
    want = published(weight, gpus * per_gpu, gpus)
    physical, copies = replicate_experts(weight, gpus * per_gpu)
    pack, rank = balanced_packing((weight / copies)[physical], [per_gpu] * gpus)
    got: list[list[int]] = [[-1] * per_gpu for _ in range(gpus)]
    for expert, g, place in zip(physical, pack, rank, strict=True):
        got[g][place] = int(expert)
    assert got == want
    rows = rebalance_experts(weight[None], gpus * per_gpu, 1, 1, gpus)
    assert rows[0].tolist() == [e for gpu in want for e in gpu]


@pytest.mark.parametrize("seed", range(20))
def test_the_solver_on_equal_servers(seed: int) -> None:
    """On equal servers each holds at least the experts that EPLB gives it, layer by layer."""
    rng = np.random.default_rng(seed)
    servers, layers, experts = 4, 3, 10
    per_layer = int(rng.integers(3, 8))
    instance = Instance(
        ModelShape("m", (0, 1, 2), experts, 2, 1),
        tuple("abcd"),
        rng.gamma(0.5, size=(servers, layers, experts)),
        ((per_layer * layers,),) * servers,
    )
    local = solve(instance, "eplb").local
    load = instance.activations.sum(axis=0)
    for layer in range(layers):
        for n, held in enumerate(published(load[layer], per_layer * servers, servers)):
            assert set(held) <= set(np.flatnonzero(local[n, layer]).tolist())
            assert local[n, layer].sum() == per_layer


@pytest.mark.parametrize("seed", range(30))
def test_layer_slots(seed: int) -> None:
    """Layers share a server's slots evenly, and every layer has room if the servers have any."""
    rng = np.random.default_rng(seed)
    servers, layers, experts = int(rng.integers(1, 6)), int(rng.integers(1, 6)), 7
    slots = rng.integers(0, layers * experts + 3, servers)
    slots[0] += max(0, layers * experts - int(slots.sum()))
    share = layer_slots(slots, layers, experts)
    assert share.sum(axis=1).tolist() == np.minimum(slots, layers * experts).tolist()
    assert (share.max(axis=1) - share.min(axis=1) <= 1).all()
    assert share.sum(axis=0).min() >= experts
    assert share.max() <= experts


def test_counts_must_divide() -> None:
    """Replicas that do not divide over GPUs, or too few of them, are refused."""
    with pytest.raises(ValueError, match="must be zero"):
        rebalance_experts(LOAD, 15, 1, 1, 8)
    with pytest.raises(ValueError, match="fewer replicas"):
        rebalance_experts(LOAD, 8, 1, 1, 8)
