"""The expected latency: exact for a request on its own, near the simulator's below 30 % load."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_plan as pp
from prism_plan.errors import InputError, WrongModel
from prism_plan.instance import Instance
from prism_plan.latency.expected_latency import PARTS, PlanLatency, expected_latency, latency_of
from prism_plan.latency.idle_time import IdleMeasure
from prism_plan.latency.workload import Site, Workload
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import gpu_offsets
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.network import Network
from prism_plan.simulate.scenario import Scenario
from prism_plan.simulate.timing import timing
from prism_plan.solvers import SOLVER_NAMES, solve
from studies.formula import at_load, simulated, stationary
from tests.profiling.synthetic import synthetic_trace
from tests.simulate.builders import (
    BYTES_PER_S,
    HALF_RTT_S,
    OVERHEAD_S,
    TOKEN_BYTES,
    Ask,
    back_s,
    dense_s,
    drawn_held,
    expert_s,
    holding,
    make_cluster,
    make_model,
    make_requests,
    make_scenario,
    out_s,
    place,
)
from tests.simulate.drawn_tables import drawn_table, drawn_table_scenario
from tests.solvers.test_paths import a_cluster, a_model, a_trace

SEEDS = st.integers(0, 2**32 - 1)


def idle(scenario: Scenario) -> Scenario:
    """The scenario with its table in the placement and no other requests in the way."""
    rates = np.zeros(len(scenario.requests.servers))
    return dataclasses.replace(
        scenario,
        placement=scenario.placement.replace(execution=scenario.execution),
        requests=dataclasses.replace(scenario.requests, rate=rates),
    )


def one_at_a_time(scenario: Scenario) -> npt.NDArray[np.float64]:
    """Seconds of each request where the one before it is long answered, by the simulator."""
    requests = scenario.requests
    apart = dataclasses.replace(requests, arrival_s=1e4 * np.arange(len(requests)))
    engine = CompiledEngine(dataclasses.replace(scenario, requests=apart))
    assert engine.advance()
    seconds: npt.NDArray[np.float64] = engine.outcome().done_s - apart.arrival_s
    return seconds


def drawn_alone(rng: np.random.Generator, route: str) -> Scenario:
    """A drawn scenario without bursts; every expert on one GPU where copies would tie."""
    scenario = idle(drawn_table_scenario(rng))
    network = dataclasses.replace(scenario.network, burst_bytes=0.0, short_bytes=0.0)
    placement = scenario.placement
    if route == "cover":
        shape = placement.on_gpu.shape
        held = drawn_held(rng, *shape, 0.0)
        placement = placement.replace(on_gpu=held)
    return dataclasses.replace(scenario, network=network, placement=placement, route=route)


@settings(max_examples=150)
@given(seed=SEEDS, route=st.sampled_from(["cover", "nearest"]))
def test_a_request_on_its_own_takes_what_the_simulator_says(seed: int, route: str) -> None:
    """Without other requests the mean is that of the same requests one at a time, for any table.

    Calls of several GPUs and links, attention and KV caches among it, by home and for all. Under
    `cover` every expert has one copy, for which copy of equal ones it takes depends on the past.
    Under `nearest` answers that are ready at one instant may share a line in another order (1 of
    1,500 draws, by 1e-4).
    """
    rel = 1e-9 if route == "cover" else 1e-3
    scenario = drawn_alone(np.random.default_rng(seed), route)
    found = expected_latency(scenario.placement, scenario)
    seconds = one_at_a_time(scenario)
    assert found.mean_s == pytest.approx(seconds.mean(), rel=rel)
    for n in range(len(found.parts)):
        of_home = seconds[scenario.requests.home == n]
        expected = of_home.mean() if len(of_home) else 0.0
        assert found.of_home[n] == pytest.approx(expected, rel=rel)
    assert not found.parts[:, PARTS.index("places") :].any()
    assert found.busiest == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_copies_change_ties_alone(seed: int) -> None:
    """Several copies under `cover`: ties are by what was sent before, so the mean is near."""
    rng = np.random.default_rng(seed)
    model = a_model(4, 8)
    cluster = a_cluster(rng, 4)
    gpus = sum(len(server.gpus) for server in cluster.servers)
    held = drawn_held(rng, gpus, 4, 8, 0.3)
    table = drawn_table(rng, 4, 4)
    requests = pp.sample_requests(a_trace(model), cluster, requests_per_server=30, seed=seed)
    placement = place(model, cluster, held).replace(execution=table)
    scenario = idle(Scenario.build(placement, requests, cluster, model))
    found = expected_latency(scenario.placement, scenario).mean_s
    assert found == pytest.approx(one_at_a_time(scenario).mean(), rel=0.03)


# ------------------------------------------------------------------------------------ parts by hand

ONE = [[0]]  # a token that calls expert 0 of the only layer


def parts_of(scenario: Scenario) -> dict[str, float]:
    """What one request of s0 takes, by part, where it is not zero."""
    found = expected_latency(scenario.placement, idle(scenario))
    parts = dict(zip(PARTS, found.parts[0].tolist(), strict=True))
    assert sum(parts.values()) == pytest.approx(found.of_home[0], rel=1e-12)
    return {name: seconds for name, seconds in parts.items() if seconds}


def test_compute_alone() -> None:
    """All at home: dense parts and experts, of a prompt of two tokens and a decode step."""
    model, cluster = make_model(1, 1), make_cluster([1])
    ask = Ask(0, 0.0, [ONE, ONE], [ONE])
    scenario = make_scenario(model, cluster, [[[True]]], [ask])
    expected = dense_s(2) + expert_s(2) + dense_s(1) + expert_s(1)
    assert parts_of(scenario) == {"compute": pytest.approx(expected, rel=1e-12)}


def test_calls_alone() -> None:
    """The expert is elsewhere: overhead, both ways, its time there, a round trip."""
    model, cluster = make_model(1, 2), make_cluster([1, 1])
    held = holding(1, 2, [(0, 1)], [(0, 0)])
    scenario = make_scenario(model, cluster, held, [Ask(0, 0.0, [ONE, ONE])])
    call = OVERHEAD_S + out_s(2) + 2 * HALF_RTT_S + expert_s(2) + back_s(2)
    assert parts_of(scenario) == {
        "compute": pytest.approx(dense_s(2), rel=1e-12),
        "calls": pytest.approx(call, rel=1e-12),
    }


def test_hops_alone() -> None:
    """The one layer executes elsewhere: ids go there, the token's id comes back.

    Then two layers on two servers: hidden states between them, ids back for the next pass.
    """

    def message_s(size: float) -> float:
        return OVERHEAD_S + size / BYTES_PER_S + HALF_RTT_S

    cluster = make_cluster([1, 1])
    held = holding(1, 1, [], [(0, 0)])
    table = np.array([[1], [1]], np.int32)
    there = make_scenario(make_model(1, 1), cluster, held, [Ask(0, 0.0, [ONE, ONE])])
    placement = there.placement.replace(execution=table)
    found = parts_of(dataclasses.replace(there, placement=placement, execution=table))
    assert found == {
        "compute": pytest.approx(dense_s(2) + expert_s(2), rel=1e-12),
        "hops": pytest.approx(message_s(8) + message_s(4), rel=1e-12),
    }
    token = [[0], [0]]
    held = holding(2, 1, [(0, 0)], [(1, 0)])
    table = np.array([[0, 1], [0, 1]], np.int32)
    there = make_scenario(make_model(2, 1), cluster, held, [Ask(0, 0.0, [token] * 3, [token])])
    placement = there.placement.replace(execution=table)
    found = parts_of(dataclasses.replace(there, placement=placement, execution=table))
    hops = message_s(3 * TOKEN_BYTES) + message_s(4) + message_s(TOKEN_BYTES) + message_s(4)
    assert found["hops"] == pytest.approx(hops, rel=1e-12)
    assert set(found) == {"compute", "hops"}


def test_attention_alone() -> None:
    """What attention adds to prompts and steps is its own part, and the rest stays as it is.

    The GPU is limited by FLOPs in prompts and by bytes in steps, each with attention.
    """
    parts = {}
    for name, changes in {
        "without": {},
        "with": {"attention_flops": 100, "kv_bytes_per_token": 512},
    }.items():
        model = make_model(1, 1, num_decoder_layers=2, **changes)
        gpu = pp.Gpu(slots=9, memory_bandwidth_gbs=1e-5, tflops=1e-8, launch_overhead_us=0.0)
        cluster = pp.Cluster("c", (pp.Server("s0", (gpu,)),))
        ask = Ask(0, 0.0, [ONE] * 40, [ONE] * 3)
        scenario = make_scenario(model, cluster, [[[True]]], [ask], curves=None)
        parts[name] = parts_of(scenario)
    prompt = 100 * 40**2 / 2 * 2 / 1e4
    steps = 512 * (40 + 41 + 42) / 1e4
    assert set(parts["without"]) == {"compute"}
    assert parts["with"]["compute"] == pytest.approx(parts["without"]["compute"], rel=1e-12)
    assert parts["with"]["attention"] == pytest.approx(prompt + steps, rel=1e-9)


def test_the_mean_weighs_homes_by_their_requests() -> None:
    """Two of three requests are of s1 and longer; a server without users counts nothing."""
    model, cluster = make_model(1, 1), make_cluster([1, 1, 1])
    held = np.ones((3, 1, 1), bool)
    asks = [Ask(0, 0.0, [ONE]), Ask(1, 0.0, [ONE] * 2), Ask(1, 1.0, [ONE] * 2)]
    scenario = idle(make_scenario(model, cluster, held, asks))
    found = expected_latency(scenario.placement, scenario)
    of_home = [dense_s(1) + expert_s(1), dense_s(2) + expert_s(2), 0.0]
    assert found.of_home.tolist() == pytest.approx(of_home, rel=1e-12)
    assert found.mean_s == pytest.approx((of_home[0] + 2 * of_home[1]) / 3, rel=1e-12)
    assert sum(found.by_part.values()) == pytest.approx(found.mean_s, rel=1e-12)


# -------------------------------------------------------------------------------- the planners


@settings(max_examples=25)
@given(seed=SEEDS)
def test_without_load_it_is_the_idle_time_of_the_planners(seed: int) -> None:
    """On the planner's prompts, by task, the measure of `paths` and `pipeline`, for any table."""
    rng = np.random.default_rng(seed)
    model = a_model(int(rng.integers(1, 5)))
    cluster = a_cluster(rng, int(rng.integers(1, 4)))
    measure = IdleMeasure(model, cluster, a_trace(model))
    held = drawn_held(
        rng, sum(len(s.gpus) for s in cluster.servers), model.num_layers, model.num_experts, 0.0
    )
    requests = measure._requests
    members = np.zeros((measure._shares.shape[1], len(requests.prompts)))
    for number, task in enumerate(measure._tasks):
        of_task = requests.prompt[requests.home == number]
        np.add.at(members[task], of_task, 1 / len(of_task))
    servers = cluster.num_servers
    prompts = requests.prompts
    longest = int((prompts.prefill_tokens + prompts.decode_tokens).max())
    gpu_start = gpu_offsets(len(server.gpus) for server in cluster.servers)
    site = Site(
        model, Network.of(cluster, model), timing(cluster, model, longest, context=longest),
        gpu_start, gpu_start[:-1] + np.array([s.dense_gpu for s in cluster.servers], np.int32),
    )  # fmt: skip
    nobody = np.zeros(servers)
    workload = Workload(prompts, members, measure._shares, nobody, nobody, (1,) * servers)
    table = drawn_table(rng, servers, model.num_layers)
    found = latency_of(held, table, workload, site)
    np.testing.assert_allclose(found.of_home, measure.idle_time(held).of_table(table), rtol=1e-9)


