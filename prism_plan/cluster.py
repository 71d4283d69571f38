"""The servers, their GPUs, their links and their users."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prism_plan.errors import InputError

#: Figures of a GPU and of links for which a default stands in where a cluster file gives none.
GPU_FIGURES = ("memory_bandwidth_gbs", "tflops", "launch_overhead_us", "load_gbs")
LINK_FIGURES = ("bandwidth_mbps", "rtt_ms", "call_overhead_ms")


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server.

    Memory is given by ``memory_bytes``, or the number of experts it holds by ``slots``. Bandwidth
    is in GB/s (1e9 bytes), compute in TFLOP/s, launch overhead in microseconds. Loads of experts
    take time on a channel of their own; with ``load_blocks_compute`` they occupy the GPU too.
    ``assumed`` names those of :data:`GPU_FIGURES` that a cluster file did not give (the defaults
    are those of an A100 of 40 GB); two GPUs that differ in nothing else are equal.
    """

    memory_bytes: int | None = None
    memory_fraction: float = 1.0
    reserve_bytes: int = 0
    dense: bool = False
    slots: int | None = None
    memory_bandwidth_gbs: float = 1555.0
    tflops: float = 312.0
    launch_overhead_us: float = 20.0
    load_gbs: float = 12.0
    load_blocks_compute: bool = False
    assumed: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def usable_bytes(self) -> int:
        """Memory that may be used, before anything is placed."""
        if self.memory_bytes is None:
            raise ValueError("a GPU described by slots has no memory size")
        return round(self.memory_bytes * self.memory_fraction)


@dataclass(frozen=True)
class Link:
    """Network figures: what any server has, unless it or a pair says otherwise.

    Messages below ``short_kb`` wait for no more than so much of longer ones (0: for all of them).
    ``assumed`` names those of :data:`LINK_FIGURES` that a cluster file did not give; links that
    differ in nothing else are equal.
    """

    bandwidth_mbps: float = 1000.0
    rtt_ms: float = 1.0
    call_overhead_ms: float = 0.2
    burst_kb: float = 0.0
    short_kb: float = 0.0
    assumed: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


_Figures = TypeVar("_Figures", Gpu, Link)


def with_figures(part: _Figures, **figures: Any) -> _Figures:
    """A copy of a GPU or of links with these figures, which count as given from then on."""
    return dataclasses.replace(part, assumed=part.assumed.difference(figures), **figures)


@dataclass(frozen=True)
class PairLink:
    """Figures of one pair of servers (by index, ``a < b``) that differ from the default."""

    a: int
    b: int
    bandwidth_mbps: float | None = None
    rtt_ms: float | None = None


@dataclass(frozen=True)
class Server:
    """One edge site.

    ``tasks`` are shares of its requests by task of the trace and sum to one; empty means it has
    no users of its own. ``weight`` replaces its token rate. ``pin`` and ``forbid`` hold
    (decoder layer, expert) pairs; ``layer_cap`` bounds the experts of any one layer.
    """

    name: str
    gpus: tuple[Gpu, ...]
    tasks: Mapping[str, float] = field(default_factory=dict)
    arrival_interval_s: float | None = None
    weight: float | None = None
    uplink_mbps: float | None = None
    downlink_mbps: float | None = None
    kv_tokens: int = 0
    concurrency: int = 1
    pin: tuple[tuple[int, int], ...] = ()
    forbid: tuple[tuple[int, int], ...] = ()
    layer_cap: int | None = None

    @property
    def has_users(self) -> bool:
        """Whether any of its own users ask for anything."""
        return any(share > 0 for share in self.tasks.values())

    @property
    def dense_gpu(self) -> int:
        """Index of the GPU that holds the dense part of the model."""
        return next((g for g, gpu in enumerate(self.gpus) if gpu.dense), 0)


@dataclass(frozen=True)
class Cluster:
    """All servers and links. Read from TOML by :func:`prism_plan.io.cluster.read_cluster`.

    Raises
    ------
    InputError
        No server, a server without GPUs, two servers of one name, two dense GPUs.
    """

    name: str
    servers: tuple[Server, ...]
    link: Link = Link()
    pair_links: tuple[PairLink, ...] = ()

    def __post_init__(self) -> None:
        if not self.servers:
            raise InputError(
                "no servers", place="server", remedy="describe each one in a [[server]] table"
            )
        seen: dict[str, int] = {}
        for index, server in enumerate(self.servers):
            place = f"server[{index}]"
            if server.name in seen:
                raise InputError(
                    f"name {server.name!r} is taken by server[{seen[server.name]}]",
                    place=f"{place}.name",
                    remedy="give every server a name of its own",
                )
            seen[server.name] = index
            if not server.gpus:
                raise InputError(
                    "no GPUs", place=place, remedy="describe each one in a [[server.gpu]] table"
                )
            if sum(gpu.dense for gpu in server.gpus) > 1:
                raise InputError("two GPUs say dense = true", place=place, expected="at most one")
            forbidden = set(server.forbid)
            for pair in server.pin:
                if pair in forbidden:
                    raise InputError(
                        f"[layer, expert] {list(pair)} is both pinned and forbidden",
                        place=place,
                        remedy="remove it from one of the two lists",
                    )

    @property
    def num_servers(self) -> int:
        """N, the number of servers."""
        return len(self.servers)
