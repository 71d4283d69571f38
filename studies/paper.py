"""Checks the Prism paper's qualitative results in the simulator; nothing is tuned to match.

    python -m studies.paper            # all parts, a quarter of an hour; writes studies/paper.json

Needs the real routing data in ../shared/traces or $PRISM_TRACES. Placements are planned on one half
of each task's requests and simulated with the other half; seeds 0 to 4 draw the halves, the
arrivals and the prompts. The results are discussed in studies/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import prism_plan as pp
from prism_plan.evaluate.sweep import sweep
from prism_plan.io.phases import read_schedule
from prism_plan.migration.policy import PolicyName
from prism_plan.profiling.esft import read_esft
from prism_plan.profiling.sources import Source
from studies.machine import commit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TASKS = ("intent", "law", "summary", "translation")
SEEDS = range(5)
SOLVERS = ("uniform", "redundance", "smartmoe", "eplb", "layer-partition", "prism", "exact")


def trace() -> pp.Trace:
    """DeepSeek-V2-Lite's architecture, four tasks, token by token."""
    folder = Path(os.environ.get("PRISM_TRACES", ROOT.parent / "shared" / "traces"))
    scores = folder / "deepseek-v2-lite-esft" / "expert_scores"
    return read_esft([Source(scores / task) for task in TASKS], pp.PRESETS["deepseek-v2-lite"])


def cluster() -> pp.Cluster:
    """The paper's testbed."""
    return pp.read_cluster(ROOT / "traces" / "paper-v2lite.toml")


def mean_and_range(values: list[float]) -> dict[str, float]:
    """Mean, minimum and maximum."""
    return {"mean": mean(values), "least": min(values), "most": max(values)}


