"""Which plan is fastest: by the formula, and by simulation where it cannot be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from prism_plan.latency.expected_latency import PlanLatency
from prism_plan.placement import Placement
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests, sample_seeds
from prism_plan.simulate.short_run import short_run
from prism_plan.solvers.latency.problem import LatencyProblem

Floats = npt.NDArray[np.float64]

#: The formula is trusted where places, GPUs and links are busy for no more than this share of time.
TRUSTED_SHARE = 0.3
#: Candidates within this share of the best by the formula are simulated; where it is not trusted,
#: those below so many times the best.
WITHIN, UNTRUSTED = 0.3, 3.0
#: Requests of a server in a sample; of large clusters fewer, so many in all.
SIMULATED_REQUESTS, MAX_SIMULATED = 40, 600
#: Rounds of simulations: samples that come to those before, and how many plans take part.
ROUNDS = ((1, 16), (2, 8), (3, 4))


class Judge:
    """Orders plans; those it simulates run on the same requests.

    ``price_s`` gives seconds that a plan costs beside its latency, for what it loads.
    """

    def __init__(self, problem: LatencyProblem, load_price: float = 0.0) -> None:
        self._problem, self._price = problem, load_price
        users = sum(server.has_users for server in problem.cluster.servers)
        self._number = min(SIMULATED_REQUESTS, -(-MAX_SIMULATED // users))
        self._samples: dict[int, Requests] = {}
        self._runs: dict[tuple[str, int], float] = {}
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
        seconds = {name: self.formula_s(name, plan) for name, plan in plans.items()}
        names = sorted(seconds, key=seconds.__getitem__)
        best = names[0]
        if not self._problem.loaded:
            return names[:1]
        most = 1 + WITHIN if trusted(self.expected[best]) else UNTRUSTED
        return [name for name in names if seconds[name] <= most * seconds[best]]

    def best(self, plans: Mapping[str, Placement]) -> str:
        """The name of the fastest plan; ``simulated`` has the seconds of those simulated."""
        close = self.close(plans)
        begin = 0
        for samples, most in ROUNDS:
            close = close[:most]
            if len(close) == 1:
                break
            begin += samples
            for name in close:
                runs = [self._run(name, plans[name], number) for number in range(begin)]
                self.simulated[name] = float(np.mean(runs))
            close = sorted(close, key=lambda n: self.simulated[n] + self.price_s(plans[n]))
        return close[0]

    def _run(self, name: str, plan: Placement, sample: int) -> float:
        """Mean seconds of the requests of one sample under a plan."""
        if (name, sample) not in self._runs:
            requests, problem = self._requests(sample), self._problem
            outcome = short_run(plan, requests, problem.cluster, problem.model)
            self._runs[name, sample] = float(np.mean(outcome.done_s - requests.arrival_s))
        return self._runs[name, sample]

    def _requests(self, sample: int) -> Requests:
        if sample not in self._samples:
            problem = self._problem
            self._samples[sample] = sample_requests(
                problem.trace, problem.cluster, requests_per_server=self._number,
                seed=sample_seeds(problem.seed, sample + 1)[sample],
            )  # fmt: skip
        return self._samples[sample]


def trusted(expected: PlanLatency) -> bool:
    """Whether the formula is close to the simulator: nothing is busy for long."""
    shares = (expected.place_share, expected.gpu_share, expected.up_share, expected.down_share)
    return max(float(share.max()) for share in shares) <= TRUSTED_SHARE
