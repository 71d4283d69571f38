"""Plans of partial layers: tables and experts in turn, each the best answer to the other.

Servers may lack experts of layers that they execute, and call them elsewhere. The search starts
from simple tables (each home on one server, all homes with one change of server), gives each the
experts that its executing servers call most, and improves the best of them: paths for the experts,
experts for the paths, and exchanges of single experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.execution_table import home_execution, moved_activations
from prism_plan.placement import Placement
from prism_plan.solvers.latency.polish import polish
from prism_plan.solvers.latency.problem import LatencyProblem, Table
from prism_plan.solvers.paths import shortest_paths, tolled_paths

#: Tables to start from: at most so many of homes on one server each, and with one change.
MOST_FIXED, MOST_CHANGES = 64, 64
#: So many of the best by the estimate get a formula, and so many of these are improved.
MEASURED, IMPROVED = 12, 4
#: Turns of table, experts and exchanges.
ROUNDS = 4
#: Steps of prompts that exchanges of experts of one plan look at, at most.
MAX_STEPS = 40_000_000


def starts(problem: LatencyProblem) -> Iterator[Table]:
    """Simple tables int32 [N, L], without those that move layers of ``execute_at_home``."""
    servers, layers = problem.cluster.num_servers, problem.model.num_layers
    homes = np.flatnonzero((problem.weights > 0) & ~problem.at_home).tolist()
    home = home_execution(servers, layers)
    if servers ** len(homes) <= MOST_FIXED:
        choices = list(itertools.product(range(servers), repeat=len(homes)))
    else:
        choices = [(m,) * len(homes) for m in range(min(servers, MOST_FIXED))]
    for chosen in choices:
        table = home.copy()
        table[homes] = np.array(chosen, np.int32)[:, None]
        yield table
    pairs = servers * (servers - 1)
    if pairs == 0:
        return
    step = max(-(-(layers - 1) * pairs // MOST_CHANGES), 1)
    for cut in range(step, layers, step):
        for first, last in itertools.permutations(range(min(servers, MOST_CHANGES)), 2):
            table = home.copy()
            table[homes, :cut], table[homes, cut:] = first, last
            yield table


def partial_layers(problem: LatencyProblem) -> Iterator[Placement]:
    """The best plans that start from simple tables."""
    if problem.cluster.num_servers > MOST_FIXED:
        return
    found: list[tuple[float, int, Placement]] = []
    for number, table in enumerate(starts(problem)):
        plan = _placed(problem, table)
        if plan is not None:
            found.append((_estimate_s(problem, plan), number, plan))
    found.sort(key=lambda entry: entry[:2])
    measured = [
        (problem.expected(plan).mean_s, number, plan) for _, number, plan in found[:MEASURED]
    ]
    measured.sort(key=lambda entry: entry[:2])
    for _, _, plan in measured[:IMPROVED]:
        yield improved(problem, plan)


def improved(problem: LatencyProblem, plan: Placement) -> Placement:
    """A plan with better tables and experts by the formula, or the plan itself."""
    best_s = problem.expected(plan).mean_s
    for _ in range(ROUNDS):
        options = [*_exchanged(problem, plan), *_responses(problem, plan)]
        found = [(problem.expected(made).mean_s, made) for made in options]
        if not found:
            return plan
        now_s, made = min(found, key=lambda entry: entry[0])
        if now_s >= best_s * (1 - 1e-9):
            return plan
        best_s, plan = now_s, made
    return plan


def _responses(problem: LatencyProblem, plan: Placement) -> Iterator[Placement]:
    """The plan's experts with better tables, and other experts for its own and for these."""
    idle = problem.measure.idle_time(plan.on_gpu)
    tables = [plan.execution_table, shortest_paths(idle, problem.at_home)]
    if problem.loaded:
        tables.append(tolled_paths(idle, problem.rates, problem.at_home))
    known = set()
    for table in tables:
        if table.tobytes() in known:
            continue
        known.add(table.tobytes())
        made = problem.if_it_fits(plan.local, table)
        if made is not None:
            yield made
        executed = np.zeros(plan.local.shape[:2], bool)
        for n in np.flatnonzero(problem.weights > 0):
            executed[table[n], np.arange(table.shape[1])] = True
        for whole in (executed & plan.local.all(axis=2), np.zeros_like(executed)):
            made = _placed(problem, table, whole)
            if made is not None:
                yield made


def _exchanged(problem: LatencyProblem, plan: Placement) -> Iterator[Placement]:
    """The plan with experts exchanged between servers."""
    prompts = problem.workload.prompts
    steps = int((prompts.prefill_tokens.astype(np.int64) + prompts.decode_tokens).sum())
    most = MAX_STEPS // max(steps * problem.model.top_k, 1)
    if most < 4 * problem.model.num_layers:
        return
    made = polish(problem, plan, most)
    if made is not None:
        yield made


def _placed(
    problem: LatencyProblem, table: Table, whole: np.ndarray | None = None
) -> Placement | None:
    if whole is None:
        whole = np.zeros(table.shape, bool)
    try:
        return problem.placed(table, whole)
    except Infeasible:
        return None


def _estimate_s(problem: LatencyProblem, plan: Placement) -> float:
    """Seconds of a mean request if each remote call took one round trip; only to order starts."""
    table = plan.execution_table
    alone = float(problem.weights @ problem.pipelines.idle.of_table(table))
    calls = moved_activations(problem.calls, table)
    total = float(problem.calls.sum())
    remote = float(np.where(plan.local, 0.0, calls).sum()) / total if total else 0.0
    per_request = (
        float(problem.weights @ problem.pipelines.idle.tokens)
        * problem.model.num_layers
        * problem.model.top_k
    )
    network = problem.network
    away = ~np.eye(len(problem.places), dtype=bool)
    call_s = (
        float((network.call_overhead_s + network.call_cost_s())[away].mean()) if away.any() else 0
    )
    return alone + remote * per_request * call_s
