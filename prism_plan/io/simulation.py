"""Simulation reports: JSON, format ``prism-plan/simulation`` version 1 (DESIGN section 6)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from prism_plan.errors import InputError
from prism_plan.files import parse_json, read_text
from prism_plan.io.declared import (
    ABSENT,
    Amount,
    Checked,
    Count,
    Declared,
    Listed,
    NonEmpty,
    Open,
    Positive,
    Share,
    Version1,
    refused,
    validated,
)

AboveZero = Annotated[float, Field(gt=0)]


def _every_percent(quantiles: list[float]) -> list[float]:
    if len(quantiles) not in (0, 101):
        raise refused(f"{len(quantiles)} numbers", "101, or none")
    return quantiles


class TimesPart(Open):
    """Seconds; null where there was nothing to measure."""

    mean: Amount | None
    p50: Amount | None
    p95: Amount | None
    p99: Amount | None
    max: Amount | None


class GpuPart(Open):
    """A GPU of a server."""

    busy: Amount | None
    experts: Count


class ServerPart(Open):
    """What the requests of one server met with, and how busy its parts were."""

    name: NonEmpty
    requests: Count
    latency_s: TimesPart
    utilisation: Amount | None
    remote_share: Share | None
    waiting_share: Share | None
    destinations: Amount | None
    bytes_sent: Count
    bytes_received: Count
    uplink_busy: Amount | None
    downlink_busy: Amount | None
    gpus: Listed[GpuPart]


class MigrationPart(Open):
    """A review of the placement."""

    at_s: Amount
    moved_experts: Count
    moved_bytes: Count
    decision: Literal["move", "stay", "busy"]
    saving_s: float | None
    cost_s: float | None
    finished_at_s: Amount | None


class LayerPart(Open):
    """Mean latency of a layer over decode steps with so many remote experts."""

    remote_experts: Count
    steps: Count
    mean: Amount | None


class TimelinePart(Open):
    """By time of arrival, bins from 0."""

    bin_s: AboveZero
    arrivals: Listed[Count]
    mean_latency_s: Listed[Amount | None]


class PhasePart(Open):
    """When a phase of the workload began, and what changed with it."""

    number: Positive
    at_s: Amount = Field(description="Arrival of its first request.")
    #: Arrival of its first request at the last server to reach it.
    everywhere_at_s: Amount
    #: Shares by task of the servers that changed.
    tasks: dict[str, dict[str, Share | None]]
    arrival_interval_s: AboveZero | None = Field(description="null: as before.")


class RunPart(Open):
    """A placement as simulated. A run may have more keys than these."""

    #: File name of the placement, or the name of a baseline.
    placement: NonEmpty
    solver: str
    partial: bool
    requests: Count
    finished: Count
    latency_s: TimesPart
    ttft_s: TimesPart
    tpot_s: TimesPart
    queueing_s: TimesPart
    remote_share: Share | None
    waiting_share: Share | None
    destinations: Amount | None
    expert_calls: Count
    remote_calls: Count
    messages: Count
    bytes_sent: Count
    busiest: Amount | None = Field(
        default=None,
        description="Share of the busiest place, GPU or link that the arrivals ask for; "
        "1 or more is unstable.",
    )
    servers: Listed[ServerPart]
    #: Reviews of the placement in order of time.
    migrations: Listed[MigrationPart]
    layer_latency_s: Listed[LayerPart] = Field(description="From 0 remote experts to top-k.")
    #: 0 %, 1 %, ..., 100 %; empty if nothing finished.
    latency_quantiles_s: Annotated[Listed[Amount], AfterValidator(_every_percent)]
    timeline: TimelinePart
    phases: Listed[PhasePart] = Field(default=[], description="Only with a schedule of phases.")
    loads: Count
    loaded_bytes: Count
    events: Count
    simulated_s: Amount
    runtime_s: Amount


class ReviewPart(Open):
    """How migrations are decided."""

    every_s: AboveZero
    horizon_s: AboveZero
    half_life_s: AboveZero | None = Field(description="null: all since the last move.")
    cost: Literal["sum", "max"]
    solver: str | None


class TracePart(Open):
    """The trace whose requests were simulated."""

    name: str
    sha256: str
    kind: Literal["tokens", "counts"]


class ClusterPart(Open):
    """The cluster that was simulated."""

    name: str
    sha256: str


class SimulationFile(Declared):
    """Latency of requests under placements, as simulated."""

    format: Literal["prism-plan/simulation"]
    version: Version1
    partial: bool = Field(description="Whether the simulation was interrupted.")
    seed: Count
    route: str
    migrate: str
    review: ReviewPart = Field(default=ABSENT, description="Only where migrations are decided.")
    timing: str = Field(description="'cluster', or the name of the calibration file.")
    trace: TracePart
    cluster: ClusterPart
    notes: Listed[str]
    runs: Checked[RunPart]


def read_simulation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a simulation report, checked.

    Raises
    ------
    InputError
        Not JSON, not a simulation report, a newer version, a value that the schema does not allow,
        or values that contradict each other; names the place and the value.
    """
    return simulation_from_json(parse_json(read_text(path), path), source=path)


