"""How much of each GPU's memory is left for routed experts (docs/design.md, section 1, "slots")."""

from __future__ import annotations

from dataclasses import dataclass

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


def resident_bytes(model: ModelSpec, server: Server, gpu: int) -> ResidentBytes:
    """Bytes that one GPU of a server holds besides routed experts."""
    holds_dense = gpu == server.dense_gpu
    return ResidentBytes(
        dense=model.dense_bytes if holds_dense else 0,
        kv=server.kv_tokens * model.kv_bytes_per_token if holds_dense else 0,
        reserve=server.gpus[gpu].reserve_bytes,
    )


def bytes_for_experts(model: ModelSpec, server: Server, gpu: int) -> int:
    """Bytes that are left on one GPU of a server for routed experts.

    Raises
    ------
    Infeasible
        The GPU is too small for what must reside on it.
    """
    resident = resident_bytes(model, server, gpu)
    usable = server.gpus[gpu].usable_bytes
    left = usable - resident.total
    if left < 0:
        held = "the dense part" if resident.total > resident.reserve else "its reserve"
        raise Infeasible(
            f"server {server.name!r} gpu[{gpu}]: {usable:,} usable bytes do not hold {held} of "
            f"{resident.total:,} bytes",
            shortfall=-left,
            unit="bytes",
            remedy="raise memory_gb or memory_fraction, or put dense = true on another GPU",
        )
    return left


def gpu_capacity(cluster: Cluster, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Capacity of each server's GPUs for experts: a number of them ("slots"), or bytes.

    Bytes where experts differ in size by layer. Slots are rounded down for each GPU: two halves of
    an expert on two GPUs are no expert.

    Raises
    ------
    InputError
        The cluster gives slots though experts differ in size.
    Infeasible
        A GPU is too small for what must reside on it.
    """
    unit = model.expert_bytes_by_layer[0] if model.equal_expert_bytes else 1
    for n, server in enumerate(cluster.servers):
        for g, gpu in enumerate(server.gpus):
            if gpu.slots is not None and not model.equal_expert_bytes:
                raise InputError(
                    f"slots = {gpu.slots}",
                    place=f"server[{n}].gpu[{g}]",
                    expected="memory_gb, for experts of this model differ in size by layer",
                )
    return tuple(
        tuple(
            bytes_for_experts(model, server, g) // unit if gpu.slots is None else gpu.slots
            for g, gpu in enumerate(server.gpus)
        )
        for server in cluster.servers
    )
