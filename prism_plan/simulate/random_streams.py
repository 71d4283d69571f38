"""One random stream for each source of chance and server, all from one seed."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Source(IntEnum):
    """What a stream decides. The numbers are part of what a seed means: never reuse one."""

    ARRIVALS = 0
    TASKS = 1
    PROMPTS = 2
    DRAWING = 3


def stream(seed: int, source: Source, *key: int) -> np.random.Generator:
    """The generator of ``source`` for the server (or task and prompt) that ``key`` names.

    Streams do not depend on each other: whatever is drawn from one leaves the others as they are.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(source), *key)))
