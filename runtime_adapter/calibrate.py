"""Measures the times that the simulator reads, on the machinery that is simulated.

One server measures while the others idle and answer. What a step with local experts alone takes
beyond the experts' own time is the dense part. What a step with all experts on one other server
takes beyond that grows with the payload: the slope between the two largest ones is the line rate.
Then tokens call experts at random, here and on all other servers, layer after layer, as requests
do: the overhead of a call is the one with which the rules of docs/design.md, section 4, give the
mean time of these steps. If long messages take longer than rate and overhead explain, the burst
that passes unshaped is smaller. A request whose layers compute nothing, on two servers in turns,
tells what a hop costs.
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
from prism_plan.execution_table import Span
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement, SolveReport
from prism_plan.seeds import random_generator
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.timing import Timing, timing
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.spans.messages import HEADER_BYTES as SPAN_HEADER_BYTES
from runtime_adapter.spans.messages import Bytes, RequestSetup
from runtime_adapter.spans.path_requests import PathRequests
from runtime_adapter.spans.timed_spans import EmptyStates
from runtime_adapter.transport.send_queue import LONG_BYTES
from runtime_adapter.transport.wire_format import HEADER_BYTES

#: Tokens of the steps that are measured.
TOKENS = (1, 2, 8, 32, 128, 512)
#: Every kind of step is measured in each of so many rounds, so that a spell in which the machine
#: is slow affects all alike; the median round counts.
ROUNDS = 9
#: Steps of each kind in a round; of those of more than 32 tokens; of those at random.
REPEATS, LONG_REPEATS, RANDOM_REPEATS = 20, 3, 150
#: Passes between two servers in a round.
HOP_REPEATS = 200


def calibration_placement(cluster: Cluster, model: ModelSpec) -> Placement:
    """The first server holds experts 0 to K-1 of each layer, the second K to 2K-1, and so on."""
    capacity = tuple(tuple(model.num_pairs for _ in server.gpus) for server in cluster.servers)
    on_gpu = np.zeros((sum(map(len, capacity)), model.num_layers, model.num_experts), bool)
    first_gpu = 0
    for n, gpus in enumerate(capacity):
        on_gpu[first_gpu, :, _holders(len(capacity), model) == n] = True
        first_gpu += len(gpus)
    return Placement(
        model=model.shape(),
        servers=tuple(server.name for server in cluster.servers),
        gpu_capacity=capacity,
        on_gpu=on_gpu,
        plan=SolveReport(solver="calibration"),
    )


def _holders(num_servers: int, model: ModelSpec) -> npt.NDArray[np.int64]:
    """The server of each expert in a :func:`calibration_placement`, [E]."""
    return np.arange(model.num_experts) // model.top_k % num_servers


class EmptySpans:
    """A :class:`~runtime_adapter.spans.span_work.SpanWork` that computes nothing.

    ``width`` are the bytes of a token's hidden states.
    """

    def __init__(self, width: int) -> None:
        self._states = EmptyStates(width)

    def begin(self, setup: RequestSetup, span: Span) -> bool:
        """No state, but there."""
        return True

    def run(
        self, state: bool, lane: RemoteDispatcher, inputs: Bytes, past: int, tokens: int
    ) -> Bytes:
        """States of no value."""
        return self._states.of(tokens)

    def token(self, outputs: Any) -> int:
        """Any."""
        return 0

    def is_end(self, token: int) -> bool:
        """A request ends with its last pass."""
        return False


def measure_hops(paths: PathRequests, num_layers: int) -> float:
    """Seconds of a pass that has its hidden states and then its id sent, between two servers.

    It is the median, over :data:`ROUNDS` rounds, of a round's mean.
    """
    means = []
    for number in range(ROUNDS):
        path = (Span(0, 0, 0), Span(1, num_layers - 1, 1))
        setup = RequestSetup(number, path, HOP_REPEATS + 2, HOP_REPEATS + 3)
        times: list[float] = []

        def note(token: int, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        paths.run(0, setup, [0], note)
        means.append((times[-1] - times[1]) / (len(times) - 2))
    return median(means)


@dataclass(frozen=True, eq=False)
class Measured:
    """Seconds of a step of one layer by tokens: all local, and all on the second server.

    ``random_s`` is the mean of steps of one token whose experts are anywhere, ``random_calls`` int
    [steps, N] the number of experts of each such step on each server; ``pass_s`` is that of
    :func:`measure_hops`, where there are layers enough.
    """

    local_s: dict[int, float]
    remote_s: dict[int, float]
    random_s: float
    random_calls: npt.NDArray[np.int64]
    pass_s: float | None = None


def measure(lane: RemoteDispatcher, model: ModelSpec, width: int, seed: int = 0) -> Measured:
    """Measure how long a step through one layer takes, dense part included, on an idle cluster.

    ``lane`` is the first server's, on a :func:`calibration_placement`; ``width`` is the bytes of a
    hidden state. Steps go through all layers in turn and are of three kinds: experts all local or
    all on the second server, for each number of :data:`TOKENS`, and one token with random experts.
    Each time is the median, over :data:`ROUNDS` rounds, of a round's mean.
    """
    rng = random_generator(seed)
    num_servers = len(lane.router.expert_map.servers)
    holder = _holders(num_servers, model)
    experts_of = {kind: np.flatnonzero(holder == n) for n, kind in enumerate(("local", "remote"))}
    times: dict[tuple[str, int], list[float]] = {}
    random_holders = []
    for _ in range(ROUNDS):
        for kind, ids in experts_of.items():
            for tokens in TOKENS:
                steps = rng.permuted(
                    np.tile(ids, (REPEATS if tokens <= 32 else LONG_REPEATS, 1)), axis=1
                )
                rows = np.repeat(steps[:, None, : model.top_k], tokens, axis=1)
                times.setdefault((kind, tokens), []).append(_mean_s(lane, rows, width))
        all_experts = np.tile(np.arange(model.num_experts), (RANDOM_REPEATS, 1))
        rows = rng.permuted(all_experts, axis=1)[:, None, : model.top_k]
        times.setdefault(("random", 1), []).append(_mean_s(lane, rows, width))
        random_holders.append(holder[rows[:, 0]])
    servers = np.concatenate(random_holders)
    return Measured(
        {tokens: median(times["local", tokens]) for tokens in TOKENS},
        {tokens: median(times["remote", tokens]) for tokens in TOKENS},
        median(times["random", 1]),
        np.stack([(servers == n).sum(axis=1) for n in range(num_servers)], axis=1),
    )


def _mean_s(lane: RemoteDispatcher, rows: npt.NDArray[np.int64], width: int) -> float:
    """Mean of a step of [steps, T, K], layer after layer; one before that is not counted."""
    times = []
    for layer, experts in enumerate([rows[0], *rows]):
        begin_s = time.perf_counter()
        _run_layer(lane, layer % lane.model.num_layers, experts, width)
        times.append(time.perf_counter() - begin_s)
    return fmean(times[1:])


def _run_layer(lane: RemoteDispatcher, layer: int, experts: Any, width: int) -> None:
    """Run the dense part and the experts [T, K] of a layer."""
    tokens, top_k = experts.shape
    hidden = torch.zeros((tokens, width), dtype=torch.uint8)
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    lane.compute.dense(layer, tokens)
    lane.run(layer, hidden, experts, weights)


def calibration(
    measured: Measured, cluster: Cluster, model: ModelSpec, rtt_s: float
) -> dict[str, Any]:
    """The values of a calibration file (see :mod:`prism_plan.io.calibration`)."""
    table = timing(cluster, model, max(TOKENS))
    placement = calibration_placement(cluster, model)
    first_gpu = [int(placement.gpus_of(n)[0]) for n in range(placement.num_servers)]
    token_bytes = model.hidden_size * model.dtype_bytes
    local = {t: _experts_s(table, model, t, 0) for t in TOKENS}
    dense_s = {t: max(measured.local_s[t] - local[t], 0.0) for t in TOKENS}
    # what a remote step takes beyond dense part and experts, against the bytes that it sends
    remote_extra_s = np.array(
        [
            measured.remote_s[t] - dense_s[t] - _experts_s(table, model, t, first_gpu[1])
            for t in TOKENS
        ]
    )
    sent_bytes = np.array(
        [2 * (t * token_bytes + HEADER_BYTES) + BYTES_PER_CALL * t * model.top_k for t in TOKENS],
        np.float64,
    )
    slope = max(
        float(remote_extra_s[-1] - remote_extra_s[-2]) / float(sent_bytes[-1] - sent_bytes[-2]),
        1e-12,
    )
    # so much of each message may pass the lines' token buckets at once
    burst = cluster.link.burst_kb * 1e3
    one_s = table.expert_s[table.kind[first_gpu], table.size[0], 1]
    calls = measured.random_calls[:, 1:]
    out = token_bytes + HEADER_BYTES + BYTES_PER_CALL * calls
    back = token_bytes + HEADER_BYTES
    wire_s = slope * (np.maximum(out - burst, 0.0) + max(back - burst, 0.0))
    others_s = np.where(calls > 0, wire_s + rtt_s + calls * one_s[1:], -np.inf)
    own_s = measured.random_calls[:, 0] * one_s[0]
    measured_s = measured.random_s - dense_s[1]

    def excess_s(overhead_s: float) -> float:
        slowest = np.maximum(own_s, (others_s + overhead_s).max(axis=1))
        return float(slowest.mean()) - measured_s

    overhead_s = 0.0
    if excess_s(0.0) < 0:
        overhead_s = float(brentq(excess_s, 0.0, 2 * measured_s))
    # if a long message takes longer than rate and overhead explain, less of it passes unshaped
    late_s = (
        float(remote_extra_s[-1]) - overhead_s - rtt_s - slope * (float(sent_bytes[-1]) - 2 * burst)
    )
    measured_burst = min(max(burst - late_s / (2 * slope), 0.0), burst)
    hop_s = None
    if measured.pass_s is not None:
        line_s = slope * max(token_bytes + SPAN_HEADER_BYTES - burst, 0.0)
        hop_s = max((measured.pass_s - rtt_s - line_s) / 2, 0.0)  # states there, an id back
    gpus = []
    for n, server in enumerate(cluster.servers):
        curves = []
        for g in range(len(server.gpus)):
            kind = table.kind[first_gpu[n] + g]
            experts_ms = [[t, 1e3 * float(table.expert_s[kind, 0, t])] for t in TOKENS]
            dense_ms = [[t, 1e3 * max(dense_s[t] + _slower_s(table, kind, t), 0.0)] for t in TOKENS]
            curves.append({"dense_ms": dense_ms, "expert_ms": experts_ms})
        gpus.append({"name": server.name, "gpus": curves})
    return {
        "format": "prism-plan/calibration",
        "version": 1,
        "call_overhead_ms": 1e3 * overhead_s,
        **({} if hop_s is None else {"hop_overhead_ms": 1e3 * hop_s}),
        "rtt_ms": 1e3 * rtt_s,
        "burst_kb": measured_burst / 1e3,
        "short_kb": LONG_BYTES / 1e3,  # shorter messages are not queued
        "bandwidth_mbps": 8e-6 / slope,
        "servers": gpus,
        "provenance": {
            "local_ms": {str(t): 1e3 * s for t, s in measured.local_s.items()},
            "remote_ms": {str(t): 1e3 * s for t, s in measured.remote_s.items()},
            "spread_ms": 1e3 * measured.random_s,
            **({} if measured.pass_s is None else {"pass_ms": 1e3 * measured.pass_s}),
        },
    }


def averaged(calibrations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average calibrations of one cluster, for a machine that is not equally fast all day."""

    def mean(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: mean([value[key] for value in values]) for key in first}
        if isinstance(first, list):
            return [mean(items) for items in zip(*values, strict=True)]
        return fmean(values) if isinstance(first, float) else first

    result: dict[str, Any] = mean(calibrations)
    return result


def _slower_s(table: Timing, kind: int, tokens: int) -> float:
    """By how much a GPU's dense part of a layer takes longer than the first GPU's, on average."""
    difference_s = table.prefill_s[kind] - table.prefill_s[table.kind[0]]
    return float(difference_s[table.dense_class, tokens].mean())


def _experts_s(table: Timing, model: ModelSpec, tokens: int, gpu: int) -> float:
    """Seconds of top-k experts with so many tokens each, on one GPU."""
    kind = table.kind[gpu]
    return model.top_k * float(table.expert_s[kind, table.size[0], tokens])
