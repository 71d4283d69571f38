"""Cluster files: TOML in, a validated :class:`~prism_plan.cluster.Cluster` out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from prism_plan.cluster import GPU_FIGURES, LINK_FIGURES, Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import MAX_GPUS, MAX_NAMES
from prism_plan.io.gpu_table import gpu_figures
from prism_plan.io.pydantic_base import (
    ABSENT,
    DictOf,
    ListOf,
    Name,
    TomlTable,
    short_repr,
    validate,
    validation_error,
)
from prism_plan.io.text_files import read_text
from prism_plan.io.toml import parse_toml

#: Shares of a server's requests must sum to one within this.
SHARE_TOLERANCE = 1e-6
#: No quantity of a file is smaller than this and not zero; products of some still are numbers.
MIN_QUANTITY = 1e-12


def _require_zero_or_normal(value: float) -> float:
    if 0 < value < MIN_QUANTITY:
        raise validation_error(short_repr(value), f"0 or a number of at least {MIN_QUANTITY:g}")
    return value


def _require_sum_of_one(shares: dict[str, float]) -> dict[str, float]:
    total = math.fsum(shares.values())
    if shares and abs(total - 1.0) > SHARE_TOLERANCE:
        raise validation_error(
            f"shares sum to {total:g}", "shares of the server's requests that sum to 1"
        )
    return shares


def _require_distinct_pairs(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    seen: set[tuple[int, int]] = set()
    for index, pair in enumerate(pairs):
        if pair in seen:
            raise validation_error(short_repr(list(pair)), "each pair once", index)
        seen.add(pair)
    return pairs


Amount = Annotated[float, Field(ge=0, le=1e12), AfterValidator(_require_zero_or_normal)]
Rate = Annotated[float, Field(ge=MIN_QUANTITY, le=1e12)]
Size = Annotated[float, Field(ge=MIN_QUANTITY, le=1e9)]
#: Keys of a GPU of which one is needed, unless its name is given.
SIZE_KEYS = frozenset({"memory_gb", "memory_gib", "slots"})
#: Beyond 2**53 floats and Parquet would lose digits.
Whole = Annotated[int, Field(ge=0, lt=2**53)]
AtLeastOne = Annotated[int, Field(ge=1, lt=2**53)]
#: Shares of a server's requests by task; they sum to one, or there are none.
TaskShares = Annotated[
    DictOf[Name, Annotated[float, Field(ge=0, le=1), AfterValidator(_require_zero_or_normal)]],
    Field(max_length=MAX_NAMES),
    AfterValidator(_require_sum_of_one),
]
Pair = Annotated[tuple[Whole, Whole], Strict(False)]
Pairs = Annotated[
    ListOf[Pair], Field(max_length=MAX_NAMES), AfterValidator(_require_distinct_pairs)
]


class LinkTable(TomlTable):
    """What any two servers have between them, unless they or their pair say otherwise."""

    bandwidth_mbps: Rate = Link.bandwidth_mbps
    rtt_ms: Amount = Link.rtt_ms
    call_overhead_ms: Amount = Link.call_overhead_ms
    burst_kb: Amount = Link.burst_kb
    short_kb: Amount = Link.short_kb


class PairTable(TomlTable):
    """Figures of one pair of servers, by their names."""

    a: Name
    b: Name
    bandwidth_mbps: Rate = ABSENT
    rtt_ms: Amount = ABSENT


class GpuTable(TomlTable):
    """A GPU: its name, its memory in units of 1e9 or 2**30 bytes, or the experts that it holds."""

    gpu: Annotated[
        Name, Field(description="A GPU of the shipped table; it gives what other keys do not.")
    ] = ABSENT
    memory_gb: Size = ABSENT
    memory_gib: Size = ABSENT
    slots: Whole = ABSENT
    memory_fraction: Annotated[float, Field(ge=MIN_QUANTITY, le=1)] = Gpu.memory_fraction
    reserve_gb: Annotated[float, Field(ge=0, le=1e9), AfterValidator(_require_zero_or_normal)] = 0.0
    dense: bool = False
    load_blocks_compute: bool = False
    memory_bandwidth_gbs: Rate = Gpu.memory_bandwidth_gbs
    tflops: Rate = Gpu.tflops
    launch_overhead_us: Amount = Gpu.launch_overhead_us
    load_gbs: Rate = Gpu.load_gbs

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = ("memory_gb", "memory_gib", "slots")
        given = [key for key in sizes if key in self.model_fields_set]
        named = "gpu" in self.model_fields_set
        if not (given or named) or given[:2] == ["memory_gb", "memory_gib"]:
            raise validation_error(
                " and ".join(given) or "no memory size",
                "memory_gb (1e9 bytes) or memory_gib (2**30 bytes), or slots",
            )
        return self


class ServerTable(TomlTable):
    """A server, its users and its GPUs."""

    name: Name = ""
    tasks: TaskShares = Field(default={})
    arrival_interval_s: Rate = ABSENT
    weight: Amount = ABSENT
    uplink_mbps: Rate = ABSENT
    downlink_mbps: Rate = ABSENT
    kv_tokens: Whole = Server.kv_tokens
    concurrency: AtLeastOne = Server.concurrency
    layer_cap: Whole = ABSENT
    execute_at_home: bool = Server.execute_at_home
    pin: Pairs = Field(default=[])
    forbid: Pairs = Field(default=[])
    gpu: Annotated[ListOf[GpuTable], Field(max_length=MAX_GPUS)] = Field(default=[])


class ClusterFile(TomlTable):
    """The servers, their GPUs, their links and their users."""

    name: Name = ""
    link: LinkTable = LinkTable()
    server: Annotated[ListOf[ServerTable], Field(max_length=MAX_NAMES)] = Field(default=[])
    links: ListOf[PairTable] = Field(default=[])


def read_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read and check a cluster file (docs/design.md, section 6).

    Raises
    ------
    InputError
        Names the file, the place in it, the value and what was expected.
    """
    return parse_cluster(read_text(path), source=path)


