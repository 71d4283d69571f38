"""Random generators, the one place where ``--seed`` enters: every random choice takes its own here.

Solvers, the split of a trace and calibration draw from one generator of the seed; the simulator has
one for each source of randomness and server, so that all placements see the same requests.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class RandomSource(IntEnum):
    """What a generator decides; never reuse a number, which is part of a seed."""

    ARRIVALS = 0
    TASKS = 1
    PROMPTS = 2
    DRAWING = 3
    BOOTSTRAP = 4


def random_generator(seed: int) -> np.random.Generator:
    """The generator of a seed."""
    return np.random.default_rng(seed)


def random_stream(seed: int, source: RandomSource, *key: int) -> np.random.Generator:
    """The generator of ``source`` for the server (or task and prompt) that ``key`` names.

    Streams are independent: what is drawn from one does not change the others.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(source), *key)))