def order_of_solvers() -> dict[str, Any]:
    """Every solver and `offload` on the testbed: 200 requests a server, five seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    layers: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in SEEDS:
        planned, scored = trace().split(0.5, seed)
        instance = pp.Instance.build(planned, cluster())
        placements = [(s, pp.solve(instance, s, pp.Options(seed=seed))) for s in SOLVERS]
        placements.append(("offload", pp.offload_placement(instance)))
        requests = pp.sample_requests(scored, cluster(), requests_per_server=200, seed=seed)
        report = pp.simulate_placements(placements, requests, scored, cluster()).to_json()
        for run in report["runs"]:
            row = found.setdefault(run["placement"], {})
            for key, value in (
                ("latency_mean_s", run["latency_s"]["mean"]),
                ("latency_p95_s", run["latency_s"]["p95"]),
                ("ttft_mean_s", run["ttft_s"]["mean"]),
                ("tpot_mean_s", run["tpot_s"]["mean"]),
                ("remote_share", run["remote_share"]),
                ("waiting_share", run["waiting_share"]),
            ):
                row.setdefault(key, []).append(value)
            layers.setdefault(run["placement"], []).append(run["layer_latency_s"])
    table = {
        name: {key: mean_and_range(values) for key, values in row.items()}
        for name, row in found.items()
    }
    eplb, prism = (found[name]["latency_mean_s"] for name in ("eplb", "prism"))
    saved = [1 - p / e for e, p in zip(eplb, prism, strict=True)]
    return {
        "solvers": table,
        "eplb_to_prism": mean_and_range(saved),
        "layer_latency_times_local": {
            name: _relative(runs) for name, runs in layers.items() if name in ("eplb", "prism")
        },
    }


def _relative(runs: list[list[dict[str, Any]]]) -> list[float | None]:
    """Mean layer latency of decode steps by remote experts, over that of none."""
    steps = [sum(run[r]["steps"] for run in runs) for r in range(len(runs[0]))]
    total = [
        sum(run[r]["steps"] * (run[r]["mean"] or 0.0) for run in runs) for r in range(len(runs[0]))
    ]
    means = [t / s if s else None for t, s in zip(total, steps, strict=True)]
    return [None if m is None or not means[0] else m / means[0] for m in means]


def scale() -> list[dict[str, Any]]:
    """GPUs by bandwidth, and arrivals, as the paper simulates them: 20 requests a server."""
    by_bandwidth = pp.Grid(
        gpus=(4, 16, 64, 256),
        bandwidth_mbps=(100.0, 500.0, 1000.0),
        arrival_interval_s=(10.0,),
        solver=("eplb", "layer-partition", "prism", "exact"),
    )
    by_arrivals = pp.Grid(
        gpus=(4, 256),
        bandwidth_mbps=(500.0,),
        arrival_interval_s=(8.0, 15.0),
        solver=("eplb", "prism"),
    )
    return [
        row
        for grid in (by_bandwidth, by_arrivals)
        for row in sweep(trace(), cluster(), grid, pp.SweepOptions(holdout=0.5))
    ]


def offload() -> list[dict[str, Any]]:
    """Remote calls against loading from host memory, by bandwidth and load bandwidth."""
    rows = []
    planned, scored = trace().split(0.5, 0)
    for load_gbs in (6.0, 12.0, 25.0, 50.0):
        for bandwidth in (100.0, 500.0, 1000.0, 10000.0):
            changed = _with(cluster(), bandwidth, load_gbs)
            instance = pp.Instance.build(planned, changed)
            placements = [
                ("prism", pp.solve(instance, "prism")),
                ("layer-partition", pp.solve(instance, "layer-partition")),
                ("offload", pp.offload_placement(instance)),
            ]
            requests = pp.sample_requests(scored, changed, requests_per_server=100)
            report = pp.simulate_placements(placements, requests, scored, changed).to_json()
            rows.append(
                {"load_gbs": load_gbs, "bandwidth_mbps": bandwidth}
                | {run["placement"]: run["latency_s"]["mean"] for run in report["runs"]}
            )
    return rows


def _with(base: pp.Cluster, bandwidth_mbps: float, load_gbs: float) -> pp.Cluster:
    servers = tuple(
        dataclasses.replace(
            server, gpus=tuple(dataclasses.replace(gpu, load_gbs=load_gbs) for gpu in server.gpus)
        )
        for server in base.servers
    )
    link = dataclasses.replace(base.link, bandwidth_mbps=bandwidth_mbps)
    return dataclasses.replace(base, servers=servers, link=link)


def shift() -> list[dict[str, Any]]:
    """Tasks that move on by one server after 200 requests, with and without migration."""
    rows = []
    schedule = read_schedule(HERE / "shift.toml")
    for seed in SEEDS:
        planned, scored = trace().split(0.5, seed)
        placement = pp.solve(pp.Instance.build(planned, cluster()), "prism")
        requests = pp.sample_requests(
            scored, cluster(), requests_per_server=400, schedule=schedule, seed=seed
        )
        policies: tuple[tuple[PolicyName, float | None], ...] = (
            ("never", None),
            ("prism", None),
            ("prism", float("inf")),
            ("partial", None),
            ("partial", float("inf")),
        )
        for policy, half_life_s in policies:
            options = pp.SimulationOptions(migrate=policy, half_life_s=half_life_s, seed=seed)
            report = pp.simulate_placements(
                [("prism", placement)], requests, scored, cluster(), options
            )
            run = report.to_json()["runs"][0]
            moves = [m for m in run["migrations"] if m["decision"] == "move"]
            number = _numbers(requests)
            latency = report.runs[0].latency_s
            rows.append(
                {
                    "seed": seed,
                    "policy": policy,
                    "statistics": "cumulative" if half_life_s else "window",
                    "before_s": float(latency[number < 200].mean()),
                    "after_s": float(latency[number >= 200].mean()),
                    "moves": len(moves),
                    "moved_experts": sum(m["moved_experts"] for m in moves),
                    "saving_s": sum(m["saving_s"] for m in moves),
                    "cost_s": sum(m["cost_s"] for m in moves),
                }
            )
    return rows


def _numbers(requests: pp.Requests) -> Any:
    """The number of each request at its server, [R]."""
    import numpy as np

    number = np.empty(len(requests), np.int64)
    for n in range(len(requests.servers)):
        own = requests.home == n
        number[own] = np.arange(own.sum())
    return number


PARTS = {"order_of_solvers": order_of_solvers, "offload": offload, "shift": shift, "scale": scale}


def main() -> None:
    """Run the named parts, or all, and write what came out."""
    target = HERE / "paper.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    for name in sys.argv[1:] or PARTS:
        print(name, flush=True)
        results[name] = PARTS[name]()
        results["commit"] = commit()
        target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
