"""Tests of phase schedules: the file, and what users ask for in each phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import InputError
from prism_plan.io.phases import parse_schedule, read_schedule
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.arrival_rates import arrival_rates
from prism_plan.simulate.phase_schedule import Phase, Schedule
from prism_plan.trace import Trace

SHIFT = """
[[phase]]
requests = 200
[phase.tasks]
edge-0 = { intent = 1.0 }
[[phase]]
requests = 50
arrival_interval_s = 2.5
[phase.tasks]
edge-0 = { law = 0.25, intent = 0.75 }
edge-1 = { law = 1.0 }
[[phase]]
"""


def test_read_schedule(tmp_path: Path) -> None:
    """Phases keep their order, and what is left out is left out."""
    path = tmp_path / "shift.toml"
    path.write_text(SHIFT)
    assert read_schedule(path) == Schedule(
        (
            Phase(200, {"edge-0": {"intent": 1.0}}),
            Phase(50, {"edge-0": {"law": 0.25, "intent": 0.75}, "edge-1": {"law": 1.0}}, 2.5),
            Phase(),
        ),
        str(path),
    )


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "phase", "no phases"),
        ("phase = 3", "phase", "3; expected tables"),
        ("[[phase]\n", "", "not TOML"),
        ("[[phase]]\n[[phase]]", "phase[0].requests", "only the last phase may leave it out"),
        ("[[phase]]\nrequests = 0", "phase[0].requests", "0; expected at least 1"),
        ("[[phase]]\nrequest = 1", "phase[0]", "did you mean 'requests'"),
        ("[[phases]]", "", "did you mean 'phase'"),
        ("[[phase]]\ntasks = { a = 1 }", "phase[0].tasks.a", "expected a table"),
        ("[[phase]]\ntasks = { a = {} }", "phase[0].tasks.a", "0 entries; expected at least 1"),
        ("[[phase]]\ntasks = { a = { x = 0.5 } }", "phase[0].tasks.a", "shares sum to 0.5"),
        (
            "[[phase]]\ntasks = { a = { x = -1 } }",
            "phase[0].tasks.a.x",
            "-1; expected at least 0",
        ),
        (
            "[[phase]]\narrival_interval_s = 0",
            "phase[0].arrival_interval_s",
            "0; expected at least 1e-12",
        ),
    ],
)
def test_bad_file(text: str, place: str, message: str) -> None:
    """Whatever is wrong is told with file, place, value and expectation."""
    with pytest.raises(InputError, match=message) as caught:
        parse_schedule(text, source="shift.toml")
    assert caught.value.source == "shift.toml"
    assert caught.value.place == place


@pytest.mark.parametrize(
    ("phases", "place"),
    [((), "phase"), ((Phase(0),), "phase[0].requests"), ((Phase(), Phase()), "phase[0].requests")],
    ids=["none", "of-no-request", "endless-first"],
)
def test_impossible_schedule(phases: tuple[Phase, ...], place: str) -> None:
    """Schedules made in Python are checked like those of a file."""
    with pytest.raises(InputError) as caught:
        Schedule(phases)
    assert caught.value.place == place


# -------------------------------------------------------------------------------------- rates

MODEL = ModelSpec(
    name="tiny",
    moe_layers=(1,),
    num_experts=2,
    top_k=1,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)


def trace() -> Trace:
    """Counts of three tasks, the last without tokens."""
    tokens = np.array([4, 4, 0])
    return Trace(MODEL, ("intent", "law", "silent"), tokens[:, None, None] // 2 * [[1, 1]], tokens)


def cluster(*servers: dict[str, object]) -> Cluster:
    gpus = (Gpu(slots=1),)
    made = (Server(f"edge-{n}", gpus, **server) for n, server in enumerate(servers))  # type: ignore[arg-type]
    return Cluster("c", tuple(made))


SITES = (
    {"tasks": {"law": 1.0}, "arrival_interval_s": 10.0},
    {"tasks": {"intent": 0.5, "law": 0.5}, "arrival_interval_s": 20.0},
    {},
)


def test_demand_without_schedule() -> None:
    """One endless phase with what the cluster file says."""
    rates = arrival_rates(trace(), cluster(*SITES))
    assert (rates.first_request.tolist(), rates.max_requests) == ([0], None)
    np.testing.assert_array_equal(rates.shares, [[[0, 1, 0], [0.5, 0.5, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(rates.interval_s, [[10, 20, np.nan]])
    assert [rates.has_users(n) for n in range(3)] == [True, True, False]
    np.testing.assert_allclose(rates.server_rates(), [0.1, 0.05, 0])


def test_demand_by_phase() -> None:
    """Servers that are not named keep their tasks, an interval stays until it is changed."""
    rates = arrival_rates(trace(), cluster(*SITES), parse_schedule(SHIFT))
    assert (rates.first_request.tolist(), rates.max_requests) == ([0, 200, 250], None)
    nobody = [0, 0, 0]
    np.testing.assert_array_equal(
        rates.shares,
        [
            [[1, 0, 0], [0.5, 0.5, 0], nobody],
            [[0.75, 0.25, 0], [0, 1, 0], nobody],
            [[0.75, 0.25, 0], [0, 1, 0], nobody],
        ],
    )
    np.testing.assert_array_equal(rates.interval_s, [[10, 20, np.nan], [2.5] * 3, [2.5] * 3])
    numbers = np.array([0, 199, 200, 249, 250, 10_000])
    assert rates.phase_of(numbers).tolist() == [0, 0, 1, 1, 2, 2]


def test_rate_needs_one_interval() -> None:
    """A change of tasks keeps the rate of requests, a change of intervals has none."""
    sites = cluster(*SITES)
    tasks = Schedule((Phase(5), Phase(tasks={"edge-0": {"intent": 1.0}})))
    np.testing.assert_allclose(arrival_rates(trace(), sites, tasks).server_rates(), [0.1, 0.05, 0])
    assert (
        arrival_rates(trace(), sites, Schedule((Phase(5), Phase(None, {}, 3.0)))).server_rates()
        is None
    )
    from_start = Schedule((Phase(5, {}, 4.0), Phase()))
    np.testing.assert_allclose(
        arrival_rates(trace(), sites, from_start).server_rates(), [0.25, 0.25, 0]
    )


def test_end_of_a_bounded_schedule() -> None:
    """Where the last phase tells its requests, the schedule ends after all of them."""
    rates = arrival_rates(trace(), cluster(*SITES), Schedule((Phase(5), Phase(7))))
    assert (rates.first_request.tolist(), rates.max_requests) == ([0, 5], 12)


@pytest.mark.parametrize(
    ("tasks", "place", "message"),
    [
        ({"edge0": {"law": 1.0}}, "phase[1].tasks", "did you mean 'edge-0'"),
        ({"edge-0": {"lav": 1.0}}, "phase[1].tasks.edge-0", "did you mean 'law'"),
        ({"edge-0": {"silent": 1.0}}, "phase[1].tasks.edge-0", "has no tokens"),
        ({"edge-2": {"law": 1.0}}, "phase[1].tasks.edge-2", "no requests before this phase"),
    ],
    ids=["server", "task", "no-tokens", "late-users"],
)
def test_unknown_names(tasks: dict[str, dict[str, float]], place: str, message: str) -> None:
    """Names that cluster or trace do not have are told with the schedule's file and place."""
    schedule = Schedule((Phase(5), Phase(tasks=tasks)), "shift.toml")
    with pytest.raises(InputError, match=message) as caught:
        arrival_rates(trace(), cluster(*SITES), schedule)
    assert (caught.value.source, caught.value.place) == ("shift.toml", place)


def test_users_by_the_first_phase() -> None:
    """A server without tasks in the cluster file may get them in the first phase."""
    schedule = Schedule((Phase(5, {"edge-2": {"law": 1.0}}, 1.0), Phase()))
    assert arrival_rates(trace(), cluster(*SITES), schedule).has_users(2)
