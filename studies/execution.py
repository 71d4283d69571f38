"""What it gains to execute layers where their experts are: orders, links, load, GPUs, prompts.

    python -m studies.execution             # all parts, twenty minutes: studies/execution.json
    python -m studies.execution load sites  # some of them; the others stay as they are in the file
    python -m studies.execution --tables    # prints the tables of studies/README.md

Needs the real routing data in ../shared/traces or $PRISM_TRACES. Placements are planned on one half
of each task's requests and simulated with the other half; a regime changes the paper's testbed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import prism_plan as pp
from prism_plan.errors import Infeasible
from prism_plan.evaluate.sweep_grid import vary_cluster
from prism_plan.simulate.sampling import sample_requests
from prism_plan.trace import PHASES, TokenBatch, trace_from_batches
from studies.paper import cluster, trace
from studies.parts import compact, run_parts

HERE = Path(__file__).resolve().parent
FILE = HERE / "execution.json"
EXPERTS = ("prism", "exact", "layer-partition")
SOLVERS = (*EXPERTS, *(f"{name}+paths" for name in EXPERTS), "pipeline")
ALL = ("uniform", "redundance", "smartmoe", "eplb", *EXPERTS)

Regimes = dict[str, pp.Cluster]


def changed(
    *, interval_s: float = 10.0, places: int = 1, mbps: float = 500.0, rtt_ms: float = 1.0,
    slots: tuple[int, ...] | None = None, bandwidth_gbs: float | None = None,
    tflops: float | None = None, servers: int = 3,
) -> pp.Cluster:  # fmt: skip
    """The testbed with other figures; ``slots`` by server, shared by its GPUs."""
    base = cluster()
    made = []
    for n, server in enumerate(base.servers):
        gpus = server.gpus
        if slots is not None:
            each, more = divmod(slots[n], len(gpus))
            gpus = tuple(
                dataclasses.replace(gpu, memory_bytes=None, slots=each + (g < more))
                for g, gpu in enumerate(gpus)
            )
        if bandwidth_gbs is not None and tflops is not None:
            figures = {"memory_bandwidth_gbs": bandwidth_gbs, "tflops": tflops}
            gpus = tuple(dataclasses.replace(gpu, **figures) for gpu in gpus)
        made.append(
            dataclasses.replace(
                server, gpus=gpus, arrival_interval_s=interval_s, concurrency=places
            )
        )
    link = dataclasses.replace(base.link, bandwidth_mbps=mbps, rtt_ms=rtt_ms)
    found = dataclasses.replace(base, servers=tuple(made), link=link)
    return vary_cluster(found, gpus=4 * servers // 3)


def unequal_gpus(base: pp.Cluster) -> pp.Cluster:
    """Three servers with GPUs of 205, 1555 and 672 GB/s."""
    figures = ((205.0, 30.0), (1555.0, 312.0), (672.0, 125.0))
    unequal = tuple(
        dataclasses.replace(
            server,
            gpus=tuple(
                dataclasses.replace(gpu, memory_bandwidth_gbs=gbs, tflops=tflops)
                for gpu in server.gpus
            ),
        )
        for server, (gbs, tflops) in zip(base.servers, figures, strict=True)
    )
    return dataclasses.replace(base, servers=unequal)


def measured(
    regimes: Mapping[str, pp.Cluster], *, seeds: int = 3, requests: int = 100,
    solvers: tuple[str, ...] = SOLVERS, offload: bool = False,
    routing: Callable[[int], tuple[pp.Trace, pp.Trace]] = lambda seed: trace().split(0.5, seed),
) -> dict[str, Any]:  # fmt: skip
    """Mean latencies by regime and solver, a number a seed; ``None`` where nothing fits."""
    found: dict[str, Any] = {}
    for name, where in regimes.items():
        rows: dict[str, Any] = {solver: [] for solver in (*solvers, *["offload"] * offload)}
        more: dict[str, Any] = {}
        for seed in range(seeds):
            planned, scored = routing(seed)
            instance = pp.Instance.build(planned, where)
            placements = []
            for solver in solvers:
                try:
                    placement = pp.solve(instance, solver, pp.Options(seed=seed))
                except Infeasible:
                    rows[solver].append(None)
                    continue
                placements.append((solver, placement))
                note = more.setdefault(solver, [])
                note.append({"home": placement.execution is None, **_told(placement)})
            if offload:
                placements.append(("offload", pp.offload_placement(instance)))
            drawn = sample_requests(scored, where, requests_per_server=requests, seed=seed)
            report = pp.simulate_placements(placements, drawn, scored, where).to_json()
            for run in report["runs"]:
                rows[run["placement"]].append(
                    {
                        "mean_s": run["latency_s"]["mean"],
                        "p99_s": run["latency_s"]["p99"],
                        "ttft_s": run["ttft_s"]["mean"],
                        "busiest": run["busiest"],
                    }
                )
        found[name] = {"runs": rows, "plans": more}
        print(name, {s: _mean(row) for s, row in rows.items()}, flush=True)
    return found


def _told(placement: pp.Placement) -> dict[str, Any]:
    """What a plan tells of its choice."""
    extra = placement.plan.extra
    return {key: extra[key] for key in ("expected_latency_s", "simulated_s") if key in extra}


def _mean(row: list[Any]) -> float | None:
    values = [run["mean_s"] for run in row if run is not None]
    return round(mean(values), 4) if values else None


def long_prompts(tokens: int, seed: int) -> tuple[pp.Trace, pp.Trace]:
    """Both halves of the trace as prompts of so many tokens, and 32 tokens that follow.

    The rows of a task's requests one after the other, again from the start where they end: what
    tokens call is recorded, that a request is so long is not.
    """
    planned, scored = trace().split(0.5, seed)
    return _as_long(planned, tokens), _as_long(scored, tokens)


def _as_long(part: pp.Trace, tokens: int, each: int = 6, decode: int = 32) -> pp.Trace:
    assert part.batches is not None
    rows: dict[int, list[Any]] = {}
    for batch in part.batches():
        for task in np.unique(batch.task):
            rows.setdefault(int(task), []).append(batch.experts[batch.task == task])
    phase = np.repeat([PHASES.index("prefill"), PHASES.index("decode")], [tokens, decode])

    def batches() -> Iterator[TokenBatch]:
        for task, parts in sorted(rows.items()):
            experts = np.concatenate(parts)
            for number in range(each):
                at = (number * (tokens + decode) + np.arange(tokens + decode)) % len(experts)
                yield TokenBatch(
                    request=np.full(len(at), task * each + number, np.int32),
                    position=np.arange(len(at), dtype=np.int32),
                    phase=phase.astype(np.int8),
                    task=np.full(len(at), task, np.int32),
                    experts=experts[at],
                )

    return trace_from_batches(part.model, part.tasks, batches(), name=f"{tokens} tokens")


# ------------------------------------------------------------------------------------------- parts


def order() -> dict[str, Any]:
    """All solvers on the testbed, and with the slots of the design."""
    solvers = (*ALL, *(f"{name}+paths" for name in ALL), "pipeline")
    regimes = {
        "541 541 1234": changed(),
        "832 832 1664": changed(slots=(832, 832, 1664)),
        "600 600 600": changed(slots=(600, 600, 600)),
    }
    return measured(regimes, seeds=5, requests=200, solvers=solvers, offload=True)


def links() -> dict[str, Any]:
    """Bandwidth and round trips."""
    return measured(
        {
            f"{mbps:g} Mbit/s, {rtt:g} ms": changed(mbps=mbps, rtt_ms=rtt)
            for mbps in (100.0, 500.0, 1000.0, 10000.0)
            for rtt in (0.2, 1.0, 5.0)
        }
    )


def load() -> dict[str, Any]:
    """Arrivals, with one place a server and with four."""
    return measured(
        {
            f"every {interval:g} s, {places} places": changed(interval_s=interval, places=places)
            for places in (1, 4)
            for interval in (10.0, 4.0, 2.0, 0.8, 0.4, 0.2)
        }
    )


def gpus() -> dict[str, Any]:
    """Weak GPUs, unequal ones, and links so fast that layers are best at home."""
    weak = {"bandwidth_gbs": 205.0, "tflops": 30.0}
    fast = {"mbps": 100_000.0, "rtt_ms": 0.02, "places": 8, "interval_s": 0.35}
    return measured(
        {
            "weak, every 10 s": changed(**weak),
            "weak, every 3 s": changed(**weak, interval_s=3.0),
            "weak, every 1.5 s, 4 places": changed(**weak, interval_s=1.5, places=4),
            "unequal, every 10 s": unequal_gpus(changed()),
            "100 Gbit/s, 0.02 ms, 8 places, every 0.35 s": changed(**fast),
            "the same, 832 832 1664": changed(**fast, slots=(832, 832, 1664)),
        }
    )


def sites() -> dict[str, Any]:
    """The testbed's servers 4 and 16 times, and two sites of three with a slow line between."""
    six = changed(servers=6)
    far = [
        pp.PairLink(a, b, bandwidth_mbps=50.0, rtt_ms=20.0) for a in range(3) for b in range(3, 6)
    ]
    return measured(
        {
            "12 servers, every 10 s": changed(servers=12),
            "12 servers, every 2 s": changed(servers=12, interval_s=2.0),
            "48 servers, every 10 s": changed(servers=48),
            "48 servers, every 2 s": changed(servers=48, interval_s=2.0),
            "two sites of three servers": dataclasses.replace(six, pair_links=tuple(far)),
        },
        requests=50,
    )


