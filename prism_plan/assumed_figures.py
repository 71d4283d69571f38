"""Which figures of GPUs and links are defaults, for a cluster file does not give them."""

from __future__ import annotations

from prism_plan.cluster import GPU_FIGURES, LINK_FIGURES, Cluster, Gpu, Link
from prism_plan.printable_text import listed, shortened

#: Figures that say how fast a GPU computes; the other one says how fast it loads experts.
COMPUTE_FIGURES = tuple(key for key in GPU_FIGURES if key != "load_gbs")


def assumed_texts(
    cluster: Cluster, *, compute: bool = False, loads: bool = False, links: bool = False
) -> tuple[str, ...]:
    """Short texts that name the figures that are used and that the cluster file does not give.

    Parameters
    ----------
    cluster
        As it is used: figures that were replaced count as given
        (:func:`prism_plan.cluster.with_figures`).
    compute
        Whether the times of GPU work are used.
    loads
        Whether the times of loading experts are used.
    links
        Whether the times of messages between servers are used.

    Returns
    -------
    tuple of str
        Figures with their values, those of alike GPUs in one text; empty where nothing is assumed.
        The length of a text does not grow with the cluster.
    """
    wanted = (COMPUTE_FIGURES if compute else ()) + (("load_gbs",) if loads else ())
    gpus = [
        (f"{shortened(server.name)} gpu[{g}]", gpu)
        for server in cluster.servers
        for g, gpu in enumerate(server.gpus)
    ]
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in wanted:
        lacking = tuple(at for at, (_, gpu) in enumerate(gpus) if key in gpu.assumed)
        if lacking:
            groups.setdefault(lacking, []).append(f"{key} {getattr(Gpu(), key):g}")
    parts = []
    for lacking, figures in groups.items():
        every = len(lacking) == len(gpus)
        where = "every GPU" if every else listed([gpus[at][0] for at in lacking])
        parts.append(f"{', '.join(figures)} of {where} (as an A100 of 40 GB)")
    missing = [f"{key} {getattr(Link(), key):g}" for key in _links_used(cluster)] if links else []
    if missing:
        parts.append(f"{', '.join(missing)} of links")
    return tuple(parts)


def _links_used(cluster: Cluster) -> list[str]:
    """Keys of [link] whose default at least one pair of servers uses, in their order."""
    pairs = cluster.num_servers * (cluster.num_servers - 1) // 2
    own_mbps = sum(pair.bandwidth_mbps is not None for pair in cluster.pair_links)
    own_rtt = sum(pair.rtt_ms is not None for pair in cluster.pair_links)
    ports = all(
        server.uplink_mbps is not None and server.downlink_mbps is not None
        for server in cluster.servers
    )
    used = {
        "bandwidth_mbps": pairs > 0 and not (ports and own_mbps == pairs),
        "rtt_ms": own_rtt < pairs,
        "call_overhead_ms": pairs > 0,
    }
    return [key for key in LINK_FIGURES if used[key] and key in cluster.link.assumed]
