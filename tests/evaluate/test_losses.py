"""Whole simulations with lost servers: what became of requests, repairs, tables, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.errors import InputError
from prism_plan.evaluate.offload_baseline import offload_placement
from prism_plan.evaluate.simulation import dump_report, simulate_placements
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.evaluate.sweep_options import SweepOptions
from prism_plan.instance import Instance
from prism_plan.io.simulation import read_simulation
from prism_plan.simulate.losses import LOST, Loss
from prism_plan.simulate.report import SimulationRun
from prism_plan.solvers import solve
from tests.evaluate.simulation_material import (
    planned,
    sampled,
    small_cluster,
    small_trace,
    without_times,
)

#: Room for two copies of all 24 experts, also at two of the three servers.
ROOMY = (("slots = 11", "slots = 24"), ("slots = 8", "slots = 21"))
#: Room for all experts at any two servers, and at none alone.
TIGHT = (("slots = 11", "slots = 17"), ("slots = 8", "slots = 14"))
LOST_A = Loss("a", 0.4)
BACK_A = Loss("a", 0.4, 0.8)


def lost(
    *losses: Loss, solver: str = "exact", changes: tuple[tuple[str, str], ...] = ROOMY,
    min_replicas: int = 1, number: int = 60, **options: Any,
) -> SimulationRun:  # fmt: skip
    """The run of one plan with losses that are known after 0.1 s; arrivals last about 2 s."""
    trace, cluster = small_trace(), small_cluster(*changes)
    instance = Instance.build(trace, cluster, min_replicas=min_replicas)
    values = {"timeout_s": 0.1, **options}
    result = simulate_placements(
        [(solver, solve(instance, solver))],
        sampled(trace, cluster, number),
        trace,
        cluster,
        SimulationOptions(lose=losses, **values),
    )
    return result.runs[0]


def told(run: SimulationRun) -> Any:
    """What the report says of the losses."""
    return run.to_json()["losses"]


@pytest.mark.parametrize("solver", ["exact", "uniform", "layer-partition+paths", "pipeline"])
@pytest.mark.parametrize("losses", [(LOST_A,), (BACK_A, Loss("c", 0.45)), (Loss("b", 0.5, 0.55),)])
def test_every_arrival_is_told_of(solver: str, losses: tuple[Loss, ...]) -> None:
    """Each is answered, failed, lost or not served; only those of lost homes are lost."""
    run = lost(*losses, solver=solver, changes=TIGHT)
    report = told(run)
    answered = int(np.isfinite(run.outcome.done_s).sum())
    gone = report["lost_requests"] + report["failed_requests"]
    assert answered + gone + report["not_served"] == 3 * 60
    assert report["not_served"] > 0 or losses[0].server == "b"
    names = np.array(run.scenario.placement.servers)[run.scenario.requests.home]
    assert run.losses is not None
    assert set(names[run.losses.outcome.why == LOST]) <= {loss.server for loss in losses}
    parts = [report[when]["requests"] for when in ("before", "during", "after")]
    assert sum(parts) == answered
    assert parts[0] > 0


@pytest.mark.parametrize("solver", ["exact", "ilp"])
def test_two_copies_outlive_any_server(solver: str) -> None:
    """With two holders of every expert no request of a living home fails, whoever is lost."""
    for name in ("a", "b", "c"):
        run = lost(Loss(name, 0.4), solver=solver, min_replicas=2)
        assert told(run)["failed_requests"] == 0
        assert told(run)["servers"][0]["noticed_s"] == 0.5


def test_requests_wait_for_the_notice() -> None:
    """With copies elsewhere the slowest request during takes the timeout at least, none before."""
    run = lost(LOST_A, min_replicas=2, changes=TIGHT)
    report = told(run)
    assert report["repeated_calls"] > 0
    assert report["before"]["latency_s"]["max"] < 0.1
    assert report["during"]["latency_s"]["max"] > 0.1


def test_classes_by_time() -> None:
    """During: there at a moment between the loss and the end of the repair."""
    run = lost(LOST_A)
    over_s = told(run)["servers"][0]["repaired_s"]
    arrival_s, done_s = run.scenario.requests.arrival_s, run.outcome.done_s
    answered = np.isfinite(done_s)
    latency_s = done_s - arrival_s
    for when, chosen in (
        ("before", done_s < 0.4),
        ("during", (done_s >= 0.4) & (arrival_s <= over_s)),
        ("after", answered & (arrival_s > over_s)),
    ):
        part = told(run)[when]
        assert part["requests"] == chosen.sum()
        assert part["latency_s"]["mean"] == pytest.approx(latency_s[chosen].mean())


def test_a_repair_restores_what_was_lost() -> None:
    """Experts that server a alone held are loaded at the others, at most 0.1 ms each and slot."""
    run = lost(LOST_A, solver="uniform", changes=ROOMY)
    (server,) = told(run)["servers"]
    missing = ~run.scenario.placement.local[1:].any(axis=0)
    assert missing.any()
    assert run.outcome.loads == missing.sum()
    assert run.experts[0] == 0
    assert 0.5 < server["repaired_s"] <= 0.5 + missing.sum() * 1e6 / 12e9 + 1e-9
    assert told(run)["failed_requests"] == 0


def test_without_room_requests_fail() -> None:
    """22 slots for 24 experts: some are held nowhere, and the report says why requests failed."""
    run = lost(LOST_A, changes=())
    report = told(run)
    assert report["failed_requests"] > 0
    assert report["failures"] == [
        {"reason": "needs an expert that no server holds", "requests": report["failed_requests"]}
    ]


def test_a_server_gets_its_share_back() -> None:
    """After the return every GPU holds what was planned; the end of that is when it is over."""
    run = lost(BACK_A, solver="uniform")
    assert run.experts.tolist() == run.scenario.placement.on_gpu.sum(axis=(1, 2)).tolist()
    (server,) = told(run)["servers"]
    assert server["noticed_s"] == 0.5
    assert 0.5 < server["repaired_s"] < 0.8 < server["restored_s"] < 0.9


def test_an_early_return_is_the_notice() -> None:
    """A server that is back before the timeout is known to have been away at that moment."""
    (server,) = told(lost(Loss("a", 0.4, 0.45), solver="uniform"))["servers"]
    assert server["noticed_s"] == server["return_s"] == 0.45
    assert server["repaired_s"] is None


def test_layers_execute_elsewhere_meanwhile() -> None:
    """With a table requests begin again, and none of a living home fails."""
    for losses in ((LOST_A,), (BACK_A,)):
        run = lost(*losses, solver="pipeline", changes=TIGHT)
        assert run.scenario.has_table
        report = told(run)
        assert report["restarted_requests"] > 0
        assert report["failed_requests"] == 0


def test_the_report_is_a_file_of_the_format(tmp_path: Path) -> None:
    """Schema and reader know the part; without losses it is not there."""
    trace, cluster = small_trace(), small_cluster(*ROOMY)
    plans, requests = planned(trace, cluster, "exact"), sampled(trace, cluster)
    for lose in ((), (LOST_A,)):
        options = SimulationOptions(lose=lose, timeout_s=0.1)
        result = simulate_placements(plans, requests, trace, cluster, options)
        (tmp_path / "s.json").write_bytes(dump_report(result.to_json()))
        values = read_simulation(tmp_path / "s.json")
        assert values == json.loads(json.dumps(result.to_json()))
        assert ("losses" in values) == ("losses" in values["runs"][0]) == bool(lose)


def test_same_seed_same_report() -> None:
    """A run with losses repeats to the last bit."""
    first, second = (
        lost(BACK_A, Loss("c", 0.9), solver="pipeline", changes=TIGHT).to_json() for _ in range(2)
    )
    assert without_times({"runs": [first]}) == without_times({"runs": [second]})


def test_what_excludes_losses() -> None:
    """Reviews move experts by a plan of their own, and offloading servers help nobody."""
    with pytest.raises(InputError, match=r"^lose: servers are lost while migrate prism moves"):
        SimulationOptions(lose=(LOST_A,), migrate="prism")
    trace, cluster = small_trace(), small_cluster()
    baseline = offload_placement(Instance.build(trace, cluster))
    with pytest.raises(InputError, match="servers are lost beside the baseline offload"):
        simulate_placements(
            [("offload", baseline)], sampled(trace, cluster), trace, cluster,
            SimulationOptions(lose=(LOST_A,)),
        )  # fmt: skip


def test_sweeps_lose_no_servers() -> None:
    """Their tables have no columns for times before, during and after."""
    with pytest.raises(InputError, match=r"^lose: servers are lost in a sweep"):
        SweepOptions(simulation=SimulationOptions(lose=(LOST_A,)))
