"""Why a plan is as it is, in one line, and what limits it."""

from __future__ import annotations

import numpy as np

from prism_plan.execution_table import home_execution, spans
from prism_plan.latency.expected_latency import PlanLatency
from prism_plan.placement import Placement
from prism_plan.solvers.latency.problem import LatencyProblem


def reason(problem: LatencyProblem, plan: Placement, expected: PlanLatency) -> str:
    """What the longest run of layers away from home saves the requests of that home.

    Beside the same experts with every layer at home, by the formula: "layers 1-18 of edge-0 run on
    edge-2: saves 0.9 s a request of edge-0". Where the formula cannot be trusted for both, for
    something is busy for long, the run alone.
    """
    table = plan.execution_table
    home = home_execution(*table.shape)
    away = (table != home) & (problem.weights > 0)[:, None]
    if problem.at_home[problem.weights > 0].all():
        return "every layer runs at home, as execute_at_home asks"
    if not away.any():
        other = ": no other table is faster" if problem.trusts(expected) else ""
        return f"every layer runs at home{other}"
    at_home = problem.expected(plan.replace(execution=home))
    saved = (at_home.of_home - expected.of_home) * problem.weights
    n = int(np.argmax(np.where(away.any(axis=1), saved, -np.inf)))
    longest = max(
        (run for run in spans(table[n]) if run.server != n), key=lambda run: run.last - run.first
    )
    layers = plan.model.moe_layers
    first, last = layers[longest.first], layers[longest.last]
    runs = "runs" if first == last else "run"
    which = f"layer {first}" if first == last else f"layers {first}-{last}"
    run = f"{which} of {plan.servers[n]} {runs} on {plan.servers[longest.server]}"
    if not (problem.trusts(expected) and problem.trusts(at_home)):
        return run
    seconds = float(at_home.of_home[n] - expected.of_home[n])
    if seconds <= 0:
        return f"{run}: for the good of other homes"
    return f"{run}: saves {seconds:.2g} s a request of {plan.servers[n]}"


def busiest(plan: Placement, expected: PlanLatency, *, places: bool = True) -> tuple[str, float]:
    """What works, or is taken, for the largest share of time, and that share by the formula.

    From 1 on more is asked for than there is: queues grow for as long as requests come. Without
    ``places`` only GPUs and links are looked at: how long places are taken depends on bursts,
    which the formula leaves out; the bytes that links carry in the long run do not.
    """
    names = plan.servers
    gpus = [
        f"gpu[{g}] of {name}"
        for name, own in zip(names, plan.gpu_capacity, strict=True)
        for g in range(len(own))
    ]
    of_places = {
        f"places of {name}": x for name, x in zip(names, expected.place_share, strict=True)
    }
    shares = {
        **(of_places if places else {}),
        **dict(zip(gpus, expected.gpu_share, strict=True)),
        **{f"uplink of {name}": x for name, x in zip(names, expected.up_share, strict=True)},
        **{f"downlink of {name}": x for name, x in zip(names, expected.down_share, strict=True)},
    }
    found = max(shares, key=lambda name: shares[name])
    return found, float(shares[found])


def limits(expected: PlanLatency, unlimited_s: float) -> dict[str, float]:
    """Shares of the mean latency, by what they are spent on, largest first.

    GPUs compute and are waited for; links and places are waited for. ``memory`` is the share that
    a request on its own would save if every server held every expert: ``unlimited_s`` is its time.
    """
    parts = expected.by_part
    mean_s = expected.mean_s
    alone_s = sum(parts[name] for name in ("compute", "attention", "hops", "calls"))
    seconds = {
        "GPUs": parts["compute"] + parts["attention"] + parts["gpus"],
        "hops": parts["hops"],
        "calls": parts["calls"],
        "links": parts["ports"],
        "places": parts["places"],
        "memory": max(alone_s - unlimited_s, 0.0),
    }
    shares = {name: value / mean_s for name, value in seconds.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
