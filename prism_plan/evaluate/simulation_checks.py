"""What is checked before a simulation: placements against the cluster, options against both."""

from __future__ import annotations

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import OFFLOAD, Placement
from prism_plan.placement_check import violations
from prism_plan.simulate.network import Network
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.scenario import Scenario
from prism_plan.simulate.timing import timing
from prism_plan.solvers.contract import Feature, Options
from prism_plan.solvers.registry import get_solver, solvers_supporting
from prism_plan.solvers.run import required_features
from prism_plan.trace import Trace

#: More reviews than this are a mistyped interval: they would take longer than the simulation.
MAX_REVIEWS = 100_000


def cluster_rules(trace: Trace, cluster: Cluster) -> Instance:
    """The rules of a cluster, whose figures are checked before any placement.

    Its capacities are those without KV caches, which lie where a placement executes layers.

    Raises
    ------
    InputError
        A figure of the cluster is not a positive number.
    """
    Network.of(cluster, trace.model)
    timing(cluster, trace.model, 1)
    return Instance.of_cluster(cluster, trace.model, reserve_kv=False)


def prepare(
    placement: Placement,
    requests: Requests,
    model: ModelSpec,
    instance: Instance,
    cluster: Cluster,
    options: SimulationOptions,
) -> tuple[Scenario, Instance]:
    """The scenario of a placement, and the rules that migrations from it have to keep.

    ``instance`` and the rules have the capacities without KV caches.

    Raises
    ------
    InputError
        The placement does not fit the cluster.
    """
    offload = placement.plan.solver == OFFLOAD
    if offload and options.lose:
        raise InputError(
            f"servers are lost beside the baseline {OFFLOAD}",
            parameter="lose",
            expected="placements whose servers call each other",
            remedy=f"leave {OFFLOAD} out",
        )
    scenario = Scenario.build(
        placement,
        requests,
        cluster,
        model,
        route=options.route,
        calibration=options.calibration,
        offload=offload,
        restarts=bool(options.lose),
    )
    rules = instance.replace(min_replicas=placement.plan.min_replicas)
    moving = options.migrate != "never" and not offload
    if moving:
        require_supported_migration(rules, options)
    limits = rules.with_execution(placement.execution_table, model)
    for violation in violations(placement, instance=limits):
        if violation.constraint == "capacity":
            raise InputError(
                violation.message,
                place="servers",
                expected=f"experts within the memory that {cluster.name} has for them",
                remedy="plan again for this cluster",
            )
        if moving:
            raise InputError(
                violation.message,
                place="servers",
                expected=f"a placement within the rules of {cluster.name}, "
                "which migrations must keep",
                remedy="plan again for this cluster",
            )
    return scenario, rules


def require_supported_migration(rules: Instance, options: SimulationOptions) -> None:
    """Refuse before a run a migration policy that the first review would refuse.

    Raises
    ------
    UnsupportedFeature
        The policy or its solver does not support a rule of the cluster.
    """
    if options.migrate == "partial":
        if not rules.in_slots:
            raise UnsupportedFeature(
                f"``migrate``: 'partial' does not support {Feature.UNEQUAL_BYTES}; 'prism' does"
            )
        return
    required = required_features(rules, Options(seed=options.seed))
    unsupported = required - get_solver(options.migrate_solver).supports
    if unsupported:
        raise UnsupportedFeature(
            f"``migrate_solver``: {options.migrate_solver!r} does not support "
            f"{' and '.join(sorted(unsupported))}; supported by: "
            f"{', '.join(solvers_supporting(required)) or 'none'}"
        )


def require_few_reviews(options: SimulationOptions, requests: Requests) -> None:
    """Refuse a time between reviews so short that there are too many before the last request.

    Raises
    ------
    InputError
        Names the number of reviews.
    """
    if options.migrate == "never" or not len(requests):
        return
    reviews = float(requests.arrival_s[-1]) / options.migrate_every_s
    if reviews > MAX_REVIEWS:
        raise InputError(
            f"{options.migrate_every_s:g} s: {reviews:,.0f} reviews before the last request",
            parameter="migrate_every_s",
            expected=f"at most {MAX_REVIEWS:,}",
            remedy="review less often",
        )
