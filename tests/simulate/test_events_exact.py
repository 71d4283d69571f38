"""Tiny scenarios whose every event is known: times from the figures of `builders`, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prism_plan.cluster import Cluster, PairLink
from tests.simulate.builders import (
    ENGINES,
    GPU,
    HALF_RTT_S,
    LINK,
    OVERHEAD_S,
    Ask,
    back_s,
    dense_s,
    expert_s,
    finished,
    holding,
    lines,
    make_cluster,
    make_model,
    make_scenario,
    out_s,
)

pytestmark = pytest.mark.parametrize("engine", ENGINES)

#: One decode step of one layer that calls expert 0, or 1.
ZERO, ONE = [[[0]]], [[[1]]]
#: From the end of the dense part until a message has gone out, idle links, one token.
D, E = dense_s(1), expert_s(1)
OUT = OVERHEAD_S + out_s(1) + HALF_RTT_S
BACK = back_s(1) + HALF_RTT_S


def test_one_server(engine: Any) -> None:
    """Two layers, two prompt tokens and one step: dense and experts in turn, nothing else."""
    model = make_model(2, 2)
    held = holding(2, 2, [(0, 0), (0, 1), (1, 0), (1, 1)])
    # in layer 0 both tokens call expert 0; in layer 1 each calls its own
    asks = [Ask(0, 1.0, [[[0], [0]], [[0], [1]]], [[[1], [1]]])]
    run = engine(make_scenario(model, make_cluster([1]), held, asks), log=True)
    outcome = finished(run)
    a = 1.0 + dense_s(2)
    b = a + expert_s(2)
    c = b + dense_s(2)
    d = c + 2 * expert_s(1)
    assert run.log() == lines(
        (1.0, "arrival", 0, -1, 0, 0),
        (a, "dense", 0, 0, 0, 0),
        (b, "local", 0, 0, 0, 0),
        (c, "dense", 0, 1, 0, 0),
        (d, "local", 0, 1, 0, 0),
        (d + D, "dense", 0, 0, 0, 0),
        (d + D + E, "local", 0, 0, 0, 0),
        (d + 2 * D + E, "dense", 0, 1, 0, 0),
        (d + 2 * D + 2 * E, "local", 0, 1, 0, 0),
    )
    assert outcome.first_token_s.tolist() == [d]
    assert outcome.done_s.tolist() == [d + 2 * D + 2 * E]
    assert outcome.gpu_busy_s.tolist() == [outcome.done_s[0] - 1.0]
    assert (outcome.layer_steps.tolist(), outcome.layer_s.tolist()) == ([2, 0], [2 * (D + E), 0.0])


def test_one_remote_expert(engine: Any) -> None:
    """Dense, overhead, out over the link, half a round trip, expert, back, half a round trip."""
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    run = engine(
        make_scenario(make_model(1, 2), make_cluster([1, 1]), held, [Ask(0, 0.0, [], ONE)]),
        log=True,
    )
    outcome = finished(run)
    there = D + OVERHEAD_S + out_s(1) + HALF_RTT_S
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (D + OVERHEAD_S, "send", 0, 0, 0, 1),
        (D + OVERHEAD_S + out_s(1), "freed", 0, 0, 0, 1),
        (there, "arrived", 0, 0, 0, 1),
        (there + E, "computed", 0, 0, 0, 1),
        (there + E + back_s(1), "freed", 0, 0, 0, 1),
        (there + E + back_s(1) + HALF_RTT_S, "returned", 0, 0, 0, 1),
    )
    assert outcome.bytes_out.tolist() == [260, 256]
    assert outcome.bytes_in.tolist() == [256, 260]
    assert outcome.up_busy_s.tolist() == [out_s(1), back_s(1)]
    assert outcome.down_busy_s.tolist() == [back_s(1), out_s(1)]
    assert outcome.messages.tolist() == [[0, 1], [0, 0]]


def test_prefill_to_two_destinations(engine: Any) -> None:
    """Three prompt tokens: one message a server, its tokens together; the uplink sends in turn.

    Tokens call experts (0, 1), (1, 2), (2, 3). Server 0 holds 0, server 1 holds 1, server 2 holds
    2 and 3: server 1 gets two tokens with two names, server 2 two tokens with three names.
    """
    held = holding(1, 4, [(0, 0)], [(0, 1)], [(0, 2), (0, 3)])
    asks = [Ask(0, 0.0, [[[0, 1]], [[1, 2]], [[2, 3]]])]
    scenario = make_scenario(make_model(1, 4, 2), make_cluster([1, 1, 1]), held, asks)
    run = engine(scenario, log=True)
    outcome = finished(run)
    dense = dense_s(3)
    sent_1 = dense + OVERHEAD_S + out_s(2, 2)
    sent_2 = sent_1 + out_s(2, 3)
    there_1, there_2 = sent_1 + HALF_RTT_S, sent_2 + HALF_RTT_S
    done_1 = there_1 + expert_s(2)
    done_2 = there_2 + expert_s(2) + expert_s(1)
    back_1 = done_1 + back_s(2)
    back_2 = max(done_2, back_1) + back_s(2)
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (dense, "dense", 0, 0, 0, 0),
        (dense + OVERHEAD_S, "send", 0, 0, 0, 1),
        (dense + OVERHEAD_S, "send", 0, 0, 0, 2),
        (dense + E, "local", 0, 0, 0, 0),
        (sent_1, "freed", 0, 0, 0, 1),
        (there_1, "arrived", 0, 0, 0, 1),
        (sent_2, "freed", 0, 0, 0, 2),
        (there_2, "arrived", 0, 0, 0, 2),
        (done_1, "computed", 0, 0, 0, 1),
        (back_1, "freed", 0, 0, 0, 1),
        (back_1 + HALF_RTT_S, "returned", 0, 0, 0, 1),
        (done_2, "computed", 0, 0, 0, 2),
        (back_2, "freed", 0, 0, 0, 2),
        (back_2 + HALF_RTT_S, "returned", 0, 0, 0, 2),
    )
    assert outcome.served.tolist() == [1, 2, 3]
    assert outcome.destinations.tolist() == [4, 0, 0]
    assert outcome.waiting.tolist() == [3, 0, 0]


def test_two_senders_queue_on_one_downlink(engine: Any) -> None:
    """Servers 0 and 1 call server 2 at once: the second message waits for its downlink.

    It starts when the first has ended, half a round trip before that one arrives.
    """
    held = holding(1, 2, [(0, 0)], [(0, 0)], [(0, 1)])
    asks = [Ask(0, 0.0, [], ONE), Ask(1, 0.0, [], ONE)]
    run = engine(make_scenario(make_model(1, 2), make_cluster([1, 1, 1]), held, asks), log=True)
    outcome = finished(run)
    ready = D + OVERHEAD_S
    sent_0 = ready + out_s(1)
    sent_1 = sent_0 + out_s(1)
    done_0 = sent_0 + HALF_RTT_S + E
    done_1 = done_0 + E
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (0.0, "arrival", 1, -1, 1, 1),
        (D, "dense", 0, 0, 0, 0),
        (D, "dense", 1, 0, 1, 1),
        (ready, "send", 0, 0, 0, 2),
        (ready, "send", 1, 0, 1, 2),
        (sent_0, "freed", 0, 0, 0, 2),
        (sent_0 + HALF_RTT_S, "arrived", 0, 0, 0, 2),
        (sent_1, "freed", 1, 0, 1, 2),
        (sent_1 + HALF_RTT_S, "arrived", 1, 0, 1, 2),
        (done_0, "computed", 0, 0, 0, 2),
        (done_0 + back_s(1), "freed", 0, 0, 0, 2),
        (done_0 + BACK, "returned", 0, 0, 0, 2),
        (done_1, "computed", 1, 0, 1, 2),
        (done_1 + back_s(1), "freed", 1, 0, 1, 2),
        (done_1 + BACK, "returned", 1, 0, 1, 2),
    )
    assert outcome.down_busy_s[2] == 2 * out_s(1)
    assert outcome.up_busy_s.tolist() == [out_s(1), out_s(1), 2 * back_s(1)]


def test_two_messages_queue_on_one_uplink(engine: Any) -> None:
    """Two requests of server 0 at once, to servers 1 and 2: its GPU and its uplink are FIFO."""
    held = holding(1, 3, [(0, 0)], [(0, 1)], [(0, 2)])
    asks = [Ask(0, 0.0, [], ONE), Ask(0, 0.0, [], [[[2]]])]
    # dense work takes 1 s, a message 65/256 s: on a link 8 times as slow the messages overlap
    slow = dataclasses.replace(LINK, bandwidth_mbps=LINK.bandwidth_mbps / 8)
    cluster = make_cluster([1, 1, 1], slow, concurrency=2)
    run = engine(make_scenario(make_model(1, 3), cluster, held, asks), log=True)
    finished(run)
    out, back = 8 * out_s(1), 8 * back_s(1)
    sent_0 = D + OVERHEAD_S + out
    sent_1 = sent_0 + out
    there_0, there_1 = sent_0 + HALF_RTT_S, sent_1 + HALF_RTT_S
    back_0 = there_0 + E + back
    back_1 = max(there_1 + E, back_0) + back
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (0.0, "arrival", 1, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (D + OVERHEAD_S, "send", 0, 0, 0, 1),
        (2 * D, "dense", 1, 0, 0, 0),
        (2 * D + OVERHEAD_S, "send", 1, 0, 0, 2),
        (sent_0, "freed", 0, 0, 0, 1),
        (there_0, "arrived", 0, 0, 0, 1),
        (there_0 + E, "computed", 0, 0, 0, 1),
        (sent_1, "freed", 1, 0, 0, 2),
        (there_1, "arrived", 1, 0, 0, 2),
        (back_0, "freed", 0, 0, 0, 1),
        (there_1 + E, "computed", 1, 0, 0, 2),
        (back_0 + HALF_RTT_S, "returned", 0, 0, 0, 1),
        (back_1, "freed", 1, 0, 0, 2),
        (back_1 + HALF_RTT_S, "returned", 1, 0, 0, 2),
    )


def test_admission_is_first_come_first_served(engine: Any) -> None:
    """One place: requests wait in order of arrival, each until the one before is answered."""
    asks = [Ask(0, at_s, [], ZERO) for at_s in (0.0, 0.25, 0.5)]
    run = engine(
        make_scenario(make_model(1, 1), make_cluster([1]), holding(1, 1, [(0, 0)]), asks), log=True
    )
    outcome = finished(run)
    each = D + E
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (0.25, "arrival", 1, -1, 0, 0),
        (0.5, "arrival", 2, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (each, "local", 0, 0, 0, 0),
        (each + D, "dense", 1, 0, 0, 0),
        (2 * each, "local", 1, 0, 0, 0),
        (2 * each + D, "dense", 2, 0, 0, 0),
        (3 * each, "local", 2, 0, 0, 0),
    )
    assert outcome.start_s.tolist() == [0.0, each, 2 * each]
    # 1 present for 1/4 s, 2 for 1/4 s, 3 until the first is done, then 2, then 1
    assert outcome.present_s.tolist() == [0.25 + 0.5 + 3 * (each - 0.5) + 2 * each + each]


def test_at_one_time_an_arrival_comes_last(engine: Any) -> None:
    """A request that arrives as another is answered finds its place free; equals by order of push.

    The first request of each server ends at D + E, when the second ones arrive.
    """
    held = holding(1, 1, [(0, 0)], [(0, 0)])
    asks = [Ask(n, at_s, [], ZERO) for at_s in (0.0, D + E) for n in (0, 1)]
    run = engine(make_scenario(make_model(1, 1), make_cluster([1, 1]), held, asks), log=True)
    outcome = finished(run)
    end = D + E
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (0.0, "arrival", 1, -1, 1, 1),
        (D, "dense", 0, 0, 0, 0),
        (D, "dense", 1, 0, 1, 1),
        (end, "local", 0, 0, 0, 0),
        (end, "local", 1, 0, 1, 1),
        (end, "arrival", 2, -1, 0, 0),
        (end, "arrival", 3, -1, 1, 1),
        (end + D, "dense", 2, 0, 0, 0),
        (end + D, "dense", 3, 0, 1, 1),
        (end + end, "local", 2, 0, 0, 0),
        (end + end, "local", 3, 0, 1, 1),
    )
    assert outcome.start_s.tolist() == [0.0, 0.0, end, end]


def test_burst_passes_unshaped_and_refills(engine: Any) -> None:
    """A bucket of 500 bytes on each port: the first message is free, the next ones pay.

    Port rates are 1024 bytes/s, a message is 260 bytes out, 256 back. Server 0's uplink and server
    1's downlink have equal buckets, and so the other way.
    """
    link = dataclasses.replace(LINK, burst_kb=0.5)
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    asks = [Ask(0, 0.0, [], [[[1]], [[1]]])]
    run = engine(make_scenario(make_model(1, 2), make_cluster([1, 1], link), held, asks), log=True)
    outcome = finished(run)
    # first step: both ways for nothing, so that a transfer ends when it begins
    first = [D, D + OVERHEAD_S, D + OVERHEAD_S + HALF_RTT_S]
    computed = first[2] + E
    returned = computed + HALF_RTT_S
    # the bucket has been refilled long since: 240 + 1024 x (more than a second) > 500
    again = returned
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (first[0], "dense", 0, 0, 0, 0),
        (first[1], "send", 0, 0, 0, 1),
        (first[1], "freed", 0, 0, 0, 1),
        (first[2], "arrived", 0, 0, 0, 1),
        (computed, "computed", 0, 0, 0, 1),
        (computed, "freed", 0, 0, 0, 1),
        (returned, "returned", 0, 0, 0, 1),
        (again + first[0], "dense", 0, 0, 0, 0),
        (again + first[1], "send", 0, 0, 0, 1),
        (again + first[1], "freed", 0, 0, 0, 1),
        (again + first[2], "arrived", 0, 0, 0, 1),
        (again + computed, "computed", 0, 0, 0, 1),
        (again + computed, "freed", 0, 0, 0, 1),
        (again + returned, "returned", 0, 0, 0, 1),
    )
    assert outcome.up_busy_s.tolist() == [0.0, 0.0]
    assert outcome.bytes_out.tolist() == [520, 512]


def test_burst_is_used_up(engine: Any) -> None:
    """A prompt of 4 tokens (1040 bytes out, 1024 back) past a bucket of 512 bytes.

    Out: 512 pass at once, 528 at 1024 bytes/s; meanwhile the bucket refills at the same rate, and
    all of that goes into this message. A second message sent t seconds after the first one's end
    finds 1024 t bytes in the bucket.
    """
    link = dataclasses.replace(LINK, burst_kb=0.512)
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    asks = [Ask(0, 0.0, [[[1]]] * 4), Ask(0, 0.0, [[[1]]] * 4)]
    cluster = make_cluster([1, 1], link, concurrency=2)
    run = engine(make_scenario(make_model(1, 2), cluster, held, asks), log=True)
    outcome = finished(run)
    dense, expert = dense_s(4), expert_s(4)
    begin_0 = dense + OVERHEAD_S
    end_0 = begin_0 + 528 / 1024
    begin_1 = 2 * dense + OVERHEAD_S
    assert begin_1 > end_0
    in_bucket = min(512.0, 1024 * (begin_1 - end_0))
    end_1 = begin_1 + (1040 - in_bucket) / 1024
    assert in_bucket == 512.0  # 1.23 s are enough to fill it
    arrivals = [event.time_s for event in run.log() if event.kind == 4]
    assert arrivals == [end_0 + HALF_RTT_S, end_1 + HALF_RTT_S]
    assert outcome.up_busy_s.tolist() == [2 * 528 / 1024, 2 * 512 / 1024]
    assert outcome.done_s[0] == end_0 + HALF_RTT_S + expert + 512 / 1024 + HALF_RTT_S


def test_burst_between_refills(engine: Any) -> None:
    """Two messages back to back: the second finds the rest of the bucket and what dripped in since.

    Dense work of one token takes 1 s, that of the second request ends 1 s later. The ports of
    server 0 fill at 64 bytes/s: 300 - 260 = 40 bytes are left, 64 drip in, 156 are shaped.
    """
    link = dataclasses.replace(LINK, burst_kb=0.3, bandwidth_mbps=LINK.bandwidth_mbps / 16)
    held = holding(1, 2, [(0, 0)], [(0, 1)])
    asks = [Ask(0, 0.0, [], ONE), Ask(0, 0.0, [], ONE)]
    cluster = make_cluster([1, 1], link, concurrency=2)
    run = engine(make_scenario(make_model(1, 2), cluster, held, asks), log=True)
    outcome = finished(run)
    arrivals = [event.time_s for event in run.log() if event.kind == 4]
    begin = D + OVERHEAD_S
    assert arrivals == [begin + HALF_RTT_S, begin + 1.0 + 156 / 64 + HALF_RTT_S]
    assert outcome.up_busy_s[0] == 156 / 64


def test_a_pair_of_its_own(engine: Any) -> None:
    """A pair with half the rate and three times the round trip; others keep the default."""
    pair = PairLink(0, 2, LINK.bandwidth_mbps / 2, 3 * LINK.rtt_ms)
    cluster = dataclasses.replace(make_cluster([1, 1, 1]), pair_links=(pair,))
    held = holding(1, 3, [(0, 0)], [(0, 1)], [(0, 2)])
    asks = [Ask(0, 0.0, [], [[[1]], [[2]]])]
    run = engine(make_scenario(make_model(1, 3), cluster, held, asks), log=True)
    outcome = finished(run)
    usual = D + OUT + E + BACK
    other = D + OVERHEAD_S + 2 * out_s(1) + 3 * HALF_RTT_S + E + 2 * back_s(1) + 3 * HALF_RTT_S
    assert outcome.first_token_s.tolist() == [usual]
    assert outcome.done_s.tolist() == [usual + other]


@pytest.mark.parametrize("local_experts", [1, 4])
def test_the_slowest_part_ends_the_layer(engine: Any, local_experts: int) -> None:
    """Local experts run while the message is away, whichever takes longer.

    One local expert takes 0.5 s; away are 1/32 + 65/256 + 1/16 + 1/2 + 1/4 + 1/16 = 1.16 s; four
    local ones take 2 s.
    """
    held = holding(1, 5, [(0, e) for e in range(4)], [(0, 4)])
    asks = [Ask(0, 0.0, [], [[[*range(local_experts), 4]]])]
    model = make_model(1, 5, local_experts + 1)
    run = engine(make_scenario(model, make_cluster([1, 1]), held, asks), log=True)
    outcome = finished(run)
    local, away = D + local_experts * E, D + OUT + E + BACK
    last_two = [(event.time_s, event.kind) for event in run.log()][-2:]
    if local_experts == 1:
        assert outcome.done_s.tolist() == [away]
        assert local < D + OUT + E
    else:
        assert last_two == [(away, 6), (local, 2)]
        assert outcome.done_s.tolist() == [local]


def test_gpus_of_a_server_work_side_by_side(engine: Any) -> None:
    """Two experts on GPU 0 (also dense) and one on GPU 1: the layer takes as long as GPU 0."""
    held = holding(1, 3, [(0, 0), (0, 1)], [(0, 2), (0, 1)])
    asks = [Ask(0, 0.0, [], [[[2, 1, 0]]])]
    run = engine(make_scenario(make_model(1, 3, 3), make_cluster([2]), held, asks), log=True)
    outcome = finished(run)
    assert outcome.done_s.tolist() == [D + 2 * E]
    assert outcome.gpu_busy_s.tolist() == [D + 2 * E, E]
    assert outcome.served.tolist() == [2, 1]  # expert 1 by the first GPU that holds it


def test_dense_work_is_on_the_dense_gpu(engine: Any) -> None:
    """With `dense` on GPU 1 the dense part runs there, and experts on GPU 0 beside it."""
    cluster = make_cluster([2])
    gpus = (GPU, dataclasses.replace(GPU, dense=True))
    cluster = Cluster("c", (dataclasses.replace(cluster.servers[0], gpus=gpus),), LINK)
    held = holding(1, 1, [(0, 0)], [])
    asks = [Ask(0, 0.0, [], [*ZERO, *ZERO])]
    outcome = finished(engine(make_scenario(make_model(1, 1), cluster, held, asks)))
    assert outcome.gpu_busy_s.tolist() == [2 * E, 2 * D]


def test_remote_calls_and_own_work_share_a_gpu(engine: Any) -> None:
    """A GPU takes a remote call and its own dense work in the order in which they come.

    Server 1's own request arrives just before the call does: the call waits for its dense part.
    """
    held = holding(1, 2, [(0, 0)], [(0, 0), (0, 1)])
    there = D + OUT
    asks = [Ask(0, 0.0, [], ONE), Ask(1, there - 0.25, [], ZERO)]
    run = engine(make_scenario(make_model(1, 2), make_cluster([1, 1]), held, asks), log=True)
    outcome = finished(run)
    own_dense = there - 0.25 + D
    call = own_dense + E
    own_expert = call + E
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (D + OVERHEAD_S, "send", 0, 0, 0, 1),
        (there - 0.25, "arrival", 1, -1, 1, 1),
        (there - HALF_RTT_S, "freed", 0, 0, 0, 1),
        (there, "arrived", 0, 0, 0, 1),
        (own_dense, "dense", 1, 0, 1, 1),
        (call, "computed", 0, 0, 0, 1),
        (call + back_s(1), "freed", 0, 0, 0, 1),
        (call + BACK, "returned", 0, 0, 0, 1),
        (own_expert, "local", 1, 0, 1, 1),
    )
    assert outcome.gpu_busy_s.tolist() == [D, D + 2 * E]