# --------------------------------------------------------------------------------------- under load


def test_one_place_without_links_is_pollaczek_and_khinchine() -> None:
    """One server, one place, requests of two lengths: M/G/1 to the last digits."""
    model, cluster = make_model(1, 1), make_cluster([1])
    asks = [Ask(0, 0.0, [ONE]), Ask(0, 1.0, [ONE] * 5)]
    scenario = make_scenario(model, cluster, [[[True]]], asks)
    seconds = np.array([dense_s(1) + expert_s(1), dense_s(5) + expert_s(5)])
    for share in (0.1, 0.5, 0.8):
        rate = share / seconds.mean()
        asked = dataclasses.replace(scenario.requests, rate=np.array([rate]))
        loaded = dataclasses.replace(scenario, requests=asked)
        found = expected_latency(loaded.placement, loaded)
        waiting = rate * (seconds**2).mean() / 2 / (1 - share)
        assert found.by_part["places"] == pytest.approx(waiting, rel=1e-9)
        assert found.by_part["compute"] == pytest.approx(seconds.mean(), rel=1e-12)
        assert found.busiest == found.busiest_place == pytest.approx(share, rel=1e-12)


def small_model() -> ModelSpec:
    """Six layers of twelve experts, with the sizes of DeepSeek-V2-Lite."""
    return ModelSpec(
        "small", tuple(range(1, 7)), 12, 2, hidden_size=2048, dtype_bytes=2,
        expert_bytes=17_000_000, dense_bytes=360_000_000, kv_bytes_per_token=60_000,
        num_decoder_layers=7, attention_flops=8_000,
    )  # fmt: skip


