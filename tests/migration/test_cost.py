"""Seconds of remote calls and of loads, against sums by hand."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import InputError
from prism_plan.migration.cost import call_seconds, communication_s, gpu_load_gbs, migration_s
from prism_plan.model_spec import PRESETS

MODEL = PRESETS["deepseek-v2-lite"]
TOKEN_BITS = 2048 * 2 * 8


def cluster(
    *servers: Server, link: Link | None = None, pairs: tuple[PairLink, ...] = ()
) -> Cluster:
    """A cluster with links of 500 Mbit/s and 1 ms unless told otherwise."""
    return Cluster("c", servers, link or Link(500.0, 1.0, 0.2), pairs)


def server(name: str, **figures: float) -> Server:
    """A server with one GPU."""
    return Server(name, (Gpu(slots=1),), **figures)  # type: ignore[arg-type]


def test_equal_links_by_hand() -> None:
    """Overhead, round trip, a hidden state and 4 bytes out, a hidden state back."""
    seconds = call_seconds(cluster(server("a"), server("b"), server("c")), MODEL)
    by_hand = 0.2e-3 + 1e-3 + (2 * TOKEN_BITS + 32) / 500e6
    assert seconds == pytest.approx([by_hand] * 3, rel=1e-12)


def test_one_server_has_no_remote_calls() -> None:
    """There is nobody to call, so a call costs nothing."""
    assert call_seconds(cluster(server("a")), MODEL).tolist() == [0.0]


def test_unequal_links_by_hand() -> None:
    """Each way goes at the least of sender's uplink, receiver's downlink and the pair's cap."""
    servers = (
        server("a", uplink_mbps=100.0),
        server("b", downlink_mbps=50.0),
        server("c", uplink_mbps=900.0, downlink_mbps=900.0),
    )
    pairs = (PairLink(0, 2, bandwidth_mbps=20.0), PairLink(1, 2, rtt_ms=30.0))
    up = {"a": 100.0, "b": 500.0, "c": 900.0}
    down = {"a": 500.0, "b": 50.0, "c": 900.0}
    cap = {"ab": 500.0, "ac": 20.0, "bc": 500.0}
    rtt_s = {"ab": 1e-3, "ac": 1e-3, "bc": 30e-3}
    cost = dict.fromkeys("abc", 0.0)
    for n, m in itertools.permutations("abc", 2):
        pair = "".join(sorted(n + m))
        out_bps = min(up[n], down[m], cap[pair]) * 1e6
        back_bps = min(up[m], down[n], cap[pair]) * 1e6
        one_call = rtt_s[pair] + (TOKEN_BITS + 32) / out_bps + TOKEN_BITS / back_bps
        cost[n] += (0.2e-3 + one_call) / 2
    seconds = call_seconds(cluster(*servers, pairs=pairs), MODEL)
    assert seconds == pytest.approx([cost["a"], cost["b"], cost["c"]], rel=1e-12)


def test_faster_links_make_cheaper_calls() -> None:
    """Ten times the bandwidth takes nine tenths of what is not round trip or overhead."""
    slow = cluster(server("a"), server("b"))
    fast = dataclasses.replace(slow, link=Link(5000.0, 1.0, 0.2))
    saved = call_seconds(slow, MODEL) - call_seconds(fast, MODEL)
    assert saved == pytest.approx([0.9 * (2 * TOKEN_BITS + 32) / 500e6] * 2, rel=1e-9)


def test_dead_links_are_refused() -> None:
    """No bandwidth is an error of the cluster file, not an infinite cost."""
    with pytest.raises(InputError, match="bandwidth_mbps"):
        call_seconds(cluster(server("a"), server("b"), link=Link(0.0)), MODEL)


def test_load_bandwidths_in_the_order_of_gpus() -> None:
    """One figure for each GPU of all servers in order."""
    gpus = [Gpu(slots=1, load_gbs=gbs) for gbs in (3.0, 5.0, 8.0)]
    both = cluster(Server("a", (gpus[0],)), Server("b", (gpus[1], gpus[2])))
    assert gpu_load_gbs(both).tolist() == [3.0, 5.0, 8.0]


@pytest.mark.parametrize("seed", range(5))
def test_communication_is_the_sum_of_remote_calls(seed: int) -> None:
    """Every remote expert's rate times its server's seconds a call times the horizon."""
    rng = np.random.default_rng(seed)
    rates, local, call_s = rng.random((3, 2, 5)), rng.random((3, 2, 5)) < 0.5, rng.random(3)
    by_hand = sum(
        rates[index] * call_s[index[0]] * 300.0 for index in np.ndindex(3, 2, 5) if not local[index]
    )
    assert communication_s(rates, local, call_s, 300.0) == pytest.approx(by_hand, rel=1e-12)


def test_loads_by_hand() -> None:
    """3 GB at 2 GB/s beside nothing and 12 GB at 4 GB/s: 4.5 s in sum, 3 s at most."""
    loads = np.zeros((3, 2, 4), bool)
    loads[0, 0, :3] = True
    loads[2, 0, :2] = loads[2, 1, 1:3] = True
    size, gbs = (10**9, 5 * 10**9), np.array([2.0, 1.0, 4.0])
    assert migration_s(loads, size, gbs) == pytest.approx(4.5)
    assert migration_s(loads, size, gbs, "sum") == pytest.approx(4.5)
    assert migration_s(loads, size, gbs, "max") == pytest.approx(3.0)


def test_nothing_to_load() -> None:
    """No loads, no seconds, by either reckoning."""
    loads = np.zeros((2, 1, 3), bool)
    assert migration_s(loads, (7,), np.ones(2), "sum") == 0.0
    assert migration_s(loads, (7,), np.ones(2), "max") == 0.0


def test_the_figures_of_the_design() -> None:
    """At 12 GB/s an expert of V2-Lite loads in 1.44 ms, one of Mixtral in 29 ms."""
    one = np.ones((1, 1, 1), bool)
    for name, milliseconds in (("deepseek-v2-lite", 1.44), ("mixtral-8x7b", 29.36)):
        size = PRESETS[name].expert_bytes_by_layer[:1]
        assert migration_s(one, size, np.array([12.0])) * 1e3 == pytest.approx(
            milliseconds, abs=0.005
        )
