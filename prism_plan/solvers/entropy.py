"""Stage 1 of Prism: how many experts of each layer a server holds, from activation entropy.

Reconstructed: the paper's text (arXiv 2508.12851) was not at hand.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.instance import Instance

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def layer_entropy(activations: Floats) -> Floats:
    """Entropy of expert usage in nats over the last axis, [..., E] → [...]; zero without calls."""
    total = activations.sum(axis=-1, keepdims=True)
    p = np.divide(activations, total, out=np.zeros_like(activations), where=total > 0)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy: Floats = np.maximum(-(p * logs).sum(axis=-1), 0.0)
    return entropy


def entropy_counts(instance: Instance) -> Ints:
    """K[n, l], experts of each layer for each server, int64 [N, L].

    K = C·H/ΣH, at most E, floored; largest remainders get the rest (ties: lowest layer). Where no
    layer of a server has any entropy, counts are uniform. Then the repair: while the servers
    together have fewer than E slots for some layer, a server (largest capacity first) moves a
    slot to it from the layer with the largest surplus. Σ_l K[n, l] = C[n] always.
    """
    experts = instance.model.num_experts
    counts = np.stack(
        [
            _server_counts(int(slots), entropy, experts)
            for slots, entropy in zip(
                instance.slots, layer_entropy(instance.activations), strict=True
            )
        ]
    )
    return repair_counts(counts, instance.slots, experts)


def uniform_counts(instance: Instance) -> Ints:
    """Counts that ignore entropy, int64 [N, L]: C/L each, remainders to the lowest layers."""
    experts = instance.model.num_experts
    ones = np.ones(instance.model.num_layers)
    counts = np.stack([_server_counts(int(slots), ones, experts) for slots in instance.slots])
    return repair_counts(counts, instance.slots, experts)


def _server_counts(slots: int, entropy: Floats, experts: int) -> Ints:
    weights = entropy if entropy.sum() > 0 else np.ones_like(entropy)
    quota = slots * weights / weights.sum()
    counts: Ints = np.floor(np.minimum(quota, experts)).astype(np.int64)
    remainder = quota - counts
    for _ in range(slots - int(counts.sum())):
        layer = int(np.argmax(np.where(counts < experts, remainder, -np.inf)))
        counts[layer] += 1
        remainder[layer] -= 1
    return counts


def repair_counts(counts: Ints, slots: Ints, experts: int) -> Ints:
    """Move slots between layers of a server until each layer has E slots over all servers.

    ``counts`` [N, L], ``slots`` [N] with Σ slots ≥ L·E. Ties: lowest index.
    """
    counts = counts.copy()
    order = np.argsort(-slots, kind="stable")
    while True:
        total = counts.sum(axis=0)
        uncovered = np.flatnonzero(total < experts)
        if not len(uncovered):
            return counts
        layer = int(uncovered[0])
        surplus = np.maximum(total - experts, 0)
        for n in order:
            donors = np.where(counts[n] > 0, surplus, 0)
            if donors.any() and counts[n, layer] < experts:
                counts[n, int(np.argmax(donors))] -= 1
                counts[n, layer] += 1
                break
        else:
            raise ValueError("fewer slots than experts")


def lemma1_bound(p: Floats, delta: float) -> float:
    """Least number of experts that can cover a share 1 − δ of the calls, by their entropy.

    If a set S covers mass at least 1 − δ of the distribution ``p`` [E], δ ≤ ½, then
    |S| ≥ exp(H(p) − h(δ) − δ·log E), h the binary entropy in nats. A provable form of the paper's
    Lemma 1, reconstructed. It bounds the need from below; it does not show that counts in
    proportion to entropy are good.

    Raises
    ------
    InputError
        ``p`` is not a distribution, or δ is not in [0, ½].
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not len(p) or not np.isfinite(p).all() or (p < 0).any():
        raise InputError("not a distribution", place="p", expected="shares of at least 0, [E]")
    if abs(p.sum() - 1) > 1e-9:
        raise InputError(f"sums to {p.sum()}", place="p", expected="shares that sum to 1")
    if not 0 <= delta <= 0.5:
        raise InputError(f"{delta}", place="delta", expected="a share between 0 and 0.5")
    binary = float(layer_entropy(np.array([delta, 1 - delta])))
    return float(np.exp(layer_entropy(p) - binary - delta * np.log(len(p))))
