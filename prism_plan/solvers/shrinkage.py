"""Expected calls for a search, where few tokens of a task are shrunk toward the mean of all tasks.

A search that is given the calls of a few requests plans for their peculiarities. Here the experts
that a task calls in a layer are estimated by a Dirichlet-multinomial model: its distribution over
the E experts is drawn around one that all tasks share, and is estimated by the posterior mean
``z · own share + (1 - z) · shared``, with ``z = n / (n + concentration)`` for n calls, or in
variances ``z = between / (between + error)`` (Bishop, Fienberg and Holland, "Discrete multivariate
analysis", 1975, chapter 12; Bühlmann and Straub, 1970, call z the credibility). It is an empirical
Bayes estimate, for both variances come from the trace, by the method of moments:

* ``error``, that of a task's own share, counts requests and not only tokens, since tokens of one
  request are alike: the variance within and between requests of a task are those of a nested
  analysis of variance (Searle, Casella and McCulloch, "Variance components", 1992, chapter 3).
  Divided by the error of as many independent tokens this is the design effect (Kish, "Survey
  sampling", 1965, section 5.4), by which Rao and Scott (Biometrics 48, 1992) divide counts.
* ``between`` tasks is what the tasks differ more than these errors explain (DerSimonian and Laird,
  Controlled Clinical Trials 7, 1986), in each layer.

Scores, bounds and reports are of what the trace has; nothing of this is in them.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.token_rates import TokenRates, expected_token_rates
from prism_plan.trace import Trace
from prism_plan.trace_totals import RequestLengths

Floats = npt.NDArray[np.float64]

#: Requests whose calls are counted one by one: so many numbers at most, but two of each task.
MAX_COUNTS = 2**23


def shrunk_activations(
    trace: Trace, cluster: Cluster, token_rates: TokenRates | None = None
) -> Floats:
    """Expected calls per second of each expert by each server, shrunk, float64 [N, L, E].

    The unit, and the sum over the experts of a layer, are those of
    :func:`prism_plan.token_rates.activations`; each number lies between that of the task's own
    share and that of the share of all tasks. With one task they are equal.

    Parameters
    ----------
    trace
        Of a counts-only one, tokens are taken to be independent: it records no requests.
    cluster
        Shares of tasks and rates of its users.
    token_rates
        Of :func:`prism_plan.token_rates.expected_token_rates`, where they are known.

    Raises
    ------
    InputError
        As :func:`prism_plan.token_rates.expected_token_rates`.
    """
    rates = (expected_token_rates(trace, cluster) if token_rates is None else token_rates).rates
    calls: Floats = np.einsum("nt,tle->nle", rates, shrunk_calls_per_token(trace))
    return calls


def shrunk_calls_per_token(trace: Trace) -> Floats:
    """Calls of each expert per token of each task, shrunk, [tasks, L, E]; zero without tokens."""
    calls = trace.calls_per_token()
    of_layer = calls.sum(axis=2, keepdims=True)  # K, or 0 where a task calls nothing
    share = calls / np.where(of_layer > 0, of_layer, 1.0)
    weight, shared = _credibility(share, _squared_error(trace, share))
    shrunk: Floats = calls + (1 - weight) * (of_layer * shared - calls)
    return shrunk


def _credibility(share: Floats, error: Floats) -> tuple[Floats, Floats]:
    """Weight of each task's own share in a layer [tasks, L, 1], and the shared distribution [L, E].

    ``share`` [tasks, L, E] sum to 1, or to 0 where a task calls nothing, which then has no part in
    the others; ``error`` [tasks, L] is the variance of each, summed over the experts. In layers
    without an error, or with fewer than two tasks, nothing is shrunk.
    """
    known = share.any(axis=2)
    tasks = known.sum(axis=0)
    able = (tasks >= 2) & np.where(known, error > 0, True).all(axis=0)  # [L]
    error = np.where(able, error, 1.0)
    precision = known / error
    total = np.maximum(precision.sum(axis=0), 1e-300)
    mean = np.einsum("tl,tle->le", precision, share) / total[:, None]
    distance = ((share - mean) ** 2).sum(axis=2)
    excess = (precision * distance).sum(axis=0) - (tasks - 1)
    scale = (precision * (total - precision)).sum(axis=0) / total
    between = np.where(able, np.maximum(excess, 0.0) / np.where(able, scale, 1.0), np.inf)
    # each task is as far from the shared distribution as tasks differ and as its own error
    precision = known / np.where(able, between + error, 1.0)
    total = np.maximum(precision.sum(axis=0), 1e-300)
    shared = np.einsum("tl,tle->le", precision / total, share)
    weight = np.where(able, between / np.where(able, between + error, 1.0), 1.0)
    return weight[:, :, None], shared


def _squared_error(trace: Trace, share: Floats) -> Floats:
    """Variance of each task's ``share`` of calls [tasks, L, E], summed over experts, [tasks, L]."""
    tokens = trace.tokens.astype(np.float64)
    independent = 1 / np.maximum(tokens, 1)
    if trace.kind == "counts":
        within = _within(tokens[:, None], share, trace.model.top_k)
        return within * independent[:, None]
    lengths = trace.request_lengths()
    squares = np.bincount(lengths.task, lengths.tokens.astype(np.float64) ** 2, len(tokens))
    within, between = _request_variances(trace, lengths)
    return within * independent[:, None] + between * (squares * independent**2)[:, None]


