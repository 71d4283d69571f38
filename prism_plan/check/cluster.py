"""Whether any solver can plan for a cluster: with a trace, with a model alone, or with neither."""

from __future__ import annotations

import dataclasses

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError, LimitReached
from prism_plan.input_limits import MAX_EXPERTS
from prism_plan.instance import Instance
from prism_plan.instance_feasibility import explain_infeasible, first_fit, require_feasible
from prism_plan.model_spec import ModelSpec
from prism_plan.solvers.contract import Options
from prism_plan.solvers.registry import get_solver
from prism_plan.token_rates import require_users
from prism_plan.trace import Trace

#: Seconds for the proof that experts of unequal size do, or do not, pack onto the GPUs.
PACKING_LIMIT_S = 60.0
#: Without a model, rules are followed up to so many (server, layer, expert) triples.
MAX_TRIPLES = 10_000_000


def require_plannable(
    cluster: Cluster, *, trace: Trace | None = None, model: ModelSpec | None = None
) -> tuple[str, ...]:
    """Refuse a cluster that every solver refuses, with the error of `solve`.

    With a trace that is what `solve` refuses with it; with a model what it refuses whatever the
    trace of that model is; with neither what it refuses whatever the trace is.

    Returns
    -------
    tuple of str
        What could not be decided.

    Raises
    ------
    InputError
        Nobody asks for an expert, or as :meth:`prism_plan.instance.Instance.build`.
    Infeasible
        No placement satisfies the cluster.
    """
    if trace is not None:
        return require_feasible_placement(Instance.build(trace, cluster))
    require_users(cluster)
    if model is not None:
        return require_feasible_placement(Instance.of_cluster(cluster, model))
    smallest = _smallest_model(cluster)
    if cluster.num_servers * smallest.num_pairs > MAX_TRIPLES:
        return ("pin and forbid not followed: that needs a trace or a model",)
    try:
        return require_feasible_placement(Instance.of_cluster(cluster, smallest))
    except Infeasible as error:
        raise Infeasible(
            f"whatever the model is, {error.constraint}",
            shortfall=error.shortfall,
            unit=error.unit,
            remedy=error.remedy,
        ) from error


def require_feasible_placement(instance: Instance) -> tuple[str, ...]:
    """Refuse an instance that no placement satisfies; gives what could not be decided.

    Raises
    ------
    Infeasible
        The constraint and the shortfall.
    """
    require_feasible(instance)
    if instance.in_slots:
        if instance.has_rules:
            explain_infeasible(instance)
        return ()
    if first_fit(instance):
        return ()
    idle = instance.replace(activations=0 * instance.activations)
    try:
        get_solver("ilp")(idle, Options(time_limit_s=PACKING_LIMIT_S))
    except LimitReached:
        return (
            f"whether whole experts pack onto the GPUs was not decided in {PACKING_LIMIT_S:g} s",
        )
    return ()


def _smallest_model(cluster: Cluster) -> ModelSpec:
    """The smallest model that has the layers and experts that pin and forbid name.

    What no placement of it satisfies, none of a larger model does: leave out the other experts.

    Raises
    ------
    InputError
        No model has such a layer or expert.
    """
    layers, experts = {0}, 1
    named = set()
    for n, server in enumerate(cluster.servers):
        for key in ("pin", "forbid"):
            for layer, expert in getattr(server, key):
                place = f"server[{n}].{key}"
                if layer >= 2**31:
                    raise InputError(f"layer {layer}", place=place, expected="at most 2**31 - 1")
                if expert >= MAX_EXPERTS:
                    raise InputError(
                        f"expert {expert}", place=place, expected=f"at most {MAX_EXPERTS - 1}"
                    )
                named.add(layer)
                experts = max(experts, expert + 1)
    return dataclasses.replace(
        _ONE_EXPERT,
        moe_layers=tuple(sorted(named or layers)),
        num_experts=experts,
        num_decoder_layers=0,  # as many as that needs
    )


_ONE_EXPERT = ModelSpec(
    name="smallest",
    moe_layers=(0,),
    num_experts=1,
    top_k=1,
    hidden_size=1,
    dtype_bytes=1,
    expert_bytes=1,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
