"""Tests of clusters: what a cluster file says, and how many experts its GPUs hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import (
    Cluster,
    Gpu,
    Link,
    PairLink,
    Server,
    expert_room_bytes,
    gpu_slots,
    resident_bytes,
)
from prism_plan.errors import Infeasible, InputError
from prism_plan.io.cluster import parse_cluster, read_cluster
from prism_plan.model import PRESETS, ModelSpec

V2_LITE = PRESETS["deepseek-v2-lite"]
MIXTRAL = PRESETS["mixtral-8x7b"]
TINY = ModelSpec(
    name="tiny",
    moe_layers=(0, 1),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=1000,
    kv_bytes_per_token=10,
)


def slots(model: ModelSpec, *gpus: str, server: str = "") -> tuple[int, ...]:
    """Slots of a server from the lines of its GPUs in a cluster file."""
    text = f"[[server]]\n{server}\n" + "".join(f"[[server.gpu]]\n{gpu}\n" for gpu in gpus)
    return gpu_slots(model, parse_cluster(text).servers[0])


# --------------------------------------------------------------------------------- slots

A100_30 = "memory_gb = 40\nmemory_fraction = 0.3"
A100_70 = "memory_gb = 40\nmemory_fraction = 0.7"


def test_slots_of_a100() -> None:
    """The slots of DESIGN section 8: 541 and 541 + 693 for V2-Lite, 70 and 70 + 79 for Mixtral."""
    assert slots(V2_LITE, A100_30) == (541,)
    assert slots(V2_LITE, A100_30, A100_30) == (541, 693)
    assert slots(MIXTRAL, A100_70) == (70,)
    assert slots(MIXTRAL, A100_70, A100_70) == (70, 79)


def test_slots_by_hand() -> None:
    """The same slots from the sizes alone, in whole numbers."""
    assert (12 * 10**9 - 2_623_265_792) // 17_301_504 == 541
    assert 12 * 10**9 // 17_301_504 == 693
    assert (28 * 10**9 - 3_211_272_192) // 352_321_536 == 70
    assert 28 * 10**9 // 352_321_536 == 79


def test_floors_do_not_add_up() -> None:
    """Two half experts on two GPUs are no expert: floors are taken per GPU."""
    half = f"memory_gb = {1.5 * 17_301_504 / 1e9!r}"
    dense = f"memory_gb = {(2_623_265_792 + 1.5 * 17_301_504) / 1e9!r}"
    assert slots(V2_LITE, dense, half) == (1, 1)  # three experts' worth of room in all


def test_dense_on_another_gpu() -> None:
    """The dense part sits on the first GPU unless another says ``dense = true``."""
    assert slots(V2_LITE, A100_30, A100_30 + "\ndense = true") == (693, 541)
    assert slots(V2_LITE, A100_30 + "\ndense = true", A100_30) == (541, 693)
    assert slots(V2_LITE, A100_30 + "\ndense = false", A100_30) == (541, 693)


def test_memory_units() -> None:
    """memory_gb counts 1e9 bytes, memory_gib 2**30."""
    gib = "memory_gib = 40\nmemory_fraction = 0.3"
    usable = 40 * 2**30 * 3 // 10
    first, second = (usable - 2_623_265_792) // 17_301_504, usable // 17_301_504
    assert slots(V2_LITE, gib, gib) == (first, second) == (593, 744)


def test_kv_tokens() -> None:
    """The KV cache takes 31,104 bytes a token, from the GPU with the dense part only."""
    room = 12 * 10**9 - 2_623_265_792 - 541 * 17_301_504  # left beside 541 experts
    fits = room // 31_104
    assert slots(V2_LITE, A100_30, A100_30, server=f"kv_tokens = {fits}") == (541, 693)
    assert slots(V2_LITE, A100_30, A100_30, server=f"kv_tokens = {fits + 1}") == (540, 693)
    on_second = (A100_30, A100_30 + "\ndense = true")
    assert slots(V2_LITE, *on_second, server=f"kv_tokens = {fits + 1}") == (693, 540)


def test_reserve() -> None:
    """The reserve of a GPU is taken from that GPU alone, and from its usable part."""
    reserve = A100_30 + "\nreserve_gb = 1.0"
    less = (12 * 10**9 - 10**9) // 17_301_504
    assert slots(V2_LITE, A100_30, reserve) == (541, less)
    assert slots(V2_LITE, reserve, A100_30) == ((11 * 10**9 - 2_623_265_792) // 17_301_504, 693)


def test_slots_given() -> None:
    """Slots given directly count as they are, beside GPUs that are computed."""
    assert slots(V2_LITE, "slots = 832") == (832,)
    assert slots(V2_LITE, "slots = 832", "slots = 0") == (832, 0)
    assert slots(V2_LITE, "slots = 7\n" + A100_30, A100_30) == (7, 693)
    assert slots(V2_LITE, "slots = 832", A100_30 + "\ndense = true") == (832, 541)


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    reserve=st.integers(0, 200),
    kv_tokens=st.integers(0, 50),
    dense=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_slots_are_the_most_that_fit(
    sizes: list[int], reserve: int, kv_tokens: int, dense: int
) -> None:
    """On each GPU so many experts fit beside what resides there, and one more does not."""
    gpus = tuple(
        Gpu(memory_bytes=size, reserve_bytes=reserve, dense=g == dense)
        for g, size in enumerate(sizes)
    )
    server = Server("s", gpus, kv_tokens=kv_tokens)
    home = dense if dense < len(sizes) else 0
    resident = [reserve] * len(sizes)
    resident[home] += 1000 + 10 * kv_tokens
    assert server.dense_gpu == home
    assert [resident_bytes(TINY, server, g) for g in range(len(sizes))] == resident
    if any(taken > size for taken, size in zip(resident, sizes, strict=True)):
        with pytest.raises(Infeasible):
            gpu_slots(TINY, server)
        return
    for taken, size, count in zip(resident, sizes, gpu_slots(TINY, server), strict=True):
        assert taken + 100 * count <= size < taken + 100 * (count + 1)


@pytest.mark.parametrize(
    ("gpus", "gpu", "short"),
    [((Gpu(999),), 0, 1), ((Gpu(1000), Gpu(10, reserve_bytes=25)), 1, 15), ((Gpu(0),), 0, 1000)],
)
def test_too_small_gpu(gpus: tuple[Gpu, ...], gpu: int, short: int) -> None:
    """A GPU that cannot hold what must reside on it is infeasible, by so many bytes."""
    with pytest.raises(Infeasible, match=rf"'edge' gpu\[{gpu}\]") as caught:
        gpu_slots(TINY, Server("edge", gpus))
    assert (caught.value.shortfall, caught.value.unit) == (short, "bytes")


def test_exactly_full() -> None:
    """A GPU that the dense part fills exactly holds no expert, and that is no error."""
    assert gpu_slots(TINY, Server("edge", (Gpu(1000), Gpu(100)))) == (0, 1)
    assert expert_room_bytes(TINY, Server("edge", (Gpu(1000),)), 0) == 0


def test_unequal_experts_have_no_slots() -> None:
    """Where experts differ in size by layer, slots have no meaning; bytes do."""
    mixed = dataclasses.replace(TINY, expert_bytes=(100, 50))
    server = Server("edge", (Gpu(1275),))
    with pytest.raises(InputError, match="differ in size"):
        gpu_slots(mixed, server)
    assert expert_room_bytes(mixed, server, 0) == 275
    same = dataclasses.replace(TINY, expert_bytes=(100, 100))
    assert gpu_slots(same, server) == (2,)


# --------------------------------------------------------------------------------- the file

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
    """Each key of DESIGN section 6 reaches the field it means, in its unit."""
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


def test_slots_tell_no_bytes() -> None:
    """A GPU given by slots has no memory size to compute with."""
    with pytest.raises(ValueError, match="no memory size"):
        _ = Gpu(slots=3).usable_bytes
