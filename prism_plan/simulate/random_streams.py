"""Random generators of the simulator, one for each source of randomness and server.

This is the one place where ``--seed`` (``seed`` of :func:`prism_plan.sample_requests`) becomes
generators; every random choice of arrivals, tasks, prompts and drawn tokens takes its own here.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class RandomSource(IntEnum):
    """What a generator decides. The numbers are part of what a seed means: never reuse one."""

    ARRIVALS = 0
    TASKS = 1
    PROMPTS = 2
    DRAWING = 3


def random_stream(seed: int, source: RandomSource, *key: int) -> np.random.Generator:
    """The generator of ``source`` for the server (or task and prompt) that ``key`` names.

    Streams are independent: what is drawn from one does not change the others.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(source), *key)))
