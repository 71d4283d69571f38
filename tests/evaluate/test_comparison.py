"""Comparisons: the same requests for all, and nothing planned on what is scored."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.evaluate.comparison import compare
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.objective import score, step_score
from prism_plan.solvers import SOLVER_NAMES, Options, solve
from prism_plan.token_rates import expected_token_rates
from prism_plan.trace import Trace
from tests.profiling.synthetic import synthetic_trace

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=8,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Two tasks with six requests each."""
    return synthetic_trace(SPEC, ["x", "y"], requests=6, seed=2)


@pytest.fixture
def cluster(slots_cluster: Callable[..., Cluster]) -> Cluster:
    """Two servers, one task each."""
    return slots_cluster(["x", "y"], [[9], [6, 4]])


def test_every_solver_has_a_row(trace: Trace, cluster: Cluster) -> None:
    """Rows come in the order of the solvers; none beats `exact` on what it was planned on."""
    result = compare(trace, cluster)
    assert [row.name for row in result.rows] == list(SOLVER_NAMES)
    shares = {row.name: row.remote.share for row in result.rows if row.remote}
    assert min(shares.values()) == pytest.approx(shares["exact"], abs=1e-12)


def test_holdout_scores_on_other_requests(trace: Trace, cluster: Cluster) -> None:
    """The planned share is of the planning part, the scores are of the rest alone."""
    result = compare(trace, cluster, solvers=["prism"], holdout=0.5, options=Options(seed=3))
    planned, held = trace.split(0.5, seed=3)
    placement = solve(Instance.build(planned, cluster), "prism")
    row = result.rows[0]
    assert row.planned_share == placement.plan.remote_share
    assert row.remote is not None
    assert row.remote.share == score(placement, Instance.build(held, cluster)).share
    assert row.steps is not None
    token_rates = expected_token_rates(held, cluster)
    assert row.steps.waiting_share == step_score(placement.local, held, token_rates).waiting_share
    assert (result.planned_requests, result.scored_requests) == (6, 6)


def test_existing_placements_are_scored_alike(trace: Trace, cluster: Cluster) -> None:
    """A placement from a file gets the very scores of the solver that made it."""
    placement = solve(Instance.build(trace, cluster), "eplb")
    result = compare(trace, cluster, solvers=["eplb"], placements=[("old.json", placement)])
    first, second = (row.to_json() for row in result.rows)
    assert second["name"] == "old.json"
    same = [key for key in first if key not in ("name", "runtime_s")]
    assert {k: first[k] for k in same} == {k: second[k] for k in same}


def test_an_existing_placement_that_does_not_fit_says_so(
    trace: Trace, cluster: Cluster, slots_cluster: Callable[..., Cluster]
) -> None:
    """Violations against the cluster are counted; other servers are refused."""
    big = slots_cluster(["x", "y"], [[16], [16, 16]])
    placement = solve(Instance.build(trace, big), "exact")
    row = compare(trace, cluster, solvers=[], placements=[("big.json", placement)]).rows[0]
    assert row.violations > 0
    three = slots_cluster(["x", "y", "y"], [[16], [16], [16]])
    other = solve(Instance.build(trace, three), "exact")
    with pytest.raises(InputError, match="servers"):
        compare(trace, cluster, solvers=[], placements=[("other.json", other)])


def test_refusals_are_notes(trace: Trace, cluster: Cluster) -> None:
    """Asked for replicas, solvers without a rule have a note instead of a score."""
    result = compare(trace, cluster, min_replicas=1)
    assert all(row.note == "" for row in result.rows)
    wide = compare(trace, cluster, solvers=["prism", "exact"], min_replicas=1)
    assert [row.note for row in wide.rows] == ["", ""]
    with pytest.raises(UnsupportedFeature):
        compare(trace, cluster, solvers=["prism"], min_replicas=2)


def test_counts_only_has_no_waiting(
    mixtral_trace: Trace, slots_cluster: Callable[..., Cluster]
) -> None:
    """Counts score remote shares; waiting and destinations stay empty, a holdout is refused."""
    cluster = slots_cluster(["college_medicine", "international_law"], [[140], [140]])
    row = compare(mixtral_trace, cluster, solvers=["exact"]).rows[0].to_json()
    assert row["waiting_share"] is None
    assert row["destinations"] is None
    with pytest.raises(InputError, match="counts-only"):
        compare(mixtral_trace, cluster, solvers=["exact"], holdout=0.5)


def test_worst_server_stands_beside_the_sum(trace: Trace, cluster: Cluster) -> None:
    """The worst server's share is the largest of all servers' shares."""
    row = compare(trace, cluster, solvers=["prism"]).rows[0].to_json()
    shares = row["remote_share_by_server"]
    assert row["worst_server_share"] == max(shares.values())
    assert shares[row["worst_server"]] == row["worst_server_share"]
    assert row["worst_waiting_share"] == max(row["waiting_share_by_server"].values())
