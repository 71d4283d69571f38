"""Compares solvers and existing placements by their scores on the same requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.evaluate.few_requests import few_requests
from prism_plan.evaluate.paired_bootstrap import Interval, relative_difference
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec, require_same_model
from prism_plan.objective import RemoteScore, StepScore, largest_share, score, step_scores
from prism_plan.placement import Placement
from prism_plan.placement_check import violations
from prism_plan.simulate.report import time_per_output_token, user_tokens_per_s
from prism_plan.simulate.sampling import sample_requests, sample_seeds
from prism_plan.simulate.short_run import short_run
from prism_plan.solvers import PATHS, SOLVER_NAMES, TABLE_SOLVERS, Options, plans_tables, solve
from prism_plan.token_rates import TokenRates, expected_token_rates, request_rates
from prism_plan.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

#: Solvers of a comparison that names none: all of them, and two with the layers where they lie.
DEFAULT_SOLVERS = (*SOLVER_NAMES, "layer-partition" + PATHS, "exact" + PATHS, *TABLE_SOLVERS)
#: Simulated requests of each server in a sample, and samples of different seeds.
SIMULATED_REQUESTS, SAMPLES = 20, 3
#: `ilp` is left out of a comparison of all solvers beyond so many (server, expert) pairs.
ILP_PAIRS = 50_000


@dataclass(frozen=True, eq=False)
class LatencyScore:
    """Seconds of the requests of short simulations: mean, 95th percentile, mean to first token.

    ``user_tokens_per_s`` are the output tokens a second after the first
    (:func:`prism_plan.simulate.report.user_tokens_per_s`), ``None`` where no request has a second.
    ``above_best`` is the interval of the relative difference to the placement of the least mean,
    ``None`` for that one: 0.1 is ten percent slower.
    """

    mean_s: float
    p95_s: float
    ttft_mean_s: float
    user_tokens_per_s: float | None
    above_best: Interval | None = None


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """One placement of a comparison, or the reason why there is none (``note``).

    Scores are on the scored requests; ``planned_share`` is the remote share on the requests that
    the solver planned with. ``latency`` is missing where nothing was simulated, and of placements
    that break a constraint.
    """

    name: str
    placement: Placement | None = None
    remote: RemoteScore | None = None
    steps: StepScore | None = None
    planned_share: float | None = None
    latency: LatencyScore | None = None
    violations: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json`` and plots."""
        remote, steps, placement, latency = self.remote, self.steps, self.placement, self.latency
        servers = placement.servers if placement else ()
        above = latency.above_best if latency else None
        worst_remote = largest_share(remote.by_server) if remote else None
        worst_waiting = largest_share(steps.waiting_by_server) if steps else None
        return {
            "name": self.name,
            "solver": placement.plan.solver if placement else None,
            "remote_share": remote.share if remote else None,
            "worst_server": servers[worst_remote[0]] if worst_remote else None,
            "worst_server_share": worst_remote[1] if worst_remote else None,
            "waiting_share": steps.waiting_share if steps else None,
            "worst_waiting_server": servers[worst_waiting[0]] if worst_waiting else None,
            "worst_waiting_share": worst_waiting[1] if worst_waiting else None,
            "destinations": steps.mean_destinations if steps else None,
            "destinations_method": _destinations_method(steps),
            "remote_share_by_server": (
                dict(zip(servers, remote.by_server, strict=True)) if remote else None
            ),
            "waiting_share_by_server": (
                dict(zip(servers, steps.waiting_by_server, strict=True)) if steps else None
            ),
            "planned_share": self.planned_share,
            "latency_mean_s": latency.mean_s if latency else None,
            "latency_p95_s": latency.p95_s if latency else None,
            "ttft_mean_s": latency.ttft_mean_s if latency else None,
            "user_tokens_per_s": latency.user_tokens_per_s if latency else None,
            "latency_above_best_low": above.low if above else None,
            "latency_above_best_high": above.high if above else None,
            "bound": placement.plan.bound if placement else None,
            "termination": placement.plan.termination if placement else None,
            "runtime_s": placement.plan.runtime_s if placement else None,
            "violations": self.violations,
            "note": self.note,
        }


