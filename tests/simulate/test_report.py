"""The report: every figure against one from the requests, tokens and placement themselves."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.request_table import write_request_table
from prism_plan.evaluate.simulation import dump_report, simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.io.simulation import simulation_from_json
from prism_plan.model_spec import ModelSpec
from prism_plan.objective import score, step_score
from prism_plan.placement import Placement
from prism_plan.simulate.arrival_trace import Arrival, ArrivalTrace
from prism_plan.simulate.calibration import Calibration, GpuCurves
from prism_plan.simulate.phase_schedule import Phase, Schedule
from prism_plan.simulate.report import (
    TIMELINE_BINS,
    SimulationRun,
    _timeline,
    summary,
    user_tokens_per_s,
)
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests
from prism_plan.token_rates import expected_token_rates
from prism_plan.trace import TokenBatch, Trace, trace_from_batches
from tests.evaluate.simulation_material import (
    SPEC,
    counts_of,
    planned,
    sampled,
    simulated,
    small_cluster,
    small_trace,
    tokens_of,
)
from tests.simulate.builders import drawn_held

#: Prompt tokens and decode steps of requests: both, no steps, nothing but steps, one token.
LENGTHS = ((6, 4), (6, 0), (0, 4), (1, 0), (0, 1))


def figures(times_s: np.ndarray) -> dict[str, float | None]:
    """What the report should say of some times."""
    times_s = np.asarray(times_s, float)
    times_s = times_s[~np.isnan(times_s)]
    if not len(times_s):
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"))
    found = {f"p{q}": np.quantile(times_s, q / 100) for q in (50, 95, 99)}
    return {"mean": times_s.mean(), **found, "max": times_s.max()}


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for rounding; null where null is expected."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (None if value is None else pytest.approx(value, rel=1e-12)), key


def test_speed_for_a_user_counts_requests_alike() -> None:
    """1 / mean TPOT: neither the mean of speeds, nor tokens over time; none without a time."""
    assert user_tokens_per_s(np.array([0.1, 0.3, np.nan])) == pytest.approx(5.0)
    assert user_tokens_per_s(np.array([np.nan])) is None
    assert user_tokens_per_s(np.zeros(2)) is None


# ----------------------------------------------------------------------- against the request table


@pytest.mark.parametrize(("prompt_tokens", "decode_tokens"), LENGTHS)
def test_times_are_those_of_the_request_table(
    tmp_path: Path, prompt_tokens: int, decode_tokens: int
) -> None:
    """Latency, first token, time per token and queueing: statistics of the per-request table."""
    trace = small_trace(prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)
    cluster = small_cluster(("arrival_interval_s = 0.02", "arrival_interval_s = 0.008"))
    result = simulated(trace, cluster, "exact")
    write_request_table(tmp_path / "r.parquet", result)
    rows = pq.read_table(tmp_path / "r.parquet").to_pydict()
    t = {key: np.array(rows[key], float) for key in rows if key.endswith(("_s", "_tokens"))}
    latency, queueing = t["done_s"] - t["arrival_s"], t["start_s"] - t["arrival_s"]
    later = t["prefill_tokens"] + t["decode_tokens"] - np.maximum(t["prefill_tokens"], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(later > 0, (t["done_s"] - t["first_token_s"]) / later, np.nan)
    run = result.to_json()["runs"][0]
    assert queueing.max() > 0
    assert_close(run["latency_s"], figures(latency))
    assert_close(run["ttft_s"], figures(t["first_token_s"] - t["arrival_s"]))
    assert_close(run["tpot_s"], figures(tpot))
    assert_close(run["queueing_s"], figures(queueing))
    speed = None if run["tpot_s"]["mean"] is None else 1 / np.nanmean(tpot)
    assert run["user_tokens_per_s"] == (None if speed is None else pytest.approx(speed, rel=1e-12))
    assert (run["tpot_s"]["mean"] is None) == (decode_tokens <= (prompt_tokens == 0))
    for server in run["servers"]:
        own = np.array(rows["server"]) == server["name"]
        assert server["requests"] == own.sum() > 0
        assert_close(server["latency_s"], figures(latency[own]))
    quantiles = np.quantile(latency, np.linspace(0, 1, 101))
    assert run["latency_quantiles_s"] == pytest.approx(quantiles, rel=1e-12)


def test_timeline_bins_requests_by_arrival() -> None:
    """Arrivals and mean latencies of the timeline are those of requests of each bin."""
    result = simulated(small_trace(), small_cluster(), "exact", number=100)
    run = result.runs[0]
    line = run.to_json()["timeline"]
    arrival_s = run.scenario.requests.arrival_s
    edges = line["bin_s"] * np.arange(len(line["arrivals"]) + 1)
    assert 20 <= len(line["arrivals"]) <= TIMELINE_BINS
    assert line["arrivals"] == np.histogram(arrival_s, edges)[0].tolist()
    which = np.digitize(arrival_s, edges) - 1
    for index, mean in enumerate(line["mean_latency_s"]):
        of_bin = run.latency_s[which == index]
        assert mean == (pytest.approx(of_bin.mean()) if len(of_bin) else None)


@example([5e-324])
@example([1e-310, 2e-310])
@example([1e12])
@example([60.0, 120.0])
@given(st.lists(st.floats(0, 1e12), max_size=20))
def test_timeline_of_any_times(times_s: list[float]) -> None:
    """Every request is in one of at most 60 bins, of a round length, from 0 on."""
    arrival_s = np.sort(np.array(times_s, float))
    line = _timeline(arrival_s, np.ones(len(arrival_s)))
    assert sum(line["arrivals"]) == len(arrival_s)
    assert len(line["arrivals"]) == len(line["mean_latency_s"]) <= TIMELINE_BINS
    digit = f"{line['bin_s']:.6e}"[0]
    assert digit in "125"
    assert line["bin_s"] * TIMELINE_BINS >= max(times_s, default=0.0)


@given(st.lists(st.floats(0, 1e9) | st.just(math.nan), max_size=30))
def test_summary_of_any_times(times_s: list[float]) -> None:
    """Times that did not come to pass are left out; the percentiles are ordered."""
    found = summary(np.array(times_s, float))
    assert_close(found, figures(np.array(times_s, float)))
    if found["max"] is not None:
        assert found["p50"] <= found["p95"] <= found["p99"] <= found["max"]  # type: ignore[operator]


# -------------------------------------------------------------------- against the one objective


def trace_of(requests: Requests) -> Trace:
    """The tokens of these requests as a trace with a task for each server."""
    tokens = tokens_of(requests)
    batches = [
        TokenBatch(
            request=np.full(len(of_request), number, np.int32),
            position=np.arange(len(of_request), dtype=np.int32),
            phase=np.full(len(of_request), 2, np.int8),
            task=np.full(len(of_request), home, np.int32),
            experts=of_request.astype(np.uint16),
        )
        for number, (home, of_request) in enumerate(zip(requests.home, tokens, strict=True))
    ]
    return trace_from_batches(SPEC, list(requests.servers), batches)


def drawn_placement(plan: Placement, copies: float, seed: int) -> Placement:
    """A placement by chance on the same GPUs, with room for everything."""
    gpus, layers, experts = plan.on_gpu.shape
    held = drawn_held(np.random.default_rng(seed), gpus, layers, experts, copies)
    room = tuple(tuple(layers * experts for _ in of_server) for of_server in plan.gpu_capacity)
    return plan.replace(on_gpu=held, gpu_capacity=room)


@pytest.mark.parametrize(("copies", "seed"), [(0.0, 0), (0.0, 1), (0.2, 2), (0.5, 3)])
def test_shares_are_those_of_the_objective(copies: float, seed: int) -> None:
    """Remote share, waiting share and destinations: the planner's scores of the same tokens."""
    cluster = small_cluster(("slots = 11", "slots = 24"), ("slots = 8", "slots = 24"),
                            ("slots = 3", "slots = 24"))  # fmt: skip
    trace = small_trace()
    placement = drawn_placement(planned(trace, cluster, "uniform")[0][1], copies, seed)
    requests = sampled(trace, cluster, 20, seed=seed)
    result = simulate_placements([("p", placement)], requests, trace, cluster)
    run = result.to_json()["runs"][0]
    seen = trace_of(requests)
    weighted = dataclasses.replace(
        cluster,
        servers=tuple(
            dataclasses.replace(server, tasks={server.name: 1.0}, weight=float(tokens))
            for server, tokens in zip(cluster.servers, seen.tokens, strict=True)
        ),
    )
    remote = score(placement, Instance.build(seen, weighted))
    steps = step_score(placement.local, seen, expected_token_rates(seen, weighted))
    assert run["destinations"] > run["waiting_share"] > run["remote_share"] > 0
    assert run["remote_share"] == pytest.approx(remote.share, rel=1e-12)
    assert run["waiting_share"] == pytest.approx(steps.waiting_share, rel=1e-12)
    assert run["destinations"] == pytest.approx(steps.mean_destinations, rel=1e-12)
    for n, server in enumerate(run["servers"]):
        assert server["remote_share"] == pytest.approx(remote.by_server[n], rel=1e-12)
        assert server["waiting_share"] == pytest.approx(steps.waiting_by_server[n], rel=1e-12)
        assert server["destinations"] == pytest.approx(steps.destinations_by_server[n], rel=1e-12)