def simulation_from_json(values: Any, source: object = "") -> dict[str, Any]:
    """The same from the values of the file; see :func:`read_simulation`."""
    remedy = "make reports with prism-plan simulate -o"
    validated(SimulationFile, values, source=source, remedy=remedy)
    for index, run in enumerate(values["runs"]):
        _check_run(run, source, f"runs[{index}]")
    return dict(values)


def _check_run(run: Mapping[str, Any], source: object, place: str) -> None:
    """What a schema cannot say: which values belong together."""
    if run["finished"] > run["requests"]:
        raise InputError(
            f"{run['finished']}",
            source=source,
            place=f"{place}.finished",
            expected=f"at most the {run['requests']} requests",
        )
    quantiles = run["latency_quantiles_s"]
    if bool(quantiles) != (run["finished"] > 0):
        raise InputError(
            f"{len(quantiles)} numbers with {run['finished']} requests finished",
            source=source,
            place=f"{place}.latency_quantiles_s",
            expected="numbers exactly if a request finished",
        )
    for below, above in itertools.pairwise(quantiles):
        if above < below:
            raise InputError(
                f"{above} after {below}",
                source=source,
                place=f"{place}.latency_quantiles_s",
                expected="ascending numbers",
            )
    for key, value in run["latency_s"].items():
        if value is None and quantiles:
            raise InputError(
                "null",
                source=source,
                place=f"{place}.latency_s.{key}",
                expected="a number, for requests finished",
            )
    timeline = run["timeline"]
    if len(timeline["arrivals"]) != len(timeline["mean_latency_s"]):
        raise InputError(
            f"{len(timeline['mean_latency_s'])} bins",
            source=source,
            place=f"{place}.timeline.mean_latency_s",
            expected=f"{len(timeline['arrivals'])}, as in arrivals",
        )
    for number, phase in enumerate(run.get("phases", ())):
        if phase["everywhere_at_s"] < phase["at_s"]:
            raise InputError(
                f"{phase['everywhere_at_s']}",
                source=source,
                place=f"{place}.phases[{number}].everywhere_at_s",
                expected=f"at least at_s, {phase['at_s']}",
            )
    for number, layer in enumerate(run["layer_latency_s"]):
        if layer["remote_experts"] != number:
            raise InputError(
                f"{layer['remote_experts']}",
                source=source,
                place=f"{place}.layer_latency_s[{number}].remote_experts",
                expected=f"{number}, one entry for each number from 0",
            )
        if layer["steps"] and layer["mean"] is None:
            raise InputError(
                f"null with {layer['steps']} steps",
                source=source,
                place=f"{place}.layer_latency_s[{number}].mean",
                expected="a number",
            )
