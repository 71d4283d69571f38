"""Links: units, the lowest of the rates on the way, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import InputError
from prism_plan.model_spec import PRESETS
from prism_plan.simulate.network import BYTES_PER_CALL, Network
from tests.simulate.builders import (
    BYTES_PER_S,
    HALF_RTT_S,
    OVERHEAD_S,
    make_cluster,
    make_model,
)

V2 = PRESETS["deepseek-v2-lite"]


def ports(*rates: tuple[float | None, float | None]) -> tuple[Server, ...]:
    """Servers from their (uplink, downlink)."""
    return tuple(
        Server(f"s{n}", (Gpu(slots=1),), uplink_mbps=up, downlink_mbps=down)
        for n, (up, down) in enumerate(rates)
    )


def test_units() -> None:
    """500 Mbit/s are 62.5e6 bytes/s, 1 ms round trip 0.5 ms one way, 64 kb 64,000 bytes."""
    link = Link(bandwidth_mbps=500, rtt_ms=1.0, call_overhead_ms=0.2, burst_kb=64, short_kb=2)
    network = Network.of(Cluster("c", ports((None, None), (None, None)), link), V2)
    assert 1 / network.seconds_per_byte[0, 1] == pytest.approx(62.5e6, rel=1e-15)
    assert network.up_bytes_per_s.tolist() == network.down_bytes_per_s.tolist() == [62.5e6, 62.5e6]
    assert network.half_rtt_s.tolist() == [[0.0, 0.0005], [0.0005, 0.0]]
    assert network.call_overhead_s == pytest.approx(0.0002, rel=1e-15)
    assert (network.burst_bytes, network.short_bytes) == (64_000, 2_000)
    assert network.token_bytes == 2048 * 2
    assert network.seconds_per_byte.diagonal().tolist() == [0.0, 0.0]


def test_the_lowest_rate_counts() -> None:
    """Of the sender's uplink, the receiver's downlink and the cap of the pair, each way."""
    servers = ports((100, None), (None, 50), (None, None))
    pairs = (PairLink(0, 2, 20.0, None), PairLink(1, 2, None, 7.0))
    network = Network.of(Cluster("c", servers, Link(bandwidth_mbps=500, rtt_ms=1), pairs), V2)
    with np.errstate(divide="ignore"):
        mbps = 8e-6 / network.seconds_per_byte
    expected = [[math.inf, 50, 20], [500, math.inf, 500], [20, 50, math.inf]]
    np.testing.assert_allclose(mbps, expected, rtol=1e-15)
    assert network.up_bytes_per_s.tolist() == [12.5e6, 62.5e6, 62.5e6]
    assert network.down_bytes_per_s.tolist() == [62.5e6, 6.25e6, 62.5e6]
    assert network.half_rtt_s.tolist() == [
        [0, 0.0005, 0.0005],
        [0.0005, 0, 0.0035],
        [0.0005, 0.0035, 0],
    ]


def test_a_port_faster_than_the_default_is_capped_by_it() -> None:
    """The default bandwidth is also the cap of a pair; a pair may raise it, not a port."""
    servers = ports((900, 900), (900, 900))
    cluster = Cluster("c", servers, Link(bandwidth_mbps=500))
    assert Network.of(cluster, V2).seconds_per_byte[0, 1] == 8e-6 / 500
    raised = dataclasses.replace(cluster, pair_links=(PairLink(0, 1, 2000.0, None),))
    assert Network.of(raised, V2).seconds_per_byte[0, 1] == 8e-6 / 900


def test_cost_of_a_call() -> None:
    """A round trip, one token and the name of one expert out, one token back; unequal ports."""
    servers = ports((100, 200), (50, 400))
    network = Network.of(Cluster("c", servers, Link(bandwidth_mbps=1000, rtt_ms=3)), V2)
    out = (4096 + BYTES_PER_CALL) * 8 / 100e6
    back = 4096 * 8 / 50e6
    cost = network.call_cost_s()
    assert cost[0, 1] == pytest.approx(0.003 + out + back, rel=1e-12)
    reverse = (4096 + BYTES_PER_CALL) * 8 / 50e6 + 4096 * 8 / 100e6
    assert cost[1, 0] == pytest.approx(0.003 + reverse, rel=1e-12)
    assert cost.diagonal().tolist() == [0.0, 0.0]


def test_figures_of_the_builders_are_exact() -> None:
    """They come through as sums of powers of two, so that tests may compare times by ==."""
    network = Network.of(make_cluster([1, 1]), make_model(1, 1))
    assert network.seconds_per_byte[0, 1] == 1 / BYTES_PER_S
    assert network.half_rtt_s[0, 1] == HALF_RTT_S
    assert network.call_overhead_s == OVERHEAD_S
    assert network.up_bytes_per_s[0] == network.down_bytes_per_s[1] == BYTES_PER_S


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["link", "uplink", "downlink", "pair"])
def test_bandwidth_must_be_above_zero(key: str, value: float) -> None:
    """Zero, negative, NaN or infinite bandwidth: refused with its place and value."""
    servers = list(ports((None, None), (None, None)))
    link, pairs = Link(), ()
    if key == "link":
        link, place = Link(bandwidth_mbps=value), "link.bandwidth_mbps"
    elif key == "pair":
        pairs, place = (PairLink(0, 1, value, None),), "links[0].bandwidth_mbps"  # type: ignore[assignment]
    else:
        place = f"server[1].{key}_mbps"
        servers[1] = dataclasses.replace(servers[1], **{f"{key}_mbps": value})  # type: ignore[arg-type]
    with pytest.raises(InputError) as error:
        Network.of(Cluster("c", tuple(servers), link, pairs), V2)
    assert str(error.value) == f"{place}: {value!r}; expected Mbit/s above 0"


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("key", ["rtt_ms", "call_overhead_ms", "burst_kb", "short_kb", "pair"])
def test_times_must_not_be_negative(key: str, value: float) -> None:
    """Negative, NaN or infinite times and bursts: refused with their place and value."""
    pairs = (PairLink(0, 1, None, value),) if key == "pair" else ()
    link = Link() if key == "pair" else dataclasses.replace(Link(), **{key: value})
    place = "links[0].rtt_ms" if key == "pair" else f"link.{key}"
    with pytest.raises(InputError) as error:
        Network.of(Cluster("c", ports((None, None), (None, None)), link, pairs), V2)
    assert str(error.value) == f"{place}: {value!r}; expected a number of at least 0"