def test_calls_and_layers_are_those_of_the_tokens() -> None:
    """Expert calls, GPUs' shares of them, and decode layers by remote experts: all counted."""
    trace, cluster = small_trace(), small_cluster()
    result = simulated(trace, cluster, "redundance")
    source, run = result.runs[0], result.to_json()["runs"][0]
    requests, local = source.scenario.requests, source.scenario.placement.local
    tokens = tokens_of(requests)
    calls = sum(of_request.size for of_request in tokens)
    of_gpus = [gpu for server in run["servers"] for gpu in server["gpus"]]
    assert run["expert_calls"] == calls == sum(gpu["expert_calls"] for gpu in of_gpus)
    held = source.scenario.placement.on_gpu.sum(axis=(1, 2))
    assert [gpu["experts"] for gpu in of_gpus] == held.tolist()
    by_remote = np.zeros(SPEC.top_k + 1, int)
    for home, of_request in zip(requests.home, tokens, strict=True):
        for token in of_request[6:]:  # the decode steps
            for layer, experts in enumerate(token):
                by_remote[(~local[home, layer, experts]).sum()] += 1
    assert [layer["steps"] for layer in run["layer_latency_s"]] == by_remote.tolist()
    means = [layer["mean"] for layer in run["layer_latency_s"]]
    assert means[0] < means[1]
    assert sum(server["bytes_sent"] for server in run["servers"]) == run["bytes_sent"] > 0
    assert sum(server["bytes_received"] for server in run["servers"]) == run["bytes_sent"]


