"""Cluster files: TOML in, a validated :class:`~prism_plan.cluster.Cluster` out."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
from prism_plan.errors import InputError, did_you_mean
from prism_plan.files import read_text

#: No quantity of a cluster is smaller than this and not zero; products of some still are numbers.
LEAST = 1e-12
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
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"not TOML: {error}", source=source) from error
    try:
        return _cluster(_Table(values, ""), default_name=Path(str(source)).stem or "cluster")
    except InputError as error:
        raise error.within(source) from error


class _Table:
    """A TOML table whose values are taken by name and kind; what is left over is an error."""

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, Mapping):
            raise InputError(f"{values!r:.60}", place=place, expected="a table")
        self.values = dict(values)
        self.place = place
        self.known: list[str] = []

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str) -> Any:
        self.known.append(key)
        return self.values.pop(key, None)

    def wrong(self, key: str, value: object, expected: str, remedy: str = "") -> InputError:
        return InputError(f"{value!r:.80}", place=self.at(key), expected=expected, remedy=remedy)

    def number(self, key: str, *, positive: bool = False, most: float = 1e12) -> float | None:
        """A number that is 0 (unless positive) or between :data:`LEAST` and ``most``."""
        value = self.take(key)
        if value is None:
            return None
        expected = f"a number {'above' if positive else 'of at least'} 0 and at most {most:g}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, value, expected)
        try:
            number = float(value)
        except OverflowError:
            raise self.wrong(key, value, expected) from None
        if not 0 <= number <= most or (positive and number == 0):
            raise self.wrong(key, value, expected)
        if 0 < number < LEAST:
            raise self.wrong(key, value, f"0 or a number of at least {LEAST:g}")
        return number

    def whole(self, key: str, *, least: int = 0) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not least <= value < 2**53  # beyond, floats and Parquet would lose digits
        ):
            raise self.wrong(key, value, f"a whole number of at least {least}")
        return value

    def text(self, key: str) -> str | None:
        value = self.take(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self.wrong(key, value, "a non-empty text")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def table(self, key: str) -> _Table:
        """A table inside this one; empty where it is not given."""
        value = self.take(key)
        return _Table({} if value is None else value, self.at(key))

    def tables(self, key: str) -> list[_Table]:
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, value, f"tables, each written as [[{self.at(key)}]]")
        return [_Table(item, f"{self.at(key)}[{index}]") for index, item in enumerate(value)]

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        value = self.take(key)
        if value is None:
            return ()
        expected = "a list of [layer, expert] pairs"
        if not isinstance(value, list):
            raise self.wrong(key, value, expected)
        pairs = []
        for index, item in enumerate(value):
            if (
                not isinstance(item, list)
                or len(item) != 2
                or any(not isinstance(x, int) or isinstance(x, bool) or x < 0 for x in item)
            ):
                raise self.wrong(f"{key}[{index}]", item, "[layer, expert]")
            pair = (item[0], item[1])
            if pair in pairs:
                raise self.wrong(f"{key}[{index}]", item, "each pair once")
            pairs.append(pair)
        return tuple(pairs)

    def end(self) -> None:
        for key in self.values:
            raise InputError(
                f"unknown key {key!r}{did_you_mean(key, self.known)}",
                place=self.place,
                expected=f"one of {', '.join(self.known)}",
            )


def _given(**values: Any) -> dict[str, Any]:
    """Only the values that the file gave, so that the defaults stand in one place."""
    return {key: value for key, value in values.items() if value is not None}


def _cluster(table: _Table, default_name: str) -> Cluster:
    name = table.text("name") or default_name
    link = _link(table.table("link"))
    servers = tuple(_server(item, index) for index, item in enumerate(table.tables("server")))
    pairs = _pair_links(table.tables("links"), [server.name for server in servers])
    table.end()
    return Cluster(name=name, servers=servers, link=link, pair_links=pairs)


def _link(table: _Table) -> Link:
    values = _given(
        bandwidth_mbps=table.number("bandwidth_mbps", positive=True),
        rtt_ms=table.number("rtt_ms"),
        call_overhead_ms=table.number("call_overhead_ms"),
        burst_kb=table.number("burst_kb"),
    )
    table.end()
    return Link(**values)


def _pair_links(tables: list[_Table], names: list[str]) -> tuple[PairLink, ...]:
    pairs: dict[tuple[int, int], PairLink] = {}
    for table in tables:
        ends = []
        for key in ("a", "b"):
            name = table.text(key)
            if name not in names:
                hint = did_you_mean(str(name), names)
                raise table.wrong(key, name, f"the name of a server{hint}")
            ends.append(names.index(name))
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


def _server(table: _Table, index: int) -> Server:
    gpus = tuple(_gpu(item) for item in table.tables("gpu"))
    server = Server(
        name=table.text("name") or f"server-{index}",
        gpus=gpus,
        tasks=_tasks(table.table("tasks")),
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


def _tasks(table: _Table) -> dict[str, float]:
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


def _gpu(table: _Table) -> Gpu:
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
    gpu = Gpu(
        memory_bytes=memory_bytes,
        slots=slots,
        dense=table.flag("dense"),
        **_given(
            memory_fraction=table.number("memory_fraction", positive=True, most=1.0),
            reserve_bytes=None if reserve_gb is None else round(reserve_gb * 1e9),
            memory_bandwidth_gbs=table.number("memory_bandwidth_gbs", positive=True),
            tflops=table.number("tflops", positive=True),
            launch_overhead_us=table.number("launch_overhead_us"),
            load_gbs=table.number("load_gbs", positive=True),
        ),
    )
    table.end()
    return gpu
