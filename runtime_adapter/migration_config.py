"""How experts of a run may move: the rules that placements keep, and what loads the experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate.simulation import SimulationOptions, require_able
from prism_plan.instance import Instance
from prism_plan.model import ModelSpec
from prism_plan.objective import violations
from prism_plan.placement import Placement
from runtime_adapter.control.run_state import SchedulerConfig
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.loader import Loader


@dataclass(frozen=True, eq=False)
class MigrationConfig:
    """The loader of this server, and the scheduler, which the first server of the run starts."""

    loader: Loader
    scheduler: SchedulerConfig


def migration_config(
    loader: Loader,
    rendezvous: Rendezvous,
    placement: Placement,
    model: ModelSpec,
    cluster: Cluster | None,
    options: SimulationOptions,
    placements_dir: str | None,
    *,
    keep_slots: bool = False,
) -> MigrationConfig:
    """Let experts move: by reviews if there is a cluster, or when requested.

    With ``keep_slots`` servers have the slots that they started with, however many the cluster's
    GPUs have room for.

    Raises
    ------
    InputError
        The placement breaks a rule of the cluster.
    Infeasible
        A GPU is too small for what must reside on it.
    UnsupportedFeature
        The migration policy does not support what the cluster asks.
    """
    if cluster is None:
        shape = (placement.num_servers, model.num_layers, model.num_experts)
        instance = Instance(
            model=placement.model,
            servers=placement.servers,
            activations=np.zeros(shape),
            gpu_capacity=placement.gpu_capacity,
            min_replicas=placement.plan.min_replicas,
        )
    else:
        instance = _instance_of_run(placement, cluster, model)
        if keep_slots:
            instance = instance.replace(gpu_capacity=placement.gpu_capacity)
        if options.migrate != "never":
            require_able(instance, options)
    return MigrationConfig(
        loader,
        SchedulerConfig(rendezvous, placement, instance, model, cluster, options, placements_dir),
    )


def _instance_of_run(placement: Placement, cluster: Cluster, model: ModelSpec) -> Instance:
    instance = Instance.of_cluster(cluster, model, min_replicas=placement.plan.min_replicas)
    for violation in violations(placement, instance=instance)[:1]:
        raise InputError(
            violation.message,
            place="servers",
            expected=f"a placement by the rules of {cluster.name}, for moves have to keep them",
            remedy="plan again for this cluster",
        )
    return instance