# ------------------------------------------------------------------------------------- utilisation


@pytest.mark.parametrize("concurrency", [1, 3])
def test_utilisation(concurrency: int) -> None:
    """Arrival rate x mean service / places; of drawn arrivals the rate is the cluster's."""
    cluster = small_cluster(('name = "a"', f'name = "a"\nconcurrency = {concurrency}'))
    run = simulated(small_trace(), cluster, "exact").runs[0]
    own = run.scenario.requests.home == 0
    service_s = (run.outcome.done_s - run.outcome.start_s)[own]
    expected = service_s.mean() / 0.02 / concurrency
    assert run.utilisation()[0] == pytest.approx(expected, rel=1e-12)


def at_times(times_s: dict[str, list[float]]) -> SimulationRun:
    """A run with requests of the servers at these times."""
    trace, cluster = small_trace(), small_cluster()
    arrivals = [Arrival(server, at) for server, of_it in times_s.items() for at in of_it]
    requests = sampled(trace, cluster, arrivals=ArrivalTrace(tuple(arrivals)))
    found = simulate_placements(planned(trace, cluster, "exact"), requests, trace, cluster)
    return found.runs[0]


def test_utilisation_of_fixed_times() -> None:
    """The rate is that between the first and the last; there is none of one time or no request."""
    run = at_times({"a": [1.0, 1.5, 1.7, 3.0], "b": [2.0, 2.0]})
    own = run.scenario.requests.home == 0
    service_s = (run.outcome.done_s - run.outcome.start_s)[own].mean()
    found = run.utilisation()
    assert found[0] == pytest.approx(service_s * 3 / 2.0, rel=1e-12)
    assert found[1] is None
    assert found[2] is None


