"""Tests of clusters: what a cluster file says, and what no cluster may be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import InputError
from prism_plan.io.cluster import parse_cluster, read_cluster

FULL = """
name = "full"
[link]
bandwidth_mbps = 500
rtt_ms = 2
call_overhead_ms = 0.5
burst_kb = 16
[[links]]
a = "b"
b = "a"
rtt_ms = 9
[[links]]
a = "a"
b = "c"
bandwidth_mbps = 50
[[server]]
name = "a"
arrival_interval_s = 10.0
tasks = { law = 0.25, "code, C" = 0.75 }
weight = 2
uplink_mbps = 100
downlink_mbps = 200
kv_tokens = 4096
concurrency = 3
pin = [[1, 5], [2, 0]]
forbid = [[1, 6]]
layer_cap = 32
[[server.gpu]]
memory_gb = 40
memory_fraction = 0.3
reserve_gb = 0.5
memory_bandwidth_gbs = 1000
tflops = 100
launch_overhead_us = 5
load_gbs = 6
[[server.gpu]]
memory_gib = 24
dense = true
[[server]]
name = "b"
[[server.gpu]]
slots = 832
[[server]]
name = "c"
[[server.gpu]]
memory_gb = 16
"""


def test_every_key() -> None:
    """Each key of docs/design.md, section 6 reaches the field it means, in its unit."""
    a_first = Gpu(
        memory_bytes=40 * 10**9,
        memory_fraction=0.3,
        reserve_bytes=5 * 10**8,
        memory_bandwidth_gbs=1000.0,
        tflops=100.0,
        launch_overhead_us=5.0,
        load_gbs=6.0,
    )
    a = Server(
        name="a",
        gpus=(a_first, Gpu(memory_bytes=24 * 2**30, dense=True)),
        tasks={"law": 0.25, "code, C": 0.75},
        arrival_interval_s=10.0,
        weight=2.0,
        uplink_mbps=100.0,
        downlink_mbps=200.0,
        kv_tokens=4096,
        concurrency=3,
        pin=((1, 5), (2, 0)),
        forbid=((1, 6),),
        layer_cap=32,
    )
    assert parse_cluster(FULL) == Cluster(
        name="full",
        servers=(
            a,
            Server("b", (Gpu(slots=832),)),
            Server("c", (Gpu(memory_bytes=16 * 10**9),)),
        ),
        link=Link(500.0, 2.0, 0.5, 16.0),
        pair_links=(PairLink(0, 1, None, 9.0), PairLink(0, 2, 50.0, None)),
    )
    assert a.dense_gpu == 1


def test_defaults() -> None:
    """What a file does not say is the default; servers are named by their index."""
    cluster = parse_cluster("[[server]]\n[[server.gpu]]\nmemory_gb = 1\n[[server]]\n"
                            "[[server.gpu]]\nslots = 1")  # fmt: skip
    assert [server.name for server in cluster.servers] == ["server-0", "server-1"]
    assert cluster.num_servers == 2
    assert cluster.link == Link()
    server = cluster.servers[0]
    assert (server.tasks, server.weight, server.arrival_interval_s) == ({}, None, None)
    assert (server.kv_tokens, server.concurrency, server.layer_cap) == (0, 1, None)
    assert server.gpus[0].memory_fraction == 1.0
    assert server.gpus[0].usable_bytes == 10**9


def test_read_cluster(tmp_path: Path) -> None:
    """A file without a name is called after itself, and errors in it name it."""
    path = tmp_path / "three-sites.toml"
    path.write_text("[[server]]\n[[server.gpu]]\nslots = 1\n")
    assert read_cluster(path).name == "three-sites"
    path.write_text("[[server]]\n[[server.gpu]]\nslots = -1\n")
    with pytest.raises(InputError) as caught:
        read_cluster(path)
    assert str(caught.value).startswith(f"{path}: server[0].gpu[0].slots: -1; expected")


@pytest.mark.parametrize(("third", "good"), [("0.333333", True), ("0.3333", False)])
def test_shares_sum_to_one(third: str, good: bool) -> None:
    """Shares of tasks sum to one within 1e-6."""
    tasks = f"tasks = {{ a = 0.333333, b = 0.333334, c = {third} }}"
    text = f"[[server]]\n{tasks}\n[[server.gpu]]\nslots = 1"
    if good:
        assert sum(parse_cluster(text).servers[0].tasks.values()) == pytest.approx(1, abs=1e-6)
        return
    with pytest.raises(InputError, match="shares sum to"):
        parse_cluster(text)


ONE = Server("a", (Gpu(slots=1),))


@pytest.mark.parametrize(
    ("servers", "place"),
    [
        ((), "server"),
        ((ONE, ONE), "server[1].name"),
        ((ONE, Server("b", ())), "server[1]"),
        ((Server("b", (Gpu(slots=1, dense=True),) * 2),), "server[0]"),
        ((Server("b", ONE.gpus, pin=((1, 2),), forbid=((1, 2),)),), "server[0]"),
    ],
    ids=["no-servers", "same-name", "no-gpus", "two-dense", "pin-and-forbid"],
)
def test_impossible_clusters(servers: tuple[Server, ...], place: str) -> None:
    """A cluster that contradicts itself cannot be made; the error names the place."""
    with pytest.raises(InputError) as caught:
        Cluster("c", servers)
    assert caught.value.place == place


def test_slots_give_no_bytes() -> None:
    """A GPU given by slots has no memory size to compute with."""
    with pytest.raises(ValueError, match="no memory size"):
        _ = Gpu(slots=3).usable_bytes


def test_users_of_some_servers() -> None:
    """The others lose their users and nothing else: caches, rules and rates stay as they are."""
    users = 'name = "b"\ntasks = { law = 1.0 }\nweight = 1\nkv_tokens = 7\n[[server.gpu]]'
    cluster = parse_cluster(FULL.replace('name = "b"\n[[server.gpu]]', users))
    only = cluster.with_users_of(["a"])
    assert [server.has_users for server in only.servers] == [True, False, False]
    assert only.servers[0] == cluster.servers[0]
    assert only.servers[1] == dataclasses.replace(cluster.servers[1], tasks={})
    assert only.servers[1].kv_tokens == 7
    assert (only.link, only.pair_links) == (cluster.link, cluster.pair_links)
    assert cluster.with_users_of(["b", "a"]) == cluster
    for name, said in (("c", "expected servers with tasks: a, b"), ("A", "'A'")):
        with pytest.raises(InputError, match=said) as caught:
            cluster.with_users_of(["a", name])
        assert caught.value.parameter == "heads"
