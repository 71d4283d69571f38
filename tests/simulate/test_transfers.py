"""Which message goes next: links are work-conserving (docs/design.md, section 4, rule 3).

A message begins when its sender's uplink and its receiver's downlink are both free; of those that
wait, the one that was ready first; one that cannot begin yet does not hold up those behind it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.events import Log
from prism_plan.simulate.network import BYTES_PER_CALL, BYTES_PER_TOKEN_ID
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import (
    BYTES_PER_S,
    ENGINES,
    HALF_RTT_S,
    KINDS,
    LINK,
    OVERHEAD_S,
    Ask,
    back_s,
    contended_scenario,
    dense_s,
    differing,
    expert_s,
    finished,
    holding,
    lines,
    make_cluster,
    make_model,
    make_scenario,
    out_s,
)

# ------------------------------------------------------------------------------------------ by hand

D, E, H = dense_s(1), expert_s(1), HALF_RTT_S
#: A decode step of one layer whose expert is at server 2, or 3.
TO_2, TO_3 = [[[0]]], [[[1]]]
HELD = holding(1, 2, [], [], [(0, 0)], [(0, 1)])


def slow_cluster(times: int) -> Cluster:
    """4 servers of 3 places; links so many times as slow: work takes 1 s, a message 65/256 s."""
    slow = dataclasses.replace(LINK, bandwidth_mbps=LINK.bandwidth_mbps / times)
    return make_cluster([1] * 4, slow, concurrency=3)


def run(engine: Any, times: int, asks: list[Ask]) -> Log:
    """The log of a run in which server 2 holds expert 0 and server 3 expert 1."""
    ran = engine(make_scenario(make_model(1, 2), slow_cluster(times), HELD, asks), log=True)
    finished(ran)
    return ran.log()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_blocked_message_holds_up_nobody(engine: Any) -> None:
    """Server 1 sends to 2; server 0 has a message for 2, then one for 3, which goes at once.

    The first one, held up by the downlink of 2 until 3.06 s, then waits for the uplink of 0, which
    the other took at 2.53 s. Reserved in order of readiness, the uplink would stay idle meanwhile.
    """
    out, back = 8 * out_s(1), 8 * back_s(1)
    log = run(engine, 8, [Ask(1, 0.0, [], TO_2), Ask(0, 0.5, [], TO_2), Ask(0, 0.5, [], TO_3)])
    ready = [D + OVERHEAD_S, 0.5 + D + OVERHEAD_S, 0.5 + 2 * D + OVERHEAD_S]
    sent_0 = ready[0] + out
    sent_2 = ready[2] + out
    sent_1 = sent_2 + out
    assert ready[1] < ready[2] < sent_0 < sent_2
    done_0, done_1, done_2 = sent_0 + H + E, sent_1 + H + E, sent_2 + H + E
    assert log == lines(
        (0.0, "arrival", 0, -1, 1, 1),
        (0.5, "arrival", 1, -1, 0, 0),
        (0.5, "arrival", 2, -1, 0, 0),
        (D, "dense", 0, 0, 1, 1),
        (ready[0], "send", 0, 0, 1, 2),
        (0.5 + D, "dense", 1, 0, 0, 0),
        (ready[1], "send", 1, 0, 0, 2),
        (0.5 + 2 * D, "dense", 2, 0, 0, 0),
        (ready[2], "send", 2, 0, 0, 3),
        (sent_0, "freed", 0, 0, 1, 2),
        (sent_0 + H, "arrived", 0, 0, 1, 2),
        (done_0, "computed", 0, 0, 1, 2),
        (sent_2, "freed", 2, 0, 0, 3),
        (sent_2 + H, "arrived", 2, 0, 0, 3),
        (done_2, "computed", 2, 0, 0, 3),
        (done_0 + back, "freed", 0, 0, 1, 2),
        (done_0 + back + H, "returned", 0, 0, 1, 2),
        (sent_1, "freed", 1, 0, 0, 2),
        (sent_1 + H, "arrived", 1, 0, 0, 2),
        (done_2 + back, "freed", 2, 0, 0, 3),
        (done_1, "computed", 1, 0, 0, 2),
        (done_2 + back + H, "returned", 2, 0, 0, 3),
        (done_1 + back, "freed", 1, 0, 0, 2),
        (done_1 + back + H, "returned", 1, 0, 0, 2),
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("short_kb", [0.0, 0.27])
def test_a_short_message_does_not_wait_for_a_long_one(engine: Any, short_kb: float) -> None:
    """A prompt of 4 tokens goes to server 2; one token's message follows, and another one.

    Where messages below 270 bytes are short, the second one goes beside the prompt's, which takes
    no longer for it, and is late by the time of 270 bytes, or of what is left of it; the third one
    begins behind the second. Otherwise each waits for all before it.
    """
    link = dataclasses.replace(LINK, bandwidth_mbps=LINK.bandwidth_mbps / 16, short_kb=short_kb)
    cluster = make_cluster([1] * 4, link, concurrency=3)
    prompt = [[[0]]] * 4
    asks = [Ask(0, 0.0, prompt, []), Ask(1, 3.0, [], TO_2), Ask(3, 3.0, [], TO_2)]
    held = holding(1, 2, [], [], [(0, 0)], [(0, 1)])
    ran = engine(make_scenario(make_model(1, 2), cluster, held, asks), log=True)
    finished(ran)
    arrived = {e.request: e.time_s - H for e in ran.log() if KINDS[e.kind] == "arrived"}
    out = 16 * out_s(1)
    long_ends = dense_s(4) + OVERHEAD_S + 4 * out
    ready = 3.0 + D + OVERHEAD_S
    begins = ready if short_kb else long_ends
    queue_s = 270 * 16 / BYTES_PER_S if short_kb else 0.0
    late = [min(queue_s, long_ends - ready), min(queue_s, long_ends - ready - out)]
    assert ready + 2 * out < long_ends
    assert arrived == pytest.approx(
        {0: long_ends, 1: begins + out + late[0], 2: begins + 2 * out + late[1]}
    )


def starts(log: Log, times: int) -> dict[int, float]:
    """When the message of each request, of one call, began its way out."""
    arrived = {e.request: e.time_s for e in log if KINDS[e.kind] == "arrived"}
    return {r: at_s - H - times * out_s(1) for r, at_s in arrived.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("second", [0, 1, 3])
def test_of_two_that_wait_the_first_goes(engine: Any, first: int, second: int) -> None:
    """Two messages for a downlink that is busy until 9.15 s: the one that was ready first.

    Whether they are of two servers or of one, and whatever the servers' numbers.
    """
    asks = [Ask(0, 0.0, [], TO_2), Ask(first, 2.0, [], TO_2), Ask(second, 2.5, [], TO_2)]
    began = starts(run(engine, 32, asks), 32)
    out = 32 * out_s(1)
    assert began == {r: D + OVERHEAD_S + r * out for r in range(3)}


@pytest.mark.parametrize("engine", ENGINES)
def test_ready_first_though_asked_later(engine: Any) -> None:
    """A prompt's dense part takes longer: the request that came later is ready, and goes, first."""
    asks = [Ask(0, 0.0, [], TO_2), Ask(1, 0.5, [[[0]]] * 5), Ask(3, 1.0, [], TO_2)]
    log = run(engine, 32, asks)
    sends = [event.request for event in log if KINDS[event.kind] == "send"]
    freed = [event.request for event in log if KINDS[event.kind] == "freed"]
    assert sends == [0, 2, 1]
    assert freed[:2] == [0, 2]
    assert starts(log, 32)[2] == D + OVERHEAD_S + 32 * out_s(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_both_queues_of_a_freed_pair(engine: Any) -> None:
    """0 has sent to 2. Waiting, in this order: 1 to 2, 0 to 3, 0 to 2: the first two begin at once.

    They end at one time: the first end frees the downlink of 2 and finds the uplink of 0 still
    taken; with the second the last message begins.
    """
    out, back = 16 * out_s(1), 16 * back_s(1)
    asks = [Ask(0, 0.0, [], e) for e in (TO_2, TO_3, TO_2)] + [Ask(1, 0.5, [], TO_2)]
    log = run(engine, 16, asks)
    ready = [D + OVERHEAD_S, 2 * D + OVERHEAD_S, 3 * D + OVERHEAD_S, 0.5 + D + OVERHEAD_S]
    sent_0 = ready[0] + out
    both = sent_0 + out
    sent_2 = both + out
    done_0, done, done_2 = sent_0 + H + E, both + H + E, sent_2 + H + E
    assert log == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (0.0, "arrival", 1, -1, 0, 0),
        (0.0, "arrival", 2, -1, 0, 0),
        (0.5, "arrival", 3, -1, 1, 1),
        (D, "dense", 0, 0, 0, 0),
        (ready[0], "send", 0, 0, 0, 2),
        (0.5 + D, "dense", 3, 0, 1, 1),
        (ready[3], "send", 3, 0, 1, 2),
        (2 * D, "dense", 1, 0, 0, 0),
        (ready[1], "send", 1, 0, 0, 3),
        (3 * D, "dense", 2, 0, 0, 0),
        (ready[2], "send", 2, 0, 0, 2),
        (sent_0, "freed", 0, 0, 0, 2),
        (sent_0 + H, "arrived", 0, 0, 0, 2),
        (done_0, "computed", 0, 0, 0, 2),
        (both, "freed", 3, 0, 1, 2),
        (both, "freed", 1, 0, 0, 3),
        (both + H, "arrived", 3, 0, 1, 2),
        (both + H, "arrived", 1, 0, 0, 3),
        (done_0 + back, "freed", 0, 0, 0, 2),
        (done_0 + back + H, "returned", 0, 0, 0, 2),
        (done, "computed", 3, 0, 1, 2),
        (done, "computed", 1, 0, 0, 3),
        (sent_2, "freed", 2, 0, 0, 2),
        (sent_2 + H, "arrived", 2, 0, 0, 2),
        (done + back, "freed", 3, 0, 1, 2),
        (done + back, "freed", 1, 0, 0, 3),
        (done + back + H, "returned", 3, 0, 1, 2),
        (done + back + H, "returned", 1, 0, 0, 3),
        (done_2, "computed", 2, 0, 0, 2),
        (done_2 + back, "freed", 2, 0, 0, 2),
        (done_2 + back + H, "returned", 2, 0, 0, 2),
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", list(itertools.permutations(["1 to 2", "0 to 2", "0 to 3"])))
def test_every_order_of_both_queues(engine: Any, order: tuple[str, ...]) -> None:
    """Ready first, `0 to 2` takes both ports; else the other two begin, whichever is in between.

    An engine that went through one port's queue before the other's would begin `0 to 2` too early
    or too late where it is in the middle.
    """
    # server 0's dense parts end at 1, 2 and 3 s; that of server 1 before, between or after
    came_s = {0: 0.5, 1: 1.5, 2: 2.5}[order.index("1 to 2")]
    rest = [TO_2 if name == "0 to 2" else TO_3 for name in order if name != "1 to 2"]
    log = run(engine, 16, [*(Ask(0, 0.0, [], e) for e in (TO_2, *rest)), Ask(1, came_s, [], TO_2)])
    names = {e.request: f"{e.at} to {e.to}" for e in log if KINDS[e.kind] == "send"}
    assert [names[e.request] for e in log if KINDS[e.kind] == "send"] == ["0 to 2", *order]
    out = 16 * out_s(1)
    freed_s = D + OVERHEAD_S + out
    began = {names[r]: at_s for r, at_s in starts(log, 16).items() if r > 0}
    if order[0] == "0 to 2":
        assert began == {"0 to 2": freed_s, "1 to 2": freed_s + out, "0 to 3": freed_s + out}
    else:
        assert began == {"1 to 2": freed_s, "0 to 3": freed_s, "0 to 2": freed_s + out}


# ------------------------------------------------------------------------------ under contention


@dataclass(frozen=True, eq=False)
class Transfer:
    """One transfer of a log: its ends, the lines at which it was ready and over, when it began."""

    sender: int
    receiver: int
    payload: int
    ready: int
    end: int
    start_s: float
    end_s: float


def transfers(scenario: Scenario, log: Log) -> list[Transfer]:
    """All of a log without bursts, in the order in which they end.

    The log tells when messages are ready and when links are free again. In between lies the time
    that the payload takes, by the tokens of the step and where their experts are (one place each).
    """
    layers, local = scenario.model.num_layers, scenario.placement.local
    token_bytes = scenario.network.token_bytes
    dense: Counter[int] = Counter()
    ready: dict[tuple[int, ...], deque[tuple[int, int, int, int]]] = defaultdict(deque)
    found = []
    for line, event in enumerate(log):
        kind, message = KINDS[event.kind], event[2:]
        if kind == "dense":
            dense[event.request] += 1
        elif kind in ("send", "computed"):
            home = scenario.requests.home[event.request]
            begins = dense[event.request] // layers  # the pass that hidden states belong to
            if event.layer < 0:
                payload = BYTES_PER_TOKEN_ID * len(rows_of(scenario, event.request, 0))
            elif event.layer == layers:
                payload = BYTES_PER_TOKEN_ID
            elif event.at != scenario.execution[home, event.layer]:
                payload = len(rows_of(scenario, event.request, begins)) * token_bytes
            else:  # a call comes after the dense part of its layer
                rows = rows_of(scenario, event.request, (dense[event.request] - 1) // layers)
                there = local[event.to, event.layer][rows[:, event.layer]]
                payload = int(there.any(axis=1).sum()) * token_bytes
                payload += BYTES_PER_CALL * int(there.sum()) * (kind == "send")
            a, b = (event.at, event.to) if kind == "send" else (event.to, event.at)
            ready[message].append((a, b, payload, line))
        elif kind == "freed":
            a, b, payload, first = ready[message].popleft()  # ids may follow each other
            start_s = event.time_s - payload * float(scenario.network.seconds_per_byte[a, b])
            found.append(Transfer(a, b, payload, first, line, start_s, event.time_s))
    assert not any(ready.values())
    return found


def rows_of(scenario: Scenario, request: int, step: int) -> npt.NDArray[np.uint16]:
    """Experts [tokens, L, K] of a step of a request."""
    prompts, p = scenario.requests.prompts, scenario.requests.prompt[request]
    prefill, first = int(prompts.prefill_tokens[p]), int(prompts.first_row[p])
    if prefill and step == 0:
        return prompts.experts[first : first + prefill]
    row = first + prefill + step - (prefill > 0)
    return prompts.experts[row : row + 1]


SLACK_S = 1e-9  # starts are differences of times


def check_links(log: Log, found: list[Transfer]) -> tuple[int, int]:
    """The rule, read off the log alone; returns how many messages waited, and were overtaken.

    Lines of the log stand for time, as several events may share one.
    """
    of_port: dict[tuple[str, int], list[Transfer]] = defaultdict(list)
    for transfer in found:
        of_port["up", transfer.sender].append(transfer)
        of_port["down", transfer.receiver].append(transfer)
    # (a) no port ever carries two at once
    begin = {transfer: transfer.ready for transfer in found}
    for port in of_port.values():
        for before, after in itertools.pairwise(port):
            assert before.end_s <= after.start_s + SLACK_S
            begin[after] = max(begin[after], before.end)
    # (b) each starts when it is ready, or when the last one before it on its ports ends
    for transfer in found:
        assert abs(log[begin[transfer]].time_s - transfer.start_s) <= SLACK_S
    # what was on its ports while each waited: of a port, those that end just before it does
    rivals: dict[Transfer, list[Transfer]] = {transfer: [] for transfer in found}
    for port in of_port.values():
        for index, transfer in enumerate(port):
            earlier = reversed(port[:index])
            rivals[transfer] += itertools.takewhile(lambda o, t=transfer: o.end > t.ready, earlier)
    # (b) at every line one of its ports is busy; (c) if with one that begins at that very line,
    # then with one that was ready before
    for transfer in found:
        line = transfer.ready
        held = [(begin[o] + (o.ready > transfer.ready), o.end) for o in rivals[transfer]]
        for first, end in sorted(held):
            if first <= line:
                line = max(line, end)
        assert line >= begin[transfer], f"free at line {line}: {log[line]}; but {transfer} waits"
    waited = sum(begin[transfer] > transfer.ready for transfer in found)
    overtaken = sum(any(o.ready > t.ready for o in rivals[t]) for t in found)
    return waited, overtaken


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_the_rule_under_contention(seed: int, ties: bool) -> None:
    """Both engines, slow links, 15-20 requests at 5 servers of 3 places, several layers, hops.

    Equal logs and figures; and over the log: no port carries two transfers at once, whenever a
    message waits one of its ports is busy, and none is overtaken by one that it could have begun
    in place of.
    """
    scenario = contended_scenario(np.random.default_rng(seed), ties=ties)
    reference, compiled = (e(scenario, log=True) for e in (ReferenceEngine, CompiledEngine))
    outcome = finished(reference)
    assert differing(finished(compiled), outcome) == []
    log = reference.log()
    assert compiled.log() == log
    found = transfers(scenario, log)
    assert sum(t.payload for t in found) == outcome.bytes_out.sum()
    check_links(log, found)


@pytest.mark.parametrize("ties", [False, True])
def test_contention_is_heavy(ties: bool) -> None:
    """In these scenarios more than two messages in three wait, and one in four is overtaken."""
    number = waited = overtaken = 0
    for seed in range(4):
        scenario = contended_scenario(np.random.default_rng(seed), ties=ties)
        engine = CompiledEngine(scenario, log=True)
        finished(engine)
        found = transfers(scenario, engine.log())
        counts = check_links(engine.log(), found)
        number, waited, overtaken = number + len(found), waited + counts[0], overtaken + counts[1]
    assert waited > number * 2 / 3
    assert overtaken > number / 4
