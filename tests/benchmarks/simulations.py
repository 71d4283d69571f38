"""Cases of the simulator: events per second, growth with servers and tokens, other engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.cluster import Cluster, Gpu, Link, Server
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.scenario import Scenario
from prism_plan.solvers import solve
from prism_plan.trace import Trace

GPU = Gpu(memory_bytes=40_000_000_000, memory_fraction=0.3)


def twins(trace: Trace, servers: int) -> Cluster:
    """Servers of two A100s each, the trace's tasks in turn, a request every 10 s, 500 Mbit/s."""
    return Cluster(
        "twins",
        tuple(
            Server(
                f"s{n}",
                (GPU, GPU),
                tasks={trace.tasks[n % len(trace.tasks)]: 1.0},
                arrival_interval_s=10.0,
            )
            for n in range(servers)
        ),
        Link(bandwidth_mbps=500, rtt_ms=1.0, call_overhead_ms=0.2),
    )


def paper_cluster(trace: Trace) -> Cluster:
    """The paper's testbed."""
    root = Path(__file__).resolve().parent.parent.parent
    return parse_cluster((root / "traces" / "paper-v2lite.toml").read_text())


def scenario(
    make_trace: Callable[[], Trace],
    make_cluster: Callable[[Trace], Cluster],
    requests: int,
    *,
    solver: str = "exact",
    decode_tokens: int = 32,
    where_held: bool = False,
) -> Callable[[Path], Scenario]:
    """Prepare a run: so many requests a server, seed 0.

    ``where_held``: each layer is executed by the server that holds most of it, not at home.
    """

    def prepare(folder: Path) -> Scenario:
        trace = make_trace()
        cluster = make_cluster(trace)
        instance = Instance.build(trace, cluster)
        offloading = solver == "offload"
        placement = offload_placement(instance) if offloading else solve(instance, solver)
        asked = sample_requests(
            trace, cluster, requests_per_server=requests, decode_tokens=decode_tokens
        )
        execution = None
        if where_held:
            holder = placement.local.sum(axis=2).argmax(axis=0).astype(np.int32)
            execution = np.tile(holder, (len(cluster.servers), 1))
        return Scenario.build(
            placement, asked, cluster, trace.model, execution=execution, offload=offloading
        )

    return prepare


def simulated(engine: type = CompiledEngine) -> Callable[[Scenario], dict[str, Any]]:
    """Run an engine to its end: events, their rate, and a latency that proves the same work."""

    def run(prepared: Scenario) -> dict[str, Any]:
        begin = time.perf_counter()
        made = engine(prepared)
        made.advance()
        runtime_s = time.perf_counter() - begin
        outcome = made.outcome()
        return {
            "events": outcome.events,
            "events_per_s": round(outcome.events / runtime_s),
            "runtime_s": runtime_s,
            "mean_latency_s": _mean_latency_s(outcome.done_s, prepared.requests),
        }

    return run


def _mean_latency_s(done_s: Any, requests: Requests) -> float:
    return round(float(np.mean(done_s - requests.arrival_s)), 9)


def simulated_by_simpy(prepared: Scenario) -> dict[str, Any]:
    """The same scenario written with SimPy; its events are its own."""
    from tests.simulate.simpy_model import SimpyModel

    begin = time.perf_counter()
    model = SimpyModel(prepared)
    done_s = model.run()
    runtime_s = time.perf_counter() - begin
    return {
        "requests_per_s": round(len(done_s) / runtime_s, 1),
        "runtime_s": runtime_s,
        "mean_latency_s": _mean_latency_s(done_s, prepared.requests),
    }


__all__ = [
    "ReferenceEngine",
    "paper_cluster",
    "scenario",
    "simulated",
    "simulated_by_simpy",
    "twins",
]
