"""Where layers execute while servers are away: shortest paths over those that are left."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance
from prism_plan.latency.idle_time import IdleMeasure
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.solvers.contract import cluster_and_trace
from prism_plan.solvers.paths import shortest_path


class LossTables:
    """Execution tables of a run whose servers may be away, by what the placement's own table says.

    ``rules`` has the cluster and the trace by which the time of a path is measured.
    """

    def __init__(self, placement: Placement, rules: Instance, model: ModelSpec, seed: int) -> None:
        self._planned = placement.execution_table
        self._rules, self._model, self._seed = rules, model, seed

    @functools.cached_property
    def _measure(self) -> IdleMeasure:
        cluster, trace = cluster_and_trace(self._rules, "a table without a lost server")
        return IdleMeasure(self._model, cluster, trace, self._seed)

    def table(self, held: Placement, avoided: Collection[int]) -> npt.NDArray[np.int32]:
        """The table int32 [N, L] that has no layer execute at the servers ``avoided``.

        A row that names none of them stays as it was planned, and so does one with all layers at
        home. Any other becomes the path of least idle time over the other servers, by what is
        ``held``; an expert that nobody holds costs nothing.
        """
        table = self._planned.copy()
        for home, row in enumerate(self._planned):
            if (row != home).any() and set(avoided) & set(row.tolist()):
                table[home] = self._path(held, home, sorted(avoided))
        return table

    def _path(self, held: Placement, home: int, avoided: list[int]) -> npt.NDArray[np.int32]:
        on_gpu = held.on_gpu.copy()
        nowhere = ~on_gpu.any(axis=0)
        for n in range(held.num_servers):
            if n not in avoided:
                on_gpu[held.gpus_of(n)[0]] |= nowhere
        request = self._measure.idle_time(on_gpu).of_home(home)
        layer_s = request.layer_s.copy()
        layer_s[:, avoided] = np.inf
        return shortest_path(dataclasses.replace(request, layer_s=layer_s), home)
