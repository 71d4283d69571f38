"""Compile what solving and simulating compile at their first use, by doing both on an example."""

from __future__ import annotations

import dataclasses
import tempfile

import numpy as np

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.instance import Instance
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.latency.idle_time import MeanRequest
from prism_plan.model_spec import ModelSpec
from prism_plan.objective import step_score
from prism_plan.simulate.sampling import sample_requests
from prism_plan.solvers import solve
from prism_plan.solvers.pipeline_order import MAX_EXACT, best_pipeline
from prism_plan.token_rates import expected_token_rates
from prism_plan.trace import TokenBatch, Trace, trace_from_batches


def compile_kernels() -> None:
    """Read, solve with a table, score and simulate a small example: all kernels are compiled."""
    written, cluster = _example()
    with tempfile.TemporaryDirectory() as folder:
        write_trace(f"{folder}/example.parquet", written)
        trace = read_trace(f"{folder}/example.parquet")
        _use(trace, cluster)


def _use(trace: Trace, cluster: Cluster) -> None:
    instance = Instance.build(trace, cluster)
    placement = solve(instance, "exact+paths")
    step_score(placement.local, trace, expected_token_rates(trace, cluster))
    requests = sample_requests(trace, cluster, requests_per_server=1)
    simulate_placements([("example", placement)], requests, trace, cluster)
    for servers in (1, MAX_EXACT + 1):  # every order, and the local search
        links = np.zeros((servers, servers))
        request = MeanRequest(np.zeros((1, servers)), links, np.zeros(servers), links)
        best_pipeline(request, np.ones((servers, 1), np.int64))
    pair = dataclasses.replace(cluster.servers[0], gpus=(Gpu(slots=4), Gpu(slots=4)))
    whole = dataclasses.replace(cluster, servers=(pair, cluster.servers[1]))
    solve(Instance.build(trace, whole), "latency")


def _example() -> tuple[Trace, Cluster]:
    """Two requests of two tokens, and two servers that hold half of the experts each."""
    model = ModelSpec(
        name="example", moe_layers=(0,), num_experts=4, top_k=2, hidden_size=8, dtype_bytes=2,
        expert_bytes=8, dense_bytes=8, kv_bytes_per_token=0,
    )  # fmt: skip
    batch = TokenBatch(
        request=np.array([0, 0, 1, 1], np.int32),
        position=np.array([0, 1, 0, 1], np.int32),
        phase=np.array([0, 1, 0, 1], np.int8),
        task=np.zeros(4, np.int32),
        experts=np.array([[[0, 1]], [[2, 3]], [[0, 2]], [[1, 3]]], np.uint16),
        weights=None,
    )
    servers = tuple(
        Server(name, (Gpu(slots=2),), tasks={"example": 1.0}, arrival_interval_s=1.0)
        for name in ("a", "b")
    )
    return trace_from_batches(model, ["example"], [batch]), Cluster("c", servers)
