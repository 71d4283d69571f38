"""Times of GPU work: rooflines by hand, curves between and beyond their points."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import InputError
from prism_plan.model_spec import PRESETS
from prism_plan.simulate.calibration import Calibration, GpuCurves
from prism_plan.simulate.scenario import Scenario
from prism_plan.simulate.timing import (
    interpolate,
    roofline_decode_s,
    roofline_expert_s,
    roofline_prefill_s,
    timing,
)
from tests.simulate.builders import Ask, make_model, make_requests, place

V2 = PRESETS["deepseek-v2-lite"]
A100 = Gpu(slots=541, memory_bandwidth_gbs=1555, tflops=312, launch_overhead_us=20, load_gbs=12)
CURVES = GpuCurves(dense_s=((2, 1.0), (4, 3.0), (8, 4.0)), expert_s=((1, 0.5), (2, 0.5)))


def cluster(*servers: tuple[Gpu, ...]) -> Cluster:
    return Cluster("c", tuple(Server(f"s{n}", gpus) for n, gpus in enumerate(servers)))


def test_expert_of_v2_lite_on_an_a100() -> None:
    """One token: 17.3 MB at 1555 GB/s, 11.1 us; from 201 tokens on its operations take longer.

    One token costs 2 x 3 x 2048 x 1408 = 17.3 M operations at 312 TFLOP/s, 55.5 ns.
    """
    tokens = np.array([1.0, 200, 201, 1000])
    got = roofline_expert_s(V2, A100, V2.expert_bytes_by_layer[0], tokens)
    read = 3 * 2048 * 1408 * 2 / 1555e9
    token = 2 * 3 * 2048 * 1408 / 312e12
    assert read == pytest.approx(11.1264e-6, rel=1e-4)
    assert token == pytest.approx(55.4535e-9, rel=1e-4)
    assert 200 * token < read < 201 * token
    expected = 20e-6 + np.array([read, read, 201 * token, 1000 * token])
    np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_dense_part_of_v2_lite_on_an_a100() -> None:
    """Its 2.62 GB are spread evenly over 26 MoE layers: 64.9 us to read, 20 us to launch."""
    plain = dataclasses.replace(V2, attention_flops=None)
    got = roofline_prefill_s(plain, A100, np.array([1.0, 1000]), 1)
    read = 2_623_265_792 / 26 / 1555e9
    assert read == pytest.approx(64.884e-6, rel=1e-4)
    flops = 1000 * 2_623_265_792 / 26
    np.testing.assert_allclose(got, [20e-6 + read, 20e-6 + flops / 312e12], rtol=1e-13)


def test_attention_of_v2_lite() -> None:
    """A decode step reads the cache: 1,152 bytes a token and decoder layer, 15.2 us for 20,480.

    The first MoE layer, 1, executes with the dense layer 0: twice the cache, twice the pairs.
    """
    assert V2.kv_bytes_per_token == 27 * 1152
    assert V2.decoder_layers_by_layer == (2, *[1] * 25)
    context = np.array([0.0, 20_480])
    once, twice = (roofline_decode_s(V2, A100, context, layers) for layers in (1, 2))
    dense = 20e-6 + 2_623_265_792 / 26 / 1555e9
    cache = 20_480 * 1152 / 1555e9
    assert cache == pytest.approx(15.172e-6, rel=1e-4)
    np.testing.assert_allclose(once, [dense, dense + cache], rtol=1e-13)
    np.testing.assert_allclose(twice, [dense, dense + 2 * cache], rtol=1e-13)
    quadratic = dataclasses.replace(V2, attention_flops=1000)
    tokens = np.array([4000.0])
    with_pairs = roofline_prefill_s(quadratic, A100, tokens, 2)
    without = roofline_prefill_s(dataclasses.replace(V2, attention_flops=None), A100, tokens, 2)
    np.testing.assert_allclose(with_pairs - without, 1000 * 2 * 4000**2 / 2 / 312e12, rtol=1e-9)


def test_layers_without_experts_execute_with_the_next() -> None:
    """MoE layers 1, 3 and 4 of 8 decoder layers: 0 with 1, 2 with 3, 5 to 7 with the last."""
    model = make_model(3, 2, num_decoder_layers=8)
    model = dataclasses.replace(model, moe_layers=(1, 3, 4))
    assert model.decoder_layers_by_layer == (2, 2, 4)
    table = timing(cluster((A100,)), model, 1)
    assert table.dense_class.tolist() == [0, 0, 1]


def test_loads_of_v2_lite() -> None:
    """docs/design.md, section 4: at 12 GB/s an expert loads in 1.44 ms."""
    table = timing(cluster((A100,)), V2, 1)
    assert table.load_s.shape == (1, 26)
    assert table.load_s[0] == pytest.approx(1.44e-3, rel=2e-3)


def test_gpus_alike_share_a_row() -> None:
    """Rows by what GPUs can do, experts by size, in tables up to the largest step."""
    slow = dataclasses.replace(A100, tflops=31.2)
    model = make_model(3, 2, expert_bytes=(100, 300, 100))
    table = timing(cluster((A100, slow), (A100,)), model, 7)
    assert table.kind.tolist() == [0, 1, 0]
    assert table.size.tolist() == [0, 1, 0]
    assert table.prefill_s.shape == (2, 1, 8)
    assert table.expert_s.shape == (2, 2, 8)
    counts = np.arange(8.0)
    for row, gpu in enumerate((A100, slow)):
        expected = roofline_prefill_s(model, gpu, counts, 1)
        np.testing.assert_array_equal(table.prefill_s[row, 0], expected)
        for column, size in enumerate((100, 300)):
            expected = roofline_expert_s(model, gpu, size, counts)
            np.testing.assert_array_equal(table.expert_s[row, column], expected)
    np.testing.assert_array_equal(table.load_s, np.tile(np.array([100, 300, 100]) / 12e9, (3, 1)))
    assert not any(array.flags.writeable for array in vars(table).values())


def test_between_and_beyond_the_points() -> None:
    """Linear between points, constant before the first, the last slope beyond the last."""
    got = interpolate(CURVES.dense_s, np.array([0.0, 1, 2, 3, 4, 6, 8, 9, 16]))
    assert got.tolist() == [1.0, 1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 4.25, 6.0]
    falling = interpolate(((1, 2.0), (3, 1.0)), np.array([2.0, 3, 100]))
    assert falling.tolist() == [1.5, 1.0, 1.0]  # a falling end does not fall below zero


def test_calibration_replaces_the_figures() -> None:
    """Curves of the GPU itself, or the default; loads still take the cluster's figure."""
    other = dataclasses.replace(CURVES, expert_s=((1, 9.0), (2, 9.5)))
    calibration = Calibration("m.json", CURVES, {("s1", 0): other})
    table = timing(cluster((A100, A100), (A100,)), V2, 3, calibration)
    assert table.kind.tolist() == [0, 0, 1]
    measured = [1.0, 1.0, 1.0, 2.0]
    assert table.prefill_s.tolist() == [[measured] * 2] * 2
    assert table.decode_s.tolist() == [[[1.0]] * 2] * 2  # nothing is added for attention
    assert table.expert_s[:, 0].tolist() == [[0.5] * 4, [9.0, 9.0, 9.5, 10.0]]
    assert table.load_s[0, 0] == 17_301_504 / 12e9


