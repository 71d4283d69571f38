"""Means and percentiles over users' requests, where servers simulate equally many of each home.

Short simulations give every home as many requests as the others, so that each home's mean is known
as well. Of the users' requests a home has a share in proportion to its arrival rate: means that
stand for users weight the simulated requests by it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.simulate.requests import Requests

Floats = npt.NDArray[np.float64]


def request_weights(requests: Requests) -> Floats | None:
    """Weight of each simulated request among those of users, float64 [R], of sum 1.

    The rate of its home over the number of requests that were simulated of the home. ``None`` where
    all weigh the same, or rates are not stationary: plain means are then those of users.
    """
    if requests.rate is None or not len(requests):
        return None
    number = np.bincount(requests.home, minlength=len(requests.rate))
    of_home = requests.rate / np.maximum(number, 1)
    weights: Floats = of_home[requests.home]
    if (weights == weights[0]).all() or not weights.any():
        return None
    shares: Floats = weights / weights.sum()
    return shares


def users_mean(values: Floats, weights: Floats | None) -> float:
    """The mean of values [R] with weights of any sum, plain where they are ``None``."""
    if weights is None:
        return float(values.mean())
    return float(weights @ values / weights.sum())


def users_percentile(values: Floats, weights: Floats | None, percent: float) -> float:
    """A percentile of values [R]; with weights the least value that so much of them is not above.

    Without weights as ``numpy.percentile``, linear between the values next to it.
    """
    if weights is None:
        return float(np.percentile(values, percent))
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[order])
    at = int(np.searchsorted(upto, percent / 100 * upto[-1] * (1 - 1e-12)))
    return float(values[order[min(at, len(order) - 1)]])
