"""Tests of planning instances: validation, immutability, and building from trace and cluster."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.model_spec import ModelShape, ModelSpec
from prism_plan.token_rates import TokenRates, activations, expected_token_rates
from prism_plan.trace import Trace

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(2, 10, 11),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=1000,
    kv_bytes_per_token=10,
)
SHAPE = SPEC.shape()
MIXED = dataclasses.replace(SPEC, expert_bytes=(100, 50, 25))


def instance(**changes: Any) -> Instance:
    """Two servers, of one and two GPUs, every expert called once a second by each."""
    values: dict[str, Any] = {
        "model": SHAPE,
        "servers": ("north", "south"),
        "activations": np.ones((2, 3, 4)),
        "gpu_capacity": ((6,), (3, 5)),
    }
    return Instance(**{**values, **changes})


def with_value(value: float) -> np.ndarray:
    given_values = np.ones((2, 3, 4))
    given_values[1, 2, 3] = value
    return given_values


# --------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"servers": ()}, "servers: no servers"),
        ({"servers": ("north", "north")}, "servers: a name is duplicated"),
        ({"servers": ("north", "south", "east")}, "activations: shape (2, 3, 4); expected (3, 3"),
        ({"activations": np.ones((2, 4, 3))}, "activations: shape (2, 4, 3); expected (2, 3, 4)"),
        ({"activations": [[1.0], [2.0, 3.0]]}, "activations: "),
        ({"activations": "many"}, "activations: "),
        (
            {"activations": with_value(float("nan"))},
            "activations of server 'south' layer 11 expert 3: nan",
        ),
        (
            {"activations": with_value(float("inf"))},
            "activations of server 'south' layer 11 expert 3: inf",
        ),
        (
            {"activations": with_value(-1e-300)},
            "activations of server 'south' layer 11 expert 3: -1e-300",
        ),
        ({"gpu_capacity": ((6,),)}, "gpu_capacity: 1 capacities and 2 layer caps"),
        ({"layer_caps": (1, 2, 3)}, "gpu_capacity: 2 capacities and 3 layer caps"),
        ({"gpu_capacity": ((6,), (3, -1))}, "server 'south': -1; expected a whole number"),
        ({"gpu_capacity": ((6.0,), (3, 5))}, "server 'north': 6.0; expected a whole number"),
        ({"gpu_capacity": ((6,), (True, 5))}, "server 'south': True; expected a whole number"),
        ({"layer_caps": (None, -2)}, "server 'south': -2; expected a whole number"),
        ({"layer_caps": (1.5, None)}, "server 'north': 1.5; expected a whole number"),
        ({"min_replicas": 0}, "min_replicas: 0; expected a whole number from 1 to 2,147,483,648"),
        ({"min_replicas": 1.0}, "min_replicas: 1.0; expected a whole number"),
        ({"pinned": ((2, 0, 0),)}, "rules: (2, 0, 0); expected indices below (2, 3, 4)"),
        ({"pinned": ((0, 0, 4),)}, "rules: (0, 0, 4)"),
        ({"forbidden": ((0, -1, 0),)}, "rules: (0, -1, 0)"),
        ({"forbidden": ((0, 3, 0),)}, "rules: (0, 3, 0)"),
        (
            {"pinned": ((1, 1, 1), (0, 1, 2)), "forbidden": ((0, 1, 2), (0, 0, 0))},
            "rules: (0, 1, 2) is both pinned and forbidden",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    """A wrong value makes no instance, neither anew nor by replace; the message names the place."""
    whole = instance()
    for make in (instance, whole.replace):
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            make(**changes)
    np.testing.assert_array_equal(whole.activations, 1)


@given(st.integers(0, 1), st.integers(0, 2), st.integers(0, 3), st.sampled_from([-1.0, np.nan]))
@settings(max_examples=25)
def test_bad_activation_is_named(n: int, layer: int, expert: int, value: float) -> None:
    """A bad activation is named by server, decoder layer and expert, wherever it stands."""
    values = np.ones((2, 3, 4))
    values[n, layer, expert] = value
    name, decoder = ("north", "south")[n], (2, 10, 11)[layer]
    with pytest.raises(InputError) as caught:
        instance(activations=values)
    assert caught.value.place == (f"activations of server '{name}' layer {decoder} expert {expert}")


# --------------------------------------------------------------------------------- immutability


def test_activations_are_copied_and_read_only() -> None:
    """Neither the caller's array nor the instance's own can change an instance."""
    values = np.ones((2, 3, 4))
    whole = instance(activations=values)
    values[0] = 7
    np.testing.assert_array_equal(whole.activations, 1)
    assert values.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        whole.activations[0] = 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.min_replicas = 2  # type: ignore[misc]


def test_lists_become_tuples() -> None:
    """Lists are taken as tuples, rules sorted and once each, so that nothing can be appended."""
    whole = instance(
        servers=["north", "south"],
        activations=np.ones((2, 3, 4), int).tolist(),
        gpu_capacity=[[6], [3, 5]],
        pinned=[(1, 0, 0), (0, 0, 0), (1, 0, 0)],
        forbidden=[(1, 1, 1)],
        layer_caps=[None, 3],
    )
    assert whole.servers == ("north", "south")
    assert whole.activations.dtype == np.float64
    assert whole.gpu_capacity == ((6,), (3, 5))
    assert whole.pinned == ((0, 0, 0), (1, 0, 0))
    assert whole.forbidden == ((1, 1, 1),)
    assert whole.layer_caps == (None, 3)


def test_negative_zero() -> None:
    """Minus zero is zero: results do not depend on its sign."""
    whole = instance(activations=np.full((2, 3, 4), -0.0))
    assert not np.signbit(whole.activations).any()


def test_replace() -> None:
    """Replace changes what is named, keeps the rest, and leaves the original alone."""
    whole = instance(layer_caps=(None, 3), pinned=((0, 0, 0),))
    more = whole.replace(min_replicas=2, gpu_capacity=((12,), (12,)))
    assert (more.min_replicas, more.gpu_capacity) == (2, ((12,), (12,)))
    assert (more.layer_caps, more.pinned) == ((None, 3), ((0, 0, 0),))
    np.testing.assert_array_equal(more.activations, whole.activations)
    assert (whole.min_replicas, whole.gpu_capacity) == (1, ((6,), (3, 5)))


# --------------------------------------------------------------------------------- derived


@given(st.lists(st.lists(st.integers(0, 20), max_size=3), min_size=1, max_size=4))
@settings(max_examples=50)
def test_slots(gpus: list[list[int]]) -> None:
    """C[n] is the sum over its GPUs, and no more than J: no server holds an expert twice."""
    names = tuple(f"s{n}" for n in range(len(gpus)))
    whole = instance(servers=names, gpu_capacity=gpus, activations=np.zeros((len(gpus), *(3, 4))))
    assert whole.slots.tolist() == [min(sum(each), 12) for each in gpus]
    assert whole.num_servers == len(gpus)


def test_huge_slots() -> None:
    """Slots beyond any memory do not overflow."""
    assert instance(gpu_capacity=((2**60,), (2**62, 2**62))).slots.tolist() == [12, 12]


@pytest.mark.parametrize(
    ("sizes", "in_slots", "expert_size"),
    [(100, True, [1, 1, 1]), ((7, 7, 7), True, [1, 1, 1]), ((100, 50, 25), False, [100, 50, 25])],
)
def test_units(sizes: int | tuple[int, ...], in_slots: bool, expert_size: list[int]) -> None:
    """Capacities count experts where these are of one size, else bytes."""
    whole = instance(model=ModelShape("m", (2, 10, 11), 4, 2, sizes))
    assert whole.in_slots == in_slots
    assert whole.expert_size.tolist() == expert_size


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, False),
        ({"layer_caps": (None, None)}, False),
        ({"min_replicas": 2}, False),
        ({"layer_caps": (None, 0)}, True),
        ({"pinned": ((0, 0, 0),)}, True),
        ({"forbidden": ((0, 0, 0),)}, True),
    ],
)
def test_has_rules(changes: dict[str, Any], rules: bool) -> None:
    """Pins, forbidden experts and caps are rules, a cap of zero too."""
    assert instance(**changes).has_rules == rules


def test_mask() -> None:
    """A mask is true at its triples and nowhere else."""
    mask = instance().mask([(0, 1, 2), (1, 2, 3)])
    assert np.argwhere(mask).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert mask.shape == (2, 3, 4)


# --------------------------------------------------------------------------------- building


def trace(model: ModelSpec = SPEC) -> Trace:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(20, np.full(4, 0.25), (2, 3))
    return Trace(model, ("law", "code"), counts, np.array([20, 20]), name="t")


SITES = """
[[server]]
name = "north"
weight = 1.0
tasks = { law = 1.0 }
pin = [[10, 3], [2, 0]]
layer_cap = 3
[[server.gpu]]
memory_gb = 1.65e-6
[[server]]
name = "south"
weight = 2.0
tasks = { law = 0.5, code = 0.5 }
forbid = [[11, 1]]
[[server.gpu]]
memory_gb = 0.599e-6
[[server.gpu]]
memory_gb = 1.7e-6
dense = true
"""


def sites(text: str = SITES) -> Cluster:
    return parse_cluster(text, "sites.toml")


def test_build() -> None:
    """Building takes activations from the workload, slots from memory, rules by decoder layer."""
    whole = Instance.build(trace(), sites(), min_replicas=2)
    assert whole.model == SHAPE
    assert whole.servers == ("north", "south")
    assert whole.gpu_capacity == ((6,), (5, 7))  # 650; 599 and 700 bytes for experts of 100
    assert whole.min_replicas == 2
    assert whole.pinned == ((0, 0, 0), (0, 1, 3))
    assert whole.forbidden == ((1, 2, 1),)
    assert whole.layer_caps == (3, None)
    p = trace().counts / 20
    np.testing.assert_allclose(whole.activations, [p[0], p[0] + p[1]])


def test_build_with_another_load() -> None:
    """A workload that is given replaces the one the cluster file expects."""
    token_rates = TokenRates(("law", "code"), np.array([[0.0, 3.0], [0.0, 0.0]]))
    whole = Instance.build(trace(), sites(), token_rates=token_rates)
    np.testing.assert_allclose(whole.activations, [3 * trace().counts[1] / 20, np.zeros((3, 4))])
    expected = activations(trace(), expected_token_rates(trace(), sites()))
    assert not np.allclose(whole.activations, expected)


def test_build_in_bytes() -> None:
    """Where experts differ in size, capacities are the bytes left on each GPU."""
    whole = Instance.build(trace(MIXED), sites())
    assert whole.gpu_capacity == ((650,), (599, 700))
    assert whole.expert_size.tolist() == [100, 50, 25]


@pytest.mark.parametrize(
    ("old", "new", "model", "place"),
    [
        ("pin = [[10, 3], [2, 0]]", "pin = [[10, 3], [3, 0]]", SPEC, "server[0].pin"),
        ("pin = [[10, 3], [2, 0]]", "pin = [[10, 4]]", SPEC, "server[0].pin"),
        ("forbid = [[11, 1]]", "forbid = [[0, 1]]", SPEC, "server[1].forbid"),
        ("law = 0.5", "lay = 0.5", SPEC, "server[1].tasks"),
        ("memory_gb = 0.599e-6", "slots = 5", MIXED, "server[1].gpu[0]"),
    ],
    ids=["layer", "expert", "forbidden-layer", "task", "slots-of-unequal-experts"],
)
def test_build_refused(old: str, new: str, model: ModelSpec, place: str) -> None:
    """What the model or the trace does not have is refused at its place in the cluster file."""
    assert old in SITES
    with pytest.raises(InputError) as caught:
        Instance.build(trace(model), sites(SITES.replace(old, new)))
    assert caught.value.place == place


@pytest.mark.parametrize("model", [SPEC, MIXED], ids=["slots", "bytes"])
def test_build_on_too_small_gpu(model: ModelSpec) -> None:
    """A GPU too small for the dense part is infeasible, by the bytes that are missing."""
    with pytest.raises(Infeasible, match=r"server 'north' gpu\[0\]") as caught:
        Instance.build(trace(model), sites(SITES.replace("1.65e-6", "0.9e-6")))
    assert caught.value.shortfall == 100
