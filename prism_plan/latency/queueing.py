"""Mean waiting times of queues, by formulas of textbooks; the cluster's queues are none of these.

Sources: L. Kleinrock, Queueing Systems I (1975) for M/G/1 and the Erlang C formula; A. M. Lee and
P. A. Longton (1959) for M/G/c as M/M/c times (1 + c²) / 2.
"""

from __future__ import annotations

import math

from prism_plan.jit import kernel

#: Formulas hold up to this share of time; beyond it waiting grows in proportion to the share.
BUSIEST = 0.95


@kernel
def above(share: float) -> tuple[float, float]:
    """A share of time that formulas can take, and the factor of their result for the rest."""
    if share <= BUSIEST:
        return share, 1.0
    return BUSIEST, share / BUSIEST


@kernel
def erlang_c(servers: int, offered: float) -> float:
    """Probability of waiting in M/M/c, for ``offered`` = arrivals per second x mean seconds < c."""
    if offered <= 0:
        return 0.0
    blocked = 1.0  # Erlang B by its recursion
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    share = offered / servers
    return blocked / (1 - share * (1 - blocked))


@kernel
def waiting_for_places(places: int, rate: float, seconds: float, squared: float) -> float:
    """Mean seconds until one of some places is free, as in M/G/c.

    ``rate`` arrivals per second; a place is taken for ``seconds`` on average, and for ``squared``
    squared seconds. Beyond :data:`BUSIEST` in proportion to the share of time.
    """
    if rate <= 0 or seconds <= 0:
        return 0.0
    share, factor = above(rate * seconds / places)
    waiting = erlang_c(places, share * places) * seconds / (places * (1 - share))
    variation = squared / seconds**2 - 1
    return factor * waiting * (1 + max(variation, 0.0)) / 2 if math.isfinite(waiting) else math.inf
