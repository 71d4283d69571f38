"""The two placements that a migration leads between, brought to the same order of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model_spec import ModelShape, require_same_model
from prism_plan.placement import Placement

Bools = npt.NDArray[np.bool_]
Capacity = Sequence[Sequence[int]]
#: What errors call two placements that are no files.
NAMES = ("first placement", "second placement")


@dataclass(frozen=True, eq=False)
class Endpoints:
    """The first and the final placement of a migration, over the same GPUs.

    ``initial`` and ``final`` say which GPU holds which pair, bool [G, J], with the servers in the
    order of the final placement. ``size`` int64 [J] and ``capacity`` int64 [G] are in slots, or in
    bytes where experts differ in size.
    """

    model: ModelShape
    servers: tuple[str, ...]
    gpus: tuple[int, ...]
    initial: Bools
    final: Bools
    size: npt.NDArray[np.int64]
    capacity: npt.NDArray[np.int64]

    @property
    def server_of_gpu(self) -> npt.NDArray[np.int64]:
        """Index of the server of each GPU, int64 [G]."""
        return np.repeat(np.arange(len(self.gpus)), self.gpus)

    def on_servers(self, held: Bools) -> npt.NDArray[np.int64]:
        """On how many GPUs of each server a pair is, int64 [N, J], of bool [G, J]."""
        counts = np.zeros((len(self.servers), held.shape[1]), np.int64)
        for n, on_gpu in zip(self.server_of_gpu, held, strict=True):
            counts[n] += on_gpu
        return counts

    def kept_replicas(self, min_replicas: int) -> npt.NDArray[np.int64]:
        """On how many servers a migration is to keep each pair at every moment, int64 [J].

        That is ``min_replicas``, or what the first or the final placement has of it if that is
        less; 0 for a pair that nobody holds at first.
        """
        servers = [(self.on_servers(held) > 0).sum(axis=0) for held in (self.initial, self.final)]
        kept: npt.NDArray[np.int64] = np.minimum(min_replicas, np.minimum(*servers))
        return kept

    def gpu_text(self, gpu: int) -> str:
        """A GPU for a message."""
        server = int(self.server_of_gpu[gpu])
        return f"server {self.servers[server]!r} gpu[{gpu - sum(self.gpus[:server])}]"


def match_placements(
    a: Placement,
    b: Placement,
    gpu_capacity: Capacity | None = None,
    names: tuple[str, str] = NAMES,
) -> Endpoints:
    """Bring two placements to the same order of GPUs; servers are matched by name.

    Capacities are those of ``b`` if none are given. ``names`` are what errors call the two.

    Raises
    ------
    WrongModel
        They place different models.
    InputError
        They are of different servers or GPUs, one is over the capacity of a GPU, or an expert that
        ``a`` holds is nowhere in ``b``.
    """
    require_same_model(a.model, b.model, source=names[0], other=names[1])
    if set(a.servers) != set(b.servers):
        raise InputError(
            _shortened(a.servers, b.servers),
            source=names[0],
            place="servers",
            expected=f"{_shortened(b.servers, a.servers)} as in {names[1]}",
        )
    model, gpus = b.model, tuple(len(caps) for caps in b.gpu_capacity)
    order = []
    for n, server in enumerate(b.servers):
        own = a.gpus_of(a.servers.index(server))
        if len(own) != gpus[n]:
            raise InputError(
                f"{len(own)} GPUs",
                source=names[0],
                place=f"server {server!r}",
                expected=f"{gpus[n]} as in {names[1]}",
            )
        order += own.tolist()
    capacity = b.gpu_capacity if gpu_capacity is None else gpu_capacity
    if tuple(len(caps) for caps in capacity) != gpus:
        raise InputError(
            f"GPUs per server {[len(caps) for caps in capacity]}",
            place="gpu_capacity",
            expected=f"{list(gpus)}",
        )
    size = np.ones(model.num_layers) if model.equal_expert_bytes else model.expert_bytes_by_layer
    ends = Endpoints(
        model=model,
        servers=b.servers,
        gpus=gpus,
        initial=a.on_gpu[order].reshape(len(order), -1),
        final=b.on_gpu.reshape(len(order), -1),
        size=np.repeat(np.asarray(size, np.int64), model.num_experts),
        capacity=np.array([cap for caps in capacity for cap in caps], np.int64),
    )
    unit = "slots" if model.equal_expert_bytes else "bytes"
    for name, held in zip(names, (ends.initial, ends.final), strict=True):
        used = held @ ends.size
        for g in np.flatnonzero(used > ends.capacity)[:1]:
            raise InputError(
                f"{ends.gpu_text(int(g))} holds {used[g]:,} {unit} of experts",
                source=name,
                expected=f"at most its capacity of {ends.capacity[g]:,}",
            )
    for pair in np.flatnonzero(ends.initial.any(axis=0) & ~ends.final.any(axis=0))[:1]:
        raise InputError(
            f"{model.pair_text(int(pair))} is held nowhere",
            source=names[1],
            expected=f"every expert that {names[0]} holds",
        )
    return ends


def in_server_order(placement: Placement, servers: Sequence[str]) -> Placement:
    """The same placement with its servers in another order; as it is if they are not the same."""
    if placement.servers == tuple(servers) or set(placement.servers) != set(servers):
        return placement
    order = [placement.servers.index(name) for name in servers]
    position = np.argsort(order)
    table = placement.execution
    return placement.replace(
        servers=tuple(servers),
        gpu_capacity=tuple(placement.gpu_capacity[n] for n in order),
        on_gpu=placement.on_gpu[np.concatenate([placement.gpus_of(n) for n in order])],
        execution=None if table is None else position[table[order]],
    )


def _shortened(names: Sequence[str], others: Sequence[str]) -> str:
    """The first four names for a message, those that are not among the others first."""
    ordered = sorted(names, key=lambda name: name in set(others))
    return f"{ordered[:4]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
