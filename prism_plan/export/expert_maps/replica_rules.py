"""Which replica of an expert each engine calls, and what stays on the caller's server by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.io.export import MapEngine

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def local_share(engine: MapEngine, holders: Sequence[int], ranks: Sequence[int]) -> Floats:
    """Share of the calls of each rank that stay on its server, float64 [R].

    ``holders`` are the ranks that hold the expert, ascending; ``ranks`` the servers of all ranks.

    * SGLang 0.5.23, ``static``: the same GPU, then the same node, then a random one. Its nodes have
      equally many GPUs: where servers have not, each GPU is started as a node of its own.
    * vLLM-Ascend (182b75ea): the replica of number rank mod replicas, also past a local copy.
    * TensorRT-LLM: in turn.
    """
    servers = np.array(ranks)
    held = servers[list(holders)]
    everywhere = (held[None, :] == servers[:, None]).mean(axis=1)
    if engine == "sglang":
        nodes = nodes_of(ranks)
        on_node = np.isin(nodes, nodes[list(holders)])
        return np.asarray(np.where(on_node, 1.0, everywhere), np.float64)
    if engine == "vllm-ascend":
        chosen = held[np.arange(len(servers)) % len(held)]
        return np.asarray(chosen == servers, np.float64)
    return np.asarray(everywhere, np.float64)


def called_ranks(
    engine: MapEngine, held: Bools, ranks: Sequence[int], rank: int, turn: int
) -> Bools:
    """Which rank a rank calls for each expert in one of its turns, bool [R, L, E]: one for each.

    ``held`` bool [R, L, E] are the experts of all ranks. Where the rule of :func:`local_share`
    takes replicas at random or in turn, turns go through them, of each expert from another one on.
    """
    allowed = held
    number = turn + np.add.outer(*map(np.arange, held.shape[1:]))
    if engine == "sglang":
        nodes = nodes_of(ranks)
        near = held & (nodes == nodes[rank])[:, None, None]
        allowed = np.where(near.any(axis=0), near, held)
        own = held & (np.arange(len(held)) == rank)[:, None, None]
        allowed = np.where(own.any(axis=0), own, allowed)
    elif engine == "vllm-ascend":
        number[:] = rank
    number %= np.maximum(allowed.sum(axis=0), 1)
    return np.asarray(allowed & (allowed.cumsum(axis=0) == number + 1), np.bool_)


def nodes_of(ranks: Sequence[int]) -> npt.NDArray[np.int64]:
    """The node of each rank as SGLang takes them, int64 [R]."""
    servers = np.array(ranks, np.int64)
    counts = np.unique(servers, return_counts=True)[1]
    return servers if (counts == counts[0]).all() else np.arange(len(servers))


def remote_share(
    engine: MapEngine, physical: npt.NDArray[np.int64], ranks: Sequence[int], calls: Floats
) -> float:
    """Share of calls that go to another server under an expert map.

    ``physical`` [L, R, S] is the expert in each slot; ``calls`` [N, L, E] by home server, which are
    spread evenly over its ranks.
    """
    servers = np.array(ranks)
    of_rank = np.bincount(servers, minlength=len(calls))
    stays = 0.0
    for layer in range(len(physical)):
        for expert in range(calls.shape[2]):
            holders = np.flatnonzero((physical[layer] == expert).any(axis=1))
            kept = local_share(engine, holders.tolist(), ranks)
            per_rank = calls[servers, layer, expert] / of_rank[servers]
            stays += float(per_rank @ kept)
    total = float(calls[np.unique(servers)].sum())
    return max(1.0 - stays / total, 0.0) if total else 0.0
