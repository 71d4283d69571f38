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

from prism_plan.model_spec import ModelShape
from runtime_adapter.spans.request_path import path_of_home, shortest_path


def cost(missing: Any, row: tuple[int, ...], home: int) -> tuple[int, int]:
    """Missing experts of a path, and its hops a pass with the way from and to home."""
    experts = sum(int(missing[n, layer]) for layer, n in enumerate(row))
    changes = sum(a != b for a, b in itertools.pairwise(row))
    return experts, changes + (row[0] != home) + (row[-1] != home)


@given(st.data())
def test_no_path_is_better(data: st.DataObject) -> None:
    """Equals the least of all paths, by missing experts and then hops, without avoided servers."""
    servers, layers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    values = data.draw(
        st.lists(st.integers(0, 3), min_size=servers * layers, max_size=servers * layers)
    )
    missing = np.array(values).reshape(servers, layers)
    home = data.draw(st.integers(0, servers - 1))
    avoided = data.draw(st.sets(st.integers(0, servers - 1)))
    usable = [n for n in range(servers) if n == home or n not in avoided]
    best = min(cost(missing, row, home) for row in itertools.product(usable, repeat=layers))
    found = shortest_path(missing, home, avoided)
    assert cost(missing, tuple(found.tolist()), home) == best
    assert set(found.tolist()) <= set(usable)


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
