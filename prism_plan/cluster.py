"""A cluster: its servers with their GPUs and users, and the links between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prism_plan.errors import InputError, did_you_mean

#: Fields of a GPU and of links that have a default where a cluster file does not give them.
GPU_FIGURES = ("memory_bandwidth_gbs", "tflops", "launch_overhead_us", "load_gbs")
LINK_FIGURES = ("bandwidth_mbps", "rtt_ms", "call_overhead_ms")


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server.

    ``memory_bytes`` is the size of its memory, or ``slots`` the number of experts it holds.
    Bandwidth is in GB/s (1e9 bytes), compute in TFLOP/s, launch overhead in microseconds. Experts
    are loaded beside other work; with ``load_blocks_compute`` a load occupies the GPU too.
    ``name`` is that of the table of GPUs (:func:`prism_plan.io.gpu_table.gpu_figures`), where a
    cluster file gives one. ``assumed`` names those of :data:`GPU_FIGURES` that neither the file nor
    the table gave (the defaults are those of an A100 of 40 GB). Two GPUs that differ in nothing
    else are equal.
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
    name: str = field(default="", compare=False, repr=False)

    @property
    def usable_bytes(self) -> int:
        """Bytes that may be used, for the dense part, the KV cache, the reserve and experts."""
        if self.memory_bytes is None:
            raise ValueError("a GPU described by slots has no memory size")
        return round(self.memory_bytes * self.memory_fraction)


@dataclass(frozen=True)
class Link:
    """Network figures between any two servers, unless a server or a pair has its own.

    Messages below ``short_kb`` wait for at most ``short_kb`` of longer ones (0: for all of them).
    ``hop_overhead_ms``, of hidden states and token ids between servers that execute layers, is
    ``call_overhead_ms`` unless a calibration gives it.
    ``assumed`` names those of :data:`LINK_FIGURES` that a cluster file did not give; links that
    differ in nothing else are equal.
    """

    bandwidth_mbps: float = 1000.0
    rtt_ms: float = 1.0
    call_overhead_ms: float = 0.2
    burst_kb: float = 0.0
    short_kb: float = 0.0
    hop_overhead_ms: float | None = None
    assumed: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


_Figures = TypeVar("_Figures", Gpu, Link)


def with_figures(part: _Figures, **figures: Any) -> _Figures:
    """A copy of a GPU or of links with these figures, which are then not assumed any more."""
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
    """One edge site with its GPUs, its users and its rules.

    ``tasks`` are shares of its requests by task of the trace and sum to one; empty without users.
    ``weight`` replaces its token rate. ``pin`` and ``forbid`` are (decoder layer, expert) pairs
    that it must, or must not, hold; ``layer_cap`` is the most experts of any one layer. With
    ``execute_at_home`` all layers of its users execute here: token ids never leave.
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
    execute_at_home: bool = False

    @property
    def has_users(self) -> bool:
        """Whether requests arrive at it."""
        return any(share > 0 for share in self.tasks.values())

    @property
    def dense_gpu(self) -> int:
        """Index of the GPU that holds the dense part of the model."""
        return next((g for g, gpu in enumerate(self.gpus) if gpu.dense), 0)


@dataclass(frozen=True)
class Cluster:
    """All servers and links; :func:`prism_plan.io.cluster.read_cluster` reads them from TOML.

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

    def with_users_of(self, names: Collection[str]) -> Cluster:
        """The cluster with the users of these servers alone; the others serve them.

        ``kv_tokens`` of the others stay reserved, so that a plan fits the whole cluster, too.

        Raises
        ------
        InputError
            No server has one of the names, or it has no users.
        """
        known = [server.name for server in self.servers if server.has_users]
        for name in names:
            if name not in known:
                raise InputError(
                    f"{name!r}{did_you_mean(name, known)}",
                    parameter="heads",
                    expected=f"servers with tasks: {', '.join(known)}",
                )
        servers = tuple(
            server if server.name in names else dataclasses.replace(server, tasks={})
            for server in self.servers
        )
        return dataclasses.replace(self, servers=servers)