def small_plan(seed: int) -> tuple[Scenario, str]:
    """A plan of some solver, half of them with a drawn table, on a drawn cluster; what it is."""
    rng = np.random.default_rng(seed)
    solvers = (*SOLVER_NAMES, "layer-partition+paths", "pipeline")
    solver = solvers[seed % len(solvers)]
    places, mbps, weak = (1, 4)[seed // 2 % 2], (100.0, 500.0, 10_000.0)[seed % 3], seed % 5 == 0
    servers: list[pp.Server] = []
    for n in range(3 + 2 * (seed % 4 == 0)):
        number, speed = int(rng.integers(1, 3)), float(rng.uniform(0.7, 1.4))
        gpu = pp.Gpu(
            slots=int(rng.integers(24, 50)) // number,
            memory_bandwidth_gbs=(205.0 if weak else 1555.0) * speed,
            tflops=(30.0 if weak else 312.0) * speed,
        )
        servers.append(
            pp.Server(
                f"s{n}", (gpu,) * number, tasks={"xyz"[n % 3]: 1.0}, concurrency=places,
                arrival_interval_s=float(rng.uniform(0.5, 2)),
            )
        )  # fmt: skip
    link = pp.Link(bandwidth_mbps=mbps, rtt_ms=1.0, call_overhead_ms=0.2)
    cluster = pp.Cluster("c", tuple(servers), link)
    model = small_model()
    trace = synthetic_trace(
        model, ["x", "y", "z"], requests=12, prompt_tokens=int(rng.integers(8, 48)),
        decode_tokens=int(rng.integers(4, 16)), seed=seed,
    )  # fmt: skip
    placement = solve(Instance.build(trace, cluster), solver)
    if placement.execution is None and rng.random() < 0.6:
        placement = placement.replace(execution=drawn_table(rng, len(servers), model.num_layers))
    requests = stationary(pp.sample_requests(trace, cluster, requests_per_server=800, seed=seed))
    steps = requests.prompts.decode_tokens
    shorter = dataclasses.replace(
        requests.prompts, decode_tokens=rng.integers(1, steps + 1).astype(np.int32)
    )
    requests = dataclasses.replace(requests, prompts=shorter)
    text = f"{seed}: {solver}, {len(servers)} servers, {places} places, {mbps:g} Mbit/s"
    return Scenario.build(placement, requests, cluster, model), text + ", weak GPUs" * weak


@pytest.mark.parametrize("plans", [40, pytest.param(100, marks=pytest.mark.long)])
def test_within_ten_percent_of_the_simulator_below_30_percent_load(plans: int) -> None:
    """Plans of all solvers, at home and with tables, 1 and 4 places, slow and fast links.

    What is busiest of places, GPUs and ports is busy for 5 to 30 % of the time; the standard error
    of the simulated means is 1.2 % on average.
    """
    errors = []
    for seed in range(plans):
        scenario, text = small_plan(seed)
        load = float(np.random.default_rng([seed, 1]).uniform(0.05, 0.3))
        scenario, found = at_load(scenario, load)
        mean_s, error_s = simulated(scenario)
        errors.append((abs(found.mean_s / mean_s - 1), error_s / mean_s, load, text))
    worst = max(errors)
    told = f"largest error {worst[0]:.1%} ± {worst[1]:.1%} at {worst[2]:.0%} load, plan {worst[3]}"
    assert worst[0] < 0.1, told
    assert np.median([error for error, *_ in errors]) < 0.02, told
    assert np.mean([noise for _, noise, *_ in errors]) < 0.02, told


def test_latency_grows_with_the_load() -> None:
    """More requests never make a mean request faster, up to loads that cannot be served."""
    for seed in (0, 3, 9, 14):
        scenario, text = small_plan(seed)
        requests = scenario.requests
        assert requests.rate is not None
        means = []
        for factor in (0, 0.1, 0.5, 1, 2, 5, 20):
            asked = dataclasses.replace(requests, rate=requests.rate * factor)
            busy = dataclasses.replace(scenario, requests=asked)
            found = expected_latency(scenario.placement, busy)
            assert np.isfinite(found.parts).all(), text
            assert (found.parts >= 0).all(), text
            means.append(found.mean_s)
        assert (np.diff(means) > 0).all(), text


# ---------------------------------------------------------------------------------------- bad input


def a_scenario(**changes: Any) -> Scenario:
    """One request on two servers."""
    model, cluster = make_model(1, 2), make_cluster([1, 1])
    return make_scenario(model, cluster, np.ones((2, 1, 2)), [Ask(0, 0.0, [ONE])], **changes)


def test_what_the_formula_does_not_know_is_refused() -> None:
    """Offloading, other servers, GPUs or models, an expert that is held nowhere, no requests."""
    scenario = a_scenario()
    with pytest.raises(InputError, match="offload"):
        expected_latency(scenario.placement, a_scenario(offload=True))
    model = scenario.model
    for gpus, text in (([1, 1, 1], "s2"), ([1, 2], r"s1 \(2 GPUs\)")):
        other = place(model, make_cluster(gpus), np.ones((sum(gpus), 1, 2)))
        with pytest.raises(InputError, match=text):
            expected_latency(other, scenario)
    with pytest.raises(WrongModel):
        bigger = place(make_model(1, 3), make_cluster([1, 1]), np.ones((2, 1, 3)))
        expected_latency(bigger, scenario)
    lacking = scenario.placement.replace(on_gpu=holding(1, 2, [(0, 1)], [(0, 1)]))
    with pytest.raises(InputError, match="held nowhere"):
        expected_latency(lacking, scenario)
    nobody = make_requests(make_cluster([1, 1]), [], 1, 1)
    with pytest.raises(InputError, match="no requests"):
        expected_latency(scenario.placement, dataclasses.replace(scenario, requests=nobody))


def test_public_names() -> None:
    """Both names are of the package, and by_part names every part."""
    assert pp.expected_latency is expected_latency
    assert pp.PlanLatency is PlanLatency
    scenario = a_scenario()
    assert tuple(pp.expected_latency(scenario.placement, idle(scenario)).by_part) == PARTS