def _destinations_method(steps: StepScore | None) -> str | None:
    if steps is None:
        return None
    if steps.greedy_share == 0:
        return "exact"
    return f"greedy in {steps.greedy_share:.1%} of steps"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The rows of a comparison, and the inputs that they were scored on."""

    rows: tuple[ComparisonRow, ...]
    trace: str
    cluster: str
    kind: str
    planned_requests: int | None
    scored_requests: int | None
    holdout: float | None
    seed: int
    min_replicas: int
    simulated_requests: int | None = None
    simulated_samples: int | None = None
    #: Why mean times may not hold for other requests, or empty.
    few_requests: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, format ``prism-plan/comparison`` version 1."""
        return {
            "format": "prism-plan/comparison",
            "version": 1,
            "trace": self.trace,
            "cluster": self.cluster,
            "kind": self.kind,
            "holdout": self.holdout,
            "planned_requests": self.planned_requests,
            "scored_requests": self.scored_requests,
            "seed": self.seed,
            "min_replicas": self.min_replicas,
            "simulated_requests": self.simulated_requests,
            "simulated_samples": self.simulated_samples,
            "rows": [row.to_json() for row in self.rows],
        }

    def to_frame(self, level: str = "placement") -> pd.DataFrame:
        """One row a placement, or with ``level`` "server" a placement and server.

        Columns and errors are those of :func:`prism_plan.comparison_frame`.
        """
        from prism_plan.evaluate.data_frames import comparison_frame

        return comparison_frame(self.to_json(), level)


