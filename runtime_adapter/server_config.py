"""How a server takes part in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prism_plan.model import ModelShape
from prism_plan.placement import Placement
from prism_plan.simulate.network import Network
from prism_plan.simulate.routing_policies import Route
from runtime_adapter.migration_config import MigrationConfig
from runtime_adapter.moe.compute import Compute
from runtime_adapter.transport.nccl_channel import ChannelConfig
from runtime_adapter.transport.rendezvous import Rendezvous


@dataclass(frozen=True, eq=False)
class ServerConfig:
    """The configuration of a server, for its driver and its worker.

    ``facts`` must be equal on all servers (placement digest, route, ...). Hidden states on the wire
    have ``width`` numbers of ``dtype`` a token (``torch.uint8`` where nothing is computed);
    ``max_tokens`` of this server's own steps; ``num_lanes`` requests at once; ``threads`` of the
    CPU that the worker may use for a call; ``migration`` where experts may move, ``channels`` where
    states do not travel by gloo.
    """

    rendezvous: Rendezvous
    placement: Placement
    model: ModelShape
    network: Network
    compute: Compute
    facts: dict[str, Any]
    dtype: torch.dtype
    width: int
    max_tokens: int
    route: Route = "cover"
    num_lanes: int = 1
    rtt_s: float = 0.0
    threads: int = 1
    migration: MigrationConfig | None = None
    channels: ChannelConfig | None = None
