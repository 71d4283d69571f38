"""A calibration: measured times that replace the figures of the cluster file.

A runtime measured them on the real machines: the time of one layer's dense part
and of one expert's batch by number of tokens, the overhead of a call, and the links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_plan.cluster import Cluster, with_figures
from prism_plan.errors import InputError, did_you_mean

#: Points (tokens, seconds), tokens ascending, at least two.
Curve = tuple[tuple[int, float], ...]


#: Figures of links that a calibration may hold.
LINK_KEYS = (
    "call_overhead_ms", "hop_overhead_ms", "bandwidth_mbps", "rtt_ms", "burst_kb", "short_kb"
)  # fmt: skip


@dataclass(frozen=True)
class GpuCurves:
    """Measured times of one GPU: of the dense part of one MoE layer, and of one expert's batch."""

    dense_s: Curve
    expert_s: Curve


@dataclass(frozen=True)
class Calibration:
    """Measured times of GPUs and links.

    ``gpus`` has them by (server name, GPU index), ``default`` those of all other GPUs.

    ``call_overhead_ms``, ``bandwidth_mbps``, ``rtt_ms``, ``burst_kb`` and ``short_kb`` replace
    those of the cluster's ``[link]`` table where they are given; ``hop_overhead_ms`` is that of
    hidden states and token ids between servers that execute layers, else ``call_overhead_ms``.
    """

    name: str = ""
    default: GpuCurves | None = None
    gpus: Mapping[tuple[str, int], GpuCurves] = field(default_factory=dict)
    call_overhead_ms: float | None = None
    hop_overhead_ms: float | None = None
    bandwidth_mbps: float | None = None
    rtt_ms: float | None = None
    burst_kb: float | None = None
    short_kb: float | None = None

    def of(self, server: str, gpu: int) -> GpuCurves:
        """Curves of a GPU.

        Raises
        ------
        InputError
            The calibration has none for it, and no default.
        """
        curves = self.gpus.get((server, gpu), self.default)
        if curves is None:
            raise InputError(
                f"no times of server {server!r} gpu[{gpu}]",
                source=self.name,
                place="servers",
                remedy="measure it, or give a default",
            )
        return curves

    def applied(self, cluster: Cluster) -> Cluster:
        """The cluster with the measured link figures.

        Raises
        ------
        InputError
            There are times of a server or GPU that the cluster does not have.
        """
        self._require_known(cluster)
        return self.with_links(cluster)

    def with_links(self, cluster: Cluster) -> Cluster:
        """As :meth:`applied`, without a check of the servers and GPUs that were measured."""
        measured = {key: getattr(self, key) for key in LINK_KEYS if getattr(self, key) is not None}
        return dataclasses.replace(cluster, link=with_figures(cluster.link, **measured))

    def _require_known(self, cluster: Cluster) -> None:
        """Refuse unknown names: a misspelt one would leave its server at the default unnoticed."""
        servers = {server.name: server for server in cluster.servers}
        for name, gpu in self.gpus:
            place = f"servers[{name!r:.60}]"
            if name not in servers:
                raise InputError(
                    f"no server of {cluster.name}{did_you_mean(name, servers)}",
                    source=self.name,
                    place=place,
                    expected=f"one of {', '.join(servers)}",
                )
            number = len(servers[name].gpus)
            if gpu >= number:
                raise InputError(
                    "a GPU too many",
                    source=self.name,
                    place=f"{place}.gpus[{gpu}]",
                    expected=f"{number}, as {cluster.name} gives {name!r:.60}",
                )
