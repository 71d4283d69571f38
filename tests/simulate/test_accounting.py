"""What a run counts equals what requests and placement say, counted here again from nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.execution_table import TableChange
from prism_plan.objective import remote_score, step_score
from prism_plan.simulate.routing_policies import hash_call
from prism_plan.simulate.scenario import Scenario
from prism_plan.token_rates import TokenRates
from prism_plan.trace import TokenBatch, trace_from_batches
from tests.simulate.builders import ENGINES, KINDS, drawn_scenario, finished

SEEDS = st.integers(0, 2**32 - 1)


def smallest(holders: list[set[int]]) -> int:
    """Size of the smallest set of servers that meets every set of holders, by trying all."""
    servers = sorted(set().union(*holders))
    for size in range(len(holders) + 1):
        for group in itertools.combinations(servers, size):
            if all(held & set(group) for held in holders):
                return size
    raise AssertionError


def steps_of(scenario: Scenario) -> list[tuple[int, int, np.ndarray, int | None]]:
    """(request, home, experts [tokens, L, K], context) of every step of every request.

    The context of a decode step is the number of tokens before it; a prompt has none.
    """
    requests, prompts = scenario.requests, scenario.requests.prompts
    steps = []
    for r, (home, p) in enumerate(zip(requests.home, requests.prompt, strict=True)):
        row = int(prompts.first_row[p])
        lengths = [int(prompts.prefill_tokens[p])] * bool(prompts.prefill_tokens[p])
        lengths += [1] * int(prompts.decode_tokens[p])
        begin = row
        for tokens in lengths:
            context = None if row == begin and prompts.prefill_tokens[p] else row - begin
            steps.append((r, int(home), prompts.experts[row : row + tokens], context))
            row += tokens
    return steps


def hops_of(
    scenario: Scenario, table_of: Mapping[int, np.ndarray] | None = None
) -> list[tuple[int, int, int]]:
    """(from, to, bytes) of all messages that are no calls, in no order (section 10, rules 1-3).

    ``table_of`` gives the execution table of each request, by default that of the scenario.
    """
    size = scenario.network.token_bytes
    tokens_of: dict[tuple[int, int], list[int]] = {}
    for r, home, tokens, _ in steps_of(scenario):
        tokens_of.setdefault((r, home), []).append(len(tokens))
    sent = []
    for (r, home), passes in tokens_of.items():
        table = scenario.execution if table_of is None else table_of[r]
        row = table[home].tolist()
        sent += [(home, row[0], 4 * passes[0])]
        for number, tokens in enumerate(passes):
            sent += [(a, b, tokens * size) for a, b in itertools.pairwise(row)]
            receivers = {home} if number == len(passes) - 1 else {home, row[0]}
            sent += [(row[-1], m, 4) for m in receivers]
    return [(a, b, payload) for a, b, payload in sent if a != b]


def counted(scenario: Scenario) -> dict[str, Any]:
    """Everything that does not depend on which of equally good servers `cover` takes.

    For ``nearest`` and ``spread`` also the traffic of each server and the calls of each GPU.
    """
    servers, layers = scenario.execution.shape
    local = scenario.placement.local
    gpu_at: dict[tuple[int, int, int], int] = {}
    for g, n in reversed(list(enumerate(scenario.placement.server_of_gpu))):
        for layer, e in np.argwhere(scenario.placement.on_gpu[g]):
            gpu_at[int(n), int(layer), int(e)] = g
    cost = scenario.network.call_cost_s()
    size = scenario.network.token_bytes
    sums = {key: [0] * servers for key in ("calls", "remote_calls", "steps", "waiting")}
    destinations = [0] * servers
    called = np.zeros(local.shape, int)
    out, into = [0] * servers, [0] * servers
    messages = np.zeros((servers, servers), int)
    served = [0] * len(scenario.placement.on_gpu)
    for r, home, tokens, _ in steps_of(scenario):
        for layer in range(layers):
            at = int(scenario.execution[home, layer])
            sent: Counter[int] = Counter()
            named: Counter[int] = Counter()
            for token in tokens[:, layer].tolist():
                sums["steps"][home] += 1
                sums["calls"][home] += len(token)
                missing = [e for e in token if not local[at, layer, e]]
                sums["remote_calls"][home] += len(missing)
                sums["waiting"][home] += bool(missing)
                holders = [set(np.flatnonzero(local[:, layer, e]).tolist()) for e in missing]
                places = dict.fromkeys(token, at)
                for e, held in zip(missing, holders, strict=True):
                    if scenario.route == "spread":
                        pair = layer * local.shape[2] + e
                        places[e] = sorted(held)[hash_call(r, pair) % len(held)]
                    else:
                        places[e] = min(held, key=lambda m: (cost[at, m], m))
                for e in token:
                    called[home, layer, e] += 1
                    served[gpu_at[places[e], layer, e]] += 1
                if scenario.route == "cover":
                    destinations[home] += smallest(holders)
                else:
                    destinations[home] += len({places[e] for e in missing})
                sent.update({places[e] for e in missing})
                named.update(places[e] for e in missing)
            for m, number in sent.items():
                messages[at, m] += 1
                out[at] += number * size + 4 * named[m]
                into[m] += number * size + 4 * named[m]
                out[m] += number * size
                into[at] += number * size
    hops = np.zeros((servers, servers), int)
    for a, b, payload in hops_of(scenario):
        hops[a, b] += 1
        out[a] += payload
        into[b] += payload
    every = {**sums, "destinations": destinations, "hops": hops}
    if scenario.route != "cover":
        every |= {"bytes_out": out, "bytes_in": into, "messages": messages, "served": served}
    return {**every, "called": called}


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=80)
@given(seed=SEEDS, home=st.booleans())
def test_counts_are_those_of_requests_and_placement(engine: Any, seed: int, home: bool) -> None:
    """Calls, remote and waiting ones, destinations; where it is fixed also traffic and work."""
    scenario = drawn_scenario(np.random.default_rng(seed), home=home)
    run = engine(scenario)
    outcome = finished(run)
    expected = counted(scenario)
    np.testing.assert_array_equal(run.take_calls(), expected.pop("called"))
    assert not run.take_calls().any()
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(outcome, name), value, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=80)
@given(seed=SEEDS, home=st.booleans())
def test_traffic_adds_up(engine: Any, seed: int, home: bool) -> None:
    """By every route: each (token, destination) travels both ways, each remote call is named once.

    What is sent is received; every call is computed once; a message is a call that was sent.
    """
    scenario = drawn_scenario(np.random.default_rng(seed), home=home)
    run = engine(scenario, log=True)
    outcome = finished(run)
    hops = hops_of(scenario)
    states = 2 * outcome.destinations.sum()
    total = states * scenario.network.token_bytes + 4 * outcome.remote_calls.sum()
    total += sum(payload for _, _, payload in hops)
    assert outcome.hops.sum() == len(hops)
    assert outcome.bytes_out.sum() == outcome.bytes_in.sum() == total
    assert outcome.served.sum() == outcome.calls.sum()
    log = run.log()
    returned = Counter((e.at, e.to) for e in log if KINDS[e.kind] == "returned")
    for (a, b), number in np.ndenumerate(outcome.messages):
        assert returned[a, b] == number
    assert outcome.events == len(log)
    assert outcome.messages.diagonal().sum() == 0
    assert (outcome.waiting <= outcome.destinations).all()
    assert (outcome.destinations <= outcome.remote_calls).all()
    decode = int(scenario.requests.prompts.decode_tokens.sum())
    assert outcome.layer_steps.sum() == decode * scenario.model.num_layers


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40)
@given(seed=SEEDS)
def test_cover_gives_the_planners_score(engine: Any, seed: int) -> None:
    """Under route `cover` a run counts what `objective` says of the same tokens and placement."""
    drawn = drawn_scenario(np.random.default_rng(seed), home=True)
    scenario = type(drawn)(**{**vars(drawn), "route": "cover"})
    run = engine(scenario)
    outcome = finished(run)
    servers = len(outcome.calls)
    requests, prompts = scenario.requests, scenario.requests.prompts
    lengths = prompts.prefill_tokens + prompts.decode_tokens
    home = np.repeat(requests.home, lengths).astype(np.int32)
    batch = TokenBatch(
        request=np.repeat(np.arange(len(requests)), lengths).astype(np.int32),
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        phase=np.full(len(home), 2, np.int8),
        task=home,
        experts=prompts.experts,
    )
    tasks = tuple(f"of-{n}" for n in range(servers))  # a server's requests are a task of their own
    trace = trace_from_batches(scenario.model, tasks, [batch])
    local = scenario.placement.local
    score = step_score(local, trace, TokenRates(tasks, np.diag(trace.tokens.astype(float))))
    np.testing.assert_allclose(outcome.steps, score.steps)
    np.testing.assert_allclose(outcome.waiting, score.waiting)
    np.testing.assert_allclose(outcome.destinations, score.destinations)
    remote = remote_score(run.take_calls().astype(float), local)
    np.testing.assert_array_equal(outcome.calls, remote.calls)
    np.testing.assert_array_equal(outcome.remote_calls, remote.remote)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40)
@given(seed=SEEDS)
def test_offload_calls_nobody(engine: Any, seed: int) -> None:
    """Every call is computed at home (where layers execute at home); nothing is sent."""
    scenario = drawn_scenario(np.random.default_rng(seed), offload=True, home=True)
    outcome = finished(engine(scenario))
    assert outcome.messages.sum() == outcome.bytes_out.sum() == outcome.remote_calls.sum() == 0
    served = np.zeros(len(outcome.calls), int)
    np.add.at(served, scenario.placement.server_of_gpu, outcome.served)
    np.testing.assert_array_equal(served, outcome.calls)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60)
@given(seed=SEEDS)
def test_a_gpu_is_busy_for_what_it_did(engine: Any, seed: int) -> None:
    """A server's dense work is known from the steps; a port is busy for what went through it."""
    scenario = drawn_scenario(np.random.default_rng(seed))
    outcome = finished(engine(scenario))
    dense = np.zeros(len(outcome.gpu_busy_s))
    for _, home, tokens, context in steps_of(scenario):
        for layer, at in enumerate(scenario.execution[home]):
            gpu = int(scenario.dense_gpu[at])
            dense[gpu] += scenario.timing.dense_s(gpu, layer, len(tokens), context)
    idle = outcome.served == 0
    np.testing.assert_allclose(outcome.gpu_busy_s[idle], dense[idle], rtol=1e-9, atol=1e-12)
    assert np.all(outcome.gpu_busy_s >= dense * (1 - 1e-9))
    if scenario.network.burst_bytes == 0:
        assert outcome.up_busy_s.sum() == pytest.approx(outcome.down_busy_s.sum(), rel=1e-9)
        slowest = scenario.network.seconds_per_byte.max(axis=1) * outcome.bytes_out
        assert np.all(outcome.up_busy_s <= slowest * (1 + 1e-9))


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=80)
@given(seed=SEEDS)
def test_counts_add_up_while_tables_change(engine: Any, seed: int) -> None:
    """Each request counts by the table that it was admitted with: calls, hops, bytes, dense work.

    A request's calls stay its home's, and its time at home is what Little's law integrates.
    """
    rng = np.random.default_rng(seed)
    scenario = drawn_scenario(rng, most=25)
    run = engine(scenario)
    servers, layers = scenario.execution.shape
    tables, changed_s = [scenario.execution], [-np.inf]
    for _ in range(int(rng.integers(1, 4))):
        run.advance(run.outcome().now_s + float(rng.choice([0.0, 1.0, rng.random() * 5])))
        tables.append(rng.integers(0, servers, (servers, layers)).astype(np.int32))
        changed_s.append(run.outcome().now_s)
        run.migrate([], TableChange(tables[-1], 0, 0))
    outcome = finished(run)
    # what starts at the very time of a change was admitted before it
    at = np.searchsorted(changed_s, outcome.start_s, side="left") - 1
    table_of = {r: tables[number] for r, number in enumerate(at)}
    remote, dense = np.zeros(servers, int), np.zeros(len(outcome.gpu_busy_s))
    local, home_of = scenario.placement.local, scenario.requests.home
    for r, home, tokens, context in steps_of(scenario):
        for layer, m in enumerate(table_of[r][home]):
            remote[home] += (~local[m, layer, tokens[:, layer]]).sum()
            gpu = int(scenario.dense_gpu[m])
            dense[gpu] += scenario.timing.dense_s(gpu, layer, len(tokens), context)
    np.testing.assert_array_equal(outcome.remote_calls, remote)
    np.testing.assert_array_equal(run.take_calls().sum(axis=(1, 2)), outcome.calls)
    sent = np.zeros((servers, servers), int)
    hops = hops_of(scenario, table_of)
    for a, b, _ in hops:
        sent[a, b] += 1
    np.testing.assert_array_equal(outcome.hops, sent)
    total = 2 * outcome.destinations.sum() * scenario.network.token_bytes + 4 * remote.sum()
    assert outcome.bytes_out.sum() == outcome.bytes_in.sum() == total + sum(h[2] for h in hops)
    idle = outcome.served == 0
    np.testing.assert_allclose(outcome.gpu_busy_s[idle], dense[idle], rtol=1e-9, atol=1e-12)
    spent_s = np.bincount(home_of, outcome.done_s - scenario.requests.arrival_s, minlength=servers)
    np.testing.assert_allclose(outcome.present_s, spent_s, rtol=1e-9, atol=1e-9)
