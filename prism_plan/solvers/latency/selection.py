"""Which plan is fastest: by the formula, and by simulation where it cannot be trusted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.latency.expected_latency import PlanLatency
from prism_plan.placement import Placement
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests, sample_seeds
from prism_plan.simulate.short_run import short_run
from prism_plan.simulate.user_means import request_weights, users_mean, users_percentile
from prism_plan.solvers.latency.problem import LatencyProblem

Floats = npt.NDArray[np.float64]

#: Candidates within this share of the best by the formula are simulated; where it is not trusted,
#: those below so many times the best.
WITHIN, UNTRUSTED = 0.3, 3.0
#: Requests of a server in a sample; of large clusters fewer, so many in all.
SIMULATED_REQUESTS, MAX_SIMULATED = 40, 600
#: Rounds of simulations: samples that come to those before, and how many plans take part.
ROUNDS = ((1, 12), (2, 6), (3, 3))
#: No plan is chosen whose slowest home is further above that of the best plan of another solver, or
#: whose 99th percentile is above its by more than this and the share that the mean gains: what is
#: gained on average is not to be one home's loss. Percentiles of few requests are uncertain.
SLOWER_HOME, SLOWER_P99 = 0.03, 0.0


@dataclass(frozen=True)
class _Figures:
    """Seconds of users' requests under a plan: mean, 99th percentile, mean of the slowest home.

    Homes count by their arrival rates in the first two.
    """

    mean_s: float
    p99_s: float
    slowest_home_s: float


class PlanSelection:
    """Orders plans; those it simulates run on the same requests.

    ``load_price`` is in seconds of mean latency a GiB that a plan loads.
    """

    def __init__(self, problem: LatencyProblem, load_price: float = 0.0) -> None:
        self._problem, self._price = problem, load_price
        users = sum(server.has_users for server in problem.cluster.servers)
        self._number = min(SIMULATED_REQUESTS, -(-MAX_SIMULATED // users))
        self._samples: dict[int, Requests] = {}
        self._runs: dict[tuple[str, int], Floats] = {}
        self.expected: dict[str, PlanLatency] = {}
        self.simulated: dict[str, float] = {}

    def formula_s(self, name: str, plan: Placement) -> float:
        """Seconds of a mean request by the formula, with the price of loads."""
        if name not in self.expected:
            self.expected[name] = self._problem.expected(plan)
        return self.expected[name].mean_s + self.price_s(plan)

    def price_s(self, plan: Placement) -> float:
        """Seconds that a plan costs for what it loads."""
        return self._price * self._problem.loaded_gib(plan) if self._price else 0.0

    def close(self, plans: Mapping[str, Placement]) -> list[str]:
        """Names of plans that may be the fastest, by the formula, best first."""
        names = self._by_formula(plans)
        best = names[0]
        if not self._problem.loaded:
            return names[:1]
        most = 1 + WITHIN if self._problem.trusts(self.expected[best]) else UNTRUSTED
        limit = most * self.formula_s(best, plans[best])
        return [name for name in names if self.formula_s(name, plans[name]) <= limit]

    def best(
        self, plans: Mapping[str, Placement], others: Collection[str], kept: str | None = None
    ) -> str:
        """The name of the fastest plan; ``simulated`` has the seconds of the last round.

        ``others`` are the plans of other solvers: the best of them is what fairness is measured by.
        ``kept`` takes part in all rounds: more plans to choose from may not make the choice worse.
        """
        if not self._problem.loaded:  # by the formula alone
            close = self._by_formula(plans)
        else:
            close = self.close(plans)
            if not any(name in others for name in close):
                close += [name for name in self._by_formula(plans) if name in others][:1]
        figures = {name: self._formula_figures(name) for name in close}
        begin = 0
        for samples, most in ROUNDS:
            if not self._problem.loaded or len(close) == 1:
                break
            standard = next((name for name in close if name in others), None)
            close = close[:most]
            close += [
                name for name in dict.fromkeys((standard, kept)) if name and name not in close
            ]
            begin += samples
            self.simulated = {}  # means of fewer samples say nothing beside those of more
            for name in close:
                figures[name] = self._simulated_figures(name, plans[name], begin)
                self.simulated[name] = figures[name].mean_s
            if begin == ROUNDS[0][0]:  # whatever the formula says of them
                for name in self._left_out(plans, min(figures[n].mean_s for n in close)):
                    figures[name] = self._simulated_figures(name, plans[name], begin)
                    self.simulated[name] = figures[name].mean_s
                    close.append(name)
            close.sort(key=lambda name: figures[name].mean_s + self.price_s(plans[name]))
        standard = next((name for name in close if name in others), None)
        if standard is None:
            return close[0]
        return next(
            name for name in close if name == standard or _is_fair(figures[name], figures[standard])
        )

    def _left_out(self, plans: Mapping[str, Placement], best_s: float) -> list[str]:
        """Of each kind of plans that was not simulated the one of least idle time.

        Without those that take longer than ``best_s`` on an idle cluster, as far as the formula
        knows: bursts of links make messages faster.
        """
        known = {_kind(name) for name in self.simulated}
        found: dict[str, tuple[float, str]] = {}
        for name in plans:
            parts = self.expected[name].by_part
            idle_s = sum(parts[part] for part in ("compute", "attention", "hops", "calls"))
            kind = _kind(name)
            if kind not in known and (idle_s < best_s or self._problem.bursts):
                found[kind] = min(found.get(kind, (idle_s, name)), (idle_s, name))
        return [name for _, name in found.values()]

    def _by_formula(self, plans: Mapping[str, Placement]) -> list[str]:
        return sorted(plans, key=lambda name: self.formula_s(name, plans[name]))

    def _formula_figures(self, name: str) -> _Figures:
        expected = self.expected[name]
        asking = expected.weights > 0
        return _Figures(expected.mean_s, 0.0, float(expected.of_home[asking].max()))

    def _simulated_figures(self, name: str, plan: Placement, samples: int) -> _Figures:
        seconds = np.concatenate([self._run(name, plan, number) for number in range(samples)])
        homes = np.concatenate([self._requests(number).home for number in range(samples)])
        by_home = np.bincount(homes, seconds) / np.maximum(np.bincount(homes), 1)
        weights = self._weights(samples)
        return _Figures(
            users_mean(seconds, weights), users_percentile(seconds, weights, 99),
            float(by_home.max()),
        )  # fmt: skip

    def _weights(self, samples: int) -> Floats | None:
        """Weight of each request of the samples, or ``None`` where all weigh the same."""
        by_sample = [request_weights(self._requests(number)) for number in range(samples)]
        known = [weights for weights in by_sample if weights is not None]
        return np.concatenate(known) if known else None

    def _run(self, name: str, plan: Placement, sample: int) -> Floats:
        """Seconds of the requests of one sample under a plan."""
        if (name, sample) not in self._runs:
            requests, problem = self._requests(sample), self._problem
            outcome = short_run(plan, requests, problem.cluster, problem.model)
            self._runs[name, sample] = outcome.done_s - requests.arrival_s
        return self._runs[name, sample]

    def _requests(self, sample: int) -> Requests:
        if sample not in self._samples:
            problem = self._problem
            self._samples[sample] = sample_requests(
                problem.trace, problem.cluster, requests_per_server=self._number,
                seed=sample_seeds(problem.seed, sample + 1)[sample],
            )  # fmt: skip
        return self._samples[sample]


def _is_fair(figures: _Figures, standard: _Figures) -> bool:
    """Whether no home, and not the slowest requests, pay for what is gained on average."""
    gain = max(1 - figures.mean_s / standard.mean_s, 0.0) if standard.mean_s > 0 else 0.0
    return (
        figures.p99_s <= (1 + SLOWER_P99 + gain) * standard.p99_s
        and figures.slowest_home_s <= (1 + SLOWER_HOME) * standard.slowest_home_s
    )


def _kind(name: str) -> str:
    """What made a plan: its name without numbers and improvements."""
    return name.split(",")[0].split(" #")[0]