def parse_cluster(text: str, source: object = "") -> Cluster:
    """A cluster from the text of a TOML file; see :func:`read_cluster`."""
    return cluster_from_values(parse_toml(text, source), source)


def cluster_from_values(values: Mapping[str, Any], source: object = "") -> Cluster:
    """A cluster from the values of its file; see :func:`read_cluster`."""
    file = validate(ClusterFile, values, source=source)
    try:
        servers = tuple(_server(server, index) for index, server in enumerate(file.server))
        return Cluster(
            name=file.name or Path(str(source)).stem or "cluster",
            servers=servers,
            link=Link(
                **dict(file.link),
                assumed=frozenset(LINK_FIGURES) - file.link.model_fields_set,
            ),
            pair_links=_pair_links(file.links, [server.name for server in servers]),
        )
    except InputError as error:
        raise error.within(source) from error


def _pair_links(tables: Sequence[PairTable], names: Sequence[str]) -> tuple[PairLink, ...]:
    pairs: dict[tuple[int, int], PairLink] = {}
    number = {name: index for index, name in enumerate(names)}
    for index, table in enumerate(tables):

        def wrong(key: str, expected: str, table: PairTable = table, at: int = index) -> InputError:
            place = f"links[{at}].{key}"
            return InputError(short_repr(getattr(table, key)), place=place, expected=expected)

        for key, name in (("a", table.a), ("b", table.b)):
            if name not in number:
                raise wrong(key, f"the name of a server{did_you_mean(name, names)}")
        a, b = sorted((number[table.a], number[table.b]))
        if a == b or (a, b) in pairs:
            raise wrong("b", "two different servers" if a == b else "each pair of servers once")
        pairs[a, b] = PairLink(a, b, table.bandwidth_mbps, table.rtt_ms)
    return tuple(pairs[key] for key in sorted(pairs))


def _server(table: ServerTable, index: int) -> Server:
    values = dict(table)
    return Server(
        name=values.pop("name") or f"server-{index}",
        gpus=tuple(
            _gpu(gpu, f"server[{index}].gpu[{g}]") for g, gpu in enumerate(values.pop("gpu"))
        ),
        pin=tuple(values.pop("pin")),
        forbid=tuple(values.pop("forbid")),
        **values,
    )


def _gpu(table: GpuTable, place: str) -> Gpu:
    values = dict(table)
    given = set(table.model_fields_set)
    name = values.pop("gpu")
    if name is not None:
        if given & SIZE_KEYS:
            given |= SIZE_KEYS
        known = _named_figures(name, place)
        values |= {key: value for key, value in known.items() if key not in given}
        given |= set(known)
    sizes = ((values.pop("memory_gb"), 1e9), (values.pop("memory_gib"), 2**30))
    memory = [round(size * unit) for size, unit in sizes if size is not None]
    return Gpu(
        memory_bytes=memory[0] if memory else None,
        reserve_bytes=round(values.pop("reserve_gb") * 1e9),
        assumed=frozenset(GPU_FIGURES) - given,
        name=name or "",
        **values,
    )


def _named_figures(name: str, place: str) -> Mapping[str, float]:
    """The keys of a GPU table for which a name of the shipped table stands, with their values."""
    try:
        return gpu_figures(name).cluster_keys()
    except InputError as error:
        raise InputError(
            error.found,
            place=f"{place}.gpu",
            expected=error.expected,
            remedy=f"{error.remedy}; or give memory_gb, memory_bandwidth_gbs and tflops",
        ) from error
