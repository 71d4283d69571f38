"""The least seconds of a layer on a server that holds it whole, however its GPUs share the experts.

A step is as long as the busiest GPU of the server. Which expert is best on which GPU is a hard
problem; what no distribution is below is simple.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.solvers.latency.problem import Floats, LatencyProblem


def least_layer_s(problem: LatencyProblem) -> Floats:
    """Seconds of layer l executed whole at server m for a mean request of a home, [N, L, M].

    Exact where a server has one GPU for experts, a lower bound where it has several.
    """
    measure, tables, site = problem.measure, problem.site.timing, problem.site
    prompts = measure.prompts
    layers, servers = problem.model.num_layers, len(problem.places)
    kinds = tables.kind[site.dense_gpu]
    groups = [_expert_gpus(problem, m) for m in range(servers)]
    step_s = np.stack(  # the experts of one token's step
        [_batch_s(np.ones((layers, problem.model.top_k), np.int64), problem, *g) for g in groups],
        axis=1,
    )
    seconds = np.zeros((len(prompts), layers, servers))
    for number in range(len(prompts)):
        prefill, decode = (
            int(of[number]) for of in (prompts.prefill_tokens, prompts.decode_tokens)
        )
        contexts = prefill + np.arange(decode)
        dense_s = tables.decode_s[kinds][:, tables.dense_class][:, :, contexts].sum(axis=2)
        seconds[number] = decode * step_s
        if prefill:
            dense_s = dense_s + tables.prefill_s[kinds][:, tables.dense_class, prefill]
            first = int(prompts.first_row[number])
            calls = _calls(prompts.experts[first : first + prefill], problem.model.num_experts)
            seconds[number] += np.stack([_batch_s(calls, problem, *g) for g in groups], axis=1)
        seconds[number] += dense_s.T
    by_task = np.tensordot(measure.members, seconds, axes=1)
    found: Floats = np.tensordot(measure.shares, by_task, axes=1)
    return found


def _expert_gpus(problem: LatencyProblem, server: int) -> tuple[int, npt.NDArray[np.int32]]:
    """How many GPUs of a server can hold an expert, and their rows in tables of times."""
    least = int(problem.instance.expert_size.min())
    first = int(problem.site.gpu_start[server])
    gpus = [
        first + g for g, room in enumerate(problem.instance.gpu_capacity[server]) if room >= least
    ] or [first]
    return len(gpus), np.unique(problem.site.timing.kind[gpus])


def _calls(experts: npt.NDArray[np.uint16], num_experts: int) -> npt.NDArray[np.int64]:
    """Calls of each expert by some tokens [tokens, L, K], int64 [L, E]."""
    layers = experts.shape[1]
    first = np.arange(layers)[None, :, None] * num_experts
    calls = np.bincount((first + experts).ravel(), minlength=layers * num_experts)
    return calls.reshape(layers, num_experts)


def _batch_s(
    calls: npt.NDArray[np.int64], problem: LatencyProblem, gpus: int, kinds: npt.NDArray[np.int32]
) -> Floats:
    """Seconds of a step with these calls [L, any experts] at one server, at least, [L].

    Each expert takes as long as on the fastest GPU: the busiest of g GPUs takes as long as the
    longest expert, as a g-th of all, and as the shortest of as many experts as one of g has to
    take.
    """
    tables = problem.site.timing
    each = tables.expert_s[kinds].min(axis=0)[tables.size[:, None], calls] * (calls > 0)
    each = np.sort(each, axis=1)
    called = (calls > 0).sum(axis=1)
    rising = np.cumsum(each, axis=1)
    total = rising[:, -1]
    if gpus == 1:
        return total
    uncalled = calls.shape[1] - called  # these come first, with no seconds
    last = np.maximum(uncalled + -(-called // gpus) - 1, 0)
    shortest = rising[np.arange(len(calls)), last]
    found: Floats = np.maximum.reduce([each[:, -1], total / gpus, shortest])
    return found