def test_calibration_lacks_a_gpu() -> None:
    """No curves for a GPU and no default: the file and the GPU are named."""
    calibration = Calibration("m.json", None, {("s0", 0): CURVES})
    with pytest.raises(InputError) as error:
        timing(cluster((A100, A100)), V2, 3, calibration)
    assert str(error.value) == (
        "m.json: servers: no times of server 's0' gpu[1]; measure it, or give a default"
    )


@pytest.mark.parametrize(
    ("name", "gpu", "message"),
    [
        ("s10", 0, "servers['s10']: no server of c, did you mean 's1'?; expected one of s0, s1"),
        ("edge", 0, "servers['edge']: no server of c; expected one of s0, s1"),
        ("s1", 1, "servers['s1'].gpus[1]: a GPU too many; expected 1, as c gives 's1'"),
        ("s0", 2, "servers['s0'].gpus[2]: a GPU too many; expected 2, as c gives 's0'"),
    ],
)
def test_calibration_of_another_cluster(name: str, gpu: int, message: str) -> None:
    """Times of a server or GPU that the cluster lacks: refused, though there is a default."""
    measured = {("s1", 0): CURVES, ("s0", 1): CURVES, (name, gpu): CURVES}
    calibration = Calibration("m.json", CURVES, measured)
    there = cluster((A100, A100), (A100,))
    with pytest.raises(InputError) as error:
        calibration.applied(there)
    assert str(error.value) == f"m.json: {message}"
    model = make_model(1, 1)
    placement = place(model, there, np.ones((3, 1, 1)))
    requests = make_requests(there, [Ask(0, 0.0, [], [[[0]]])], 1, 1)
    with pytest.raises(InputError) as again:
        Scenario.build(placement, requests, there, model, calibration=calibration)
    assert str(again.value) == str(error.value)
    del measured[name, gpu]
    assert Scenario.build(placement, requests, there, model, calibration=calibration)


def test_calibrated_links() -> None:
    """Measured link figures replace the defaults; what is not measured stays."""
    measured = Calibration("m.json", CURVES, bandwidth_mbps=123.0, rtt_ms=0.0)
    before = cluster((A100,))
    link = measured.applied(before).link
    assert (link.bandwidth_mbps, link.rtt_ms) == (123.0, 0.0)
    assert link.call_overhead_ms == before.link.call_overhead_ms
    assert Calibration("m.json", CURVES, call_overhead_ms=7.0).applied(before).link == (
        dataclasses.replace(before.link, call_overhead_ms=7.0)
    )


@pytest.mark.parametrize(
    "key", ["memory_bandwidth_gbs", "tflops", "load_gbs", "launch_overhead_us"]
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_figures_must_be_numbers(key: str, value: float) -> None:
    """A figure that no GPU has is refused with its place; only the overhead may be zero."""
    gpus = (A100, dataclasses.replace(A100, **{key: value}))
    if key == "launch_overhead_us" and value == 0.0:
        assert timing(cluster((A100,), gpus), V2, 1).expert_s.shape == (2, 1, 2)
        return
    with pytest.raises(InputError) as error:
        timing(cluster((A100,), gpus), V2, 1)
    assert str(error.value).startswith(f"server[1].gpu[1].{key}: {value!r}; expected a number")
