"""The solver ``latency``: candidates, search, and the choice by formula and simulation."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

from prism_plan.errors import UnsupportedFeature
from prism_plan.instance import Instance
from prism_plan.placement import Placement
from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult, cluster_and_trace
from prism_plan.solvers.latency.candidates import OWN, candidates, spread_over_gpus
from prism_plan.solvers.latency.no_plan import no_plan
from prism_plan.solvers.latency.partial_layers import (
    LEAST_FORMULAS,
    Budget,
    improved,
    partial_layers,
)
from prism_plan.solvers.latency.plan_report import plan_report
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.latency.selection import PlanSelection

#: Plans that are changed further: so many of the best by the formula, of large problems one: each
#: takes flows over so many (server, layer, expert) triples.
IMPROVED, LARGE = 3, 300_000
#: With a time limit, how often the work doubles at most.
MOST_EFFORT = 12


class _Search:
    """Plans by name, each kept once; of several with one name the second is "name #2"."""

    def __init__(self, problem: LatencyProblem, options: Options) -> None:
        self.problem, self.options = problem, options
        self.plans: dict[str, Placement] = {}
        self.selection = PlanSelection(
            problem, options.load_price if options.reference is not None else 0.0
        )
        self.others: set[str] = set()  # names of plans of other solvers
        self._known: set[bytes] = set()
        self._number: Counter[str] = Counter()  # plans by name without their number

    def add(self, name: str, plan: Placement, *, of_others: bool = False) -> None:
        """Keep a plan that is allowed, unless it is known."""
        key = np.packbits(plan.on_gpu).tobytes() + plan.execution_table.tobytes()
        if key in self._known:
            return
        self._known.add(key)
        if self.problem.is_allowed(plan, whole_layers=self.options.whole_layers):
            self._number[name] += 1
            if self._number[name] > 1:
                name = f"{name} #{self._number[name]}"
            self.plans[name] = plan
            if of_others:
                self.others.add(name)

    def run(self, required: frozenset[Feature], effort: int) -> None:
        """Collect candidates and improve the best of them."""
        for name, plan in candidates(self.problem, self.options, required, effort):
            self.add(name, plan, of_others=not name.startswith(OWN))
        if not self.plans:
            return
        if self.problem.reference is None:
            for name in self._best(self.selection.close(self.plans) or list(self.plans)):
                spread = spread_over_gpus(self.problem, self.plans[name])
                if spread is not None:
                    self.add(f"{name}, spread over GPUs", spread)
        if not self.options.whole_layers and self.problem.instance.in_slots:
            budget = Budget(self.problem, effort)
            for plan in partial_layers(self.problem, budget):
                self.add("partial layers", plan)
            if self.problem.loaded and not self._trusted():  # the formula may order them wrongly
                idle = self.problem.as_idle()
                for plan in partial_layers(idle, Budget(idle, effort)):
                    self.add("partial layers for an idle cluster", plan)
            budget.formulas = max(budget.formulas, LEAST_FORMULAS)
            for name in self._to_improve():
                self.add(f"{name}, improved", improved(self.problem, self.plans[name], budget))

    def _trusted(self) -> bool:
        """Whether the formula is close to the simulator for the plan that it finds best."""
        name = self._best(list(self.plans))[0]
        return self.problem.trusts(self.selection.expected[name])

    def _to_improve(self) -> list[str]:
        """Names of the best plans; also of those that are best but for what they load."""
        most = 1 if self.problem.calls.size > LARGE else IMPROVED
        found = self._best(list(self.plans))[:most]
        if self.options.load_price > 0:
            fastest = sorted(self.plans, key=lambda name: self.selection.expected[name].mean_s)
            found += [name for name in fastest[:most] if name not in found]
        return found

    def _best(self, names: list[str]) -> list[str]:
        """Names by the formula, best first."""
        return sorted(names, key=lambda name: self.selection.formula_s(name, self.plans[name]))


def _solve(instance: Instance, options: Options) -> SolverResult:
    cluster, trace = cluster_and_trace(instance, "latency")
    begin = time.monotonic()
    problem = LatencyProblem(instance, cluster, trace, options.seed, options.reference)
    needed = {
        Feature.MIN_REPLICAS: instance.min_replicas > 1,
        Feature.RULES: instance.has_rules,
        Feature.UNEQUAL_BYTES: not instance.in_slots,
    }
    required = frozenset(feature for feature, is_needed in needed.items() if is_needed)
    if Feature.UNEQUAL_BYTES in required and required != {Feature.UNEQUAL_BYTES}:
        others = ", ".join(sorted(required - {Feature.UNEQUAL_BYTES}))
        raise UnsupportedFeature(
            f"solver 'latency' does not support {others} with experts of unequal size; "
            "supported by: ilp"
        )
    search = _Search(problem, options)
    search.run(required, 1)
    kept = None
    if options.time_limit_s is not None and search.plans:
        searched = time.monotonic()
        kept = search.selection.best(search.plans, search.others)
        last_s, selected_s = searched - begin, time.monotonic() - searched
        for doubling in range(1, MOST_EFFORT):
            now = time.monotonic()
            # the next one takes twice as long as the last at most, then one is selected again
            if now - begin + 2 * last_s + selected_s > options.time_limit_s:
                break
            search.problem.seed = (options.seed + doubling) % 2**31
            search.run(required, 2**doubling)
            last_s = time.monotonic() - now
        search.problem.seed = options.seed
    if not search.plans:
        raise no_plan(problem, options)
    selection = search.selection
    chosen = selection.best(search.plans, search.others, kept)
    plan, expected = search.plans[chosen], selection.expected[chosen]
    if not options.whole_layers and (filled := problem.filled(plan)) is not None:
        with_copies = problem.expected(filled)
        if with_copies.mean_s <= expected.mean_s:
            plan, expected = filled, with_copies
    extra = plan_report(problem, plan, expected, selection, chosen)
    return SolverResult.of_plan(plan, extra)


SOLVER = Solver(
    name="latency",
    summary="experts and where layers execute, planned together for the least mean latency",
    guarantee="never worse than prism, exact, layer-partition and pipeline by its own measure",
    function=_solve,
    supports=frozenset(
        {Feature.MIN_REPLICAS, Feature.RULES, Feature.UNEQUAL_BYTES, Feature.LOAD_PRICE}
    ),
)
