"""Who holds what: losses by opinion and by the log, and what routers and waiters see of them."""

from __future__ import annotations

import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from runtime_adapter.weights.expert_map import ExpertMap
from tests.limits import HANG_S

MODEL = ModelShape("tiny", (1, 2), 3, 2, 1)
#: GPUs of each server.
GPUS = (1, 2, 1)


def made(held: np.ndarray) -> ExpertMap:
    """A map of three servers with four GPUs."""
    capacity = tuple((6,) * gpus for gpus in GPUS)
    return ExpertMap(Placement(MODEL, ("a", "b", "c"), capacity, held, SolveReport("hand")))


def everywhere() -> np.ndarray:
    """Every GPU holds everything."""
    return np.ones((4, 2, 3), bool)


#: What may happen to the map.
CHANGES = st.one_of(
    st.tuples(st.just("change"), st.integers(0, 3), st.integers(0, 5), st.booleans()),
    st.tuples(st.sampled_from(["suspect", "unsuspect", "set_down"]), st.integers(0, 2)),
    st.tuples(st.just("set_up"), st.integers(0, 2), st.sets(st.integers(0, 5))),
)


@hypothesis.given(changes=st.lists(CHANGES, max_size=12), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=100)
def test_arrays_follow_every_change(changes: list[tuple], seed: int) -> None:
    """After each change the router's arrays are what the held experts and the losses say."""
    held = np.random.default_rng(seed).random((4, 2, 3)) < 0.5
    expert_map = made(held)
    mine, suspect, down = held.reshape(4, -1).copy(), set(), set()
    server_of = [0, 1, 1, 2]
    for kind, where, *rest in changes:
        if kind == "change":
            expert_map.change(where, *rest)
            mine[where, rest[0]] = rest[1]
        elif kind == "set_up":
            gpu = server_of.index(where)
            expert_map.set_up(where, [(gpu, pair) for pair in rest[0]])
            mine[[n == where for n in server_of]] = False
            mine[gpu, list(rest[0])] = True
            down.discard(where)
        else:
            getattr(expert_map, kind)(where)
            if kind == "suspect":
                suspect.add(where)
            else:
                suspect.discard(where)
            if kind == "set_down":
                down.add(where)
                mine[[n == where for n in server_of]] = False
        assert np.array_equal(expert_map.on_gpu(), mine)
        for pair in range(6):
            first = {server_of[g]: g for g in range(4)[::-1] if mine[g, pair]}
            used = {n: g for n, g in first.items() if n not in suspect | down}
            assert expert_map.gpu_of[:, pair].tolist() == [used.get(n, -1) for n in range(3)]
            count = expert_map.num_replicas[pair]
            assert expert_map.holder[pair, :count].tolist() == sorted(used)
            silent = sorted(set(first) & (suspect - down))
            assert expert_map.holders_suspect(pair) == silent
        assert [expert_map.lost(n) for n in range(3)] == [n in suspect | down for n in range(3)]
        assert expert_map.down_names() == ["abc"[n] for n in sorted(down)]


def test_avoided_servers_are_kept_where_they_are_alone() -> None:
    """Other holders are taken where there are any, else the one that was avoided first.

    The map itself stays as it is.
    """
    held = everywhere()
    held[[0, 3], 0, 0] = False  # only b holds the first expert
    expert_map = made(held)
    for avoided, first, second in (
        ([1], [1], [0, 2]), ([0, 2], [1], [1]), ([2, 0, 1], [1], [2]), ([0, 1, 2], [1], [0]),
    ):  # fmt: skip
        holder, num_replicas = expert_map.without(avoided)
        assert holder[0, : num_replicas[0]].tolist() == first
        assert holder[1, : num_replicas[1]].tolist() == second
    assert expert_map.num_replicas.tolist() == [1, 3, 3, 3, 3, 3]


def test_who_waits_is_woken() -> None:
    """A change wakes who waits, also one that came between the look and the wait."""
    expert_map = made(everywhere())
    seen = expert_map.version
    assert not expert_map.wait_for_change(0.01)
    expert_map.suspect(1)
    assert expert_map.wait_for_change(HANG_S, since=seen)
    woken = threading.Event()

    def wait() -> None:
        assert expert_map.wait_for_change(HANG_S)
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not woken.wait(0.01):  # until the thread waits, and then a change more
        expert_map.change(0, 0, True)
    thread.join()
    seen = expert_map.version
    expert_map.suspect(1)  # it is already
    assert expert_map.version == seen
