"""What a lost server does to latency: before, during and after, by plan and by server.

    python -m studies.lost_server           # all parts, two minutes: studies/lost_server.json
    python -m studies.lost_server copies    # one of them; the others stay as they are in the file
    python -m studies.lost_server --tables  # prints the tables of the file

Needs the real routing data in ../shared/traces or $PRISM_TRACES. DeepSeek-V2-Lite on the three
servers of the paper's testbed, planned on one half of each task's requests and simulated with the
other half. In each of ten runs, with other arrivals, a server is lost at a moment in the middle;
requests of all runs are put together.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import prism_plan as pp
from prism_plan.simulate.loss_report import WHEN
from prism_plan.simulate.losses import Loss
from prism_plan.simulate.report import SimulationRun, summary
from studies.execution import changed
from studies.paper import trace
from studies.parts import compact, run_parts

HERE = Path(__file__).resolve().parent
FILE = HERE / "lost_server.json"
#: Solvers that plan two copies of each expert, and those that have no such rule.
WITH_COPIES = ("exact", "latency")
PLAIN = ("layer-partition", "layer-partition+paths", "pipeline")
RUNS = 10
#: Seconds from a loss to the return, where there is one.
AWAY_S = 120.0
#: Requests of a server in a run, 10 s apart on average.
REQUESTS = 60


@functools.cache
def halves() -> tuple[pp.Trace, pp.Trace]:
    """The requests that are planned on, and those that are simulated."""
    return trace().split(0.5, 0)


@functools.cache
def plans(slots: tuple[int, ...], copies: int) -> dict[str, pp.Placement]:
    """A plan of each solver, with so many copies of each expert where it has a rule for that."""
    cluster, planned = changed(slots=slots), halves()[0]
    several = pp.Instance.build(planned, cluster, min_replicas=copies)
    single = several.replace(min_replicas=1)
    found = {name: pp.solve(several, name) for name in WITH_COPIES}
    return found | {name: pp.solve(single, name) for name in PLAIN}


def measured(
    slots: tuple[int, ...], *, copies: int, returns: bool, lost: tuple[str, ...]
) -> dict[str, Any]:
    """Times before, during and after, and what became of requests, by server and plan."""
    planned, scored = halves()
    cluster = changed(slots=slots)
    placements = list(plans(slots, copies).items())
    found: dict[str, Any] = {}
    for server in lost:
        runs: dict[str, list[SimulationRun]] = {name: [] for name, _ in placements}
        for seed in range(RUNS):
            requests = pp.sample_requests(scored, cluster, requests_per_server=REQUESTS, seed=seed)
            at_s = float(np.random.default_rng(seed).uniform(0.4, 0.6)) * 10.0 * REQUESTS
            loss = Loss(server, at_s, at_s + AWAY_S if returns else None)
            simulation = pp.simulate_placements(
                placements, requests, scored, cluster, pp.SimulationOptions(lose=(loss,)),
                planned_on=planned,
            )  # fmt: skip
            for run in simulation.runs:
                runs[run.placement].append(run)
        found[f"{server} lost"] = {name: _together(of_plan) for name, of_plan in runs.items()}
        for name, row in found[f"{server} lost"].items():
            print(server, name, {w: row[w]["latency_s"]["mean"] for w in WHEN}, flush=True)
    return found


def _together(runs: list[SimulationRun]) -> dict[str, Any]:
    """Times of the requests of all runs, and the sums of what happened to others."""
    latency_s: dict[str, list[Any]] = {when: [] for when in WHEN}
    ttft_s: dict[str, list[Any]] = {when: [] for when in WHEN}
    counts: dict[str, int] = {}
    over_s = []
    for run in runs:
        assert run.losses is not None
        arrival_s, done_s = run.scenario.requests.arrival_s, run.outcome.done_s
        for when, chosen in run.losses.when(arrival_s, done_s).items():
            latency_s[when].append(run.latency_s[chosen])
            ttft_s[when].append(run.ttft_s[chosen])
        for name, value in run.losses.counts().items():
            if isinstance(value, int):
                counts[name] = counts.get(name, 0) + value
        (record,) = run.losses.records
        if record.over_s is not None:
            over_s.append(record.over_s - record.at_s)
    return {
        **{
            when: {
                "requests": sum(map(len, latency_s[when])),
                "latency_s": summary(np.concatenate(latency_s[when])),
                "ttft_s": summary(np.concatenate(ttft_s[when])),
            }
            for when in WHEN
        },
        **counts,
        "over_after_s": float(np.mean(over_s)) if over_s else None,
    }


# ------------------------------------------------------------------------------------------- parts


def copies() -> dict[str, Any]:
    """Slots 832 832 1664: two copies of each expert, so that no expert is lost with a server."""
    return measured((832, 832, 1664), copies=2, returns=False, lost=("edge-0", "edge-2"))


def returning() -> dict[str, Any]:
    """The same with a server that comes back after two minutes."""
    return measured((832, 832, 1664), copies=2, returns=True, lost=("edge-0", "edge-2"))


def single() -> dict[str, Any]:
    """Slots 541 541 1234: experts that the lost server alone held are loaded elsewhere.

    A small server is lost, for without the largest one there is no room for all of them.
    """
    return measured((541, 541, 1234), copies=1, returns=False, lost=("edge-0",))


PARTS = {"copies": copies, "returning": returning, "single": single}


# ------------------------------------------------------------------------------------------ tables

COLUMNS = (
    ("lost", "lost_requests"),
    ("failed", "failed_requests"),
    ("restarted", "restarted_requests"),
    ("calls again", "repeated_calls"),
)


def tables(values: Mapping[str, Any]) -> str:
    """Markdown tables of all parts: means and 99th percentiles in seconds."""
    texts = []
    head = [f"{when}: {what}" for when in WHEN for what in ("mean", "p99", "first token")]
    titles = ["plan", *head, *(title for title, _ in COLUMNS), "over after"]
    for part, by_server in values["parts"].items():
        for server, rows in by_server.items():
            lines = [f"### {part}: {server}", "", "| " + " | ".join(titles) + " |"]
            lines.append("|---" * len(titles) + "|")
            lines += ["| " + " | ".join(_cells(name, row)) + " |" for name, row in rows.items()]
            texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    times = [
        row[when][which][statistic]
        for when in WHEN
        for which, statistic in (("latency_s", "mean"), ("latency_s", "p99"), ("ttft_s", "mean"))
    ]
    return [
        f"`{name}`",
        *("–" if value is None else f"{value:.3g}" for value in times),
        *(f"{row[key]}" for _, key in COLUMNS),
        "–" if row["over_after_s"] is None else f"{row['over_after_s']:.2f} s",
    ]


if __name__ == "__main__":
    sys.exit(run_parts(FILE, PARTS, tables, compact))