def _within(tokens: Floats, share: Floats, top_k: int) -> Floats:
    """Variance of single tokens around the share of their group, pooled over groups, [L].

    ``tokens`` [groups, 1] of each, ``share`` [groups, L, E]. A token calls K different experts, so
    the squares of its own shares add up to 1 / K.
    """
    squares = np.where(share.any(axis=2), 1 / top_k - (share**2).sum(axis=2), 0.0)
    degrees = np.maximum(tokens - 1, 0.0).sum()
    found: Floats = np.maximum((tokens * squares).sum(axis=0), 0.0) / max(degrees, 1.0)
    return found


def _request_variances(trace: Trace, lengths: RequestLengths) -> tuple[Floats, Floats]:
    """Variances of tokens within a request, and of requests within a task, [L] each.

    Summed over experts and pooled over tasks. Where no task has two requests nobody knows how they
    differ: the second is then 0, as of independent tokens.
    """
    chosen = _sample(lengths, trace)
    task, tokens = lengths.task[chosen], lengths.tokens[chosen].astype(np.float64)
    share = (
        _calls_of_requests(trace, lengths.key[chosen]) / (tokens * trace.model.top_k)[:, None, None]
    )
    within = _within(tokens[:, None], share, trace.model.top_k)
    mean_square = np.zeros(trace.model.num_layers)
    degrees, effective = 0, 0.0
    for code in np.unique(task):
        own = np.flatnonzero(task == code)
        total = tokens[own].sum()
        mean = np.einsum("r,rle->le", tokens[own], share[own]) / total
        mean_square += np.einsum("r,rle->l", tokens[own], (share[own] - mean) ** 2)
        degrees += len(own) - 1
        effective += total - (tokens[own] ** 2).sum() / total
    if degrees == 0:
        return within, np.zeros_like(within)
    between = (mean_square / degrees - within) / (effective / degrees)
    return within, np.maximum(between, 0.0)


def _sample(lengths: RequestLengths, trace: Trace) -> npt.NDArray[np.int64]:
    """Indices of the requests that are counted: all, or evenly spaced ones of each task."""
    first = lengths.first(len(trace.tasks))
    tasks = max(int((trace.tokens > 0).sum()), 1)
    most = max(MAX_COUNTS // (trace.model.num_pairs * tasks), 2)
    parts = []
    for begin, end in itertools.pairwise(first.tolist()):
        number = min(end - begin, most)
        parts.append(begin + np.arange(number) * (end - begin) // max(number, 1))
    return np.concatenate(parts)


def _calls_of_requests(trace: Trace, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Calls of each expert by the requests of these ascending ``keys``, [requests, L, E]."""
    from prism_plan.compiled_loops import as_constant, count_selections

    assert trace.batches is not None
    model = trace.model
    calls = np.zeros((len(keys), model.num_layers, model.num_experts), np.int64)
    scratch = np.zeros(model.num_experts, np.int32)
    for batch in trace.batches():
        key = batch.task.astype(np.int64) << 32 | batch.request
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        kept = np.flatnonzero(keys[at] == key)
        experts, request = batch.experts[kept], at[kept].astype(np.int32)
        count_selections(as_constant(experts), as_constant(request), calls, scratch)
    return calls
