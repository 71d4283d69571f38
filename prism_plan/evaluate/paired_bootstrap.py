"""How sure a difference of mean latencies is: paired bootstrap over samples and requests.

Two placements are simulated on the same requests, in several samples of different seeds. Requests
of one sample are not independent, for they queue behind each other, so samples are drawn first and
then the requests within each (a two-stage bootstrap; Davison and Hinkley, "Bootstrap methods and
their application", 1997, section 3.8).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.seeds import RandomSource, random_stream

Floats = npt.NDArray[np.float64]

#: Resamples, and the share of them that an interval holds.
RESAMPLES, CONFIDENCE = 1000, 0.95


class Interval(NamedTuple):
    """An interval of the relative difference of two means; 0.1 is ten percent more."""

    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether no difference at all lies outside."""
        return not self.low <= 0 <= self.high


def relative_difference(one_s: Floats, other_s: Floats, seed: int = 0) -> Interval:
    """The interval of ``mean(one) / mean(other) - 1``.

    ``one_s`` and ``other_s`` are seconds of the same requests, float64 [samples, requests], above
    0 in the mean. Seeded: equal inputs give equal intervals.
    """
    samples, requests = one_s.shape
    rng = random_stream(seed, RandomSource.BOOTSTRAP)
    found = np.empty(RESAMPLES)
    for b in range(RESAMPLES):
        sample = np.array(rng.integers(0, samples, samples))[:, None]
        request = rng.integers(0, requests, (samples, requests))
        found[b] = one_s[sample, request].sum() / other_s[sample, request].sum() - 1
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [outside, 1 - outside])
    return Interval(float(low), float(high))
