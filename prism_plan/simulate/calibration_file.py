"""Calibration files: JSON, format ``prism-plan/calibration`` version 1.

::

    {"format": "prism-plan/calibration", "version": 1,
     "call_overhead_ms": 0.2, "bandwidth_mbps": 500, "rtt_ms": 1.0,
     "burst_kb": 0, "short_kb": 0,
     "default": {"dense_ms": [[1, 0.08], [64, 0.1]], "expert_ms": [[1, 0.03], [64, 0.04]]},
     "servers": [{"name": "edge-0", "gpus": [{"dense_ms": [...], "expert_ms": [...]}]}]}

Points are [tokens, milliseconds], tokens ascending. All keys but the first two may be left out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError, did_you_mean
from prism_plan.files import parse_json, read_text
from prism_plan.simulate.calibration import LINK_KEYS, Calibration, Curve, GpuCurves

FORMAT = "prism-plan/calibration"
VERSION = 1
KEYS = ("format", "version", *LINK_KEYS, "default", "servers", "provenance")


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read and check a calibration file.

    Raises
    ------
    InputError
        Not a calibration, a negative or infinite time, token counts that do not ascend; names the
        file, the place in it and the value.
    """
    return calibration_from_json(parse_json(read_text(path), path), source=path)


def calibration_from_json(values: Any, source: object = "") -> Calibration:
    """The same from the values of the file; see :func:`read_calibration`."""
    try:
        return _calibration(values, str(source))
    except InputError as error:
        raise error.within(source) from error


def _calibration(values: Any, name: str) -> Calibration:
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        form = values.get("format") if isinstance(values, Mapping) else values
        raise InputError(f"{form!r:.60}", place="format", expected=repr(FORMAT))
    if values.get("version") != VERSION or isinstance(values["version"], bool):
        raise InputError(
            f"{values.get('version')!r:.60}",
            place="version",
            expected=str(VERSION),
            remedy="a newer file needs a newer prism-plan",
        )
    _known(values, KEYS, "")
    link = {
        key: _time(values[key], key, key == "bandwidth_mbps") for key in LINK_KEYS & values.keys()
    }
    default = None if values.get("default") is None else _gpu(values["default"], "default")
    gpus: dict[tuple[str, int], GpuCurves] = {}
    for n, server in enumerate(_list(values.get("servers", []), "servers")):
        place = f"servers[{n}]"
        if not isinstance(server, Mapping) or not isinstance(server.get("name"), str):
            raise InputError(f"{server!r:.60}", place=place, expected="an object with a name")
        _known(server, ("name", "gpus"), place)
        for g, gpu in enumerate(_list(server.get("gpus"), f"{place}.gpus")):
            if (server["name"], g) in gpus:
                raise InputError(f"{server['name']!r:.60} stands twice", place=f"{place}.name")
            gpus[server["name"], g] = _gpu(gpu, f"{place}.gpus[{g}]")
    if default is None and not gpus:
        raise InputError("no times in it", expected="default, or servers")
    return Calibration(name=name, default=default, gpus=gpus, **link)


def _known(values: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in values:
        if key not in keys:
            raise InputError(
                f"unknown key {key!r:.60}{did_you_mean(str(key), keys)}",
                place=place,
                expected=f"the keys {', '.join(keys)}",
            )


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{value!r:.60}", place=place, expected="a list")
    return value


def _gpu(values: Any, place: str) -> GpuCurves:
    if not isinstance(values, Mapping):
        raise InputError(f"{values!r:.60}", place=place, expected="dense_ms and expert_ms")
    _known(values, ("dense_ms", "expert_ms"), place)
    return GpuCurves(
        dense_s=_curve(values.get("dense_ms"), f"{place}.dense_ms"),
        expert_s=_curve(values.get("expert_ms"), f"{place}.expert_ms"),
    )


def _curve(values: Any, place: str) -> Curve:
    points = []
    for index, point in enumerate(_list(values, place)):
        where = f"{place}[{index}]"
        if not isinstance(point, list) or len(point) != 2:
            raise InputError(f"{point!r:.60}", place=where, expected="[tokens, milliseconds]")
        tokens = point[0]
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens < 2**31:
            raise InputError(f"{tokens!r:.60}", place=where, expected="a whole number of tokens")
        points.append((tokens, _time(point[1], where) * 1e-3))
    if len(points) < 2:
        raise InputError(f"{len(points)} points", place=place, expected="at least two")
    for index, (a, b) in enumerate(itertools.pairwise(points)):
        if a[0] >= b[0]:
            raise InputError(
                f"{b[0]} tokens after {a[0]}", place=f"{place}[{index + 1}]", expected="more tokens"
            )
    return tuple(points)


def _time(value: Any, place: str, positive: bool = False) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 <= value <= 1e12
        or (positive and value == 0)
    ):
        expected = "a number above 0" if positive else "a number of at least 0"
        raise InputError(f"{value!r:.60}", place=place, expected=expected)
    return float(value)
