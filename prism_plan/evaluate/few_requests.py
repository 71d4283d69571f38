"""Whether a trace has too few requests for what is said about mean times.

Plans are made for, and compared on, the requests of a trace, which are a sample of what users will
ask for. How far the mean of another such sample may lie is told by how much requests of a task
differ in length, as far as times are in proportion to tokens: the standard error of a stratified
mean, each task weighted by its share of the users' requests, with Student's t of Satterthwaite's
degrees of freedom (Cochran, "Sampling techniques", 1977, sections 5.3 and 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.printable_text import quantity
from prism_plan.token_rates import request_rates, shares_by_task
from prism_plan.trace import Trace

Floats = npt.NDArray[np.float64]

#: A half-width of the 95 % interval beyond this share of the mean is told.
MAX_RELATIVE_ERROR = 0.2
#: The 0.975 quantile of Student's t by 1 / degrees of freedom; straight lines between are close.
_INVERSE_DEGREES = (0.0, 1 / 30, 1 / 15, 1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1.0)
_STUDENT_T = (1.960, 2.042, 2.131, 2.228, 2.365, 2.571, 2.776, 3.182, 4.303, 12.706)
#: Tasks that a message names at most, those with the largest part in the error first.
NAMED_TASKS = 3


@dataclass(frozen=True, eq=False)
class LengthError:
    """The half-width of the 95 % interval of users' mean request length, relative to the mean.

    ``relative`` is infinite where a task has one request, of which nobody knows how it differs from
    others. ``variance`` [tasks] is each task's part in the squared error, ``requests`` [tasks] how
    many it has.
    """

    relative: float
    variance: Floats
    requests: npt.NDArray[np.int64]


def length_error(trace: Trace, cluster: Cluster) -> LengthError:
    """How well the requests of a token-level trace tell the mean length of the users' requests.

    Raises
    ------
    InputError
        A server's tasks are not those of the trace.
    ValueError
        The trace is counts-only.
    """
    weight = _request_shares(trace, cluster)
    lengths = trace.request_lengths()
    number = np.bincount(lengths.task, minlength=len(trace.tasks))
    asked = (weight > 0) & (number > 0)
    of = np.maximum(number, 1)
    mean = np.bincount(lengths.task, lengths.tokens, len(trace.tasks)) / of
    squares = np.bincount(lengths.task, (lengths.tokens - mean[lengths.task]) ** 2, len(of))
    single = asked & (number < 2)
    degrees = np.maximum(number - 1, 1)
    variance = np.where(single, np.inf, weight**2 * squares / degrees / of)
    total = float(variance.sum())
    if single.any():
        relative = np.inf
    elif total == 0:
        relative = 0.0
    else:
        inverse = float((variance**2 / degrees).sum()) / total**2
        quantile = float(np.interp(inverse, _INVERSE_DEGREES, _STUDENT_T))
        relative = quantile * np.sqrt(total) / float(weight @ mean)
    return LengthError(float(relative), variance, number)


def few_requests(trace: Trace, cluster: Cluster) -> str:
    """A line that says for which tasks the trace has too few requests; empty where it has enough.

    That is where the mean length of the users' requests is known to no better than
    :data:`MAX_RELATIVE_ERROR` of it. Empty for a counts-only trace too: it has no requests, and
    commands say that prompts are drawn. ``solve``, ``compare`` and ``simulate`` print the line
    after the trace's name where times are simulated.

    Raises
    ------
    InputError
        A server's tasks are not those of the trace.
    """
    if trace.kind == "counts":
        return ""
    error = length_error(trace, cluster)
    if error.relative <= MAX_RELATIVE_ERROR:
        return ""
    largest = np.argsort(-error.variance, kind="stable")[:NAMED_TASKS].tolist()
    worst = [t for t in largest if error.variance[t] >= 0.1 * error.variance[largest[0]]]
    if np.isinf(error.relative):
        worst = [t for t in worst if error.requests[t] == 1]
    named = ", ".join(
        f"{quantity(int(error.requests[t]), 'request')} of task {trace.tasks[t]}" for t in worst
    )
    if np.isinf(error.relative):
        return f"only {named}: how far mean times of other requests may differ cannot be told"
    by = f"{100 * error.relative:.0f} %" if error.relative < 1 else "more than 100 %"
    return (
        f"only {named}: by their lengths, mean times of other requests may differ by {by} "
        "(95 % interval), and another plan may be the best for them"
    )


def _request_shares(trace: Trace, cluster: Cluster) -> Floats:
    """Share of each task in all requests of the cluster, float64 [tasks], of sum 1.

    By arrival rates; where a server with users has none, by ``weight`` over the mean tokens of its
    requests.
    """
    shares = np.array(
        [
            shares_by_task(trace, server.tasks, f"server[{n}].tasks")
            for n, server in enumerate(cluster.servers)
        ]
    )
    rates = request_rates(cluster)
    if rates is None:
        tokens = shares @ trace.mean_tokens()
        weights = np.array([server.weight or 0.0 for server in cluster.servers])
        rates = weights / np.where(tokens > 0, tokens, 1.0)
    by_task: Floats = rates @ shares
    return by_task / max(float(by_task.sum()), 1e-300)
