"""Tests of capacities: how many experts the GPUs of a cluster hold."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import Infeasible, InputError
from prism_plan.expert_capacity import bytes_for_experts, gpu_capacity, resident_bytes
from prism_plan.io.cluster import parse_cluster
from prism_plan.model_spec import PRESETS, ModelSpec

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
    return gpu_capacity(parse_cluster(text), model)[0]


def capacity(model: ModelSpec, server: Server) -> tuple[int, ...]:
    """Capacities of the GPUs of a server."""
    return gpu_capacity(Cluster("c", (server,)), model)[0]


A100_30 = "memory_gb = 40\nmemory_fraction = 0.3"
A100_70 = "memory_gb = 40\nmemory_fraction = 0.7"


def test_slots_of_a100() -> None:
    """The slots of docs/design.md, section 8: 541 (+ 693) for V2-Lite, 70 (+ 79) for Mixtral."""
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
@settings(max_examples=100)
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
    assert [resident_bytes(TINY, server, g).total for g in range(len(sizes))] == resident
    if any(taken > size for taken, size in zip(resident, sizes, strict=True)):
        with pytest.raises(Infeasible):
            capacity(TINY, server)
        return
    for taken, size, count in zip(resident, sizes, capacity(TINY, server), strict=True):
        assert taken + 100 * count <= size < taken + 100 * (count + 1)


@pytest.mark.parametrize(
    ("gpus", "gpu", "short"),
    [((Gpu(999),), 0, 1), ((Gpu(1000), Gpu(10, reserve_bytes=25)), 1, 15), ((Gpu(0),), 0, 1000)],
)
def test_too_small_gpu(gpus: tuple[Gpu, ...], gpu: int, short: int) -> None:
    """A GPU that cannot hold what must reside on it is infeasible, by so many bytes."""
    with pytest.raises(Infeasible, match=rf"'edge' gpu\[{gpu}\]") as caught:
        capacity(TINY, Server("edge", gpus))
    assert (caught.value.shortfall, caught.value.unit) == (short, "bytes")


def test_exactly_full() -> None:
    """A GPU that the dense part fills exactly holds no expert, and that is no error."""
    assert capacity(TINY, Server("edge", (Gpu(1000), Gpu(100)))) == (0, 1)
    assert bytes_for_experts(TINY, Server("edge", (Gpu(1000),)), 0) == 0


def test_unequal_experts_have_no_slots() -> None:
    """Where experts differ in size by layer, slots have no meaning; bytes do."""
    mixed = dataclasses.replace(TINY, expert_bytes=(100, 50))
    server = Server("edge", (Gpu(1275),))
    with pytest.raises(InputError, match="differ in size"):
        capacity(mixed, Server("edge", (Gpu(1275), Gpu(slots=3))))
    assert capacity(mixed, server) == (275,)
    same = dataclasses.replace(TINY, expert_bytes=(100, 100))
    assert capacity(same, server) == (2,)
