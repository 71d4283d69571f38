"""Stage 2 of Prism: each server takes its most used experts, then coverage is repaired.

Reconstructed: the paper's text (arXiv 2508.12851) was not at hand.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.instance import Instance


def greedy_with_coverage(
    instance: Instance, counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Fill each server's count of each layer: bool [N, L, E], Σ_e local = ``counts`` [N, L].

    Each server takes its K[n, l] most used experts of layer l. While an expert of the layer is
    nowhere, the server that holds most duplicates in that layer drops its least used duplicate
    and takes, of the uncovered experts, the one that it uses most. Ties: lowest index.

    Raises
    ------
    ValueError
        Some layer has fewer slots than experts.
    """
    if (counts.sum(axis=0) < instance.model.num_experts).any():
        raise ValueError("a layer has fewer slots than experts")
    local = np.zeros(instance.activations.shape, bool)
    for layer in range(instance.model.num_layers):
        calls = instance.activations[:, layer]
        held = local[:, layer]
        for n, count in enumerate(counts[:, layer]):
            held[n, np.argsort(-calls[n], kind="stable")[:count]] = True
        _repair_coverage(calls, held)
    return local


def _repair_coverage(calls: npt.NDArray[np.float64], held: npt.NDArray[np.bool_]) -> None:
    """Repair the coverage of one layer in place; ``calls`` and ``held`` are [N, E]."""
    num_replicas = held.sum(axis=0)
    while not num_replicas.all():
        duplicate = held & (num_replicas > 1)
        n = int(np.argmax(duplicate.sum(axis=1)))
        drop = int(np.argmin(np.where(duplicate[n], calls[n], np.inf)))
        take = int(np.argmax(np.where(num_replicas == 0, calls[n], -1.0)))
        held[n, drop], held[n, take] = False, True
        num_replicas[drop] -= 1
        num_replicas[take] += 1
