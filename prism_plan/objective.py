"""Scores of a placement: remote share, waiting share and destinations (docs/design.md, section 1).

Every score that is printed or written is computed here from the placement itself, whatever the
solver said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.deprecated_names import renamed_parameters
from prism_plan.exact_sum import exact_row_sums
from prism_plan.instance import Instance
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement
from prism_plan.token_rates import TokenRates
from prism_plan.trace import Trace

#: Up to so many candidate servers the smallest set for a step is found by enumeration.
EXACT_COVER_SERVERS = 16


@dataclass(frozen=True, eq=False)
class RemoteScore:
    """Calls of experts by each server: ``calls`` per second [N], of them ``remote`` [N]."""

    calls: npt.NDArray[np.float64]
    remote: npt.NDArray[np.float64]

    @property
    def share(self) -> float:
        """Remote share over all servers; zero where nothing is called."""
        return _ratio(self.remote, self.calls)

    @property
    def by_server(self) -> list[float | None]:
        """Remote share of each server; ``None`` for one that calls nothing."""
        return _ratios(self.remote, self.calls)


@dataclass(frozen=True, eq=False)
class StepScore:
    """(Token, layer) steps of each server's requests, in steps per second.

    ``steps`` [N] all of them, ``waiting`` [N] those with a remote expert, ``destinations`` [N] the
    sum of the sizes of their smallest sets of remote servers, ``greedy`` [N] the steps whose set
    was found greedily, for more than :data:`EXACT_COVER_SERVERS` servers hold a missing expert.
    """

    steps: npt.NDArray[np.float64]
    waiting: npt.NDArray[np.float64]
    destinations: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.float64]

    @property
    def waiting_share(self) -> float:
        """Waiting share over all servers."""
        return _ratio(self.waiting, self.steps)

    @property
    def mean_destinations(self) -> float:
        """Mean number of remote servers per step over all servers."""
        return _ratio(self.destinations, self.steps)

    @property
    def greedy_share(self) -> float:
        """Share of steps whose destinations are an upper bound found greedily."""
        return _ratio(self.greedy, self.steps)

    @property
    def waiting_by_server(self) -> list[float | None]:
        """Waiting share of each server; ``None`` for one without steps."""
        return _ratios(self.waiting, self.steps)

    @property
    def destinations_by_server(self) -> list[float | None]:
        """Mean destinations of each server; ``None`` for one without steps."""
        return _ratios(self.destinations, self.steps)


def _ratio(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> float:
    total = math.fsum(whole)
    return math.fsum(part) / total if total > 0 else 0.0


def _ratios(part: Iterable[float], whole: Iterable[float]) -> list[float | None]:
    return [float(p / w) if w > 0 else None for p, w in zip(part, whole, strict=True)]


def largest_share(shares: list[float | None]) -> tuple[int, float] | None:
    """Index and value of the largest share, or ``None`` where no server has one."""
    known = [(share, -n) for n, share in enumerate(shares) if share is not None]
    if not known:
        return None
    share, index = max(known)
    return -index, share


def remote_score(activations: npt.NDArray[np.float64], local: npt.NDArray[np.bool_]) -> RemoteScore:
    """Score ``activations`` [N, L, E] where ``local`` [N, L, E] says which server holds what."""
    by_server = activations.reshape(len(activations), -1)
    remote = np.where(local, 0.0, activations).reshape(by_server.shape)
    return RemoteScore(exact_row_sums(by_server), exact_row_sums(remote))


def score(placement: Placement, instance: Instance) -> RemoteScore:
    """Score the remote calls of a placement under the activations of an instance.

    Raises
    ------
    WrongModel
        They are of different models.
    """
    require_same_model(
        placement.model, instance.model, source="placement", other="the planning problem"
    )
    return remote_score(instance.activations, placement.local_to_execution)


@renamed_parameters(load="token_rates")
def step_score(
    local: npt.NDArray[np.bool_] | Placement, trace: Trace, token_rates: TokenRates
) -> StepScore:
    """Score the waiting steps and destinations of every token, where ``local`` is [N, L, E].

    In its place a :class:`~prism_plan.placement.Placement` may stand, with its execution table.

    A token of task t has weight rate[n, t] / tokens[t] at server n. To score several placements,
    :func:`step_scores` goes over the tokens once.

    Raises
    ------
    ValueError
        The trace is counts-only: it does not record which experts are called together.
    """
    return step_scores([local], trace, token_rates)[0]


def step_scores(
    placements: Sequence[npt.NDArray[np.bool_] | Placement], trace: Trace, token_rates: TokenRates
) -> list[StepScore]:
    """Score several placements as :func:`step_score` does, in one pass over the tokens.

    Each is a placement on the same servers, or its ``local`` [N, L, E] where every layer executes
    at home. Steps count at their home; what is remote, and which servers are needed, is seen from
    where the layer executes.

    Raises
    ------
    ValueError
        The trace is counts-only: it does not record which experts are called together.
    """
    from prism_plan.compiled_loops import as_constant

    if trace.batches is None:
        raise ValueError("a counts-only trace does not record which experts are called together")
    if not placements:
        return []
    counters = [_StepCounter(placed, token_rates) for placed in placements]
    for batch in trace.batches():
        experts, task = as_constant(batch.experts), as_constant(batch.task)
        for counter in counters:
            counter.add(experts, task)
    weight = token_rates.rates / np.maximum(trace.tokens, 1)
    steps = token_rates.rates.sum(axis=1) * trace.model.num_layers
    return [StepScore(steps, *(counter.sums * weight).sum(axis=2)) for counter in counters]


class _StepCounter:
    """Counts the waiting steps of one placement, their destinations and those found greedily.

    ``sums`` int64 [3, N, tasks].
    """

    def __init__(self, placed: npt.NDArray[np.bool_] | Placement, token_rates: TokenRates) -> None:
        from prism_plan.compiled_loops import MAX_MASK_SERVERS, as_constant

        local = placed.local if isinstance(placed, Placement) else placed
        seen = placed.local_to_execution if isinstance(placed, Placement) else placed
        num_servers = len(local)
        # holders of (l, e) in ascending server order: holder[start[l·E + e] : start[l·E + e + 1]]
        by_pair = local.reshape(num_servers, -1).T
        holder = np.nonzero(by_pair)[1].astype(np.int32)
        start = np.concatenate([[0], np.cumsum(by_pair.sum(axis=1))]).astype(np.int64)
        self._local = as_constant(seen)
        self._holder = as_constant(holder)
        self._start = as_constant(start)
        bits = np.left_shift(1, np.arange(num_servers) % MAX_MASK_SERVERS, dtype=np.int64)
        self._holders = as_constant(np.einsum("nle,n->le", local, bits))
        self._serves = as_constant(token_rates.rates > 0)
        self.sums = np.zeros((3, *token_rates.rates.shape), np.int64)

    def add(self, experts: npt.NDArray[np.uint16], task: npt.NDArray[np.int32]) -> None:
        from prism_plan.compiled_loops import score_steps

        num_servers = self.sums.shape[1]
        scratch = np.zeros((4, max(num_servers, experts.shape[2]) + 1), np.int64)
        score_steps(
            experts,
            task,
            self._local,
            self._holder,
            self._start,
            self._holders,
            self._serves,
            EXACT_COVER_SERVERS,
            scratch,
            self.sums,
        )
