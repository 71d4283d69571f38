"""Paths around lost servers: the best of all by enumeration, and the plan's where it can be."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from prism_plan.io.cluster import parse_cluster
from prism_plan.model_spec import ModelShape
from runtime_adapter.spans.request_path import PathCosts, path_of_home, shortest_path
from tests.runtime_adapter.replays import SPEC


def cost(layer: Any, hop: Any, row: tuple[int, ...], home: int) -> float:
    """What a path costs, with the ways from and to home."""
    way = itertools.pairwise((home, *row, home))
    return sum(layer[n, at] for at, n in enumerate(row)) + sum(hop[a, b] for a, b in way)


@given(st.data())
def test_no_path_is_better(data: st.DataObject) -> None:
    """Equals the least of all paths over the usable servers, and of equal ones the lowest."""
    servers, layers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))

    def drawn(rows: int, columns: int) -> Any:
        values = st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)
        return np.array(data.draw(values), float).reshape(rows, columns)

    layer, hop = drawn(servers, layers), drawn(servers, servers)
    np.fill_diagonal(hop, 0.0)
    home = data.draw(st.integers(0, servers - 1))
    avoided = data.draw(st.sets(st.integers(0, servers - 1)))
    usable = [n for n in range(servers) if n == home or n not in avoided]
    rows = list(itertools.product(usable, repeat=layers))
    found = tuple(shortest_path(layer, hop, home, avoided).tolist())
    assert found == min(rows, key=lambda row: (cost(layer, hop, row, home), row))


def test_costs_of_a_cluster() -> None:
    """Paths avoid slow GPUs and far servers by the figures of the cluster file."""
    gpu = "[[server.gpu]]\nslots = 12\nmemory_bandwidth_gbs = {}\ntflops = 50\n"
    text = 'name = "c"\n[link]\nbandwidth_mbps = 500\nrtt_ms = 1\n'
    for name, speed in (("s0", 0.5), ("s1", 500), ("s2", 500)):
        text += f'[[server]]\nname = "{name}"\nweight = 1\ntasks = {{t = 1.0}}\n'
        text += gpu.format(speed)
    text += '[[links]]\na = "s0"\nb = "s2"\nbandwidth_mbps = 1\n'
    costs = PathCosts.of(parse_cluster(text), SPEC)
    assert (costs.dense_s[0] > 10 * costs.dense_s[1]).all()
    assert costs.hop_s[0, 2] > costs.hop_s[0, 1]
    nothing = np.zeros((3, SPEC.num_layers), np.int64)
    seconds = costs.of_layers(nothing, SPEC.num_experts, SPEC.top_k)
    assert (seconds == costs.dense_s).all()
    assert set(shortest_path(seconds, costs.hop_s, 0).tolist()) == {1}
    nothing[1] = SPEC.num_experts  # s1 calls for every token
    seconds = costs.of_layers(nothing, SPEC.num_experts, SPEC.top_k)
    assert seconds[1] == pytest.approx(costs.dense_s[1] + costs.call_s[1])


def test_the_plan_where_it_can_be() -> None:
    """A row stays as planned unless it names a server that is lost; a home row stays always."""
    held = np.zeros((3, 4), np.int32)
    held[1] = -1  # s1 lacks everything
    table = np.array([[1, 2], [1, 1], [2, 0]])
    placement: Any = SimpleNamespace(model=ModelShape("m", (0, 1), 2, 1, 1))
    expert_map: Any = SimpleNamespace(gpu_of=held)

    def servers(home: int, avoided: list[int]) -> list[int]:
        path = path_of_home(table[home], placement, expert_map, home, avoided)
        return [span.server for span in path for _ in range(span.first, span.last + 1)]

    assert servers(0, []) == [1, 2]
    assert servers(0, [2]) == [0, 0]
    assert servers(1, [0, 2]) == [1, 1]
    assert servers(2, [1]) == [2, 0]
    assert servers(2, [0, 1]) == [2, 2]
