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
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from prism_plan.io.json import parse_json
from prism_plan.io.pydantic_base import (
    ABSENT,
    FormatModel,
    ListOf,
    Version1,
    short_repr,
    validate,
    validation_error,
)
from prism_plan.io.text_files import read_text
from prism_plan.simulate.calibration import LINK_KEYS, Calibration, GpuCurves


def _ascending(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    for index, ((a, _), (b, _)) in enumerate(itertools.pairwise(points), start=1):
        if a >= b:
            raise validation_error(f"{b} tokens after {a}", "more tokens", index)
    return points


#: Milliseconds, or kilobytes.
Amount = Annotated[float, Field(ge=0, le=1e12)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Point = Annotated[tuple[Tokens, Amount], Strict(False)]
CurvePart = Annotated[ListOf[Point], Field(min_length=2), AfterValidator(_ascending)]


class CurvesPart(FormatModel):
    """Times of one GPU by tokens: the dense part of one MoE layer, and one expert's batch."""

    dense_ms: CurvePart
    expert_ms: CurvePart

    def curves(self) -> GpuCurves:
        """Both curves, with their times in seconds."""
        dense, expert = (
            tuple((tokens, time_ms * 1e-3) for tokens, time_ms in points)
            for points in (self.dense_ms, self.expert_ms)
        )
        return GpuCurves(dense_s=dense, expert_s=expert)


class ServerPart(FormatModel):
    """Times of the GPUs of one server, in order."""

    name: str
    gpus: ListOf[CurvesPart]


class CalibrationFile(FormatModel):
    """Times and figures of links that were measured."""

    format: Literal["prism-plan/calibration"]
    version: Version1
    call_overhead_ms: Amount = ABSENT
    hop_overhead_ms: Amount = ABSENT
    bandwidth_mbps: Annotated[float, Field(gt=0, le=1e12)] = ABSENT
    rtt_ms: Amount = ABSENT
    burst_kb: Amount = ABSENT
    short_kb: Amount = ABSENT
    default: CurvesPart | None = None
    servers: ListOf[ServerPart] = Field(default=[])
    provenance: Any = None

    @model_validator(mode="after")
    def _times_once(self) -> Self:
        first: set[str] = set()
        for index, server in enumerate(self.servers):
            if server.name in first and server.gpus:
                raise validation_error(
                    f"{short_repr(server.name)} is duplicated", "", "servers", index, "name"
                )
            if server.gpus:
                first.add(server.name)
        if self.default is None and not first:
            raise validation_error("no times in it", "default, or servers")
        return self


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
    """A calibration from the parsed JSON of its file; see :func:`read_calibration`."""
    file = validate(CalibrationFile, values, source=source)
    return Calibration(
        name=str(source),
        default=file.default.curves() if file.default else None,
        gpus={
            (server.name, number): gpu.curves()
            for server in file.servers
            for number, gpu in enumerate(server.gpus)
        },
        **{key: getattr(file, key) for key in LINK_KEYS},
    )