def test_unstable_load_is_noted_with_its_utilisation() -> None:
    """Arrivals faster than service: a note names the server and its utilisation; else none."""
    crowded = small_cluster(("0.04", "0.0001"))
    result = simulated(small_trace(), crowded, "exact")
    (note,) = result.notes
    utilisation = result.runs[0].utilisation()
    assert max(utilisation[:2]) < 1 < utilisation[2]
    assert f"c {utilisation[2]:.2f}" in note
    assert "unstable load" in note
    assert simulated(small_trace(), small_cluster(), "exact").notes == ()


def test_unknown_attention_is_noted_once() -> None:
    """A model spec without ``attention_flops``: one note, however many placements are simulated.

    None where they are known, where a calibration measured all of it, or where nobody has a prompt.
    """
    unknown = dataclasses.replace(SPEC, attention_flops=None)

    def notes_of(model: ModelSpec, prompt_tokens: int = 6, **options: Any) -> tuple[str, ...]:
        drawn = small_trace(prompt_tokens=prompt_tokens)
        trace = dataclasses.replace(drawn, model=model)
        found: tuple[str, ...] = simulated(
            trace, small_cluster(), "exact", "prism", number=5, **options
        ).notes
        return found

    (note,) = notes_of(unknown)
    assert note.startswith("attention_flops of tiny is not known: prompts pay nothing for pairs")
    for flops in (0, 1000):
        assert notes_of(dataclasses.replace(SPEC, attention_flops=flops)) == ()
    curve = ((1, 1e-6), (64, 2e-6))
    measured = Calibration("c", GpuCurves(dense_s=curve, expert_s=curve))
    assert notes_of(unknown, calibration=measured) == ()
    assert notes_of(unknown, prompt_tokens=0) == ()


def test_overload_is_told_however_many_places_there_are() -> None:
    """With places for all, links and GPUs are what is short; the note names them."""
    crowded = small_cluster(
        *(
            (f"arrival_interval_s = {s}", "arrival_interval_s = 0.0002\nconcurrency = 1000")
            for s in ("0.02", "0.04")
        )
    )
    result = simulated(small_trace(), crowded, "exact", number=60)
    run = result.runs[0]
    offered = run.offered_load()
    assert max(share for share in run.utilisation() if share is not None) < 1
    span_s = max(
        (run.scenario.requests.home == n).sum() / run.scenario.requests.rate[n] for n in range(2)
    )
    assert offered["a gpu[0]"] == pytest.approx(run.outcome.gpu_busy_s[0] / span_s, rel=1e-12)
    busiest, share = max(offered.items(), key=lambda item: item[1])
    assert share > 1
    assert f"{busiest} {share:.2f}" in result.notes[0]
    assert run.to_json()["busiest"] == share


# -------------------------------------------------------------------------------------- the schema


def accepted(result: Any) -> Any:
    """The report's values as another program reads them from the file."""
    return simulation_from_json(json.loads(dump_report(result.to_json())))


@pytest.mark.parametrize(("prompt_tokens", "decode_tokens"), LENGTHS)
@pytest.mark.parametrize("number", [1, 5])
def test_schema_accepts_few_tokens_and_requests(
    prompt_tokens: int, decode_tokens: int, number: int
) -> None:
    """Reports of one request, of no decode step, of no prompt are valid."""
    trace = small_trace(prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)
    values = accepted(simulated(trace, small_cluster(), "exact", number=number))
    assert values["runs"][0]["finished"] == 3 * number


def test_schema_accepts_migrations() -> None:
    """A report with reviews is valid, and says how they are decided."""
    for policy, half_life_s in (("prism", None), ("partial", math.inf)):
        result = simulated(
            small_trace(), small_cluster(), "uniform",
            migrate=policy, migrate_every_s=0.1, half_life_s=half_life_s,
        )  # fmt: skip
        values = accepted(result)
        assert any(review["decision"] == "move" for review in values["runs"][0]["migrations"])
        assert values["review"]["half_life_s"] == (0.1 if half_life_s is None else None)


