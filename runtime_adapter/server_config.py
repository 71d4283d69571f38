"""How a server takes part in a run, and how the experts of the run may move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.evaluate.simulation_checks import require_supported_migration
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape, ModelSpec
from prism_plan.placement import Placement
from prism_plan.placement_check import violations
from prism_plan.simulate.network import Network
from prism_plan.simulate.routing_policies import Route
from runtime_adapter.control.scheduler_config import SchedulerConfig
from runtime_adapter.control.store.client import StoreAddress
from runtime_adapter.log_output import Format, Level
from runtime_adapter.moe.compute import Compute
from runtime_adapter.transport.nccl_channel import ChannelConfig
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.loader_interface import Loader


@dataclass(frozen=True, eq=False)
class MigrationConfig:
    """The loader of this server, and what the run's scheduler is given.

    Without a ``scheduler`` nothing moves, and no loss is repaired; ``movable`` is whether the
    command `move` is accepted.
    """

    loader: Loader
    scheduler: SchedulerConfig | None = None
    movable: bool = False


@dataclass(frozen=True)
class OwnStoreConfig:
    """Options of a store that a server starts; ``trace`` is a file, for reviews of tables."""

    secret_file: str | None = None
    insecure: bool = False
    placements_dir: str | None = None
    trace: str | None = None


@dataclass(frozen=True, eq=False)
class ServerConfig:
    """The configuration of a server, for its driver and its worker.

    ``facts`` must be equal on all servers (placement digest, route, ...). Hidden states on the wire
    have ``width`` numbers of ``dtype`` a token (``torch.uint8`` where nothing is computed);
    ``max_tokens`` of this server's own steps, which wait for other servers for up to
    ``request_timeout_s``; ``kv_tokens`` bound the tokens that requests of a home have in flight, by
    its name; prompts of more than ``chunk_tokens`` go through the model in chunks (0: whole);
    ``num_lanes`` requests at once; ``threads`` of the CPU that the worker may use for a call;
    ``channels`` where states do not travel with the messages. ``store`` is how this server starts
    the run's store, if it is the one to do so.
    """

    rendezvous: Rendezvous
    placement: Placement
    model: ModelShape
    network: Network
    compute: Compute
    migration: MigrationConfig
    facts: dict[str, Any]
    dtype: torch.dtype
    width: int
    max_tokens: int
    kv_tokens: Mapping[str, int] = field(default_factory=dict)
    chunk_tokens: int = 0
    route: Route = "cover"
    num_lanes: int = 1
    rtt_s: float = 0.0
    request_timeout_s: float = 600.0
    threads: int = 1
    channels: ChannelConfig | None = None
    store: OwnStoreConfig = OwnStoreConfig()
    log_level: Level = "info"
    log_format: Format = "text"

    @property
    def store_address(self) -> StoreAddress:
        """Where the store of the run is."""
        rendezvous = self.rendezvous
        return StoreAddress(rendezvous.host, rendezvous.port, rendezvous.secret)

    @property
    def name(self) -> str:
        """The name of the server."""
        return self.placement.servers[self.rendezvous.rank]


def kv_tokens_of_run(placement: Placement, cluster: Cluster | None) -> dict[str, int]:
    """Tokens in flight for which the run has memory, by home: the plan's, or the cluster file's.

    Plans without a table have none of their own.
    """
    if placement.kv_tokens or cluster is None:
        return dict(placement.kv_tokens)
    return {server.name: server.kv_tokens for server in cluster.servers if server.kv_tokens}


def migration_config(
    loader: Loader,
    placement: Placement,
    model: ModelSpec,
    cluster: Cluster | None,
    options: SimulationOptions,
    timeout_s: float,
    *,
    movable: bool = False,
    keep_slots: bool = False,
) -> MigrationConfig:
    """How experts move: when a loss is repaired, by reviews if there is a cluster, or on request.

    With ``keep_slots`` servers have the slots that they started with, however many the cluster's
    GPUs have room for. Without reviews and requests the placement's own slots are all that counts.

    Raises
    ------
    InputError
        The placement breaks a rule of the cluster.
    Infeasible
        A GPU is too small for what must reside on it.
    UnsupportedFeature
        The migration policy does not support what the cluster asks.
    """
    kv_tokens = kv_tokens_of_run(placement, cluster)
    if not movable and options.migrate == "never":
        cluster = None
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
            require_supported_migration(instance, options)
    scheduler = SchedulerConfig(
        placement, instance, model, cluster, options, timeout_s, kv_tokens=kv_tokens
    )
    return MigrationConfig(loader, scheduler, movable)


def _instance_of_run(placement: Placement, cluster: Cluster, model: ModelSpec) -> Instance:
    instance = Instance.of_cluster(
        cluster, model, min_replicas=placement.plan.min_replicas,
        execution=placement.execution_table,
    )  # fmt: skip
    for violation in violations(placement, instance=instance)[:1]:
        raise InputError(
            violation.message,
            place="servers",
            expected=f"a placement within the rules of {cluster.name}, which migrations must keep",
            remedy="plan again for this cluster",
        )
    return instance
