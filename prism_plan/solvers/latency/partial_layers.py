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
from prism_plan.solvers.latency.expert_exchange import ExpertExchange
from prism_plan.solvers.latency.problem import Bools, LatencyProblem, Table
from prism_plan.solvers.paths import shortest_paths, tolled_paths

#: Tables to start from: at most so many of homes on one server each, and with one change.
MOST_FIXED, MOST_CHANGES = 64, 64
#: Starts are given experts while all have so many (server, layer, expert) triples together: the
#: time of a flow grows with them.
MOST_PAIRS = 4_000_000
#: So many of the best by the estimate are measured by the formula; of these the best are improved,
#: of large problems fewer: as many as have prompts of so many expert calls together.
MEASURED, LEAST_IMPROVED, MOST_IMPROVED, CALLS_IMPROVED = 24, 2, 8, 100_000
#: The formula's work on a plan grows with (servers² × layers); how many plans are measured by it.
FORMULA_WORK, LEAST_FORMULAS, MOST_FORMULAS = 2_000_000, 24, 1000
#: Turns of table, experts and exchanges.
ROUNDS = 4
#: Expert calls of prompts that exchanges of experts look at: in all, and of one plan a share.
MAX_CALLS, SHARE = 40_000_000, 0.25


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


class Budget:
    """Expert calls that exchanges of experts may still look at, and plans that may be measured."""

    def __init__(self, problem: LatencyProblem, effort: int = 1) -> None:
        self.whole = self.left = MAX_CALLS * effort
        work = problem.cluster.num_servers**2 * problem.model.num_layers
        self.formulas = int(np.clip(FORMULA_WORK // work, LEAST_FORMULAS, MOST_FORMULAS)) * effort


def partial_layers(problem: LatencyProblem, budget: Budget) -> Iterator[Placement]:
    """The best plans that start from simple tables."""
    found: list[tuple[float, int, Table, Bools]] = []
    nothing = np.zeros((problem.cluster.num_servers, problem.model.num_layers), bool)
    most = MOST_PAIRS // problem.calls.size
    for number, table in enumerate(itertools.islice(starts(problem), most)):
        try:
            local = problem.experts_for(table, nothing)
        except Infeasible:
            continue
        found.append((_estimate_s(problem, table, local), number, table, local))
    found.sort(key=lambda entry: entry[:2])
    measured = []
    for _, number, table, local in found[: min(MEASURED, budget.formulas // 3)]:
        plan = problem.if_it_fits(local, table)
        if plan is not None:
            measured.append((problem.expected(plan).mean_s, number, plan))
            budget.formulas -= 1
    measured.sort(key=lambda entry: entry[:2])
    most = int(np.clip(CALLS_IMPROVED // _calls(problem), LEAST_IMPROVED, MOST_IMPROVED))
    for _, _, plan in measured[:most]:
        yield improved(problem, plan, budget)


def improved(problem: LatencyProblem, plan: Placement, budget: Budget) -> Placement:
    """A plan with better tables and experts by the formula, or the plan itself."""
    best_s = problem.expected(plan).mean_s
    for _ in range(ROUNDS):
        if budget.formulas <= 0:
            return plan
        options = [*_exchanged(problem, plan, budget), *_responses(problem, plan)]
        found = [(problem.expected(made).mean_s, made) for made in options]
        budget.formulas -= len(found)
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


def _exchanged(problem: LatencyProblem, plan: Placement, budget: Budget) -> Iterator[Placement]:
    """The plan with experts exchanged between servers."""
    calls = _calls(problem)
    most = int(min(budget.left, SHARE * budget.whole)) // calls
    if most < 2 * problem.model.num_layers:
        return
    search = ExpertExchange(problem, plan, most)
    made = search.plan()
    budget.left -= search.tried * calls
    if made is not None:
        yield made


def _calls(problem: LatencyProblem) -> int:
    """Expert calls of all prompts in one layer, which a change of it looks at."""
    prompts = problem.workload.prompts
    tokens = int((prompts.prefill_tokens.astype(np.int64) + prompts.decode_tokens).sum())
    return max(tokens * problem.model.top_k, 1)


def _placed(problem: LatencyProblem, table: Table, whole: Bools) -> Placement | None:
    try:
        return problem.placed(table, whole)
    except Infeasible:
        return None


def _estimate_s(problem: LatencyProblem, table: Table, local: Bools) -> float:
    """Seconds of a mean request if each remote call took one round trip; only to order starts."""
    alone = float(problem.weights @ problem.pipelines.idle.of_table(table))
    calls = moved_activations(problem.calls, table)
    total = float(problem.calls.sum())
    remote = float(np.where(local, 0.0, calls).sum()) / total if total else 0.0
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