def compare(
    trace: Trace,
    cluster: Cluster,
    *,
    solvers: Sequence[str] | None = None,
    placements: Sequence[tuple[str, Placement]] = (),
    holdout: float | None = None,
    min_replicas: int = 1,
    options: Options | None = None,
    requests_per_server: int = SIMULATED_REQUESTS,
    progress: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Plan with each solver, and score the results and existing placements alike.

    With ``holdout`` the solvers plan on one part of each task's requests and all placements are
    scored on the rest. ``solvers`` of ``None`` are :data:`DEFAULT_SOLVERS`, without `ilp` where it
    would take minutes. Latencies are those of :data:`SAMPLES` simulations of
    ``requests_per_server`` requests of each server with users, the same for all placements; 0, or
    a server without ``arrival_interval_s``: nothing is simulated.

    Raises
    ------
    InputError
        An unknown solver, a placement of other servers or of another model, a trace that cannot
        be split.
    Infeasible
        No placement satisfies the cluster.
    """
    options = options or Options()
    planned, scored = (trace, trace) if holdout is None else trace.split(holdout, options.seed)
    names = DEFAULT_SOLVERS if solvers is None else tuple(solvers)
    at_home = not all(map(plans_tables, names)) or bool(placements)
    instance = Instance.build(planned, cluster, min_replicas=min_replicas, reserve_kv=at_home)
    target = Instance.build(scored, cluster, min_replicas=min_replicas, reserve_kv=False)
    token_rates = expected_token_rates(scored, cluster)
    rows: list[ComparisonRow] = []
    for name in names:
        pairs = instance.num_servers * instance.model.num_pairs
        if solvers is None and name == "ilp" and pairs > ILP_PAIRS:
            note = f"left out beyond {ILP_PAIRS:,} pairs; it runs where ``solvers`` names it"
            rows.append(ComparisonRow(name, note=note))
            continue
        progress(name)
        try:
            placement = solve(instance, name, options)
        except (UnsupportedFeature, Infeasible) as error:
            places_experts = name in SOLVER_NAMES and isinstance(error, Infeasible)
            if places_experts or (solvers is not None and len(solvers) == 1):
                raise
            rows.append(ComparisonRow(name, note=str(error)))
            continue
        rows.append(_score_row(name, placement, target, trace.model))
    for name, placement in placements:
        progress(name)
        require_same_model(placement.model, trace.model, source=name, other=trace.name)
        if placement.servers != instance.servers:
            raise InputError(
                f"servers {', '.join(placement.servers)}",
                source=name,
                place="servers",
                expected=f"those of {cluster.name}, in order: {', '.join(instance.servers)}",
            )
        rows.append(_score_row(name, placement, target, trace.model))
    rows = _score_steps(rows, scored, token_rates)
    simulated = None if request_rates(cluster) is None else requests_per_server or None
    if simulated is not None:
        rows = _score_latency(rows, scored, cluster, simulated, options.seed)
    return Comparison(
        rows=tuple(rows),
        trace=trace.name,
        cluster=cluster.name,
        kind=trace.kind,
        planned_requests=None if planned.requests is None else int(planned.requests.sum()),
        scored_requests=None if scored.requests is None else int(scored.requests.sum()),
        holdout=holdout,
        seed=options.seed,
        min_replicas=min_replicas,
        simulated_requests=simulated,
        simulated_samples=None if simulated is None else SAMPLES,
        few_requests="" if simulated is None else few_requests(scored, cluster),
    )


def _score_row(
    name: str, placement: Placement, target: Instance, model: ModelSpec
) -> ComparisonRow:
    planned_for = target.with_execution(placement.execution_table, model)
    return ComparisonRow(
        name=name,
        placement=placement,
        remote=score(placement, target),
        planned_share=placement.plan.remote_share,
        violations=len(violations(placement, instance=planned_for)),
    )


def _score_steps(
    rows: Sequence[ComparisonRow], scored: Trace, token_rates: TokenRates
) -> list[ComparisonRow]:
    """The rows with step scores of their placements, where ``scored`` is token-level."""
    if scored.kind == "counts":
        return list(rows)
    placed = [row.placement for row in rows if row.placement is not None]
    scores = iter(step_scores(placed, scored, token_rates))
    return [
        row if row.placement is None else dataclasses.replace(row, steps=next(scores))
        for row in rows
    ]


def _score_latency(
    rows: Sequence[ComparisonRow], scored: Trace, cluster: Cluster, number: int, seed: int
) -> list[ComparisonRow]:
    """The rows with latencies of their placements, all on the same simulated requests."""
    placed = {
        index: row.placement
        for index, row in enumerate(rows)
        if row.placement is not None and not row.violations
    }
    samples: dict[int, list[npt.NDArray[np.float64]]] = {index: [] for index in placed}
    for own_seed in sample_seeds(seed, SAMPLES):
        requests = sample_requests(scored, cluster, requests_per_server=number, seed=own_seed)
        for index, placement in placed.items():
            outcome = short_run(placement, requests, cluster, scored.model)
            latency_s, ttft_s = (
                outcome.done_s - requests.arrival_s,
                outcome.first_token_s - requests.arrival_s,
            )
            tpot_s = time_per_output_token(requests, outcome)
            samples[index].append(np.stack([latency_s, ttft_s, tpot_s]))
    times = {index: np.stack(parts, axis=1) for index, parts in samples.items()}
    best = min(times, key=lambda index: float(times[index][0].mean()), default=None)
    found = list(rows)
    for index, (latency_s, ttft_s, tpot_s) in times.items():
        above = None
        if best is not None and index != best:
            above = relative_difference(latency_s, times[best][0], seed)
        score_of_row = LatencyScore(
            mean_s=float(latency_s.mean()),
            p95_s=float(np.percentile(latency_s, 95)),
            ttft_mean_s=float(ttft_s.mean()),
            user_tokens_per_s=user_tokens_per_s(tpot_s),
            above_best=above,
        )
        found[index] = dataclasses.replace(rows[index], latency=score_of_row)
    return found
