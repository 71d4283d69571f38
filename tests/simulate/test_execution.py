"""Where layers execute (docs/design.md, section 10): spans, hidden states, token ids, places."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Link, PairLink
from prism_plan.execution_table import home_execution
from prism_plan.simulate.calibration import Calibration, GpuCurves
from prism_plan.simulate.engine_interface import Engine
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import (
    BYTES_PER_S,
    CURVES,
    ENGINES,
    HALF_RTT_S,
    LINK,
    OVERHEAD_S,
    TOKEN_BYTES,
    Ask,
    back_s,
    dense_s,
    expert_s,
    finished,
    holding,
    lines,
    make_cluster,
    make_model,
    make_requests,
    make_scenario,
    place,
)

pytestmark = pytest.mark.parametrize("engine", ENGINES)

D, E = dense_s(1), expert_s(1)
LAYER = D + E
ID_S = BYTES_PER_TOKEN_ID / BYTES_PER_S
ID = OVERHEAD_S + ID_S + HALF_RTT_S  # an id, from where it is ready to where it is needed
HOP = OVERHEAD_S + back_s(1) + HALF_RTT_S  # a hidden state without names, one way
ALL = [(0, 0), (1, 0), (2, 0)]


def spans(
    rows: Sequence[Sequence[int]], asks: Sequence[Ask], *, layers: int = 3, link: Link = LINK,
    **changes: Any,
) -> Scenario:  # fmt: skip
    """A scenario of one expert a layer, which every server holds, with an execution table."""
    servers = len(rows)
    cluster = make_cluster([1] * servers, link, **changes)
    held = holding(layers, 1, *([(layer, 0) for layer in range(layers)] for _ in rows))
    table = np.array(rows, np.int32)
    return make_scenario(make_model(layers, 1), cluster, held, asks, execution=table)


def sends(run: Engine) -> list[tuple[int, int, int]]:
    """(layer, from, to) of every message, in the order in which they are ready."""
    return [(event.layer, event.at, event.to) for event in run.log() if event.kind == 3]


# ------------------------------------------------------------------------------ the worked example

#: The network alone: 4,096 bytes a token, 500 Mbit/s, 1 ms, 0.2 ms a message; no work takes time.
EXAMPLE_LINK = Link(bandwidth_mbps=500, rtt_ms=1.0, call_overhead_ms=0.2)
NO_WORK = GpuCurves(dense_s=((1, 0.0), (2, 0.0)), expert_s=((1, 0.0), (2, 0.0)))


def example(rows: Sequence[Sequence[int]], home: int = 0, **figures: Any) -> Scenario:
    """The worked example of section 10: a prompt of 4 tokens and 2 decode steps at ``home``."""
    model = make_model(3, 1, hidden_size=2048)
    link = dataclasses.replace(EXAMPLE_LINK, **figures)
    cluster = make_cluster([1] * len(rows), link)
    token = [[0]] * 3
    requests = make_requests(cluster, [Ask(home, 0.0, [token] * 4, [token] * 2)], 3, 1)
    held = holding(3, 1, *([(layer, 0) for layer in range(3)] for _ in rows))
    return Scenario.build(
        place(model, cluster, held), requests, cluster, model,
        calibration=Calibration("no work", NO_WORK), execution=np.array(rows, np.int32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "home", "first_ms", "done_ms", "sent", "hops"),
    [
        ([[0, 1, 1], [1, 1, 1]], 0, 1.662, 4.593, 24_588, 6),
        ([[1, 1, 0], [1, 1, 1]], 0, 1.662, 4.594, 24_600, 6),
        ([[1, 1, 1], [1, 1, 1]], 0, 1.400, 1.400, 28, 4),
        ([[0, 0, 0], [0, 1, 2], [2, 2, 2]], 1, 3.325, 7.787, 49_188, 12),
    ],
    ids=["A B B", "B B A", "B B B", "A B C of B"],
)
def test_worked_example(
    engine: Any, rows: list[list[int]], home: int, first_ms: float, done_ms: float, sent: int,
    hops: int,
) -> None:  # fmt: skip
    """First token, completion, bytes and hops are those of section 10, to the microsecond."""
    outcome = finished(engine(example(rows, home)))
    assert round(1e3 * outcome.first_token_s[0], 3) == first_ms
    assert round(1e3 * outcome.done_s[0], 3) == done_ms
    assert outcome.bytes_out.sum() == outcome.bytes_in.sum() == sent
    assert outcome.hops.sum() == hops
    assert outcome.messages.sum() == outcome.remote_calls.sum() == outcome.waiting.sum() == 0


def test_ids_of_the_chain_come_home_one_by_one(engine: Any) -> None:
    """The second id of the chain A B C is at home, B, after 5.556 ms."""
    run = engine(example([[0, 0, 0], [0, 1, 2], [2, 2, 2]], 1), log=True)
    finished(run)
    at_home = [e.time_s for e in run.log() if e.kind == 4 and e.layer == 3 and e.to == 1]
    assert [round(1e3 * at_s, 3) for at_s in at_home] == [3.325, 5.556, 7.787]


def test_a_calibration_gives_hops_their_own_overhead(engine: Any) -> None:
    """With ``hop_overhead_ms`` 0.1 the four hops of B B B take 0.1 ms less each way."""
    outcome = finished(engine(example([[1, 1, 1], [1, 1, 1]], hop_overhead_ms=0.1)))
    assert round(1e3 * outcome.first_token_s[0], 3) == 1.2


# ------------------------------------------------------------------------------------ logs by hand


def test_one_span_elsewhere(engine: Any) -> None:
    """Layer 1 executes at server 1: hidden states there and back, and no id travels."""
    run = engine(spans([[0, 1, 0], [1, 1, 1]], [Ask(0, 0.0, [], [[[0]] * 3])]), log=True)
    outcome = finished(run)
    a = LAYER
    b = a + HOP + LAYER
    c = b + HOP + LAYER
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (a, "local", 0, 0, 0, 0),
        (a + OVERHEAD_S, "send", 0, 1, 0, 1),
        (a + OVERHEAD_S + back_s(1), "freed", 0, 1, 0, 1),
        (a + HOP, "arrived", 0, 1, 0, 1),
        (a + HOP + D, "dense", 0, 1, 1, 1),
        (b, "local", 0, 1, 1, 1),
        (b + OVERHEAD_S, "send", 0, 2, 1, 0),
        (b + OVERHEAD_S + back_s(1), "freed", 0, 2, 1, 0),
        (b + HOP, "arrived", 0, 2, 1, 0),
        (b + HOP + D, "dense", 0, 2, 0, 0),
        (c, "local", 0, 2, 0, 0),
    )
    assert outcome.done_s.tolist() == [3 * LAYER + 2 * HOP]
    assert outcome.bytes_out.tolist() == outcome.bytes_in.tolist() == [TOKEN_BYTES, TOKEN_BYTES]
    assert outcome.hops.tolist() == [[0, 1], [1, 0]]
    # the time of a layer counts the way to it
    assert outcome.layer_s.tolist() == [3 * LAYER + 2 * HOP, 0.0]


def test_all_on_one_other_server(engine: Any) -> None:
    """Prompt and decode elsewhere: the prompt's ids go there, each new id comes home.

    No pass waits for home: the second pass begins when the first token is made.
    """
    token = [[0]] * 3
    run = engine(spans([[1, 1, 1], [1, 1, 1]], [Ask(0, 0.0, [token] * 4, [token])]), log=True)
    outcome = finished(run)
    start = OVERHEAD_S + 4 * ID_S + HALF_RTT_S
    first = start + 3 * (dense_s(4) + expert_s(4))
    second = first + 3 * LAYER
    assert outcome.first_token_s.tolist() == [first + ID]
    assert outcome.done_s.tolist() == [second + ID]
    assert sends(run) == [(-1, 0, 1), (3, 1, 0), (3, 1, 0)]
    assert outcome.bytes_out.tolist() == [16, 8]
    assert outcome.layer_s.tolist() == [3 * LAYER, 0.0]  # ids belong to no layer
    assert outcome.calls.tolist() == [15, 0]  # they stay the home's calls
    assert outcome.gpu_busy_s[0] == 0.0
    begun = [e.time_s for e in run.log() if e.kind == 1 and e.layer == 0]
    assert begun == [start + dense_s(4), first + D]


def test_two_spans(engine: Any) -> None:
    """A B B: the id comes home and begins the next pass with one message."""
    token = [[0]] * 3
    run = engine(spans([[0, 1, 1], [1, 1, 1]], [Ask(0, 0.0, [token] * 2, [token])]), log=True)
    outcome = finished(run)
    wide = OVERHEAD_S + back_s(2) + HALF_RTT_S
    first = 3 * (dense_s(2) + expert_s(2)) + wide + ID
    assert outcome.first_token_s.tolist() == [first]
    assert outcome.done_s.tolist() == [first + 3 * LAYER + HOP + ID]
    assert sends(run) == [(1, 0, 1), (3, 1, 0), (1, 0, 1), (3, 1, 0)]


def test_the_driver_at_home(engine: Any) -> None:
    """B B A: the id is at home at once; the next pass begins when it arrives at the first span."""
    token = [[0]] * 3
    run = engine(spans([[1, 1, 0], [1, 1, 1]], [Ask(0, 0.0, [], [token] * 2)]), log=True)
    outcome = finished(run)
    first = ID + 3 * LAYER + HOP
    assert outcome.first_token_s.tolist() == [first]
    assert outcome.done_s.tolist() == [first + ID + 3 * LAYER + HOP]
    assert sends(run) == [(-1, 0, 1), (2, 1, 0), (3, 0, 1), (2, 1, 0)]
    assert outcome.layer_s.tolist() == [2 * (3 * LAYER + HOP), 0.0]


def test_a_chain_of_three(engine: Any) -> None:
    """A B C of home D: two ids a token, that to the first span first; the last one only home."""
    token = [[0]] * 3
    rows = [[0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 1, 2]]
    run = engine(spans(rows, [Ask(3, 0.0, [], [token] * 2)]), log=True)
    outcome = finished(run)
    made = ID + 3 * LAYER + 2 * HOP
    assert sends(run) == [
        (-1, 3, 0), (1, 0, 1), (2, 1, 2), (3, 2, 0), (3, 2, 3), (1, 0, 1), (2, 1, 2), (3, 2, 3),
    ]  # fmt: skip
    # both are ready at once and share the uplink: the one home waits for the other
    assert outcome.first_token_s.tolist() == [made + ID + ID_S]
    assert outcome.done_s.tolist() == [made + ID + 3 * LAYER + 2 * HOP + ID]
    assert outcome.hops.tolist() == [[0, 2, 0, 0], [0, 0, 2, 0], [1, 0, 0, 2], [1, 0, 0, 0]]


def test_a_place_is_held_until_the_last_id_is_at_home(engine: Any) -> None:
    """One place at home: the second request starts when the first one's last id arrives.

    The executing server admits without limit: a request of its own starts when it arrives, and
    queues on the GPU only.
    """
    token = [[0]]
    asks = [Ask(0, 0.0, [], [token]), Ask(0, 0.0, [], [token]), Ask(1, 0.5, [], [token])]
    outcome = finished(engine(spans([[1], [1]], asks, layers=1)))
    answered = ID + 2 * D + E + ID
    own = ID + 2 * D + 2 * E
    assert outcome.start_s.tolist() == [0.0, answered, 0.5]
    assert outcome.done_s.tolist() == [answered, own + D + E + ID, own]


def test_concurrency_of_two(engine: Any) -> None:
    """Two requests at once on one executing server: their dense parts queue on its GPU."""
    token = [[0]]
    asks = [Ask(0, 0.0, [], [token]), Ask(0, 0.0, [], [token])]
    outcome = finished(engine(spans([[1], [1]], asks, layers=1, concurrency=2)))
    # the second id is sent behind the first; its dense part waits for the other request's
    assert outcome.done_s.tolist() == [ID + 2 * D + E + ID, ID + 2 * D + 2 * E + ID]


def test_short_messages_pass_long_ones(engine: Any) -> None:
    """Ids are short: one does not wait for hidden states that occupy the same uplink."""
    token = [[0]] * 3
    wide = [Ask(0, 0.0, [token] * 4, []), Ask(2, 0.0, [], [token])]
    rows = [[0, 1, 1], [1, 1, 1], [0, 0, 0]]

    def first_token_s(short_kb: float) -> float:
        link = dataclasses.replace(LINK, short_kb=short_kb)
        held = {"concurrency": 2}
        return float(finished(engine(spans(rows, wide, link=link, **held))).first_token_s[1])

    assert first_token_s(0.016) <= first_token_s(0.0)


def test_unequal_links(engine: Any) -> None:
    """Each hop pays the half round trip and the rate of its own pair."""
    token = [[0]] * 2
    cluster = make_cluster([1, 1, 1], LINK)
    slow = PairLink(0, 1, bandwidth_mbps=8e-6 * BYTES_PER_S / 2, rtt_ms=4e3 * HALF_RTT_S)
    cluster = dataclasses.replace(cluster, pair_links=(slow,))
    held = holding(2, 1, *([(0, 0), (1, 0)] for _ in range(3)))
    table = np.array([[1, 2], [1, 1], [2, 2]], np.int32)
    scenario = make_scenario(
        make_model(2, 1), cluster, held, [Ask(0, 0.0, [], [token])], execution=table
    )
    outcome = finished(engine(scenario))
    start = OVERHEAD_S + 2 * ID_S + 2 * HALF_RTT_S
    assert outcome.done_s.tolist() == [start + LAYER + HOP + LAYER + ID]


# -------------------------------------------------------------------------------- calls and homes


def test_calls_from_the_execution_server(engine: Any) -> None:
    """What the execution server lacks it calls itself, and the answer comes back to it."""
    execution = np.array([[1], [1], [2]], np.int32)
    held = holding(1, 1, [], [], [(0, 0)])
    scenario = make_scenario(
        make_model(1, 1), make_cluster([1, 1, 1]), held, [Ask(0, 0.0, [], [[[0]]])],
        execution=execution,
    )  # fmt: skip
    outcome = finished(engine(scenario))
    assert outcome.messages.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert outcome.hops.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert outcome.bytes_out.tolist() == [4, 260 + 4, 256]
    assert outcome.remote_calls.tolist() == outcome.waiting.tolist() == [1, 0, 0]


def test_at_home_nothing_hops(engine: Any) -> None:
    """The home table is the default: the same run, and only calls on the links."""
    asks = [Ask(n % 2, 0.1 * n, [[[0]] * 3] * 2, [[[0]] * 3]) for n in range(4)]
    model, cluster = make_model(3, 1), make_cluster([1, 1])
    held = holding(3, 1, [(0, 0), (2, 0)], [(1, 0)])
    runs = [
        engine(make_scenario(model, cluster, held, asks, execution=execution), log=True)
        for execution in (None, home_execution(2, 3))
    ]
    outcomes = [finished(run) for run in runs]
    assert runs[0].log() == runs[1].log()
    assert len(sends(runs[0])) == outcomes[0].messages.sum() > 0
    assert outcomes[0].hops.sum() == 0
    assert home_execution(2, 3).tolist() == [[0, 0, 0], [1, 1, 1]]


# --------------------------------------------------------------------------------------- attention


def test_attention_reads_the_cache_where_the_layer_executes(engine: Any) -> None:
    """Decode steps take longer with every token before them; a calibration adds nothing.

    Weights of 8,192 bytes and 1,024 bytes of keys and values a token at 8 KiB/s: 1 s and 1/8 s.
    """
    gpu = make_cluster([1]).servers[0].gpus[0]
    slow = dataclasses.replace(
        gpu, memory_bandwidth_gbs=8192 / 1e9, tflops=1e3, launch_overhead_us=0.0
    )
    cluster = make_cluster([1])
    cluster = dataclasses.replace(
        cluster, servers=(dataclasses.replace(cluster.servers[0], gpus=(slow,)),)
    )
    model = make_model(1, 1, kv_bytes_per_token=1024)
    token = [[0]]
    asks = [Ask(0, 0.0, [token] * 2, [token] * 2)]
    held = holding(1, 1, [(0, 0)])
    outcome = finished(engine(make_scenario(model, cluster, held, asks, curves=None)))
    assert outcome.first_token_s[0] == pytest.approx(2.0)  # a prompt reads no cache
    assert outcome.done_s[0] == pytest.approx(2.0 + (1 + 2 / 8 + 1) + (1 + 3 / 8 + 1))
    measured = finished(engine(make_scenario(model, cluster, held, asks, curves=CURVES)))
    assert measured.done_s[0] == dense_s(2) + expert_s(2) + 2 * LAYER
