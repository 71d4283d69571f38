"""Random small instances in which compute costs nothing: hops and calls alone make the idle time.

Each number is an instance of its own, the same on every machine. Servers have unequal slots, users
with mixes of tasks, and links that are all alike or unequal by pair. Popularity of experts is
skewed and differs by task. The cluster gives ``weight`` and no arrival rates, so that solvers plan
it as idle: no queue is part of the measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import DECODE_PHASE, PREFILL_PHASE, TokenBatch, Trace, trace_from_batches

#: Recorded requests of each task, and the fewest and most decode steps of one.
REQUESTS, DECODE_STEPS = 3, (6, 20)
#: Slots of all servers, as a multiple of the (layer, expert) pairs.
LEAST_SLOTS, MOST_SLOTS = 1.05, 2.2
#: No server has slots for more than this share of the pairs: else it executes everything.
LARGEST_SHARE = 0.8
#: Instances of other draws are others: part of every seed.
SERIES = 16


@dataclass(frozen=True, eq=False)
class SmallInstance:
    """A trace and a cluster, by number."""

    number: int
    trace: Trace
    cluster: Cluster
    prefill_tokens: int
    equal_links: bool

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of each server, [N]."""
        return tuple(gpu.slots or 0 for server in self.cluster.servers for gpu in server.gpus)

    def problem(self) -> Instance:
        """The planning problem, as solvers get it."""
        return Instance.build(self.trace, self.cluster)

    def digest(self) -> str:
        """Changes with anything that the optimum depends on."""
        parts = [repr(self.trace.model), repr(self.cluster)]
        assert self.trace.batches is not None
        for batch in self.trace.batches():
            parts += [batch.experts.tobytes().hex(), repr(batch.phase.tolist()), repr(batch.task)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def draw(
    number: int, *, servers: int = 3, layers: int | None = None, experts: int = 8,
    decode_steps: tuple[int, int] = DECODE_STEPS,
) -> SmallInstance:  # fmt: skip
    """The instance of this number; ``layers`` 4 or 5 where they are not given."""
    rng = np.random.default_rng([SERIES, number])
    drawn_layers = int(rng.integers(4, 6))
    model = ModelSpec(
        f"small {number}",
        tuple(range(layers or drawn_layers)),
        num_experts=experts,
        top_k=1 if rng.random() < 0.2 else 2,
        expert_bytes=1,
        hidden_size=int(2 ** rng.integers(9, 14)),
        dtype_bytes=2,
        dense_bytes=0,
        kv_bytes_per_token=0,
    )
    prefill_tokens = int(rng.choice([0, 0, 2, 3]))
    equal_links = bool(rng.random() < 0.5)
    tasks = tuple(f"task {t}" for t in range(3))
    trace = trace_from_batches(
        model, tasks, _requests(rng, model, len(tasks), prefill_tokens, decode_steps)
    )
    return SmallInstance(
        number, trace, _cluster(rng, model, tasks, servers, equal_links), prefill_tokens,
        equal_links,
    )  # fmt: skip


def _requests(
    rng: np.random.Generator, model: ModelSpec, tasks: int, prefill_tokens: int,
    decode_steps: tuple[int, int],
) -> Iterator[TokenBatch]:  # fmt: skip
    """Requests of each task: popularity by layer, of it the task's own, of that the request's."""
    shape = (model.num_layers, model.num_experts)
    skew = float(np.exp(rng.uniform(np.log(1), np.log(10))))
    popularity = rng.dirichlet(np.full(shape[1], skew), shape[0])
    likeness = float(np.exp(rng.uniform(np.log(5), np.log(100))))
    for task in range(tasks):
        own = np.array([rng.dirichlet(likeness * p + 0.05) for p in popularity])
        for request in range(REQUESTS):
            steps = int(rng.integers(decode_steps[0], decode_steps[1] + 1))
            rows = prefill_tokens + steps
            logits = np.log(own + 1e-4) + rng.normal(0, 0.3, shape)
            noisy = logits + rng.gumbel(size=(rows, *shape))
            yield TokenBatch(
                request=np.full(rows, task * REQUESTS + request, np.int32),
                position=np.arange(rows, dtype=np.int32),
                phase=np.repeat([PREFILL_PHASE, DECODE_PHASE], [prefill_tokens, steps]).astype(
                    np.int8
                ),
                task=np.full(rows, task, np.int32),
                experts=np.argsort(-noisy, axis=2)[:, :, : model.top_k].astype(np.uint16),
            )


def _cluster(
    rng: np.random.Generator, model: ModelSpec, tasks: tuple[str, ...], servers: int,
    equal_links: bool,
) -> Cluster:  # fmt: skip
    """Servers of one GPU that takes no time; one of ten without users."""
    mixes = rng.dirichlet(np.full(len(tasks), np.exp(rng.uniform(np.log(0.1), np.log(3)))), servers)
    weights = np.exp(rng.normal(0, 0.6, servers))
    idle_one = int(rng.integers(servers)) if rng.random() < 0.1 else -1
    made = []
    for n, slots in enumerate(_slots(rng, model.num_pairs, servers).tolist()):
        shares = np.round(mixes[n], 3)
        shares[shares.argmax()] = round(float(shares.max() + 1 - shares.sum()), 3)
        gpu = Gpu(slots=slots, memory_bandwidth_gbs=1e9, tflops=1e9, launch_overhead_us=0.0)
        users = {} if n == idle_one else dict(zip(tasks, shares.tolist(), strict=True))
        made.append(Server(f"s{n}", (gpu,), tasks=users, weight=round(float(weights[n]), 3)))

    def between(low: float, high: float) -> float:
        return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.3g}")

    link = Link(
        bandwidth_mbps=between(50, 5000), rtt_ms=between(0.1, 10),
        call_overhead_ms=between(0.02, 0.5),
    )  # fmt: skip
    pairs = [] if equal_links else [(a, b) for b in range(servers) for a in range(b)]
    unequal = tuple(
        PairLink(
            a,
            b,
            round(link.bandwidth_mbps * between(0.2, 1), 2),
            round(link.rtt_ms * between(0.3, 3), 4),
        )
        for a, b in pairs
    )
    return Cluster("small", tuple(made), link, unequal)


def _slots(rng: np.random.Generator, pairs: int, servers: int) -> npt.NDArray[np.int64]:
    """Unequal slots that hold every pair, none of them :data:`LARGEST_SHARE` of the pairs."""
    total = rng.uniform(LEAST_SLOTS, min(MOST_SLOTS, 0.95 * LARGEST_SHARE * servers)) * pairs
    while True:
        slots = np.rint(total * rng.dirichlet(np.full(servers, 8.0))).astype(np.int64)
        large_enough = slots.min() >= 1 and slots.sum() >= LEAST_SLOTS * pairs
        if large_enough and slots.max() <= LARGEST_SHARE * pairs:
            return slots
