"""Calibration from measured steps: known rates and overheads are found again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.io.calibration import calibration_from_json
from prism_plan.model_spec import PRESETS
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.timing import timing
from runtime_adapter.calibrate import (
    TOKENS,
    Measured,
    averaged,
    calibration,
    calibration_placement,
)
from runtime_adapter.spans.messages import HEADER_BYTES as SPAN_HEADER_BYTES
from runtime_adapter.transport.send_queue import LONG_BYTES
from runtime_adapter.transport.wire_format import HEADER_BYTES

MODEL = PRESETS["deepseek-v2-lite"]


def cluster(burst_kb: float) -> Cluster:
    """Two alike servers."""
    servers = tuple(Server(name, (Gpu(slots=2000),)) for name in ("a", "b"))
    return Cluster("c", servers, Link(burst_kb=burst_kb))


def made_up(
    two: Cluster, *, overhead_s: float, mbps: float = 400.0, rtt_s: float = 0.0, own_s: float = 0.0
) -> Measured:
    """Steps that take so much beyond the tables."""
    table = timing(two, MODEL, max(TOKENS))
    burst = two.link.burst_kb * 1e3
    local, remote = {}, {}
    for t in TOKENS:
        experts_s = MODEL.top_k * float(table.expert_s[0, 0, t])
        dense_s = float(table.prefill_s[0, :, t].mean()) + own_s
        out = t * MODEL.hidden_size * 2 + BYTES_PER_CALL * t * MODEL.top_k + HEADER_BYTES
        back = t * MODEL.hidden_size * 2 + HEADER_BYTES
        shaped = max(out + back - 2 * burst, 0.0)
        local[t] = dense_s + experts_s
        remote[t] = dense_s + experts_s + overhead_s + rtt_s + shaped * 8e-6 / mbps
    here = np.arange(MODEL.top_k + 1)
    spread = np.stack([here, MODEL.top_k - here], axis=1)
    one_s = float(table.expert_s[0, 0, 1])
    steps_s = []
    for own, calls in spread.tolist():
        bytes_out = MODEL.hidden_size * 2 + BYTES_PER_CALL * calls + HEADER_BYTES
        bytes_back = MODEL.hidden_size * 2 + HEADER_BYTES
        shaped = sum(max(b - burst, 0.0) for b in (bytes_out, bytes_back))
        away_s = overhead_s + rtt_s + shaped * 8e-6 / mbps + calls * one_s
        steps_s.append(max(own * one_s, away_s if calls else 0.0))
    spread_s = float(table.prefill_s[0, :, 1].mean()) + own_s + float(np.mean(steps_s))
    return Measured(local, remote, spread_s, spread)


@pytest.mark.parametrize("burst_kb", [0.0, 64.0])
@pytest.mark.parametrize("rtt_ms", [0.0, 2.0])
def test_made_up_times_are_found_again(burst_kb: float, rtt_ms: float) -> None:
    """Steps that take 0.3 ms a call at 400 Mbit/s beyond the tables give back these figures.

    So do passes of two hops that take 0.1 ms each.
    """
    two, own_s = cluster(burst_kb), 0.0002
    measured = made_up(two, overhead_s=0.0003, rtt_s=rtt_ms * 1e-3, own_s=own_s)
    line_s = max(MODEL.hidden_size * 2 + SPAN_HEADER_BYTES - 1e3 * burst_kb, 0.0) * 8e-6 / 400
    pass_s = 2 * 0.0001 + rtt_ms * 1e-3 + line_s  # hidden states there, an id back
    measured = dataclasses.replace(measured, pass_s=pass_s)
    values = calibration(measured, two, MODEL, rtt_ms * 1e-3)
    assert values["call_overhead_ms"] == pytest.approx(0.3, rel=1e-6)
    assert values["hop_overhead_ms"] == pytest.approx(0.1, rel=1e-6)
    assert values["bandwidth_mbps"] == pytest.approx(400, rel=1e-6)
    assert values["burst_kb"] == pytest.approx(burst_kb, rel=1e-6)
    found = calibration_from_json(values)
    assert found.rtt_ms == rtt_ms
    assert found.short_kb == LONG_BYTES / 1e3
    curves, table = found.of("b", 0), timing(two, MODEL, max(TOKENS))
    for t, seconds in curves.dense_s:
        assert seconds == pytest.approx(float(table.prefill_s[0, :, t].mean()) + own_s, rel=1e-9)
    for t, seconds in curves.expert_s:
        assert seconds == pytest.approx(float(table.expert_s[0, 0, t]), rel=1e-9)


@pytest.mark.parametrize(("late_ms", "burst_kb"), [(0.5, 51.5), (2.0, 14.0), (9.0, 0.0), (-1, 64)])
def test_long_messages_that_are_late(late_ms: float, burst_kb: float) -> None:
    """What they take beyond rate and overhead is a burst that is smaller, at least none.

    At 400 Mbit/s 0.5 ms are 25 kB, of the two messages of a call together; an early message does
    not make the burst larger than the cluster says.
    """
    two = cluster(64.0)
    measured = made_up(two, overhead_s=0.0003)
    late = {t: s + (t >= 128) * late_ms * 1e-3 for t, s in measured.remote_s.items()}
    values = calibration(dataclasses.replace(measured, remote_s=late), two, MODEL, 0.0)
    assert values["burst_kb"] == pytest.approx(burst_kb, abs=1e-6)
    assert values["call_overhead_ms"] == pytest.approx(0.3, rel=1e-6)


def test_the_placement_of_a_calibration_covers_and_separates() -> None:
    """Every expert is somewhere; those of a local step are the first server's alone."""
    placement = calibration_placement(cluster(0.0), MODEL)
    local = placement.local
    assert local.any(axis=0).all()
    assert local[0, 0, : MODEL.top_k].all()
    assert not local[1, 0, : MODEL.top_k].any()
    assert local[1, 0, MODEL.top_k : 2 * MODEL.top_k].all()


def test_the_mean_of_calibrations() -> None:
    """Times and rates are averaged, tokens and names stay; of one calibration it is itself."""
    two = cluster(0.0)
    fast, slow = (
        calibration(made_up(two, overhead_s=s, mbps=mbps, own_s=s), two, MODEL, 0.0)
        for s, mbps in ((1e-3, 500.0), (2e-3, 400.0))
    )
    assert averaged([fast]) == fast
    found = averaged([fast, slow])
    assert found["call_overhead_ms"] == pytest.approx(1.5, rel=1e-6)
    assert found["bandwidth_mbps"] == pytest.approx(450.0, rel=1e-6)
    assert calibration_from_json(found)
    for server, one, other in zip(found["servers"], fast["servers"], slow["servers"], strict=True):
        assert server["name"] == one["name"]
        for curve, a, b in zip(server["gpus"], one["gpus"], other["gpus"], strict=True):
            for key in ("dense_ms", "expert_ms"):
                assert [t for t, _ in curve[key]] == [t for t, _ in a[key]]
                means = [(x + y) / 2 for (_, x), (_, y) in zip(a[key], b[key], strict=True)]
                assert [x for _, x in curve[key]] == pytest.approx(means)
