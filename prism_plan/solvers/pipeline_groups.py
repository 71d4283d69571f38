"""Groups of servers: each has one copy of all layers as a pipeline, and serves its own homes.

Every partition of the servers is tried up to :data:`MAX_EXACT` of them. Beyond that, servers that
hold too little on their own are merged with the nearest ones, then groups are merged and servers
moved between them while that makes requests faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from prism_plan.solvers.pipeline_order import MAX_EXACT

Members = frozenset[int]
#: At most so many groups are planned in search of a partition.
MAX_PLANNED = 3000


@dataclass(frozen=True, eq=False)
class Group:
    """Servers with a pipeline of their own.

    ``row`` int32 [L] is the server that executes each layer for the homes among ``members``;
    ``cost_s`` the seconds of their requests, weighted by their share of all requests.
    """

    members: Members
    row: npt.NDArray[np.int32]
    cost_s: float


Partition = tuple[Group, ...]


def total_s(groups: Iterable[Group]) -> float:
    """Mean seconds of a request of the cluster."""
    return math.fsum(group.cost_s for group in groups)


@dataclass(eq=False)
class Groups:
    """Plans groups, each once. ``plan`` gives that of some servers, or ``None``: too little memory.

    ``distance_s`` [N, N] are seconds of a message with one token's hidden state.
    """

    num_servers: int
    plan: Callable[[Members], Group | None]
    distance_s: npt.NDArray[np.float64]
    _planned: dict[Members, Group | None] = field(default_factory=dict)

    def group(self, members: Iterable[int]) -> Group | None:
        """The pipeline of these servers, or ``None`` where they hold too little."""
        key = frozenset(members)
        if key not in self._planned:
            self._planned[key] = self.plan(key)
        return self._planned[key]

    def candidates(self) -> list[Partition]:
        """Partitions to choose from, fastest for a request on its own first; none: no pipeline.

        The fastest partition, all servers as one group, and the partition of most groups, which
        spreads requests over servers most; no two of them have as many groups.
        """
        found = list(self._partitions())
        if not found:
            return []
        fastest = min(found, key=lambda groups: (total_s(groups), len(groups)))
        most = max(found, key=lambda groups: (len(groups), -total_s(groups)))
        chosen = [fastest, *(groups for groups in found if len(groups) == 1), most]
        return list({_key(groups): groups for groups in chosen}.values())

    def _partitions(self) -> Iterator[Partition]:
        everyone = frozenset(range(self.num_servers))
        if self.num_servers <= MAX_EXACT:
            for sets in _partitions_of(sorted(everyone)):
                groups = [self.group(members) for members in sets]
                planned = tuple(group for group in groups if group is not None)
                if len(planned) == len(groups):
                    yield planned
            return
        one = self.group(everyone)
        if one is None:
            return
        yield (one,)
        merged = self._merge_small()
        if len(merged) > 1:
            yield tuple(merged)
        yield tuple(self._improve(merged))
        yield tuple(self._improve([one]))

    def _merge_small(self) -> list[Group]:
        """Groups of few servers: what holds too little is merged with what is nearest."""
        cells: list[Members] = [frozenset([n]) for n in range(self.num_servers)]
        while True:
            lacking = [cell for cell in cells if self.group(cell) is None]
            if not lacking:
                planned = (self.group(cell) for cell in cells)
                return [group for group in planned if group is not None]
            cell = lacking[0]
            others = [other for other in lacking if other != cell]
            others = others or [other for other in cells if other != cell]
            nearest = min(others, key=lambda other: (self._between_s(cell, other), min(other)))
            cells = [c for c in cells if c not in (cell, nearest)] + [cell | nearest]

    def _between_s(self, one: Members, other: Members) -> float:
        a, b = np.ix_(sorted(one), sorted(other)), np.ix_(sorted(other), sorted(one))
        return float(self.distance_s[a].mean() + self.distance_s[b].mean())

    def _improve(self, groups: Sequence[Group]) -> list[Group]:
        """Merge groups and move or split off servers while that saves time."""
        current = list(groups)
        while len(self._planned) < MAX_PLANNED:
            for old, new in self._moves(current):
                planned = [self.group(members) for members in new if members]
                made = [group for group in planned if group is not None]
                before = total_s(old)
                if len(made) == len(planned) and total_s(made) < before - 1e-12 * abs(before):
                    current = [group for group in current if group not in old] + made
                    break
                if len(self._planned) >= MAX_PLANNED:
                    return current
            else:
                return current
        return current

    @staticmethod
    def _moves(current: Sequence[Group]) -> Iterator[tuple[list[Group], list[Members]]]:
        """Groups to take away and the servers of those that come in their place."""
        for a, b in itertools.combinations(current, 2):
            yield [a, b], [a.members | b.members]
        for group in current:
            for n in sorted(group.members):
                if len(group.members) > 1:
                    yield [group], [group.members - {n}, frozenset([n])]
                for other in current:
                    if other is not group:
                        yield [group, other], [group.members - {n}, other.members | {n}]


def _key(groups: Partition) -> frozenset[Members]:
    return frozenset(group.members for group in groups)


def _partitions_of(servers: Sequence[int]) -> Iterator[list[list[int]]]:
    """All partitions of some servers into groups."""
    if not servers:
        yield []
        return
    first, rest = servers[0], servers[1:]
    for smaller in _partitions_of(rest):
        yield [[first], *smaller]
        for i in range(len(smaller)):
            yield [*smaller[:i], [first, *smaller[i]], *smaller[i + 1 :]]
