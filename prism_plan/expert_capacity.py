"""How much of each GPU's memory is left for routed experts (docs/design.md, section 1, "slots")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, Server
from prism_plan.errors import Infeasible, InputError
from prism_plan.model_spec import ModelSpec


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes on one GPU that are not routed experts: dense part, KV cache and reserve."""

    dense: int
    kv: int
    reserve: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.dense + self.kv + self.reserve


def kv_bytes(
    cluster: Cluster, model: ModelSpec, execution: npt.NDArray[np.int32] | None = None
) -> tuple[int, ...]:
    """Bytes that each server keeps for the KV caches of the layers that it executes, [N].

    Each home's ``kv_tokens`` are kept where its decoder layers execute, by an execution table
    int32 [N, L]; rounded up once a server. Without a table all execute at home. While requests run
    on several tables, int32 [tables, N, L], a home's tokens may all be on the one with the most of
    its layers at a server.
    """
    if execution is None:
        return tuple(server.kv_tokens * model.kv_bytes_per_token for server in cluster.servers)
    tables = execution.reshape(-1, *execution.shape[-2:])
    executed = [decoder_layers_at(model, table) for table in tables]
    token_layers = [0] * cluster.num_servers
    for n, server in enumerate(cluster.servers):
        for m in {m for by_home in executed for m in by_home[n]}:
            token_layers[m] += server.kv_tokens * max(by_home[n].get(m, 0) for by_home in executed)
    return tuple(cache_bytes(model, kept) for kept in token_layers)


def cache_bytes(model: ModelSpec, token_layers: int) -> int:
    """Bytes of the KV caches of so many tokens times decoder layers, rounded up."""
    return -(-token_layers * model.kv_bytes_per_token // model.num_decoder_layers)


def decoder_layers_at(model: ModelSpec, execution: npt.NDArray[np.int32]) -> list[dict[int, int]]:
    """How many decoder layers each server executes for requests of each home server, [N].

    By an execution table int32 [N, L]; servers that execute none are left out.
    """
    found: list[dict[int, int]] = []
    for row in execution.tolist():
        executed: dict[int, int] = {}
        for m, layers in zip(row, model.decoder_layers_by_layer, strict=True):
            executed[m] = executed.get(m, 0) + layers
        found.append(executed)
    return found


def resident_bytes(
    model: ModelSpec, server: Server, gpu: int, kv: int | None = None
) -> ResidentBytes:
    """Bytes that one GPU of a server holds besides routed experts.

    ``kv`` are those of the server's KV caches; by default of its own users' whole requests.
    """
    holds_dense = gpu == server.dense_gpu
    if kv is None:
        kv = server.kv_tokens * model.kv_bytes_per_token
    return ResidentBytes(
        dense=model.dense_bytes if holds_dense else 0,
        kv=kv if holds_dense else 0,
        reserve=server.gpus[gpu].reserve_bytes,
    )


def bytes_for_experts(model: ModelSpec, server: Server, gpu: int, kv: int | None = None) -> int:
    """Bytes that are left on one GPU of a server for routed experts.

    Raises
    ------
    Infeasible
        The GPU is too small for what must reside on it.
    """
    resident = resident_bytes(model, server, gpu, kv)
    usable = server.gpus[gpu].usable_bytes
    left = usable - resident.total
    if left < 0:
        held = "the dense part" if resident.total > resident.reserve else "its reserve"
        lower = ""
        if resident.kv:
            held, lower = "the dense part and KV caches", ", or lower kv_tokens"
        raise Infeasible(
            f"server {server.name!r} gpu[{gpu}]: {usable:,} usable bytes do not hold {held} of "
            f"{resident.total:,} bytes",
            shortfall=-left,
            unit="bytes",
            remedy=f"raise memory_gb or memory_fraction, or put dense = true on another GPU{lower}",
        )
    return left


def gpu_capacity(
    cluster: Cluster, model: ModelSpec, execution: npt.NDArray[np.int32] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Capacity of each server's GPUs for experts: a number of them ("slots"), or bytes.

    KV caches lie where layers execute, by an execution table int32 [N, L] or several: see
    :func:`kv_bytes`. Bytes where experts differ in size by layer. Slots are rounded down for each
    GPU: two halves of an expert on two GPUs are no expert.

    Raises
    ------
    InputError
        The cluster gives slots though experts differ in size.
    Infeasible
        A GPU is too small for what must reside on it.
    """
    require_memory_for_unequal(cluster, model)
    return capacity_with_kv(cluster, model, kv_bytes(cluster, model, execution))


def require_memory_for_unequal(cluster: Cluster, model: ModelSpec) -> None:
    """Refuse slots where experts differ in size by layer, for a number of them says nothing then.

    Raises
    ------
    InputError
        Names the first GPU that gives slots.
    """
    for n, server in enumerate(cluster.servers):
        for g, gpu in enumerate(server.gpus):
            if gpu.slots is not None and not model.equal_expert_bytes:
                raise InputError(
                    f"slots = {gpu.slots}",
                    place=f"server[{n}].gpu[{g}]",
                    expected="memory_gb, for experts of this model differ in size by layer",
                )


def capacity_with_kv(
    cluster: Cluster, model: ModelSpec, kv: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """As :func:`gpu_capacity`, with so many bytes for the KV caches of each server [N]."""
    return tuple(
        server_capacity(model, server, own) for server, own in zip(cluster.servers, kv, strict=True)
    )


def server_capacity(model: ModelSpec, server: Server, kv: int) -> tuple[int, ...]:
    """As :func:`gpu_capacity`, of one server with so many bytes for its KV caches.

    Raises
    ------
    Infeasible
        A GPU is too small for what must reside on it.
    """
    unit = model.expert_bytes_by_layer[0] if model.equal_expert_bytes else 1
    return tuple(
        bytes_for_experts(model, server, g, kv) // unit if gpu.slots is None else gpu.slots
        for g, gpu in enumerate(server.gpus)
    )
