"""What the solver `latency` reaches, beside the paper's method, layer-partition and pipelines.

    python -m studies.latency                # all parts, half an hour: studies/latency.json
    python -m studies.latency reach shift    # some of them; the others stay as they are in the file
    python -m studies.latency --tables       # prints the tables of studies/README.md

Parts: `reach` (the regimes that the design names), `shift` (users' tasks change, without reviews),
`search` (the default search beside one of five minutes).
Needs the real routing data in ../shared/traces or $PRISM_TRACES. Placements are planned on one half
of each task's requests and simulated with the other half; Mixtral's tokens are drawn from counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import prism_plan as pp
from prism_plan.errors import Infeasible
from prism_plan.io.phases import read_schedule
from studies.execution import changed
from studies.grid.cells import MIXTRAL_TASKS, with_tasks
from studies.grid.measure import routing
from studies.paper import cluster, trace
from studies.parts import run_parts, six_digits

HERE = Path(__file__).resolve().parent
FILE = HERE / "latency.json"
SOLVERS = ("prism", "exact", "layer-partition", "layer-partition+paths", "pipeline", "latency")
SEEDS = range(5)


def reach() -> dict[str, Any]:
    """Mean, 99th percentile and slowest home in each regime: 200 requests a server, five seeds."""
    weak = {"bandwidth_gbs": 205.0, "tflops": 30.0}
    fast = {"mbps": 100_000.0, "rtt_ms": 0.02, "places": 8, "interval_s": 0.35}
    mixtral = with_tasks(changed(slots=(70, 70, 149)), MIXTRAL_TASKS)
    regimes = {
        "541 541 1234, 500 Mbit/s, 1 ms, every 10 s": changed(),
        "832 832 1664": changed(slots=(832, 832, 1664)),
        "100 Mbit/s": changed(mbps=100.0),
        "Mixtral counts 70 70 149": mixtral,
        "4 places, every 0.8 s": changed(interval_s=0.8, places=4),
        "weak GPUs (205 GB/s, 30 TFLOP/s)": changed(**weak),
        "weak GPUs, every 3 s": changed(**weak, interval_s=3.0),
        "weak GPUs, 4 places, every 1.5 s": changed(**weak, interval_s=1.5, places=4),
        "100 Gbit/s, 0.02 ms, 8 places, every 0.35 s": changed(**fast),
    }
    found: dict[str, Any] = {}
    for name, where in regimes.items():
        rows: dict[str, list[Any]] = {solver: [] for solver in SOLVERS}
        told: list[Any] = []
        for seed in SEEDS:
            is_mixtral = where is mixtral
            planned, scored = (
                (routing(True), routing(True)) if is_mixtral else trace().split(0.5, seed)
            )
            instance = pp.Instance.build(planned, where)
            requests = pp.sample_requests(scored, where, requests_per_server=200, seed=seed)
            for solver in SOLVERS:
                try:
                    plan = pp.solve(instance, solver, pp.Options(seed=seed))
                except Infeasible:
                    continue
                rows[solver].append(_figures(plan, requests, scored, where))
                if solver == "latency":
                    extra = plan.plan.extra
                    keys = ("chosen", "reason", "expected_latency_s", "latency_bound_s")
                    told.append({key: extra[key] for key in (*keys, "whole_layers_bound_s")})
        found[name] = {"runs": rows, "plans": told}
        print(name, {s: round(_mean(row, "mean_s"), 4) for s, row in rows.items()}, flush=True)
    return found


def _figures(
    plan: pp.Placement, requests: pp.Requests, scored: pp.Trace, where: pp.Cluster
) -> dict[str, float]:
    run = pp.simulate_placements([("plan", plan)], requests, scored, where).to_json()["runs"][0]
    return {
        "mean_s": run["latency_s"]["mean"],
        "p99_s": run["latency_s"]["p99"],
        "slowest_home_s": max(s["latency_s"]["mean"] for s in run["servers"] if s["requests"]),
        "ttft_s": run["ttft_s"]["mean"],
        "busiest": run["busiest"],
    }


def shift() -> dict[str, Any]:
    """Each server's users take up the next server's task: means before and after, no reviews."""
    schedule = read_schedule(HERE / "shift.toml")
    first = schedule.phases[0].requests or 0
    found: dict[str, Any] = {}
    for solver in ("prism", "layer-partition+paths", "pipeline", "latency"):
        rows = []
        for seed in SEEDS:
            planned, scored = trace().split(0.5, seed)
            instance = pp.Instance.build(planned, cluster())
            plan = pp.solve(instance, solver, pp.Options(seed=seed))
            requests = pp.sample_requests(
                scored, cluster(), requests_per_server=2 * first, schedule=schedule, seed=seed
            )
            result = pp.simulate_placements([(solver, plan)], requests, scored, cluster())
            rows.append(_before_and_after(requests, result.runs[0].latency_s, first))
        found[solver] = rows
        before, after = mean(row[0] for row in rows), mean(row[1] for row in rows)
        print(solver, round(before, 4), round(after, 4), f"{after / before - 1:+.1%}", flush=True)
    return found


def _before_and_after(requests: pp.Requests, latency_s: Any, first: int) -> list[float]:
    """Mean latency of the first requests of each server, and of those that come after them."""
    is_after = np.zeros(len(latency_s), bool)
    for n in np.unique(requests.home):
        own = np.flatnonzero(requests.home == n)
        is_after[own[np.argsort(requests.arrival_s[own], kind="stable")][first:]] = True
    return [float(latency_s[~is_after].mean()), float(latency_s[is_after].mean())]


def search() -> dict[str, Any]:
    """The default search and one of five minutes, on the testbed and under load."""
    regimes = {
        "541 541 1234": changed(),
        "4 places, every 0.8 s": changed(interval_s=0.8, places=4),
    }
    found: dict[str, Any] = {}
    for name, where in regimes.items():
        planned, scored = trace().split(0.5, 0)
        instance = pp.Instance.build(planned, where)
        requests = [
            pp.sample_requests(scored, where, requests_per_server=200, seed=seed) for seed in SEEDS
        ]
        found[name] = {}
        for label, limit in (("default", None), ("five minutes", 300.0)):
            begun = time.perf_counter()
            plan = pp.solve(instance, "latency", pp.Options(time_limit_s=limit))
            took = time.perf_counter() - begun
            runs = [_figures(plan, drawn, scored, where) for drawn in requests]
            extra = plan.plan.extra
            found[name][label] = {
                "solve_s": took,
                "expected_s": extra["expected_latency_s"],
                "simulated_s": extra.get("simulated_latency_s"),
                "held_out_s": mean(run["mean_s"] for run in runs),
            }
            print(name, label, found[name][label], flush=True)
    return found


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "reach": reach, "shift": shift, "search": search,
}  # fmt: skip


def _mean(rows: list[Any], key: str) -> float:
    return mean(row[key] for row in rows) if rows else float("nan")


def tables(values: Mapping[str, Any]) -> str:
    """Markdown of the parts `reach` and `shift`."""
    lines = ["| regime | " + " | ".join(f"`{s}`" for s in SOLVERS) + " | p99 | slowest home |"]
    lines.append("|---" * (len(SOLVERS) + 3) + "|")
    for name, regime in values["parts"].get("reach", {}).items():
        cells = [f"{_mean(regime['runs'][solver], 'mean_s'):.3g}" for solver in SOLVERS]
        own = regime["runs"]["latency"]
        cells += [f"{_mean(own, key):.3g}" for key in ("p99_s", "slowest_home_s")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for solver, rows in values["parts"].get("shift", {}).items():
        before, after = mean(row[0] for row in rows), mean(row[1] for row in rows)
        lines.append(
            f"`{solver}`: {before:.3g} s before, {after:.3g} s after, {after / before - 1:+.1%}"
        )
    return "\n".join(lines)


def _text(values: Any) -> str:
    """JSON with numbers of six digits."""
    return json.dumps(six_digits(values), indent=1)


if __name__ == "__main__":
    sys.exit(run_parts(FILE, PARTS, tables, _text))
