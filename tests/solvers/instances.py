"""Random small instances for the solver tests."""

from __future__ import annotations

import numpy as np

from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape


def random_instance(
    rng: np.random.Generator, max_bits: int = 12, *, rules: bool = False, ties: bool | None = None
) -> Instance:
    """N·L·E of at most ``max_bits``; tied and zero activations, full servers, empty servers."""
    while True:
        servers, layers, experts = (int(rng.integers(1, 5)) for _ in range(3))
        if servers * layers * experts <= max_bits:
            break
    pairs = layers * experts
    shape = (servers, layers, experts)
    if ties if ties is not None else rng.random() < 0.5:
        activations = rng.integers(0, 4, shape).astype(float)
    else:
        activations = rng.gamma(0.5, size=shape)
        activations[rng.random(shape) < 0.2] = 0.0
    if rng.random() < 0.2:
        activations[rng.integers(servers)] = 0.0
    capacity = []
    for _ in range(servers):
        kind = rng.random()
        slots = 0 if kind < 0.15 else pairs + 1 if kind < 0.3 else int(rng.integers(1, pairs + 1))
        split = int(rng.integers(0, slots + 1))
        capacity.append((slots,) if rng.random() < 0.5 else (split, slots - split))
    names = tuple(f"s{n}" for n in range(servers))
    model = ModelShape("random", tuple(range(1, layers + 1)), experts, 1, 100)
    instance = Instance(model, names, activations, tuple(capacity))
    if not rules:
        return instance
    triples = [tuple(map(int, t)) for t in np.argwhere(rng.random(shape) < 0.15)]
    cut = int(rng.integers(0, len(triples) + 1))
    caps = tuple(
        int(rng.integers(0, experts + 1)) if rng.random() < 0.5 else None for _ in range(servers)
    )
    return instance.replace(
        min_replicas=int(rng.integers(1, min(servers, 3) + 1)),
        pinned=tuple(triples[:cut]),
        forbidden=tuple(triples[cut:]),
        layer_caps=caps,
    )
