"""Scores of a placement: remote share, waiting share and destinations (docs/design.md, section 1).

Every score that is printed or written is computed here from the placement itself, whatever the
solver said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.model import require_same_model
from prism_plan.placement import Placement
from prism_plan.token_rates import TokenRates
from prism_plan.trace import Trace

#: Up to so many candidate servers the smallest cover of a step is found by enumeration.
EXACT_COVER_SERVERS = 16


@dataclass(frozen=True, eq=False)
class RemoteScore:
    """Remote calls of a placement: ``calls`` per second [N] and ``remote`` of them [N]."""

    calls: npt.NDArray[np.float64]
    remote: npt.NDArray[np.float64]

    @property
    def share(self) -> float:
        """Remote share over all servers; zero where nothing is called."""
        return _ratio(math.fsum(self.remote), math.fsum(self.calls))

    @property
    def by_server(self) -> list[float | None]:
        """Remote share of each server; ``None`` for one that calls nothing."""
        return _ratios(self.remote, self.calls)


@dataclass(frozen=True, eq=False)
class StepScore:
    """What a placement means for (token, layer) steps, in steps per second.

    ``steps`` [N] all of them, ``waiting`` [N] those with a remote expert, ``destinations`` [N]
    the sum of their smallest sets of remote servers, ``greedy`` [N] the steps whose set was found
    greedily because more than :data:`EXACT_COVER_SERVERS` servers hold a missing expert.
    """

    steps: npt.NDArray[np.float64]
    waiting: npt.NDArray[np.float64]
    destinations: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.float64]

    @property
    def waiting_share(self) -> float:
        """Waiting share over all servers."""
        return _ratio(math.fsum(self.waiting), math.fsum(self.steps))

    @property
    def mean_destinations(self) -> float:
        """Mean number of remote servers per step over all servers."""
        return _ratio(math.fsum(self.destinations), math.fsum(self.steps))

    @property
    def greedy_share(self) -> float:
        """Share of steps whose destinations are an upper bound found greedily."""
        return _ratio(math.fsum(self.greedy), math.fsum(self.steps))

    @property
    def waiting_by_server(self) -> list[float | None]:
        """Waiting share of each server; ``None`` for one that serves nothing."""
        return _ratios(self.waiting, self.steps)

    @property
    def destinations_by_server(self) -> list[float | None]:
        """Mean destinations of each server; ``None`` for one that serves nothing."""
        return _ratios(self.destinations, self.steps)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _ratios(part: Iterable[float], whole: Iterable[float]) -> list[float | None]:
    return [float(p / w) if w > 0 else None for p, w in zip(part, whole, strict=True)]


def worst(shares: list[float | None]) -> tuple[int, float] | None:
    """Index and value of the largest share, or ``None`` where no server has one."""
    known = [(value, -n) for n, value in enumerate(shares) if value is not None]
    if not known:
        return None
    value, index = max(known)
    return -index, value


def remote_score(activations: npt.NDArray[np.float64], local: npt.NDArray[np.bool_]) -> RemoteScore:
    """Calls and remote calls of each server from f and locality, both [N, L, E]."""
    calls = [math.fsum(f.ravel()) for f in activations]
    remote = [math.fsum(f[~held]) for f, held in zip(activations, local, strict=True)]
    return RemoteScore(np.array(calls), np.array(remote))


def score(placement: Placement, instance: Instance) -> RemoteScore:
    """Remote calls of a placement under the activations of an instance.

    Raises
    ------
    WrongModel
        They speak of different models.
    """
    require_same_model(
        placement.model, instance.model, source="placement", other="the planning problem"
    )
    return remote_score(instance.activations, placement.local)


def step_score(local: npt.NDArray[np.bool_], trace: Trace, load: TokenRates) -> StepScore:
    """Waiting and destinations of locality [N, L, E] over every token of a trace.

    A token of task t counts at server n with weight rate[n, t] / tokens[t].

    Raises
    ------
    ValueError
        The trace is counts-only: it does not tell which experts are called together.
    """
    from prism_plan.kernels import score_steps

    if trace.batches is None:
        raise ValueError("a counts-only trace does not tell which experts are called together")
    num_servers, layers, _ = local.shape
    tasks = len(trace.tasks)
    # holders of (l, e) in ascending server order: holder[start[l·E + e] : start[l·E + e + 1]]
    by_pair = local.reshape(num_servers, -1).T
    holder = np.nonzero(by_pair)[1].astype(np.int32)
    start = np.concatenate([[0], np.cumsum(by_pair.sum(axis=1))]).astype(np.int64)
    sums = np.zeros((3, num_servers, tasks), np.int64)
    served = load.rates > 0
    for batch in trace.batches():
        score_steps(
            np.ascontiguousarray(batch.experts),
            np.ascontiguousarray(batch.task),
            np.ascontiguousarray(local),
            holder,
            start,
            served,
            EXACT_COVER_SERVERS,
            sums,
        )
    weight = load.rates / np.maximum(trace.tokens, 1)
    steps = load.rates.sum(axis=1) * layers
    waiting, destinations, greedy = (sums * weight).sum(axis=2)
    return StepScore(steps, waiting, destinations, greedy)
