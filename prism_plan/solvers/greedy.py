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
    """Locality bool [N, L, E] with Σ_e local[n, l, e] = counts[n, l] for counts [N, L].

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
        use = instance.activations[:, layer]
        held = local[:, layer]
        for n, number in enumerate(counts[:, layer]):
            held[n, np.argsort(-use[n], kind="stable")[:number]] = True
        _cover(use, held)
    return local


def _cover(use: npt.NDArray[np.float64], held: npt.NDArray[np.bool_]) -> None:
    """Repair the coverage of one layer in place; ``use`` and ``held`` are [N, E]."""
    copies = held.sum(axis=0)
    while not copies.all():
        duplicate = held & (copies > 1)
        n = int(np.argmax(duplicate.sum(axis=1)))
        drop = int(np.argmin(np.where(duplicate[n], use[n], np.inf)))
        take = int(np.argmax(np.where(copies == 0, use[n], -1.0)))
        held[n, drop], held[n, take] = False, True
        copies[drop] -= 1
        copies[take] += 1
