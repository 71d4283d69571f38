"""Cluster files: TOML in, a validated :class:`~prism_plan.cluster.Cluster` out."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from prism_plan.cluster import (
    GPU_FIGURES,
    LINK_FIGURES,
    Cluster,
    Gpu,
    Link,
    PairLink,
    Server,
)
from prism_plan.errors import InputError, did_you_mean
from prism_plan.files import read_text
from prism_plan.limits import MAX_GPUS, MAX_NAMES, require_at_most, require_name
from prism_plan.toml_table import Table, parse_toml

#: Shares of a server's requests must sum to one within this.
SHARE_TOLERANCE = 1e-6


def read_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read and check a cluster file (DESIGN section 6).

    Raises
    ------
    InputError
        Names the file, the place in it, the value and what was expected.
    """
    return parse_cluster(read_text(path), source=path)


def parse_cluster(text: str, source: object = "") -> Cluster:
    """A cluster from the text of a TOML file; see :func:`read_cluster`."""
    return cluster_from_table(parse_toml(text, source), source)


def cluster_from_table(table: Table, source: object = "") -> Cluster:
    """A cluster from the outermost table of its file; see :func:`read_cluster`."""
    try:
        return _cluster(table, default_name=Path(str(source)).stem or "cluster")
    except InputError as error:
        raise error.within(source) from error


def _given(**values: Any) -> dict[str, Any]:
    """Only the values that the file gave, so that the defaults stand in one place."""
    return {key: value for key, value in values.items() if value is not None}


def _cluster(table: Table, default_name: str) -> Cluster:
    name = table.text("name") or default_name
    link = _link(table.table("link"))
    tables = table.tables("server")
    require_at_most(len(tables), MAX_NAMES, "servers", place="server")
    servers = tuple(_server(item, index) for index, item in enumerate(tables))
    pairs = _pair_links(table.tables("links"), [server.name for server in servers])
    table.end()
    return Cluster(name=name, servers=servers, link=link, pair_links=pairs)


def _link(table: Table) -> Link:
    values = _given(
        bandwidth_mbps=table.number("bandwidth_mbps", positive=True),
        rtt_ms=table.number("rtt_ms"),
        call_overhead_ms=table.number("call_overhead_ms"),
        burst_kb=table.number("burst_kb"),
        short_kb=table.number("short_kb"),
    )
    table.end()
    return Link(assumed=frozenset(LINK_FIGURES).difference(values), **values)


def _pair_links(tables: list[Table], names: list[str]) -> tuple[PairLink, ...]:
    pairs: dict[tuple[int, int], PairLink] = {}
    number = {name: index for index, name in enumerate(names)}
    for table in tables:
        ends = []
        for key in ("a", "b"):
            name = table.text(key)
            if name not in number:
                hint = did_you_mean(str(name), names)
                raise table.wrong(key, name, f"the name of a server{hint}")
            ends.append(number[name])
        a, b = sorted(ends)
        if a == b or (a, b) in pairs:
            what = "two different servers" if a == b else "each pair of servers once"
            raise table.wrong("b", names[ends[1]], what)
        pairs[a, b] = PairLink(
            a,
            b,
            bandwidth_mbps=table.number("bandwidth_mbps", positive=True),
            rtt_ms=table.number("rtt_ms"),
        )
        table.end()
    return tuple(pairs[key] for key in sorted(pairs))


def _server(table: Table, index: int) -> Server:
    gpus = table.tables("gpu")
    require_at_most(len(gpus), MAX_GPUS, "GPUs", place=table.at("gpu"))
    server = Server(
        name=table.text("name") or f"server-{index}",
        gpus=tuple(_gpu(item) for item in gpus),
        tasks=task_shares(table.table("tasks")),
        **_given(
            arrival_interval_s=table.number("arrival_interval_s", positive=True),
            weight=table.number("weight"),
            uplink_mbps=table.number("uplink_mbps", positive=True),
            downlink_mbps=table.number("downlink_mbps", positive=True),
            kv_tokens=table.whole("kv_tokens"),
            concurrency=table.whole("concurrency", least=1),
            layer_cap=table.whole("layer_cap"),
        ),
        pin=table.pairs("pin"),
        forbid=table.pairs("forbid"),
    )
    table.end()
    return server


def task_shares(table: Table) -> dict[str, float]:
    """Shares of a server's requests by task; they sum to one, or there are none.

    Raises
    ------
    InputError
        A share is no number from 0 to 1, a task has no name, the sum is not one.
    """
    require_at_most(len(table.values), MAX_NAMES, "tasks", place=table.place)
    for task in table.values:
        require_name(task, place=table.place)
    shares = {key: table.number(key, most=1.0) or 0.0 for key in list(table.values)}
    if any(not key.strip() for key in shares):
        raise InputError("empty task", place=table.place, expected="names of tasks")
    total = math.fsum(shares.values())
    if shares and abs(total - 1.0) > SHARE_TOLERANCE:
        raise InputError(
            f"shares sum to {total:g}",
            place=table.place,
            expected="shares of the server's requests that sum to 1",
            remedy="divide each share by their sum",
        )
    return shares


def _gpu(table: Table) -> Gpu:
    gigabytes = table.number("memory_gb", positive=True, most=1e9)
    gibibytes = table.number("memory_gib", positive=True, most=1e9)
    slots = table.whole("slots")
    given = [
        key
        for key, value in (("memory_gb", gigabytes), ("memory_gib", gibibytes), ("slots", slots))
        if value is not None
    ]
    if not given or {"memory_gb", "memory_gib"} <= set(given):
        raise InputError(
            " and ".join(given) or "no memory size",
            place=table.place,
            expected="memory_gb (1e9 bytes) or memory_gib (2**30 bytes), or slots",
        )
    memory_bytes = None
    if gigabytes is not None:
        memory_bytes = round(gigabytes * 1e9)
    elif gibibytes is not None:
        memory_bytes = round(gibibytes * 2**30)
    reserve_gb = table.number("reserve_gb", most=1e9)
    dense, blocks = table.flag("dense"), table.flag("load_blocks_compute")
    values = _given(
        memory_fraction=table.number("memory_fraction", positive=True, most=1.0),
        reserve_bytes=None if reserve_gb is None else round(reserve_gb * 1e9),
        memory_bandwidth_gbs=table.number("memory_bandwidth_gbs", positive=True),
        tflops=table.number("tflops", positive=True),
        launch_overhead_us=table.number("launch_overhead_us"),
        load_gbs=table.number("load_gbs", positive=True),
    )
    table.end()
    return Gpu(
        memory_bytes=memory_bytes,
        slots=slots,
        dense=dense,
        load_blocks_compute=blocks,
        assumed=frozenset(GPU_FIGURES).difference(values),
        **values,
    )
