"""Placements for migration tests, and referees that know nothing of how plans are made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration_step import MigrationStep
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport


def placed(
    held: Sequence[Sequence[int]] | np.ndarray,
    slots: Sequence[int],
    *,
    pairs: int,
    gpus: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Placement:
    """A placement from the pairs that each GPU holds; servers of one GPU unless ``gpus`` says so.

    One layer of ``pairs`` experts, or with ``sizes`` a layer of one expert of each size.
    """
    gpus = [1] * len(slots) if gpus is None else gpus
    names = [f"s{n}" for n in range(len(gpus))] if names is None else names
    on_gpu = np.zeros((len(slots), pairs), bool)
    for g, own in enumerate(held):
        on_gpu[g, list(own)] = True
    if sizes is None:
        model = ModelShape("m", (3,), pairs, 1, 10)
    else:
        model = ModelShape("m", tuple(range(pairs)), 1, 1, tuple(sizes))
    ends = list(itertools.accumulate(gpus))
    capacity = tuple(tuple(slots[end - n : end]) for n, end in zip(gpus, ends, strict=True))
    shape = (len(slots), model.num_layers, model.num_experts)
    return Placement(model, tuple(names), capacity, on_gpu.reshape(shape), SolveReport("hand"))


def flat(placement: Placement) -> np.ndarray:
    """Who holds what, bool [G, J]."""
    return placement.on_gpu.reshape(len(placement.on_gpu), -1)


def sizes_of(placement: Placement) -> np.ndarray:
    """What each pair takes of a capacity, [J]."""
    model = placement.model
    if model.equal_expert_bytes:
        return np.ones(model.num_pairs, int)
    return np.repeat(model.expert_bytes_by_layer, model.num_experts)


def capacities(placement: Placement) -> np.ndarray:
    """Of all GPUs in order, [G]."""
    return np.array([cap for caps in placement.gpu_capacity for cap in caps])


def trouble_at(
    steps: Sequence[MigrationStep], done: frozenset[int], a: Placement, b: Placement
) -> str | None:
    """What is wrong when exactly ``done`` is complete and every load that could run is running."""
    held = flat(a).astype(int)
    for index in done:
        held[steps[index].gpu, steps[index].pair] += 1 if steps[index].kind == "load" else -1
    if held.min() < 0 or held.max() > 1:
        return f"after {sorted(done)}: dropped or loaded twice"
    if (flat(a).any(axis=0) & ~held.any(axis=0)).any():
        return f"after {sorted(done)}: an expert has no copy"
    for index, step in enumerate(steps):
        if step.kind == "load" and index not in done and done.issuperset(step.needs):
            held[step.gpu, step.pair] += 1
    if held.max() > 1:
        return f"after {sorted(done)}: loads what is there"
    if (held @ sizes_of(a) > capacities(b)).any():
        return f"after {sorted(done)}: a GPU is over its capacity"
    if len(done) == len(steps) and (held != flat(b)).any():
        return "the end is not the target"
    return None


def every_stage(plan: MigrationPlan, most: int) -> Iterator[frozenset[int]]:
    """All sets of steps that can be complete at some moment, up to ``most`` of them."""
    seen = {frozenset[int]()}
    stack = list(seen)
    while stack and len(seen) < most:
        done = stack.pop()
        yield done
        for index, step in enumerate(plan.steps):
            if index not in done and done.issuperset(step.needs):
                more = done | {index}
                if more not in seen:
                    seen.add(more)
                    stack.append(more)
    yield from stack


def random_extension(plan: MigrationPlan, rng: np.random.Generator) -> list[int]:
    """A random order of the steps that respects their needs."""
    missing = [len(step.needs) for step in plan.steps]
    ready = [index for index, count in enumerate(missing) if not count]
    order = []
    while ready:
        index = ready.pop(int(rng.integers(len(ready))))
        order.append(index)
        for later, step in enumerate(plan.steps):
            if index in step.needs:
                missing[later] -= 1
                if not missing[later]:
                    ready.append(later)
    return order


def can_move(
    a: Placement, b: Placement, forbidden: np.ndarray | None = None, most: int = 200_000
) -> bool:
    """Whether there is any order from ``a`` to ``b``: breadth first over all states.

    ``forbidden`` [G, J] keeps loads away, but for those of the target.
    """
    start, goal = flat(a), flat(b)
    cap, size = capacities(b), sizes_of(a)
    covered = start.any(axis=0)
    barred = np.zeros_like(goal) if forbidden is None else forbidden & ~goal
    seen = {start.tobytes()}
    layer = [start]
    while layer:
        following = []
        for held in layer:
            if (held == goal).all():
                return True
            room = cap - held @ size
            for g, j in np.ndindex(*held.shape):
                if held[g, j]:
                    legal = held[:, j].sum() > 1 or not covered[j]
                else:
                    legal = room[g] >= size[j] and not barred[g, j]
                if legal:
                    other = held.copy()
                    other[g, j] ^= True
                    if other.tobytes() not in seen:
                        seen.add(other.tobytes())
                        following.append(other)
        layer = following
        if len(seen) > most:
            raise AssertionError("too many states for a referee")
    return False
