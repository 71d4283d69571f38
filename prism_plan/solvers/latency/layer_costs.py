"""What the calls of a layer cost by which server holds which expert, for single changes of that.

Compiled steps of the prompts for one layer at a time: another copy of an expert changes the time of
its own layer alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from prism_plan.kernel_types import int64
from prism_plan.latency.idle_layers import Problem, Record, Scratch, layer_problem, step_s
from prism_plan.placement import Placement
from prism_plan.solvers.latency.problem import LatencyProblem

Array = Any

_NONE = np.zeros((0, 3))
_NO_RECORD = Record(_NONE[:, 0], _NONE, _NONE, _NONE, _NONE[:, 0], _NONE[:, 0])


class CopyChange(NamedTuple):
    """A copy that came or went: the GPU of the server that held it before, -1 for none."""

    server: int
    layer: int
    expert: int
    gpu_before: int


class LayerCosts:
    """Seconds of experts and calls of each layer, of a mean request, while copies come and go.

    ``local`` bool [N, L, E] is what servers hold now; change it by :meth:`put` and :meth:`take`.
    """

    def __init__(self, problem: LatencyProblem, plan: Placement) -> None:
        site = problem.site
        self._experts = problem.model.num_experts
        made, self._scratch = layer_problem(
            plan.on_gpu, problem.model, site.gpu_start, site.dense_gpu, site.network, site.timing,
            problem.workload.prompts,
        )  # fmt: skip
        # arrays of their own, which the read-only views that kernels get show as they change
        self._first_gpu = made.first_gpu.copy()
        self._holders = made.holders.copy()
        self._replicas = made.num_replicas.copy()
        self._problem = made._replace(
            first_gpu=as_constant(self._first_gpu),
            holders=as_constant(self._holders),
            num_replicas=as_constant(self._replicas),
        )
        self._gpu_start = site.gpu_start
        self.local = plan.local.copy()
        self._weights = _prompt_weights(problem, plan)
        self.evaluations = 0

    def seconds(self, layer: int) -> float:
        """Seconds of the experts and calls of a layer, of a mean request of the cluster."""
        at, weights = self._weights[layer]
        self.evaluations += 1
        self._scratch.tokens_sent[:] = 0
        return float(_layer_cost(self._problem, self._scratch, _NO_RECORD, layer, at, weights))

    def calls_elsewhere(self, layer: int) -> bool:
        """Whether some server that executes the layer lacks an expert of it."""
        at, _ = self._weights[layer]
        return not bool(self.local[at, layer].all())

    def put(self, server: int, layer: int, expert: int) -> CopyChange:
        """Give a server a copy of an expert, on its GPU with the fewest of the layer."""
        begin, end = int(self._gpu_start[server]), int(self._gpu_start[server + 1])
        if end == begin + 1:
            return self._set(server, layer, expert, begin)
        first = layer * self._experts
        on = self._first_gpu[server, first : first + self._experts]
        fewest = min(range(begin, end), key=lambda g: int((on == g).sum()))
        return self._set(server, layer, expert, fewest)

    def take(self, server: int, layer: int, expert: int) -> CopyChange:
        """Take a server's copy of an expert."""
        return self._set(server, layer, expert, -1)

    def undo(self, change: CopyChange) -> None:
        """Make a change undone: the copy is gone, or lies on its GPU again."""
        self._set(*change)

    def _set(self, server: int, layer: int, expert: int, gpu: int) -> CopyChange:
        pair = layer * self._experts + expert
        before = _put_on(self._first_gpu, self._holders, self._replicas, server, pair, gpu)
        self.local[server, layer, expert] = gpu >= 0
        return CopyChange(server, layer, expert, int(before))


def _prompt_weights(problem: LatencyProblem, plan: Placement) -> list[tuple[Array, Array]]:
    """For each layer the executing servers [A], and the weights of prompts at each, [A, P]."""
    load, table = problem.workload, plan.execution_table
    by_home = (load.weights[:, None] * load.shares) @ load.members  # [N, P]
    found = []
    for layer in range(table.shape[1]):
        homes = load.weights > 0
        at = np.unique(table[homes, layer])
        weights = np.array([by_home[homes & (table[:, layer] == m)].sum(axis=0) for m in at])
        found.append((as_constant(at.astype(np.int64)), as_constant(weights)))
    return found


@kernel
def _put_on(  # pragma: no cover - compiled
    first_gpu: Array, holders: Array, replicas: Array, server: int, pair: int, gpu: int
) -> Any:
    """Put a server's copy of a pair on a GPU, -1 for none; where it was before."""
    before = first_gpu[server, pair]
    first_gpu[server, pair] = gpu
    holding = 0
    for m in range(len(first_gpu)):
        if first_gpu[m, pair] >= 0:
            holders[pair, holding] = m
            holding += 1
    replicas[pair] = holding
    return before


@kernel
def _layer_cost(  # pragma: no cover - compiled
    p: Problem, s: Scratch, r: Record, layer: int, executing: Array, weights: Array
) -> float:
    """Weighted seconds of the steps of all prompts in one layer, without dense work."""
    total = 0.0
    for number in range(len(executing)):
        at = executing[number]
        for prompt in range(weights.shape[1]):
            weight = weights[number, prompt]
            if weight == 0.0:
                continue
            row = p.first_row[prompt]
            tokens = int64(p.prefill_tokens[prompt])
            seconds = 0.0
            if tokens > 0:
                seconds += step_s(p, s, r, at, int64(layer), int64(prompt), row, tokens, 1.0)
            for context in range(tokens, tokens + p.decode_tokens[prompt]):
                seconds += step_s(
                    p, s, r, at, int64(layer), int64(prompt), row + context, int64(1), 1.0
                )
            total += weight * seconds
    return total
