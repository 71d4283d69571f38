"""How the memory of every GPU is used, and whether a KV cache still fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.execution_table import home_execution
from prism_plan.expert_capacity import (
    decoder_layers_at,
    gpu_capacity,
    kv_bytes,
    require_memory_for_unequal,
    resident_bytes,
)
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
    def for_experts_bytes(self) -> int | None:
        """Bytes left for experts; negative where what must reside there does not fit."""
        if self.usable_bytes is None:
            return None
        resident_bytes = sum(
            size or 0 for size in (self.dense_bytes, self.kv_bytes, self.reserve_bytes)
        )
        return self.usable_bytes - resident_bytes

    @property
    def free_bytes(self) -> int | None:
        """Bytes that nothing uses; negative where a placement does not fit."""
        left = self.for_experts_bytes
        return None if left is None else left - self.expert_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        values = {key: value for key, value in vars(self).items() if key != "name" or value}
        return {
            **values,
            "for_experts_bytes": self.for_experts_bytes,
            "free_bytes": self.free_bytes,
        }


def gpu_memory(
    cluster: Cluster, model: ModelSpec, placement: Placement | None = None
) -> tuple[GpuMemory, ...]:
    """The memory of each GPU of all servers in order.

    ``placement`` is one for the servers and GPUs of the cluster; KV caches lie where its execution
    table has layers execute. Where it does not fit, sizes are negative (:func:`memory_shortages`).

    Raises
    ------
    InputError
        Slots are given though experts differ in size.
    Infeasible
        Without a placement: a GPU is too small for what must reside on it.
    """
    if placement is None:
        gpu_capacity(cluster, model)
    else:
        require_memory_for_unequal(cluster, model)
    kv = kv_bytes(cluster, model, None if placement is None else placement.execution)
    rows: list[GpuMemory] = []
    for n, server in enumerate(cluster.servers):
        for g, gpu in enumerate(server.gpus):
            resident = None if gpu.slots is not None else resident_bytes(model, server, g, kv[n])
            empty = GpuMemory(
                server=server.name,
                gpu=g,
                usable_bytes=None if resident is None else gpu.usable_bytes,
                dense_bytes=None if resident is None else resident.dense,
                kv_bytes=None if resident is None else resident.kv,
                reserve_bytes=None if resident is None else resident.reserve,
                slots=gpu.slots,
                experts=0,
                expert_bytes=0,
                name=gpu.name,
            )
            held = None
            if placement is not None:
                held = placement.on_gpu[int(placement.gpus_of(n)[g])].sum(axis=1)
            rows.append(_with_experts(empty, model, held))
    return tuple(rows)


def _with_experts(
    row: GpuMemory, model: ModelSpec, held: npt.NDArray[np.int64] | None
) -> GpuMemory:
    """A GPU without experts filled with ``held`` [L] of each layer; ``None``: with all it holds."""
    left = max(row.for_experts_bytes or 0, 0)
    size = model.expert_bytes_by_layer
    slots = row.slots
    if model.equal_expert_bytes and slots is None:
        slots = left // size[0]
    if held is not None:
        experts, expert_bytes = int(held.sum()), int(held @ np.array(size, np.int64))
    elif slots is not None:
        experts = min(slots, model.num_pairs)
        expert_bytes = experts * size[0]
    else:
        all_bytes = sum(size) * model.num_experts
        return dataclasses.replace(row, experts=None, expert_bytes=min(left, all_bytes))
    return dataclasses.replace(row, slots=slots, experts=experts, expert_bytes=expert_bytes)


def memory_shortages(memory: Sequence[GpuMemory]) -> tuple[str, ...]:
    """A line for each GPU on which dense part, KV cache, reserve and experts do not fit."""
    return tuple(
        f"server {row.server!r} gpu[{row.gpu}] lacks {-row.free_bytes:,} bytes: dense part "
        f"{row.dense_bytes:,}, KV cache {row.kv_bytes:,}, reserve {row.reserve_bytes:,} and "
        f"{row.experts:,} experts {row.expert_bytes:,}, of {row.usable_bytes:,} usable bytes"
        for row in memory
        if row.free_bytes is not None and row.free_bytes < 0
    )


def missing_kv_reservation(
    cluster: Cluster,
    model: ModelSpec | None = None,
    execution: npt.NDArray[np.int32] | None = None,
) -> str:
    """A line that names the servers with users whose KV cache has no memory reserved.

    Those whose layers execute, by a table int32 [N, L], on GPUs that give ``slots`` are named
    apart: ``kv_tokens`` would reserve nothing there. Empty where there is none, or where the model
    is known to keep nothing per token.
    """
    if model is not None and model.kv_bytes_per_token == 0:
        return ""
    in_memory: list[str] = []
    in_slots: list[str] = []
    for n, server in enumerate(cluster.servers):
        if not server.has_users or server.kv_tokens:
            continue
        at = [n] if execution is None else np.unique(execution[n]).tolist()
        holders = [cluster.servers[m] for m in at]
        given = all(holder.gpus[holder.dense_gpu].slots is not None for holder in holders)
        (in_slots if given else in_memory).append(server.name)
    lines = []
    if in_memory:
        lines.append(
            f"nothing is reserved for the KV cache of {listed(in_memory)}: kv_tokens is not given "
            "or 0"
        )
    if in_slots:
        lines.append(
            f"no KV cache of {listed(in_slots)} is subtracted from slots, which are used as given"
        )
    return "; ".join(lines)


def insufficient_kv_memory(
    cluster: Cluster,
    model: ModelSpec,
    memory: Sequence[GpuMemory],
    trace: Trace | None = None,
    execution: npt.NDArray[np.int32] | None = None,
) -> str:
    """A line that names the servers where no KV cache of one request fits.

    The GPU with the dense part has too little where what is reserved for KV caches and what is
    free are together less than the cache of one request, of the layers that execute there by a
    table int32 [N, L]. A request has the mean tokens of its home server's where the trace tells
    them, else one token. GPUs that give ``slots`` are left out, for their memory is not known.
    """
    rows = {(row.server, row.gpu): row for row in memory}
    if execution is None:
        execution = home_execution(cluster.num_servers, model.num_layers)
    needed = [(0, 0, 0)] * cluster.num_servers  # bytes, tokens and home of the largest cache
    for n, (server, executed) in enumerate(
        zip(cluster.servers, decoder_layers_at(model, execution), strict=True)
    ):
        if not server.has_users:
            continue
        tokens = 1
        if trace is not None and trace.requests is not None:
            shares = shares_by_task(trace, server.tasks, f"server[{n}].tasks")
            tokens = max(math.ceil(float(shares @ trace.mean_tokens())), 1)
        for m, layers in executed.items():
            share = -(-tokens * model.kv_bytes_per_token * layers // model.num_decoder_layers)
            if share > needed[m][0]:
                needed[m] = (share, tokens, n)
    short = []
    for m, (server, (share, tokens, home)) in enumerate(zip(cluster.servers, needed, strict=True)):
        row = rows[server.name, server.dense_gpu]
        free = row.free_bytes
        if free is None:
            continue
        left = (row.kv_bytes or 0) + free
        if share and left < share:
            request = f"a request of {tokens:,} tokens" if tokens > 1 else "a token"
            if home != m:
                request += f" of {shortened(cluster.servers[home].name)}"
            short.append(
                f"{shortened(server.name)} gpu[{row.gpu}] ({left:,} bytes, {request} needs "
                f"{share:,})"
            )
    more = f" and {len(short) - 3:,} more" if len(short) > 3 else ""
    return f"nothing is left for a KV cache on {', '.join(short[:3])}{more}" if short else ""
