"""Measuring the times that the simulator reads, on the machinery that they are times of.

One server measures while the others idle and answer. What a step with local experts alone takes
beyond the experts' own time is the dense part. What a step with all experts on one other server
takes beyond that grows with the payload: between the two largest ones the slope is the line rate.
Then tokens call experts at random, here and on all other servers, layer after layer, as requests
do: the overhead of a call is the one with which section 4's rules give these steps' mean time.
Where long messages take longer than rate and overhead account for, less of them passes unshaped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq

from prism_plan.cluster import Cluster
from prism_plan.model import ModelSpec
from prism_plan.placement import Placement, SolveReport, gpu_offsets
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.timing import Timing, timing
from runtime_adapter.moe.dispatch import Dispatcher
from runtime_adapter.transport.messages import HEADER_BYTES
from runtime_adapter.transport.send_queue import LONG_BYTES

#: Tokens of the steps that are measured.
TOKENS = (1, 2, 8, 32, 128, 512)
#: Every kind of step is measured in each of so many rounds, so that a spell in which the machine
#: is slow falls on all alike; the median round counts.
ROUNDS = 9
#: Steps of each kind in a round, of those of more than 32 tokens, and of those at random.
REPEATS, LONG_REPEATS, SPREAD_REPEATS = 20, 3, 150


def calibration_placement(cluster: Cluster, model: ModelSpec) -> Placement:
    """The first server holds experts 0 to K-1 of each layer, the second K to 2K-1, and so on."""
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
        plan=SolveReport(solver="calibration"),
    )


@dataclass(frozen=True, eq=False)
class Measured:
    """Seconds of a step of one layer by tokens: all local, and all on the second server.

    ``spread_s`` is the mean of steps of one token whose experts are anywhere, ``spread`` int
    [steps, N] how many experts of each such step were on each server.
    """

    local_s: dict[int, float]
    remote_s: dict[int, float]
    spread_s: float
    spread: npt.NDArray[np.int64]


def measure(dispatcher: Dispatcher, model: ModelSpec, width: int, seed: int = 0) -> Measured:
    """Time steps of one layer on an idle cluster."""
    rng = np.random.default_rng(seed)
    servers = len(dispatcher.router.table.servers)
    holder = np.arange(model.num_experts) // model.top_k % servers
    own = {kind: np.flatnonzero(holder == n) for n, kind in enumerate(("local", "remote"))}
    found: dict[tuple[str, int], list[float]] = {}
    at = []
    for _ in range(ROUNDS):
        for kind, ids in own.items():
            for tokens in TOKENS:
                steps = rng.permuted(
                    np.tile(ids, (REPEATS if tokens <= 32 else LONG_REPEATS, 1)), axis=1
                )
                rows = np.repeat(steps[:, None, : model.top_k], tokens, axis=1)
                found.setdefault((kind, tokens), []).append(_mean_s(dispatcher, rows, width))
        every = np.tile(np.arange(model.num_experts), (SPREAD_REPEATS, 1))
        rows = rng.permuted(every, axis=1)[:, None, : model.top_k]
        found.setdefault(("spread", 1), []).append(_mean_s(dispatcher, rows, width))
        at.append(holder[rows[:, 0]])
    where = np.concatenate(at)
    return Measured(
        {tokens: median(found["local", tokens]) for tokens in TOKENS},
        {tokens: median(found["remote", tokens]) for tokens in TOKENS},
        median(found["spread", 1]),
        np.stack([(where == n).sum(axis=1) for n in range(servers)], axis=1),
    )


def _mean_s(dispatcher: Dispatcher, rows: npt.NDArray[np.int64], width: int) -> float:
    """Of a step of [steps, T, K], layer after layer; one before that is not counted."""
    times = []
    for layer, experts in enumerate([rows[0], *rows]):
        begin_s = time.perf_counter()
        one_layer(dispatcher, layer % dispatcher.model.num_layers, experts, width)
        times.append(time.perf_counter() - begin_s)
    return fmean(times[1:])


def one_layer(dispatcher: Dispatcher, layer: int, experts: Any, width: int) -> None:
    """Dense part and experts [T, K] of a layer."""
    tokens, top_k = experts.shape
    hidden = torch.zeros((tokens, width), dtype=torch.uint8)
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    dispatcher.compute.dense(tokens)
    dispatcher.run(layer, hidden, experts, weights)


def calibration(
    measured: Measured, cluster: Cluster, model: ModelSpec, rtt_s: float
) -> dict[str, Any]:
    """The values of a calibration file (see :mod:`prism_plan.io.calibration`)."""
    table = timing(cluster, model, max(TOKENS))
    first_gpu = gpu_offsets(len(server.gpus) for server in cluster.servers)[:-1].tolist()
    token_bytes = model.hidden_size * model.dtype_bytes
    local = {t: _experts_s(table, model, t, 0) for t in TOKENS}
    dense_s = {t: max(measured.local_s[t] - local[t], 0.0) for t in TOKENS}
    # what a remote step takes beyond dense part and experts, against the bytes that it sends
    away = np.array(
        [
            measured.remote_s[t] - dense_s[t] - _experts_s(table, model, t, first_gpu[1])
            for t in TOKENS
        ]
    )
    sent = np.array(
        [2 * (t * token_bytes + HEADER_BYTES) + BYTES_PER_CALL * t * model.top_k for t in TOKENS],
        np.float64,
    )
    # of each message so much may pass the lines' token buckets at once
    slope = max(float(away[-1] - away[-2]) / float(sent[-1] - sent[-2]), 1e-12)
    burst = cluster.link.burst_kb * 1e3
    spread = measured.spread
    one_s = table.expert_s[table.kind[first_gpu], table.size[0], 1]
    calls = spread[:, 1:]
    out = token_bytes + HEADER_BYTES + BYTES_PER_CALL * calls
    back = token_bytes + HEADER_BYTES
    wire_s = slope * (np.maximum(out - burst, 0.0) + max(back - burst, 0.0))
    others_s = np.where(calls > 0, wire_s + rtt_s + calls * one_s[1:], -np.inf)
    own_s = spread[:, 0] * one_s[0]
    wanted_s = measured.spread_s - dense_s[1]

    def too_long_s(overhead_s: float) -> float:
        slowest = np.maximum(own_s, (others_s + overhead_s).max(axis=1))
        return float(slowest.mean()) - wanted_s

    overhead_s = 0.0
    if too_long_s(0.0) < 0:
        overhead_s = float(brentq(too_long_s, 0.0, 2 * wanted_s))
    # a long message takes longer than rate and overhead say: then less of it passes unshaped
    late_s = float(away[-1]) - overhead_s - rtt_s - slope * (float(sent[-1]) - 2 * burst)
    measured_burst = min(max(burst - late_s / (2 * slope), 0.0), burst)
    gpus = []
    for n, server in enumerate(cluster.servers):
        curves = []
        for g in range(len(server.gpus)):
            kind = table.kind[first_gpu[n] + g]
            experts_ms = [[t, 1e3 * float(table.expert_s[kind, 0, t])] for t in TOKENS]
            own_s = table.dense_s[kind] - table.dense_s[table.kind[0]]
            dense_ms = [[t, 1e3 * max(dense_s[t] + float(own_s[t]), 0.0)] for t in TOKENS]
            curves.append({"dense_ms": dense_ms, "expert_ms": experts_ms})
        gpus.append({"name": server.name, "gpus": curves})
    return {
        "format": "prism-plan/calibration",
        "version": 1,
        "call_overhead_ms": 1e3 * overhead_s,
        "rtt_ms": 1e3 * rtt_s,
        "burst_kb": measured_burst / 1e3,
        "short_kb": LONG_BYTES / 1e3,  # what the runtime lets pass by
        "bandwidth_mbps": 8e-6 / slope,
        "servers": gpus,
        "provenance": {
            "local_ms": {str(t): 1e3 * s for t, s in measured.local_s.items()},
            "remote_ms": {str(t): 1e3 * s for t, s in measured.remote_s.items()},
            "spread_ms": 1e3 * measured.spread_s,
        },
    }


def averaged(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of calibrations of one cluster, for a machine that is not equally fast all day."""

    def mean(found: Sequence[Any]) -> Any:
        first = found[0]
        if isinstance(first, dict):
            return {key: mean([one[key] for one in found]) for key in first}
        if isinstance(first, list):
            return [mean(ones) for ones in zip(*found, strict=True)]
        return fmean(found) if isinstance(first, float) else first

    values: dict[str, Any] = mean(measured)
    return values


def _experts_s(table: Timing, model: ModelSpec, tokens: int, gpu: int) -> float:
    """Seconds of top-k experts with that many tokens each, on one GPU."""
    kind = table.kind[gpu]
    return model.top_k * float(table.expert_s[kind, table.size[0], tokens])