def test_phases_begin_with_their_first_requests() -> None:
    """A report of a schedule says when each phase began, at the first and at the last server.

    A phase that no server reached is left out, and a report without a schedule has no phases.
    """
    trace, cluster = small_trace(), small_cluster()
    schedule = Schedule((Phase(5), Phase(10, {"a": {"z": 1.0}}, 0.5), Phase(30), Phase()))
    requests = sample_requests(trace, cluster, requests_per_server=60, schedule=schedule)
    reached = sample_requests(trace, cluster, duration_s=1.0, schedule=schedule)
    for asked, count in ((requests, 4), (reached, 2)):
        (_, placement), *_ = planned(trace, cluster, "exact")
        result = simulate_placements([("p", placement)], asked, trace, cluster)
        phases = accepted(result)["runs"][0]["phases"]
        assert [phase["number"] for phase in phases] == list(range(1, count + 1))
        for phase, first in zip(phases, (0, 5, 15, 45), strict=False):
            begun_s = [asked.arrival_s[asked.home == n] for n in range(3)]
            begun_s = [times_s[first] for times_s in begun_s if len(times_s) > first]
            assert phase["at_s"] == min(begun_s)
            assert phase["everywhere_at_s"] == max(begun_s)
        assert phases[1]["tasks"] == {"a": {"z": 1.0}}
        assert phases[1]["arrival_interval_s"] == 0.5
    assert "phases" not in accepted(simulated(trace, cluster, "exact"))["runs"][0]


def test_schema_accepts_partial_and_empty_reports() -> None:
    """A run that the time limit truncated is valid; times of nothing are null."""
    result = simulated(
        small_trace(), small_cluster(), "exact", "prism",
        number=1000, engine="reference", time_limit_s=1e-9,
    )  # fmt: skip
    values = accepted(result)
    (run,) = values["runs"]
    assert values["partial"]
    assert run["partial"]
    assert run["finished"] < run["requests"] == 3000
    outcome, requests = result.runs[0].outcome, result.runs[0].scenario.requests
    waited_s = np.maximum(outcome.now_s - requests.arrival_s, 0.0)
    outcome = dataclasses.replace(
        outcome,
        done_s=np.full(3000, np.nan),
        present_s=np.bincount(requests.home, waited_s),
    )
    nothing = dataclasses.replace(result.runs[0], outcome=outcome)
    values = accepted(dataclasses.replace(result, runs=(nothing,)))
    assert values["runs"][0]["latency_s"]["mean"] is None
    assert values["runs"][0]["latency_quantiles_s"] == []


def test_schema_accepts_offload_and_drawn_tokens() -> None:
    """Reports of the baseline `offload` and of counts are valid; drawn routing is noted."""
    trace = counts_of(small_trace())
    cluster = small_cluster(('name = "a"', 'name = "a"\nweight = 1.0'),
                            ('name = "b"', 'name = "b"\nweight = 1.0'),
                            ('name = "c"', 'name = "c"\nweight = 1.0'))  # fmt: skip
    plans = planned(trace, cluster, "exact")
    plans.append(("offload", offload_placement(Instance.build(trace, cluster))))
    requests = sampled(trace, cluster, 3, prompt_tokens=5, decode_tokens=2)
    values = accepted(simulate_placements(plans, requests, trace, cluster))
    assert values["trace"]["kind"] == "counts"
    assert [run["loads"] > 0 for run in values["runs"]] == [False, True]
    (note,) = values["notes"]
    assert "drawn from counts" in note


# ------------------------------------------------------------------------------------ Little's law


def test_littles_law_is_checked() -> None:
    """Spoiled counts of requests present, at one server by a millionth, are found out."""
    run = simulated(small_trace(), small_cluster(), "exact").runs[0]
    run.to_json()
    for n in range(3):
        present_s = run.outcome.present_s.copy()
        present_s[n] *= 1 + 1e-6
        outcome = dataclasses.replace(run.outcome, present_s=present_s)
        with pytest.raises(AssertionError, match=f"server {n}: requests spent"):
            dataclasses.replace(run, outcome=outcome).to_json()


def test_options_reach_the_report() -> None:
    """Seed, route and timing of the options are in the report."""
    options = SimulationOptions(route="spread", seed=7)
    trace, cluster = small_trace(), small_cluster()
    found = simulate_placements(
        planned(trace, cluster, "exact"), sampled(trace, cluster, 2), trace, cluster, options
    ).to_json()
    assert (found["seed"], found["route"], found["timing"]) == (7, "spread", "cluster")
    assert (found["migrate"], "review" in found) == ("never", False)
