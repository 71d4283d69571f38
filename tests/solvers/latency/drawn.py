"""Random small clusters, traces and plans for the tests of ``latency``."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport, server_of_gpu
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.trace import Trace
from tests.profiling.synthetic import synthetic_trace
from tests.solvers.test_paths import a_model


def drawn_model(rng: np.random.Generator, layers: int, experts: int, **changes: Any) -> ModelSpec:
    """A model whose attention may cost much or nothing, and whose decoder layers are unequal."""
    values: dict[str, Any] = {
        "attention_flops": int(rng.choice([0, 10**5, 10**8])),
        "kv_bytes_per_token": int(rng.choice([0, 2000, 10**6])),
        "num_decoder_layers": layers + 1 + int(rng.integers(0, 3)),
        **changes,
    }
    return a_model(layers, experts, **values)


def drawn_trace(rng: np.random.Generator, model: ModelSpec) -> Trace:
    """Requests of two tasks: with a prompt and steps, without a prompt, or without steps."""
    prompt, decode = [(5, 3), (0, 4), (6, 0), (1, 1), (3, 20)][int(rng.integers(5))]
    return synthetic_trace(
        model, ["x", "y"], requests=4, prompt_tokens=prompt, decode_tokens=decode,
        seed=int(rng.integers(1000)),
    )  # fmt: skip


def drawn_cluster(rng: np.random.Generator, servers: int, pairs: int, **changes: Any) -> Cluster:
    """Servers of 1 to 3 unequal GPUs, unequal ports and pairs; one may be without users.

    Together they hold all of so many ``pairs`` of layer and expert, and often little more.
    """
    room = rng.multinomial(int(pairs * rng.choice([1.0, 1.2, 2.5])), rng.dirichlet([1.0] * servers))
    room[0] += max(pairs - int(room.sum()), 0)
    made = []
    for n in range(servers):
        number = int(rng.integers(1, 4))
        slots = rng.multinomial(int(room[n]), rng.dirichlet([1.0] * number))
        gpus = tuple(
            Gpu(
                slots=int(own),
                memory_bandwidth_gbs=float(10 ** rng.uniform(0, 2)),
                tflops=float(10 ** rng.uniform(-1, 1)),
                launch_overhead_us=float(rng.choice([0.0, 20.0])),
            )
            for own in slots
        )
        users = {"x": 0.5, "y": 0.5} if rng.random() < 0.3 else {"xy"[n % 2]: 1.0}
        made.append(
            Server(
                f"s{n}",
                gpus,
                tasks=users if n == 0 or rng.random() < 0.8 else {},
                arrival_interval_s=float(rng.uniform(1, 1e3)),
                uplink_mbps=float(10 ** rng.uniform(1, 4)),
                execute_at_home=bool(rng.random() < 0.15),
                **changes,
            )
        )
    links = tuple(
        PairLink(
            a, b, bandwidth_mbps=float(10 ** rng.uniform(1, 4)), rtt_ms=float(rng.choice([0.01, 5]))
        )
        for a, b in itertools.combinations(range(servers), 2)
        if rng.random() < 0.5
    )  # fmt: skip
    overhead_ms = float(rng.choice([0.0, 0.2, 2.0]))
    link = Link(
        bandwidth_mbps=float(10 ** rng.uniform(2, 4)), rtt_ms=float(rng.choice([0.0, 1.0, 10.0])),
        call_overhead_ms=overhead_ms,
        hop_overhead_ms=None if rng.random() < 0.5 else float(rng.choice([0.0, 1.0])),
    )  # fmt: skip
    return Cluster("c", tuple(made), link, links)


def in_bytes(cluster: Cluster, model: ModelSpec) -> Cluster:
    """The cluster with memory for as many of the largest experts as it has slots."""
    largest = max(model.expert_bytes_by_layer)
    servers = []
    for server in cluster.servers:
        gpus = []
        for g, gpu in enumerate(server.gpus):
            dense = model.dense_bytes if g == server.dense_gpu else 0
            memory = (gpu.slots or 0) * largest + dense
            gpus.append(dataclasses.replace(gpu, slots=None, memory_bytes=memory))
        servers.append(dataclasses.replace(server, gpus=tuple(gpus)))
    return dataclasses.replace(cluster, servers=tuple(servers))


def with_unequal_sizes(rng: np.random.Generator, model: ModelSpec) -> ModelSpec:
    """The model with experts of 1 to 3 MB, by layer."""
    sizes = rng.integers(1, 4, model.num_layers) * 10**6
    return dataclasses.replace(model, expert_bytes=tuple(int(size) for size in sizes))


def counts_of(trace: Trace) -> Trace:
    """The trace as one that has counts alone."""
    return Trace(trace.model, trace.tasks, trace.counts, trace.tokens, name=trace.name)


def problem_of(trace: Trace, cluster: Cluster, **changes: Any) -> LatencyProblem:
    """The problem of a cluster, memory for KV caches not taken off."""
    instance = Instance.build(trace, cluster, reserve_kv=False, **changes)
    return LatencyProblem(instance, cluster, trace, seed=0)


def planned(problem: LatencyProblem, on_gpu: np.ndarray, table: np.ndarray) -> Placement:
    """A plan of these experts and this table, within the capacities of the instance."""
    instance = problem.instance
    return Placement(
        instance.model, instance.servers, instance.gpu_capacity, on_gpu, SolveReport("drawn"),
        execution=table.astype(np.int32),
    )  # fmt: skip


def idle_s(problem: LatencyProblem, plan: Placement) -> float:
    """Expected seconds of requests on their own: work, hops and calls, no waiting."""
    expected = problem.expected(plan)
    return float(sum(expected.by_part[name] for name in ("compute", "attention", "hops", "calls")))


def drawn_table(rng: np.random.Generator, problem: LatencyProblem) -> np.ndarray:
    """Any table, or one of few spans; homes that execute at home do."""
    servers, layers = problem.instance.num_servers, problem.model.num_layers
    table = rng.integers(0, servers, (servers, layers))
    if rng.random() < 0.5:
        table[:] = table[:, :1]
        if rng.random() < 0.5:
            table[:, int(rng.integers(layers)) :] = int(rng.integers(servers))
    return np.where(problem.at_home[:, None], np.arange(servers)[:, None], table)


def drawn_experts(rng: np.random.Generator, problem: LatencyProblem) -> np.ndarray:
    """Each expert on a GPU with room, and the rest of memory filled at random, bool [G, L, E]."""
    instance, model = problem.instance, problem.model
    size = np.repeat(instance.expert_size, model.num_experts)
    free = np.array([room for gpus in instance.gpu_capacity for room in gpus])
    owner = server_of_gpu(instance.gpu_capacity)
    held = np.zeros((len(free), len(size)), bool)
    first = rng.permutation(len(size)) if rng.random() < 0.5 else np.arange(len(size))
    for pair in [*first.tolist(), *rng.permutation(np.repeat(np.arange(len(size)), len(free)))]:
        holders = held[:, pair]
        fits = (free >= size[pair]) & ~np.isin(owner, owner[holders])
        if fits.any():
            gpu = int(rng.choice(np.flatnonzero(fits)))
            held[gpu, pair] = True
            free[gpu] -= size[pair]
    return held.reshape(-1, model.num_layers, model.num_experts)


def with_slots(cluster: Cluster, slots: list[list[int]]) -> Cluster:
    """The cluster with these slots of its GPUs."""
    servers = tuple(
        dataclasses.replace(
            server,
            gpus=tuple(
                dataclasses.replace(gpu, slots=own)
                for gpu, own in zip(server.gpus, gpus, strict=True)
            ),
        )
        for server, gpus in zip(cluster.servers, slots, strict=True)
    )
    return dataclasses.replace(cluster, servers=servers)
