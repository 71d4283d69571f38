"""Made-up simulation reports and sweep tables with the form of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def statistics(values: np.ndarray) -> dict[str, float | None]:
    """Mean, quantiles and maximum in seconds, null without values."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"))
    p50, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99])
    found = {"mean": values.mean(), "p50": p50, "p95": p95, "p99": p99, "max": values.max()}
    return {key: float(value) for key, value in found.items()}


def make_run(
    placement: str,
    solver: str = "exact",
    *,
    scale: float = 1.0,
    finished: int = 300,
    top_k: int = 6,
    moves: Sequence[float] = (),
    stays: Sequence[float] = (),
    busy: Sequence[float] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """A run whose latencies are ``scale`` times 2 s and more; reviews at the times given."""
    rng = np.random.default_rng(seed)
    latency = scale * (2 + rng.gamma(2, 2, finished))
    arrival = rng.uniform(0, 3000, finished)
    bins = 60
    which = (arrival / 50).astype(int)
    mean = [float(latency[which == b].mean()) if (which == b).any() else None for b in range(bins)]
    decisions = {t: d for d, ts in (("move", moves), ("stay", stays), ("busy", busy)) for t in ts}
    times = statistics(latency)
    share = None if not finished else min(0.3 * scale, 1.0)
    server = {
        "name": "edge-0",
        "requests": finished,
        "latency_s": times,
        "utilisation": 0.14,
        "remote_share": share,
        "waiting_share": share,
        "destinations": share,
        "bytes_sent": 10,
        "bytes_received": 20,
        "uplink_busy": 0.02,
        "downlink_busy": 0.03,
        "gpus": [{"busy": 0.1, "experts": 541}],
    }
    return {
        "placement": placement,
        "solver": solver,
        "partial": False,
        "requests": 300,
        "finished": finished,
        "latency_s": times,
        "ttft_s": times,
        "tpot_s": times,
        "user_tokens_per_s": None if not finished else 1 / times["mean"],
        "queueing_s": times,
        "remote_share": share,
        "waiting_share": None if share is None else min(2 * share, 1.0),
        "destinations": share,
        "expert_calls": 123,
        "remote_calls": 45,
        "messages": 40,
        "bytes_sent": 123456,
        "servers": [server],
        "migrations": [
            {
                "at_s": float(at),
                "moved_experts": 120 if decision == "move" else 0,
                "moved_bytes": 2076180480 if decision == "move" else 0,
                "decision": decision,
                "saving_s": 12.3 if decision != "busy" else None,
                "cost_s": 0.2 if decision != "busy" else None,
                "finished_at_s": at + 0.4 if decision == "move" else None,
            }
            for at, decision in sorted(decisions.items())
        ],
        "layer_latency_s": [
            {
                "remote_experts": r,
                "steps": 500 if finished else 0,
                "mean": 0.0003 * (1 + scale * 1.1 * r**0.8) if finished else None,
            }
            for r in range(top_k + 1)
        ],
        "latency_quantiles_s": (
            np.quantile(latency, np.linspace(0, 1, 101)).tolist() if finished else []
        ),
        "timeline": {
            "bin_s": 50.0,
            "arrivals": np.bincount(which, minlength=bins).tolist(),
            "mean_latency_s": mean,
        },
        "loads": 0,
        "loaded_bytes": 0,
        "events": 123456,
        "simulated_s": 3000.0,
        "runtime_s": 0.4,
    }


def make_report(runs: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A report of these runs."""
    return {
        "format": "prism-plan/simulation",
        "version": 1,
        "partial": False,
        "seed": 0,
        "route": "cover",
        "migrate": "never",
        "timing": "cluster",
        "trace": {"name": "bigbench.parquet", "sha256": "0" * 64, "kind": "tokens"},
        "cluster": {"name": "paper-v2lite.toml", "sha256": "1" * 64},
        "notes": [],
        "runs": list(runs),
    } | changes


def make_sweep(
    gpus: Sequence[int] = (4, 16, 64, 256),
    bandwidths: Sequence[float | None] = (100, 250, 500, 1000),
    intervals: Sequence[float | None] = (None,),
    fractions: Sequence[float | None] = (None,),
    solvers: Sequence[str] = ("eplb", "prism", "exact"),
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """The rows of a full sweep; latency falls with bandwidth and GPUs, solver by solver."""
    rng = np.random.default_rng(0)
    return [
        {
            "gpus": count,
            "servers": max(count // 2, 1),
            "bandwidth_mbps": None if bandwidth is None else float(bandwidth),
            "arrival_interval_s": interval,
            "memory_fraction": fraction,
            "solver": solver,
            "seed": seed,
            "status": "ok",
            "requests": 20 * count,
            "latency_mean_s": float(
                (3 + 700 / (bandwidth or 500))
                * (1.2 - 0.03 * np.log(count))
                * (1 + 8 / (interval or 10))
                * (1.5 - (fraction or 0.5))
                / (1 + 0.25 * s)
                * rng.uniform(0.95, 1.05)
            ),
            "latency_p50_s": 4.0,
            "latency_p95_s": 8.0,
            "latency_p99_s": 9.5,
            "ttft_mean_s": 0.5,
            "tpot_mean_s": 0.1,
            "remote_share": 0.3,
            "waiting_share": 0.7,
            "destinations": 0.9,
            "bytes_sent": 123456789012,
            "utilisation": 0.4,
            "events": 1000000,
            "solve_s": 0.03,
            "runtime_s": 1.25,
        }
        for count in gpus
        for bandwidth in bandwidths
        for interval in intervals
        for fraction in fractions
        for s, solver in enumerate(solvers)
        for seed in range(seeds)
    ]


def failed(row: dict[str, Any], status: str = "too slow, by far") -> dict[str, Any]:
    """The row of a run that went wrong."""
    conditions = list(row)[: list(row).index("status")]
    return {key: row[key] if key in conditions else None for key in row} | {"status": status}
