"""Moves whose execution table changes: at every moment, experts and KV caches fit their memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import Infeasible
from prism_plan.execution_table import home_execution
from prism_plan.expert_capacity import gpu_capacity, kv_bytes
from prism_plan.instance import Instance
from prism_plan.migration.endpoints import in_server_order
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.staged import _between, staged_migration
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_diff import diff
from tests.migration.replicas_by_hand import too_few_copies

#: An expert has 100 bytes; a token's cache 30, 10 in each of three decoder layers.
LAYERS, EXPERTS, SERVERS = 3, 3, 3


def a_model(layers: int, experts: int, expert_bytes: Any = 100) -> ModelSpec:
    """A dense part of 50 bytes and a cache of 30 a token."""
    return ModelSpec(
        name="m", moe_layers=tuple(range(layers)), num_experts=experts, top_k=1, hidden_size=8,
        dtype_bytes=2, expert_bytes=expert_bytes, dense_bytes=50, kv_bytes_per_token=30,
    )  # fmt: skip


MODEL = a_model(LAYERS, EXPERTS)


def a_cluster(rng: np.random.Generator) -> Cluster:
    """Three servers of one or two GPUs, each user group with 0 to 12 tokens in flight."""
    servers = []
    for n in range(SERVERS):
        kv = int(rng.choice([0, 4, 8, 12]))
        gpus = [Gpu(memory_bytes=50 + int(rng.integers(700, 1100)))]
        if rng.random() < 0.4:
            gpus.append(Gpu(memory_bytes=int(rng.integers(100, 400))))
        servers.append(Server(f"s{n}", tuple(gpus), tasks={"t": 1.0}, kv_tokens=kv))
    return Cluster("c", tuple(servers))


def a_table(rng: np.random.Generator) -> np.ndarray:
    """Any table, now and then with every layer at home."""
    if rng.random() < 0.2:
        return home_execution(SERVERS, LAYERS)
    return rng.integers(0, SERVERS, (SERVERS, LAYERS)).astype(np.int32)


def a_placement(
    rng: np.random.Generator, cluster: Cluster, table: np.ndarray, *older: np.ndarray
) -> Placement | None:
    """Every expert somewhere and GPUs nearly full, within what the tables leave, if there is room.

    It executes by ``table``; requests may run on the ``older`` ones too.
    """
    capacity = gpu_capacity(cluster, MODEL, np.stack([table, *older]))
    room = [slots for gpus in capacity for slots in gpus]
    held = np.zeros((len(room), LAYERS * EXPERTS), bool)
    for pair in rng.permutation(LAYERS * EXPERTS):
        free = [g for g in range(len(room)) if held[g].sum() < room[g]]
        if not free:
            return None
        held[rng.choice(free), pair] = True
    for g, slots in enumerate(room):
        missing = rng.permutation(np.flatnonzero(~held[g]))
        held[g, missing[: max(slots - held[g].sum() - int(rng.integers(0, 2)), 0)]] = True
    names = tuple(server.name for server in cluster.servers)
    on_gpu = held.reshape(len(room), LAYERS, EXPERTS)
    return Placement(MODEL.shape(), names, capacity, on_gpu, SolveReport("drawn"), execution=table)


def kept_bytes(cluster: Cluster, tables: list[np.ndarray]) -> list[int]:
    """KV bytes of each server: each home's tokens, on the table with most of its layers there."""
    kept = []
    for m in range(SERVERS):
        tokens = 0
        for n, server in enumerate(cluster.servers):
            tokens += server.kv_tokens * max(int((table[n] == m).sum()) for table in tables)
        kept.append(tokens * MODEL.kv_bytes_per_token // LAYERS)
    return kept


def assert_fits(cluster: Cluster, held: np.ndarray, tables: list[np.ndarray]) -> None:
    """Dense part, KV caches and experts of every GPU are within its memory."""
    g = 0
    for server, kept in zip(cluster.servers, kept_bytes(cluster, tables), strict=True):
        for number, gpu in enumerate(server.gpus):
            resident = (50 + kept) if number == 0 else 0
            assert resident + 100 * held[g].sum() <= gpu.usable_bytes
            g += 1


def replay(
    rng: np.random.Generator, cluster: Cluster, plan: MigrationPlan, current: Placement,
    target: Placement, in_use: list[np.ndarray],
) -> None:  # fmt: skip
    """Do the steps in a drawn order; requests on old tables end as late as anything can wait.

    Loads take their room when they start and serve when they end.
    """
    held = current.on_gpu.reshape(len(current.on_gpu), -1).copy()
    reserved = held.copy()
    tables, done = list(in_use), set[int]()
    change = plan.change
    begun = drained = change is None
    while True:
        if change is not None and not begun and len(done) >= change.begins_after:
            begun = True
            tables = [*tables, change.execution]
        assert_fits(cluster, reserved, tables)
        assert held.any(axis=0).all()
        assert too_few_copies(plan, frozenset(done), current, target) is None
        ready = [
            i
            for i, step in enumerate(plan.steps)
            if i not in done and done.issuperset(step.needs)
            and (change is None or drained or i < change.waits_from)
        ]  # fmt: skip
        if not ready:
            if begun and not drained:
                assert change is not None
                drained, tables = True, [change.execution]
                continue
            break
        started = rng.permutation(ready)[: int(rng.integers(1, len(ready) + 1))]
        for i in started:  # those of one moment start side by side
            if plan.steps[i].kind == "load":
                reserved[plan.steps[i].gpu, plan.steps[i].pair] = True
        assert_fits(cluster, reserved, tables)
        for i in started:
            step = plan.steps[i]
            held[step.gpu, step.pair] = step.kind == "load"
            reserved[step.gpu, step.pair] = held[step.gpu, step.pair]
            done.add(int(i))
    assert len(done) == len(plan.steps)
    assert (held.reshape(target.on_gpu.shape) == target.on_gpu).all()


def stage(plan: MigrationPlan) -> str:
    """Which of the four kinds of moves a plan is."""
    change = plan.change
    if change is None:
        return "no change"
    if change.waits_from == len(plan.steps):
        return "table after" if change.begins_after else "at once"
    return "two stages" if change.begins_after else "steps wait"


@pytest.mark.parametrize("block", range(6))
def test_memory_holds_at_every_moment(block: int) -> None:
    """Experts, and KV caches of all tables that requests may run on, fit; nothing gets lost.

    With one replica or two: whatever is not kept of the second one the plan says.
    """
    seen = set()
    for seed in range(40 * block, 40 * block + 40):
        rng = np.random.default_rng(seed)
        cluster = a_cluster(rng)
        old, new = a_table(rng), a_table(rng)
        older = [old, *([a_table(rng)] if rng.random() < 0.3 else [])]
        try:
            current, target = a_placement(rng, cluster, *older), a_placement(rng, cluster, new)
            instance = Instance.of_cluster(cluster, MODEL)
        except Infeasible:  # a GPU is too small for the caches alone
            continue
        if current is None or target is None:
            continue
        try:
            plan = staged_migration(
                current, target, np.stack(older), instance, MODEL, min_replicas=1 + seed % 2
            )
        except Infeasible:
            seen.add("none")
            continue
        seen.add(stage(plan))
        replay(rng, cluster, plan, current, target, older)
    assert {"at once", "table after", "steps wait", "two stages"} <= seen


def test_replicas_that_fit_beside_neither_table_are_told() -> None:
    """An expert may have a copy less from the first stage into the second: one dip, of both."""
    over_both = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        cluster = a_cluster(rng)
        old, new = a_table(rng), a_table(rng)
        try:
            current, target = a_placement(rng, cluster, old), a_placement(rng, cluster, new)
            if current is None or target is None:
                continue
            instance = Instance.of_cluster(cluster, MODEL)
            plan = staged_migration(current, target, old[None], instance, MODEL, min_replicas=2)
        except Infeasible:
            continue
        replay(rng, cluster, plan, current, target, [old])
        change = plan.change
        over_both += change is not None and any(
            dip.drop < change.begins_after <= dip.load for dip in plan.dips
        )
    assert over_both > 0


def test_without_caches_nothing_waits() -> None:
    """With no kv_tokens the steps are those of the experts alone, and the table begins at once."""
    rng = np.random.default_rng(0)
    servers = tuple(
        Server(f"s{n}", (Gpu(memory_bytes=750),), tasks={"t": 1.0}) for n in range(SERVERS)
    )
    cluster = Cluster("c", servers)
    home, table = home_execution(SERVERS, LAYERS), a_table(rng)
    current, target = (a_placement(rng, cluster, x) for x in (home, table))
    assert current is not None
    assert target is not None
    instance = Instance.of_cluster(cluster, MODEL)
    plan = staged_migration(current, target, home[None], instance, MODEL)
    assert plan.steps == migration_plan(current, target).steps
    assert stage(plan) == "at once"
    stays = staged_migration(current, target.replace(execution=None), home[None], instance, MODEL)
    assert (stays.steps, stays.change) == (plan.steps, None)


def test_tables_alone_change_without_steps() -> None:
    """Equal experts: no steps, and the table of the target."""
    rng = np.random.default_rng(1)
    cluster = Cluster("c", tuple(Server(f"s{n}", (Gpu(slots=9),)) for n in range(SERVERS)))
    home, table = home_execution(SERVERS, LAYERS), np.full((SERVERS, LAYERS), 2, np.int32)
    current = a_placement(rng, cluster, home)
    assert current is not None
    target = current.replace(execution=table)
    instance = Instance.of_cluster(cluster, MODEL)
    plan = staged_migration(current, target, home[None], instance, None)
    assert plan.steps == ()
    assert plan.change is not None
    assert plan.change.execution.tolist() == table.tolist()


@pytest.mark.parametrize("min_replicas", [1, 2])
@pytest.mark.parametrize("seed", range(30))
def test_the_placement_between_costs_the_fewest_loads(seed: int, min_replicas: int) -> None:
    """Against every placement of four experts on two servers that fits and covers.

    Of the replicas that both placements have it keeps as many as any, and then loads count.
    """
    rng = np.random.default_rng(seed)
    model = a_model(1, 4).shape()
    room = rng.integers(2, 4, 2)
    while True:
        had, will = rng.random((2, 2, 1, 4)) < 0.6
        if had.any(axis=0).all() and will.any(axis=0).all():
            break

    def placed(held: np.ndarray) -> Placement:
        return Placement(model, ("a", "b"), ((4,), (4,)), held, SolveReport("drawn"))

    limits = Instance(model, ("a", "b"), np.zeros((2, 1, 4)), tuple((int(n),) for n in room))
    found = _between(placed(had), placed(will), limits, min_replicas).local
    kept = np.minimum(had.sum(axis=0), will.sum(axis=0)).clip(1, min_replicas)

    def missing(held: Any) -> int:
        return int(np.maximum(kept - held.sum(axis=0), 0).sum())

    def loads(held: Any) -> int:
        return int((held & ~had).sum() + (will & ~held).sum())

    least = min(
        (missing(held), loads(held))
        for bits in itertools.product([False, True], repeat=8)
        if (held := np.array(bits).reshape(2, 1, 4)).any(axis=0).all()
        and (held.sum(axis=(1, 2)) <= room).all()
    )
    assert found.any(axis=0).all()
    assert (found.sum(axis=(1, 2)) <= room).all()
    assert (missing(found), loads(found)) == least


def test_experts_of_unequal_size_need_room_beside_both_tables() -> None:
    """Where neither placement has it there is no plan, and the line says why."""
    model = a_model(2, 1, (100, 150))
    gpu = Gpu(memory_bytes=50 + 300 + 300 + 200)
    servers = tuple(Server(f"s{n}", (gpu,), tasks={"t": 1.0}, kv_tokens=10) for n in range(2))
    cluster = Cluster("c", servers)
    home, swapped = home_execution(2, 2), np.array([[1, 1], [0, 0]], np.int32)
    held = np.ones((2, 2, 1), bool)
    both = [
        Placement(model.shape(), ("s0", "s1"), ((250,), (250,)), held, SolveReport("x"),
                  execution=table)
        for table in (home, swapped)
    ]  # fmt: skip
    instance = Instance.of_cluster(cluster, model)
    with pytest.raises(Infeasible, match="beside the KV caches of both execution tables"):
        staged_migration(both[0], both[1], home[None], instance, model)


def test_bytes_of_several_tables_by_hand() -> None:
    """Each home counts where it has most layers: 12 tokens of s0 wholly at both servers."""
    servers = (
        Server("s0", (Gpu(slots=1),), kv_tokens=12),
        Server("s1", (Gpu(slots=1),), kv_tokens=3),
    )
    cluster = Cluster("c", servers)
    home = home_execution(2, 3)
    moved = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    assert kv_bytes(cluster, MODEL, home) == kv_bytes(cluster, MODEL) == (360, 90)
    assert kv_bytes(cluster, MODEL, moved) == (30, 360 + 60)
    assert kv_bytes(cluster, MODEL, np.stack([home, moved])) == (360 + 30, 360 + 90)


def test_servers_in_another_order() -> None:
    """Experts, capacities and tables follow their servers."""
    rng = np.random.default_rng(3)
    cluster = a_cluster(rng)
    placement = a_placement(rng, cluster, rng.integers(0, 3, (3, 3)).astype(np.int32))
    assert placement is not None
    other = in_server_order(placement, ("s2", "s0", "s1"))
    assert other.servers == ("s2", "s0", "s1")
    difference = diff(placement, other)
    for moved in (difference.loads, difference.drops, difference.shifts, difference.reroutes):
        assert not moved.any()
    back = in_server_order(other, placement.servers)
    assert back.gpu_capacity == placement.gpu_capacity
    assert (back.on_gpu == placement.on_gpu).all()
    assert (back.execution_table == placement.execution_table).all()
    assert in_server_order(placement, ("s0", "s1")) is placement
