"""The experiment's judgement of what counts, and the table of its results."""

from __future__ import annotations

from typing import Any

import pytest

from studies.shaped import by_round_trip, errors, ranking, table
from studies.testbed.processors import ProcessorMonitor


def test_only_while_requests_are_served() -> None:
    """Servers that start saturate the processors; samples that reach out of a run do not count."""
    processors = ProcessorMonitor(interval_s=0.5)
    processors._samples = [(0.5, 1.0), (1.0, 1.0), (1.5, 0.2), (2.0, 0.4), (2.5, 1.0)]
    assert processors.saturated == pytest.approx(3 / 5)
    processors.restrict(1.0, 2.1)
    assert processors.samples == [0.2, 0.4]
    assert (processors.busy, processors.saturated) == (pytest.approx(0.3), 0.0)
    processors.restrict(1.0, 2.5)
    assert processors.saturated == pytest.approx(1 / 3)


def run(solver: str, seed: int, measured: float, predicted: float, **more: Any) -> dict[str, Any]:
    """A row of the results."""
    latency = [{"mean": mean, "p95": 2 * mean, "p99": 3 * mean} for mean in (measured, predicted)]
    row = {"solver": solver, "seed": seed, "rtt_ms": 0.0, "void": False, "latency_s": latency[0]}
    row |= {"remote_share": 0.5, "waiting_share": 0.5, "payload_bytes": 10**9}
    return row | {"predicted": {"latency_s": latency[1]}} | more


def test_what_the_table_says() -> None:
    """Void runs do not count; an order counts if every seed has it; errors are a prediction's."""
    rows = [
        *(run("a", seed, 1.0 + seed, 1.1 + seed) for seed in (0, 1)),
        *(run("b", seed, 1.5 + seed, 0.9 + seed) for seed in (0, 1)),  # slower, predicted faster
        run("c", 0, 0.9, 1.0),
        run("c", 1, 2.7, 1.9),  # faster than both, then slower: no order
        run("c", 2, 9.0, 9.0, void=True),
    ]
    found = by_round_trip({"rows": rows})
    assert list(found) == [0.0]
    solvers = found[0.0]
    assert [(name, list(runs)) for name, runs in solvers.items()] == [(n, [0, 1]) for n in "abc"]
    assert errors(solvers["a"]) == pytest.approx([0.1, 0.05])
    assert ranking(solvers) == (1, ["a and b"])
    assert "| `a` | 1.50 s (1.00–2.00) | 1.60 s | +6.7%, +10.0% |" in table(solvers)
