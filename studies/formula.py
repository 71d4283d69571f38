"""How far the formula of a plan's latency is from the simulator, by load.

    python -m studies.formula             # all parts, ten minutes: studies/formula.json
    python -m studies.formula v2lite-low  # some of them; the others stay as they are in the file
    python -m studies.formula --tables    # prints the table of studies/README.md

Needs the real routing data in ../shared/traces or $PRISM_TRACES. Plans are placements of every
solver, with its own execution table, at home, or with a table that is drawn; links, places and GPUs
are drawn too. Requests come so often that what is busiest is busy for a drawn share of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import prism_plan as pp
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sources import Source
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.scenario import Scenario
from studies.execution import changed
from studies.machine import commit
from studies.paper import ROOT, trace

HERE = Path(__file__).resolve().parent
FILE = HERE / "formula.json"
EXPERTS = ("uniform", "redundance", "smartmoe", "eplb", "layer-partition", "prism", "exact")
TABLES = ("exact+paths", "layer-partition+paths", "pipeline")
#: Shares of time between which loads are drawn.
BANDS = {"low": (0.05, 0.3), "middle": (0.3, 0.6), "high": (0.6, 0.9)}

#: Runs at low load are repeated with four times the requests while the standard error of the mean
#: is not below this share of it, up to so many requests a server.
NOISE, MOST_REQUESTS = 0.02, 1600

Floats = npt.NDArray[np.float64]


def at_load(scenario: Scenario, busiest: float) -> tuple[Scenario, pp.PlanLatency]:
    """The scenario with requests so often that the busiest resource is busy for such a share.

    By the formula, which comes with it.
    """
    requests, placement = scenario.requests, scenario.placement
    assert requests.rate is not None

    def faster(factor: float) -> Scenario:
        changed = dataclasses.replace(
            requests, arrival_s=requests.arrival_s / factor, rate=requests.rate * factor
        )
        return dataclasses.replace(scenario, requests=changed)

    least, most = 0.0, math.inf
    factor = 1.0
    for step in range(60):
        found = faster(factor)
        latency = pp.expected_latency(placement, found)
        if abs(latency.busiest / busiest - 1) < 1e-3:
            return found, latency
        if latency.busiest < busiest:
            least = factor
        else:
            most = factor
        factor *= busiest / latency.busiest  # shares grow nearly in proportion
        if step > 4 or not least < factor < most:
            factor = 2 * least if most == math.inf else (least + most) / 2
    raise AssertionError(f"no load of {busiest}")


def stationary(requests: pp.Requests) -> pp.Requests:
    """The requests up to the time when the first home has no more."""
    last_s = min(requests.arrival_s[requests.home == n][-1] for n in np.unique(requests.home))
    kept = requests.arrival_s <= last_s
    return dataclasses.replace(
        requests,
        home=requests.home[kept],
        arrival_s=requests.arrival_s[kept],
        prompt=requests.prompt[kept],
    )


def simulated(scenario: Scenario) -> tuple[float, float]:
    """Mean seconds of a request, and the standard error of the mean by 20 batches."""
    engine = CompiledEngine(scenario)
    while not engine.advance():
        pass
    seconds = engine.outcome().done_s - scenario.requests.arrival_s
    batches = np.array([part.mean() for part in np.array_split(seconds, 20)])
    return float(seconds.mean()), float(batches.std(ddof=1) / math.sqrt(len(batches)))


def spans(rng: np.random.Generator, servers: int, layers: int) -> npt.NDArray[np.int32]:
    """A table [N, L] of one to four spans a home, or of single layers, or of one row for all."""
    table = np.zeros((servers, layers), np.int32)
    for row in table:
        cuts = np.sort(rng.choice(np.arange(1, layers), int(rng.integers(0, 4)), replace=False))
        row[:] = np.repeat(rng.integers(0, servers, len(cuts) + 1), np.diff([0, *cuts, layers]))
    kind = rng.random()
    if kind < 0.2:
        return rng.integers(0, servers, (servers, layers)).astype(np.int32)
    if kind < 0.5:
        table[:] = table[0]
    return table


def drawn(
    planned: pp.Trace, scored: pp.Trace, number: int, slots: tuple[int, ...] | None
) -> tuple[dict[str, Any], pp.Placement, pp.Cluster]:
    """Plan ``number``: what was drawn, the placement and the cluster."""
    rng = np.random.default_rng(number)
    solver = (*EXPERTS, *TABLES)[number % (len(EXPERTS) + len(TABLES))]
    figures: dict[str, Any] = {
        "mbps": float(rng.choice([100, 500, 10_000])),
        "rtt_ms": float(rng.choice([0.2, 1, 5])),
        "places": int(rng.choice([1, 4])),
    }
    weak = bool(rng.random() < 0.3)
    gpus = {"bandwidth_gbs": 205.0, "tflops": 30.0} if weak else {}
    where = changed(**figures, slots=slots, **gpus)
    if slots is not None:  # tasks of the other trace
        names = iter(planned.tasks * len(where.servers))
        where = dataclasses.replace(
            where,
            servers=tuple(
                dataclasses.replace(server, tasks={next(names): 1.0}) for server in where.servers
            ),
        )
    placement = pp.solve(pp.Instance.build(planned, where), solver)
    table = "own" if solver in TABLES else "home"
    if solver not in TABLES and rng.random() < 0.6:
        table = "drawn"
        execution = spans(rng, len(where.servers), planned.model.num_layers)
        placement = placement.replace(execution=execution)
    return {"solver": solver, "table": table, "weak": weak, **figures}, placement, where


def measured(
    routing: Callable[[], tuple[pp.Trace, pp.Trace]], band: str, plans: int,
    slots: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a plan: what was drawn, seconds by formula and simulator, and the error."""
    planned, scored = routing()
    rows = []
    for number in range(plans):
        told, placement, where = drawn(planned, scored, number, slots)
        load = float(np.random.default_rng([number, *band.encode()]).uniform(*BANDS[band]))
        each = 400 if band == "low" else 200
        while True:
            asked = pp.sample_requests(scored, where, requests_per_server=each, seed=number)
            scenario = Scenario.build(placement, stationary(asked), where, scored.model)
            scenario, latency = at_load(scenario, load)
            mean_s, error_s = simulated(scenario)
            if band != "low" or error_s < NOISE * mean_s or each >= MOST_REQUESTS:
                break
            each *= 4
        rows.append(
            {
                **told,
                "load": load,
                "formula_s": latency.mean_s,
                "simulated_s": mean_s,
                "error": latency.mean_s / mean_s - 1,
                "noise": error_s / mean_s,
                "requests": each,
            }
        )
        print(number, {key: _short(value) for key, value in rows[-1].items()}, flush=True)
    return rows


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def v2lite() -> tuple[pp.Trace, pp.Trace]:
    """DeepSeek-V2-Lite's routing: planned on one half, asked from the other."""
    return trace().split(0.5, 0)


