"""Comparisons: the same requests for all, and nothing planned on what is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.evaluate.comparison import compare
from prism_plan.evaluate.simulation import simulate_placements
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.objective import score, step_score
from prism_plan.simulate.sampling import sample_requests
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
    """Rows come in the order of the solvers; none beats `exact` on what it was planned on.

    Two of them follow with their layers where the experts are, and the pipeline.
    """
    result = compare(trace, cluster)
    tables = ["layer-partition+paths", "exact+paths", "pipeline", "latency"]
    assert [row.name for row in result.rows] == [*SOLVER_NAMES, *tables]
    shares = {row.name: row.remote.share for row in result.rows if row.remote}
    shares = {name: share for name, share in shares.items() if name not in tables}
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


def arriving(cluster: Cluster) -> Cluster:
    """With a request of each server every ten seconds."""
    servers = tuple(replace(server, arrival_interval_s=10.0) for server in cluster.servers)
    return replace(cluster, servers=servers)


def test_latencies_are_those_of_the_simulator(trace: Trace, cluster: Cluster) -> None:
    """On held-out requests, the same for all rows, `simulate` gives the same times.

    The mean is over three samples of different seeds; intervals are of the difference to the least.
    """
    cluster = arriving(cluster)
    names = ["uniform", "layer-partition+paths", "pipeline"]
    compared = compare(
        trace, cluster, solvers=names, holdout=0.5, options=Options(seed=3), requests_per_server=30
    )
    assert compared.simulated_requests == 30
    planned, held = trace.split(0.5, seed=3)
    instance = Instance.build(planned, cluster)
    placements = [(name, solve(instance, name, Options(seed=3))) for name in names]
    samples = []
    for seed in (3, 4, 5):
        requests = sample_requests(held, cluster, requests_per_server=30, seed=seed)
        report = simulate_placements(placements, requests, held, cluster).to_json()
        samples.append(report["runs"])
    rows = [row.to_json() for row in compared.rows]
    for index, found in enumerate(rows):
        for key, of in (("latency_mean_s", "latency_s"), ("ttft_mean_s", "ttft_s")):
            mean = sum(runs[index][of]["mean"] for runs in samples) / 3
            assert found[key] == pytest.approx(mean, rel=1e-12)
        # every request has as many tokens that are timed in each sample
        tpot_s = sum(runs[index]["tpot_s"]["mean"] for runs in samples) / 3
        assert found["user_tokens_per_s"] == pytest.approx(1 / tpot_s, rel=1e-12)
    best = min(rows, key=lambda row: row["latency_mean_s"])
    assert best["latency_above_best_low"] is best["latency_above_best_high"] is None
    for row in rows:
        if row is not best:
            above = row["latency_mean_s"] / best["latency_mean_s"] - 1
            assert row["latency_above_best_low"] <= above <= row["latency_above_best_high"]


def test_where_nothing_is_simulated(
    trace: Trace, cluster: Cluster, slots_cluster: Callable[..., Cluster]
) -> None:
    """Asked for none, without arrival rates, and of a placement that breaks a constraint."""

    def latency(where: Cluster, **more: Any) -> list[float | None]:
        rows = compare(trace, where, solvers=["exact"], **more).rows
        return [row.to_json()["latency_mean_s"] for row in rows]

    known = arriving(cluster)
    assert latency(known)[0] is not None
    assert latency(known, requests_per_server=0) == [None]
    servers = (known.servers[0], cluster.servers[1])
    assert latency(replace(cluster, servers=servers)) == [None]
    big = solve(Instance.build(trace, slots_cluster(["x", "y"], [[16], [16, 16]])), "exact")
    assert latency(known, placements=[("big", big)])[1] is None


def test_a_pipeline_that_does_not_fit_is_a_note(
    trace: Trace, slots_cluster: Callable[..., Cluster]
) -> None:
    """Servers too small for whole layers have plans of experts all the same."""
    small = slots_cluster(["x", "y"], [[9], [7]])
    rows = {row.name: row for row in compare(trace, small).rows}
    assert "all 2 layers: they hold 1 whole layer" in rows["pipeline"].note
    assert rows["exact"].remote is not None
    with pytest.raises(Infeasible, match="whole layer"):
        compare(trace, small, solvers=["pipeline"])
