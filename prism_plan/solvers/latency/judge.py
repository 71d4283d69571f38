"""Which plan is fastest: by the formula, and by simulation where it cannot be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.latency.expected_latency import PlanLatency
from prism_plan.placement import Placement
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests, sample_seeds
from prism_plan.simulate.short_run import short_run
from prism_plan.solvers.latency.problem import LatencyProblem

Floats = npt.NDArray[np.float64]

#: The formula is trusted where places and GPUs are busy for no more than this share of the time.
TRUSTED_SHARE = 0.3
#: Candidates within this share of the best by the formula are simulated.
WITHIN = 0.3
#: Requests of a server in a sample; of large clusters fewer, so many in all.
SIMULATED_REQUESTS, MAX_SIMULATED = 40, 600
#: Rounds of simulations: samples of each, and how many of the best go on to it.
ROUNDS = ((1, 16), (2, 6), (3, 3))


@dataclass(frozen=True, eq=False)
class Simulated:
    """Seconds of all requests of some samples under a plan: [requests] each, and their homes."""

    latency_s: Floats
    ttft_s: Floats
    home: npt.NDArray[np.int32]
    later_s: Floats
    later_tokens: npt.NDArray[np.int64]

    @property
    def mean_s(self) -> float:
        """Mean seconds of a request."""
        return float(self.latency_s.mean())


class Judge:
    """Simulates plans on the same requests, in rounds: the best of one go on to the next."""

    def __init__(self, problem: LatencyProblem) -> None:
        self._problem = problem
        users = sum(server.has_users for server in problem.cluster.servers)
        self._number = min(SIMULATED_REQUESTS, -(-MAX_SIMULATED // users))
        self._samples: dict[int, Requests] = {}
        self._runs: dict[tuple[str, int], Floats] = {}

    def best(
        self, plans: Mapping[str, Placement], expected: Mapping[str, PlanLatency]
    ) -> tuple[str, dict[str, float]]:
        """The name of the fastest plan, and the simulated seconds of those that were simulated."""
        by_formula = sorted(plans, key=lambda name: expected[name].mean_s)
        first = by_formula[0]
        if not self._problem.loaded:
            return first, {}
        close = [
            name
            for name in by_formula
            if expected[name].mean_s <= (1 + WITHIN) * expected[first].mean_s
            or not trusted(expected[name])
            or not trusted(expected[first])
        ]
        if len(close) == 1:
            return first, {}
        simulated: dict[str, float] = {}
        begin = 0
        for samples, most in ROUNDS:
            close = close[:most]
            if len(close) == 1:
                break
            for name in close:
                runs = [self._run(name, plans[name], number) for number in range(begin + samples)]
                simulated[name] = float(np.mean([run.mean() for run in runs]))
            begin += samples
            close = sorted(close, key=simulated.__getitem__)
        return close[0], simulated

    def _run(self, name: str, plan: Placement, sample: int) -> Floats:
        """Seconds of the requests of one sample under a plan."""
        if (name, sample) not in self._runs:
            requests = self._requests(sample)
            problem = self._problem
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


def trusted(expected: PlanLatency) -> bool:
    """Whether the formula is close to the simulator: nothing is busy for long."""
    shares: Sequence[float] = (
        expected.busiest_place,
        float(expected.gpu_share.max()),
        float(expected.up_share.max()),
        float(expected.down_share.max()),
    )
    return max(shares) <= TRUSTED_SHARE