def mixtral() -> tuple[pp.Trace, pp.Trace]:
    """Mixtral's counts, from which tokens are drawn."""
    folder = Path(os.environ.get("PRISM_TRACES", ROOT.parent / "shared" / "traces"))
    counts = read_counts(
        [Source(folder / "mixtral-8x7b-mmlu" / "counts.csv")], pp.PRESETS["mixtral-8x7b"]
    )
    return counts, counts


def _parts() -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    for band in BANDS:
        yield (
            f"v2lite-{band}",
            functools.partial(measured, v2lite, band, 100 if band == "low" else 40),
        )
    for band in BANDS:
        yield f"mixtral-{band}", functools.partial(measured, mixtral, band, 30, (70, 70, 149))


PARTS: Mapping[str, Callable[[], list[dict[str, Any]]]] = dict(_parts())


def tables(parts: Mapping[str, list[dict[str, Any]]]) -> str:
    """The Markdown table: errors by trace and load."""
    lines = [
        "| routing | busiest | plans | median error | 95 % below | largest | within 10 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in parts.items():
        routing, band = name.split("-")
        low, high = BANDS[band]
        errors = np.array([row["error"] for row in rows])
        size = np.abs(errors)
        largest = errors[size.argmax()]
        lines.append(
            f"| {routing} | {low:.0%}–{high:.0%} | {len(rows)} | {np.median(size):.1%} "
            f"| {np.quantile(size, 0.95):.1%} | {largest:+.1%} | {(size < 0.1).sum()} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the parts that are named, or all; keep the others of the file."""
    values = json.loads(FILE.read_text()) if FILE.exists() else {"parts": {}}
    if sys.argv[1:] == ["--tables"]:
        print(tables(values["parts"]))
        return 0
    for part in sys.argv[1:] or PARTS:
        values["parts"][part] = PARTS[part]()
        values["commit"] = commit()
        FILE.write_text(_compact(values), encoding="utf-8")
    print(tables(values["parts"]))
    return 0


def _compact(values: Mapping[str, Any]) -> str:
    """JSON with one line a plan, in the order of :data:`PARTS`."""
    parts = []
    for name in PARTS:
        if name in values["parts"]:
            rows = [
                "   " + json.dumps({key: _short(value) for key, value in row.items()})
                for row in values["parts"][name]
            ]
            parts.append(f"  {json.dumps(name)}: [\n" + ",\n".join(rows) + "\n  ]")
    inner = ",\n".join(parts)
    return f'{{\n "commit": {json.dumps(values["commit"])},\n "parts": {{\n{inner}\n }}\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
