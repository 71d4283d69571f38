"""Plans of whole layers under load: which servers hold which, group by group.

Each group of servers serves its own homes. The search (:mod:`.whole_layer_moves`) starts from
servers filled one after the other, from the group's pipeline, and from changes of the best one
drawn at random; it stops by work.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible
from prism_plan.execution_table import home_execution
from prism_plan.expert_capacity import capacity_with_kv, kv_bytes
from prism_plan.solvers.latency.problem import Bools, LatencyProblem, Table
from prism_plan.solvers.latency.whole_layer_moves import GroupProblem, improve
from prism_plan.solvers.pipeline_groups import Partition

#: Groups of at most so many servers are searched.
MAX_SERVERS = 8
#: Orders in which servers are filled, and changes that are drawn at random.
ORDERS, CHANGES = 6, 16
#: Holdings that a local search tries at most, and steps of the dynamic programme of all of them.
MAX_TRIED, MAX_WORK = 20_000, 3_000_000_000
#: Shares of the slowest home in the objective; a plan is selected from the best by each.
FAIRNESS = (0.0, 0.3)
#: So many of the best plans by each objective are given back.
BEST_PLANS = 3
MOST_PLANS = BEST_PLANS * len(FAIRNESS)
#: KV caches lie where layers execute: search, count, search again.
MAX_ROUNDS = 10
#: Squared coefficient of variation of a request's seconds where it is not known.
VARIATION = 0.2


def whole_layer_plans(
    problem: LatencyProblem, partition: Partition, effort: int = 1
) -> list[tuple[Table, Bools]]:
    """Tables int32 [N, L] and whole layers bool [N, L] of the best plans that were found.

    At most :data:`MOST_PLANS` that differ, best first by the queued objective; none where a group
    is too large, or its memory too small. ``effort`` multiplies the work.
    """
    if any(len(group.members) > MAX_SERVERS for group in partition):
        return []
    cluster, model = problem.cluster, problem.model
    reserved = [0] * cluster.num_servers
    for _ in range(MAX_ROUNDS):
        try:
            room = [sum(gpus) for gpus in capacity_with_kv(cluster, model, reserved)]
        except Infeasible:
            return []
        plans = _searched(problem, partition, room, effort)
        fitting = []
        for table, whole in plans:
            needed = kv_bytes(cluster, model, table)
            try:
                left = [sum(gpus) for gpus in capacity_with_kv(cluster, model, needed)]
            except Infeasible:
                left = [0] * cluster.num_servers
            if (whole @ _layer_size(problem) <= left).all():
                fitting.append((table, whole))
        if fitting or not plans:
            return fitting
        needed = kv_bytes(cluster, model, plans[0][0])
        reserved = [max(before, now) for before, now in zip(reserved, needed, strict=True)]
    return []


def _layer_size(problem: LatencyProblem) -> npt.NDArray[np.int64]:
    return problem.instance.expert_size * problem.model.num_experts


def _searched(
    problem: LatencyProblem, partition: Partition, room: Sequence[int], effort: int
) -> list[tuple[Table, Bools]]:
    """The best plans of all groups together; the k-th has the k-th plan of each group."""
    servers, layers = problem.cluster.num_servers, problem.model.num_layers
    tables = [home_execution(servers, layers) for _ in range(MOST_PLANS)]
    wholes = [np.zeros((servers, layers), bool) for _ in range(MOST_PLANS)]
    most = 1
    for group in partition:
        members = sorted(group.members)
        asked = _group_problem(problem, members, room)
        owned = np.zeros((len(members), layers), bool)
        owned[[members.index(m) for m in group.row.tolist()], np.arange(layers)] = True
        found = []
        for fairness in FAIRNESS:
            fair = dataclasses.replace(asked, fairness=fairness)
            found += _best(fair, owned, problem.seed, effort, len(partition))
        if not found:
            return []
        most = max(most, len(found))
        homes = [members[m] for m in asked.home.tolist()]
        for k in range(MOST_PLANS):
            held, rows = found[min(k, len(found) - 1)]
            wholes[k][members] = held
            tables[k][homes] = np.array(members, np.int32)[rows]
    return list(zip(tables, wholes, strict=True))[:most]


def _group_problem(
    problem: LatencyProblem, members: Sequence[int], room: Sequence[int]
) -> GroupProblem:
    pipelines = problem.pipelines
    idle, weights = pipelines.idle, problem.weights
    homes = [m for m in members if idle.has_users[m]] or [members[0]]
    requests = [idle.of_home(n) for n in homes]
    within = np.ix_(members, members)
    layers = problem.model.num_layers
    called = np.zeros((len(homes), layers))
    for number, n in enumerate(homes):
        if n in pipelines.called_s:
            called[number] = pipelines.called_s[n][:, members].min(axis=1)
    return GroupProblem(
        layer_s=np.array([request.layer_s[:, members] for request in requests]),
        called_s=called,
        hop_s=np.array([request.hop_s[within] for request in requests]),
        id_s=np.array([request.id_s[within] for request in requests]),
        start_s=np.array([request.start_s[members] for request in requests]),
        home=np.array([members.index(n) for n in homes], np.int64),
        fixed=problem.at_home[homes],
        rates=problem.rates[homes],
        weights=weights[homes],
        places=np.array([problem.places[n] for n in homes], np.float64),
        variation=np.full(len(homes), VARIATION),
        room=np.array([room[m] for m in members], np.int64),
        size=_layer_size(problem),
    )


def _best(
    asked: GroupProblem, owned: Bools, seed: int, effort: int, groups: int
) -> list[tuple[Bools, Table]]:
    """The best that local searches from all starts found, with different tables, best first."""
    homes, layers, servers = asked.layer_s.shape
    step = 3 * homes * layers * servers**3
    tries = min(MAX_TRIED, MAX_WORK // step // groups) * effort
    if tries < 1:
        return []
    found = []
    for start in itertools.chain([owned], _filled(asked)):
        held, table, seconds, tried = improve(asked, start, tries)
        tries -= tried
        found.append((seconds, held, table))
        if tries < 1:
            break
    rng = np.random.default_rng(seed)
    for _ in range(CHANGES * effort):
        if tries < 1:
            break
        seconds, held, table = min(found, key=lambda plan: plan[0])
        start = held.copy()
        for m in rng.choice(servers, size=min(servers, 2), replace=False).tolist():
            start[m] = _contiguous(asked, m, int(rng.integers(layers)))
        held, table, seconds, tried = improve(asked, start, tries)
        tries -= tried
        found.append((seconds, held, table))
    best: dict[bytes, tuple[Bools, Table]] = {}
    for seconds, held, table in sorted(found, key=lambda plan: plan[0]):
        if np.isfinite(seconds) and len(best) < BEST_PLANS:
            best.setdefault(table.tobytes(), (held, table))
    return list(best.values())


def _filled(asked: GroupProblem) -> Iterator[Bools]:
    """Servers filled with one layer after the other, in several orders; again from the first."""
    _, layers, servers = asked.layer_s.shape
    for order in itertools.islice(itertools.permutations(range(servers)), ORDERS):
        held = np.zeros((servers, layers), bool)
        begin = 0
        for m in order:
            held[m] = _contiguous(asked, m, begin)
            begin = (begin + int(held[m].sum())) % layers
        yield held


def _contiguous(asked: GroupProblem, server: int, begin: int) -> Bools:
    """The layers from one on that a server holds, as long as its memory goes; bool [L]."""
    layers = len(asked.size)
    held = np.zeros(layers, bool)
    left = int(asked.room[server])
    for number in range(layers):
        layer = (begin + number) % layers
        if asked.size[layer] > left:
            break
        held[layer] = True
        left -= int(asked.size[layer])
    return held
