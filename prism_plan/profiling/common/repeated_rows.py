"""Find rows of a recording that repeat the row before them in every layer, too often for chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.model_spec import ModelSpec

#: Shorter runs of equal rows are not reported: a token that stands several times in a row in a
#: prompt may be routed alike each time.
MIN_RUN = 16
#: A run is reported where the chance of its repetitions is below 2 to the power of minus this.
CHANCE_BITS = 50

Selections = npt.NDArray[np.uint16]


def runs_of_equal_rows(
    experts: Selections, begins: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First rows and lengths of the runs of at least two equal rows in [T, L, K].

    Rows are equal if all layers are. A run ends before a row that ``begins`` [T] a request.
    """
    if len(experts) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # nearly all rows differ in the first layer already, so the others are seldom compared
    same = (experts[1:, 0] == experts[:-1, 0]).all(axis=1)
    if begins is not None:
        same &= ~begins[1:]
    at = np.flatnonzero(same)
    if len(at):
        same[at] = (experts[at + 1] == experts[at]).all(axis=(1, 2))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    return edges[::2], edges[1::2] - edges[::2] + 1


def min_suspect_run(model: ModelSpec) -> int | None:
    """The length from which a run of rows that are equal in every layer cannot be chance.

    Two tokens choose the same experts of a layer with a chance of 1 in C(E, K) if all experts are
    equally popular. They are not, so only half of those bits are counted, and at most one bit a
    layer: the chance of a repetition is taken as 2^-L, or more. ``None`` where K = E.
    """
    choices = math.comb(model.num_experts, model.top_k)
    if choices == 1:
        return None
    bits = min(1.0, math.log2(choices) / 2) * model.num_layers
    return max(MIN_RUN, 1 + math.ceil(CHANCE_BITS / bits))


@dataclass
class RepeatedRows:
    """Counts rows that repeat the row before them in every layer, in runs too long for chance.

    Engines that do not clear a buffer, for example at the boundary of two chunks of a prompt,
    return the row of one token for many. A request of one token over and over may look the same,
    so such rows are kept and reported.
    """

    model: ModelSpec
    runs: int = 0
    rows: int = 0
    longest: int = 0
    where: str = ""

    def __post_init__(self) -> None:
        self._min_run = min_suspect_run(self.model)

    def add(
        self,
        experts: Selections,
        place: object,
        *,
        first: int = 0,
        begins: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Check selections [T, L, K] at ``place``, the first of which is token ``first``."""
        if self._min_run is None:
            return
        starts, lengths = runs_of_equal_rows(experts, begins)
        long = lengths >= self._min_run
        if not long.any():
            return
        starts, lengths = starts[long], lengths[long]
        repeats = lengths - 1
        self.runs += len(repeats)
        self.rows += int(repeats.sum())
        at = int(repeats.argmax())
        if repeats[at] > self.longest:
            self.longest = int(repeats[at])
            self.where = f"{place} after token {first + int(starts[at])}"

    def notice(self) -> str:
        """The notice of such rows, or an empty text."""
        if not self.runs:
            return ""
        return (
            f"{self.rows:,} rows in {self.runs:,} runs repeat the row before them in every layer, "
            f"the longest {self.longest:,} rows at {self.where}: a buffer that the engine did not "
            "overwrite, or one token over and over; they were kept"
        )
