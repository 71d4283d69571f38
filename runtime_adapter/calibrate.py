"""Measuring the times that the simulator reads, on the machinery that they are times of.

One server measures while the others idle and answer. Its steps are made up: all experts of a step
are local, or all are on one other server. What a step takes beyond the experts' own time is the
dense part; what a remote step takes beyond a local one grows with the payload: between the largest
ones the slope is the line rate, and the rest of the smallest is the overhead of a call.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from prism_plan.cluster import Cluster
from prism_plan.model import ModelSpec
from prism_plan.placement import Placement, Plan
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.timing import Timing, timing
from runtime_adapter.dispatch import Dispatcher
from runtime_adapter.wire import HEADER_BYTES

#: Tokens of the steps that are measured.
TOKENS = (1, 2, 8, 32, 128, 512)
#: Steps of each kind; more of the short ones.
REPEATS = 40


def calibration_placement(cluster: Cluster, model: ModelSpec) -> Placement:
    """The first server holds experts 0 to K-1 of the first layer, the second K to 2K-1, and so on.

    Layers are shared out whole beyond the first, so that every expert is somewhere.
    """
    capacity = tuple(tuple(model.num_pairs for _ in server.gpus) for server in cluster.servers)
    on_gpu = np.zeros((sum(map(len, capacity)), model.num_layers, model.num_experts), bool)
    first = 0
    for n, gpus in enumerate(capacity):
        mine = np.arange(model.num_experts) // model.top_k % len(capacity) == n
        on_gpu[first, :, mine] = True
        first += len(gpus)
    return Placement(
        model=model.shape(),
        servers=tuple(server.name for server in cluster.servers),
        gpu_capacity=capacity,
        on_gpu=on_gpu,
        plan=Plan(solver="calibration"),
    )


@dataclass(frozen=True)
class Measured:
    """Median seconds of a step by tokens: all local, and all on the second server."""

    local_s: dict[int, float]
    remote_s: dict[int, float]


def measure(dispatcher: Dispatcher, model: ModelSpec, width: int) -> Measured:
    """Time steps of one layer on an idle cluster."""
    found: dict[str, dict[int, float]] = {"local": {}, "remote": {}}
    for kind, first in (("local", 0), ("remote", model.top_k)):
        for tokens in TOKENS:
            experts = np.tile(np.arange(first, first + model.top_k), (tokens, 1))
            times = []
            for _ in range(REPEATS if tokens <= 32 else REPEATS // 4):
                begin_s = time.perf_counter()
                one_layer(dispatcher, experts, width)
                times.append(time.perf_counter() - begin_s)
            found[kind][tokens] = median(times[1:])
    return Measured(found["local"], found["remote"])


def one_layer(dispatcher: Dispatcher, experts: Any, width: int) -> None:
    """Dense part and experts [T, K] of the first layer."""
    tokens, top_k = experts.shape
    hidden = torch.zeros((tokens, width), dtype=torch.uint8)
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    dispatcher.compute.dense(tokens)
    dispatcher.run(0, hidden, experts, weights)


def calibration(
    measured: Measured, cluster: Cluster, model: ModelSpec, rtt_s: float
) -> dict[str, Any]:
    """The values of a calibration file (see :mod:`prism_plan.simulate.calibration_file`)."""
    table = timing(cluster, model, max(TOKENS))
    token_bytes = model.hidden_size * model.dtype_bytes
    local = {t: _experts_s(table, model, t, 0) for t in TOKENS}
    dense_s = {t: max(measured.local_s[t] - local[t], 0.0) for t in TOKENS}
    # what a remote step takes beyond dense part and experts, against the bytes that it sends
    away = np.array(
        [measured.remote_s[t] - dense_s[t] - _experts_s(table, model, t, 1) for t in TOKENS]
    )
    sent = np.array(
        [2 * (t * token_bytes + HEADER_BYTES) + BYTES_PER_CALL * t * model.top_k for t in TOKENS],
        np.float64,
    )
    slope, rest = _line(sent, away, 2 * cluster.link.burst_kb * 1e3)
    gpus = []
    for n, server in enumerate(cluster.servers):
        first = sum(len(s.gpus) for s in cluster.servers[:n])
        curves = []
        for g in range(len(server.gpus)):
            kind = table.kind[first + g]
            experts_ms = [[t, 1e3 * float(table.expert_s[kind, 0, t])] for t in TOKENS]
            own_s = table.dense_s[kind] - table.dense_s[table.kind[0]]
            dense_ms = [[t, 1e3 * max(dense_s[t] + float(own_s[t]), 0.0)] for t in TOKENS]
            curves.append({"dense_ms": dense_ms, "expert_ms": experts_ms})
        gpus.append({"name": server.name, "gpus": curves})
    return {
        "format": "prism-plan/calibration",
        "version": 1,
        "call_overhead_ms": 1e3 * max(rest - rtt_s, 0.0),
        "rtt_ms": 1e3 * rtt_s,
        "bandwidth_mbps": 8e-6 / slope,
        "servers": gpus,
        "provenance": {
            "local_ms": {str(t): 1e3 * s for t, s in measured.local_s.items()},
            "remote_ms": {str(t): 1e3 * s for t, s in measured.remote_s.items()},
        },
    }


def _experts_s(table: Timing, model: ModelSpec, tokens: int, server_gpu: int) -> float:
    """Seconds of top-k experts with that many tokens each, on one GPU."""
    kind = table.kind[min(server_gpu, len(table.kind) - 1)]
    return model.top_k * float(table.expert_s[kind, table.size[0], tokens])


def _line(sent: Any, away_s: Any, unshaped: float) -> tuple[float, float]:
    """Seconds per byte of the line, and of a call besides.

    Of every call ``unshaped`` bytes may pass the lines' token buckets at once, there and back, so
    the rate is the slope between the two largest.
    """
    slope = max(float(away_s[-1] - away_s[-2]) / float(sent[-1] - sent[-2]), 1e-12)
    return slope, float(away_s[0]) - slope * max(float(sent[0]) - unshaped, 0.0)