def prompts() -> dict[str, Any]:
    """Prompts of 512, 2,048 and 8,192 tokens with attention, 32 tokens after them."""
    found: dict[str, Any] = {}
    for tokens, interval in ((512, 30.0), (2048, 60.0), (8192, 240.0)):
        found |= measured(
            {f"{tokens} tokens, every {interval:g} s": changed(interval_s=interval)},
            requests=20,
            routing=lambda seed, tokens=tokens: long_prompts(tokens, seed),
        )
    return found


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "order": order, "links": links, "load": load, "gpus": gpus, "sites": sites, "prompts": prompts,
}  # fmt: skip


# ------------------------------------------------------------------------------------------ tables


def tables(values: Mapping[str, Any]) -> str:
    """Markdown tables of all parts; + marks a plan that executes at home after all, by a seed."""
    texts = []
    for part, regimes in values["parts"].items():
        solvers = list(next(iter(regimes.values()))["runs"])
        lines = [
            f"### {part}",
            "",
            "| regime | " + " | ".join(f"`{solver}`" for solver in solvers) + " |",
            "|---" * (len(solvers) + 1) + "|",
        ]
        for name, regime in regimes.items():
            cells = [_cell(regime, solver) for solver in solvers]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _cell(regime: Mapping[str, Any], solver: str) -> str:
    value = _mean(regime["runs"][solver])
    if value is None:
        return "–"
    plans = regime["plans"].get(solver, [])
    home = any(plan["home"] for plan in plans) and "+paths" in solver
    return f"{value:.3g}" + " +" * home


if __name__ == "__main__":
    sys.exit(run_parts(FILE, PARTS, tables, compact))
