"""How the memory of every GPU is used, and whether a KV cache still fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_plan.cluster import Cluster
from prism_plan.expert_capacity import gpu_capacity, kv_bytes, resident_bytes
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.printable_text import listed, shortened
from prism_plan.token_rates import shares_by_task
from prism_plan.trace import Trace


@dataclass(frozen=True)
class GpuMemory:
    """The memory of one GPU, in bytes.

    ``usable`` is what the cluster file lets be used of it: dense part, KV cache, reserve, experts
    and what is free add up to it. Where the file gives ``slots`` in place of memory these sizes
    are not known and ``None``, but for those of experts. ``slots`` is ``None`` where experts
    differ in size. ``experts`` and ``expert_bytes`` are those that a placement puts there;
    without a placement the most that the GPU can hold (``experts`` is then ``None`` where experts
    differ in size). ``name`` is that of the table of GPUs, where the cluster file gives one.
    """

    server: str
    gpu: int
    usable_bytes: int | None
    dense_bytes: int | None
    kv_bytes: int | None
    reserve_bytes: int | None
    slots: int | None
    experts: int | None
    expert_bytes: int
    name: str = ""

    @property
    def free_bytes(self) -> int | None:
        """Bytes that nothing uses; negative where a placement does not fit."""
        if self.usable_bytes is None:
            return None
        resident_bytes = sum(
            size or 0 for size in (self.dense_bytes, self.kv_bytes, self.reserve_bytes)
        )
        return self.usable_bytes - resident_bytes - self.expert_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        values = {key: value for key, value in vars(self).items() if key != "name" or value}
        return {**values, "free_bytes": self.free_bytes}


def gpu_memory(
    cluster: Cluster, model: ModelSpec, placement: Placement | None = None
) -> tuple[GpuMemory, ...]:
    """The memory of each GPU of all servers in order.

    ``placement`` is one for the servers and GPUs of the cluster; KV caches lie where its execution
    table has layers execute.

    Raises
    ------
    InputError
        Slots are given though experts differ in size.
    Infeasible
        A GPU is too small for what must reside on it.
    """
    size = np.array(model.expert_bytes_by_layer, np.int64)
    all_bytes = sum(model.expert_bytes_by_layer) * model.num_experts
    in_slots = model.equal_expert_bytes
    execution = None if placement is None else placement.execution
    kv = kv_bytes(cluster, model, execution)
    rows: list[GpuMemory] = []
    for n, (server, capacities) in enumerate(
        zip(cluster.servers, gpu_capacity(cluster, model, execution), strict=True)
    ):
        for g, (gpu, capacity) in enumerate(zip(server.gpus, capacities, strict=True)):
            experts: int | None
            if placement is not None:
                held = placement.on_gpu[int(placement.gpus_of(n)[g])]
                experts, expert_bytes = int(held.sum()), int(held.sum(axis=1) @ size)
            elif in_slots:
                experts = min(capacity, model.num_pairs)
                expert_bytes = experts * model.expert_bytes_by_layer[0]
            else:
                experts = None
                expert_bytes = min(capacity, all_bytes)
            resident = None if gpu.slots is not None else resident_bytes(model, server, g, kv[n])
            rows.append(
                GpuMemory(
                    server=server.name,
                    gpu=g,
                    usable_bytes=None if resident is None else gpu.usable_bytes,
                    dense_bytes=None if resident is None else resident.dense,
                    kv_bytes=None if resident is None else resident.kv,
                    reserve_bytes=None if resident is None else resident.reserve,
                    slots=capacity if in_slots else None,
                    experts=experts,
                    expert_bytes=expert_bytes,
                    name=gpu.name,
                )
            )
    return tuple(rows)


def missing_kv_reservation(cluster: Cluster, model: ModelSpec | None = None) -> str:
    """A line that names the servers with users whose KV cache has no memory reserved.

    Empty where there is none, or where the model is known to keep nothing per token.
    """
    if model is not None and model.kv_bytes_per_token == 0:
        return ""
    names = [s.name for s in cluster.servers if s.has_users and not s.kv_tokens]
    if not names:
        return ""
    return f"nothing is reserved for the KV cache of {listed(names)}: kv_tokens is not given or 0"


def insufficient_kv_memory(
    cluster: Cluster, model: ModelSpec, memory: Sequence[GpuMemory], trace: Trace | None = None
) -> str:
    """A line that names the servers with users where no KV cache of one request fits.

    The GPU with the dense part has too little where what is reserved for the KV cache and what is
    free are together less than the cache of one request: the mean tokens of its users' requests
    where the trace tells them, else one token. GPUs that give ``slots`` are left out, for their
    memory is not known.
    """
    rows = {(row.server, row.gpu): row for row in memory}
    short = []
    for n, server in enumerate(cluster.servers):
        row = rows[server.name, server.dense_gpu]
        free = row.free_bytes
        if free is None or not server.has_users:
            continue
        tokens = 1
        if trace is not None and trace.requests is not None:
            shares = shares_by_task(trace, server.tasks, f"server[{n}].tasks")
            tokens = max(math.ceil(float(shares @ trace.mean_tokens())), 1)
        left, needed = (row.kv_bytes or 0) + free, tokens * model.kv_bytes_per_token
        if left < needed:
            request = f"a request of {tokens:,} tokens" if tokens > 1 else "a token"
            short.append(
                f"{shortened(server.name)} gpu[{row.gpu}] ({left:,} bytes, {request} needs "
                f"{needed:,})"
            )
    more = f" and {len(short) - 3:,} more" if len(short) > 3 else ""
    return f"nothing is left for a KV cache on {', '.join(short[:3])}{more}" if short else ""
