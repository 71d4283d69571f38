"""The baseline without help (docs/design.md, section 4, rule 8): loads into LRU slots, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import (
    ENGINES,
    EXPERT_BYTES,
    LOAD_S,
    Ask,
    Token,
    dense_s,
    expert_s,
    finished,
    holding,
    make_cluster,
    make_model,
    make_scenario,
)

D, E = dense_s(1), expert_s(1)


def offload(
    tokens: Sequence[Token],
    held: np.ndarray,
    capacity: int,
    *,
    prefill: bool = False,
    blocks: bool = False,
) -> Scenario:
    """One request of one server, its tokens as a prompt or one by one."""
    gpus, layers, experts = held.shape
    cluster = make_cluster([gpus])
    if blocks:
        changed = tuple(
            dataclasses.replace(gpu, load_blocks_compute=True) for gpu in cluster.servers[0].gpus
        )
        cluster = Cluster(
            "c", (dataclasses.replace(cluster.servers[0], gpus=changed),), cluster.link
        )
    ask = Ask(0, 0.0, tokens, []) if prefill else Ask(0, 0.0, [], tokens)
    model = make_model(layers, experts, len(tokens[0][0]))
    return make_scenario(model, cluster, held, [ask], capacity=capacity, offload=True)


def step_ends(run: Any) -> list[float]:
    """When each layer's experts were done."""
    return [event.time_s for event in run.log() if event.kind == 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_least_recently_used(engine: Any) -> None:
    """Two slots with experts 0 and 1: each miss takes the slot that was used longest ago.

    Calls 0, 2, 0, 1, 2: hit; 2 takes the place of 1, never used; hit; 1 that of 2; 2 that of 0.
    """
    run = engine(
        offload([[[e]] for e in (0, 2, 0, 1, 2)], holding(1, 3, [(0, 0), (0, 1)]), 2), log=True
    )
    outcome = finished(run)
    hit, miss = D + E, D + LOAD_S + E
    assert step_ends(run) == np.cumsum([hit, miss, hit, miss, miss]).tolist()
    assert (outcome.loads, outcome.loaded_bytes) == (3, 3 * EXPERT_BYTES)
    assert outcome.bytes_out.tolist() == [0]
    assert outcome.gpu_busy_s.tolist() == [5 * (D + E)]  # loads are on a channel of their own


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_slots_are_taken_first(engine: Any) -> None:
    """Three slots with experts 0, 1 and nothing: the first miss evicts nobody.

    Calls 2, 0, 3, 2, 0, 1: 2 takes the empty slot; hit; 3 that of 1, never used; two hits; 1 that
    of 3.
    """
    run = engine(
        offload([[[e]] for e in (2, 0, 3, 2, 0, 1)], holding(1, 4, [(0, 0), (0, 1)]), 3), log=True
    )
    outcome = finished(run)
    hit, miss = D + E, D + LOAD_S + E
    assert step_ends(run) == np.cumsum([miss, hit, miss, hit, hit, miss]).tolist()
    assert outcome.loads == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_loads_of_a_gpu_come_one_after_the_other(engine: Any) -> None:
    """Two experts missing and one there: it works while they load; each works once it is loaded."""
    run = engine(offload([[[1, 2, 0]]], holding(1, 3, [(0, 0)]), 3), log=True)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + 2 * LOAD_S + E]
    assert outcome.gpu_busy_s.tolist() == [D + 3 * E]
    assert outcome.loads == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_loads_of_two_gpus_side_by_side(engine: Any) -> None:
    """One empty slot on each of two GPUs: both load at once."""
    held = holding(1, 3, [(0, 0)], [])
    run = engine(offload([[[1, 2]]], held, 1), log=True)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + LOAD_S + E]
    assert outcome.served.tolist() == [1, 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_slots_beyond_the_number_of_experts_are_no_matter(engine: Any) -> None:
    """A billion slots a GPU run as one slot for each expert, and take no memory of their own."""
    tokens = [[[e]] for e in (0, 2, 0, 1, 2, 3)]
    held = holding(1, 4, [(0, 0), (0, 1)])
    logs = []
    for capacity in (4, 10**9):
        run = engine(offload(tokens, held, capacity), log=True)
        finished(run)
        logs.append(run.log())
    assert logs[0] == logs[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_more_experts_than_slots(engine: Any) -> None:
    """One slot, three experts of a layer: each load waits until the slot's expert has worked."""
    run = engine(offload([[[0, 1, 2]]], holding(1, 3, [(0, 2)]), 1), log=True)
    outcome = finished(run)
    # 2 is resident and works first; then 0 and 1 stream through the slot
    assert outcome.done_s.tolist() == [D + E + 2 * (LOAD_S + E)]
    assert outcome.loads == 2
    # the last one is still there
    run = engine(offload([[[0]], [[1]], [[1]]], holding(1, 2, [(0, 0)]), 1), log=True)
    finished(run)
    assert step_ends(run) == np.cumsum([D + E, D + LOAD_S + E, D + E]).tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_loads_an_expert_once(engine: Any) -> None:
    """Four tokens of a prompt that call one expert: one load, one batch."""
    run = engine(offload([[[1]]] * 4, holding(1, 2, [(0, 0)]), 2, prefill=True), log=True)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [dense_s(4) + LOAD_S + expert_s(4)]
    assert (outcome.loads, outcome.served.tolist()) == (1, [4])


@pytest.mark.parametrize("engine", ENGINES)
def test_loads_that_block_the_gpu(engine: Any) -> None:
    """A load then begins when the GPU is free, and is work: nothing overlaps.

    Expert 0 works first (0.5 s); then 1 and 2 load and work in turn.
    """
    run = engine(offload([[[0, 1, 2]]], holding(1, 3, [(0, 0)]), 3, blocks=True), log=True)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + E + 2 * (LOAD_S + E)]
    assert outcome.gpu_busy_s.tolist() == [D + E + 2 * (LOAD_S + E)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_copy_on_a_server_is_no_use(engine: Any) -> None:
    """Expert 0 on both GPUs: the second one's slot begins empty, so that 1 loads into it."""
    held = holding(1, 2, [(0, 0)], [(0, 0)])
    run = engine(offload([[[e]] for e in (0, 1, 0, 1)], held, 1), log=True)
    outcome = finished(run)
    assert outcome.loads == 1
    assert outcome.served.tolist() == [2, 2]
    assert step_ends(run) == np.cumsum([D + E, D + LOAD_S + E, D + E, D + E]).tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_servers_do_not_help_each_other(engine: Any) -> None:
    """What the neighbour holds is loaded all the same; no migration is taken."""
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    asks = [Ask(0, 0.0, [], [[[1]]]), Ask(1, 0.0, [], [[[1]]])]
    scenario = make_scenario(
        make_model(1, 2), make_cluster([1, 1]), held, asks, capacity=1, offload=True
    )
    run = engine(scenario)
    with pytest.raises(ValueError, match="nothing to migrate"):
        run.migrate([])
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + LOAD_S + E, D + E]
    assert outcome.messages.sum() == 0


def test_a_server_needs_a_slot() -> None:
    """Offloading without room for one expert is refused, and the server named."""
    with pytest.raises(InputError, match=r"server .s0. has no slots; expected room for one"):
        ReferenceEngine(offload([[[0]]], holding(1, 1, []), 0))
