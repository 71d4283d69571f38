"""Simulation reports: JSON, ``prism-plan/simulation`` version 1 (docs/design.md, section 6)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from prism_plan.io.pydantic_base import (
    ABSENT,
    Amount,
    CheckedList,
    Count,
    DictOf,
    ExtensibleModel,
    FormatModel,
    ListOf,
    NonEmpty,
    Positive,
    Share,
    Version1,
    validate,
)
from prism_plan.io.text_files import read_text

AboveZero = Annotated[float, Field(gt=0)]


class TimesPart(ExtensibleModel):
    """Seconds; null where there was nothing to measure."""

    mean: Amount | None
    p50: Amount | None
    p95: Amount | None
    p99: Amount | None
    max: Amount | None


class GpuPart(ExtensibleModel):
    """A GPU of a server."""

    busy: Amount | None
    experts: Count


class ServerPart(ExtensibleModel):
    """Latency and calls of the requests of one server, and the utilisation of its parts."""

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
    gpus: ListOf[GpuPart]


class MigrationPart(ExtensibleModel):
    """A review of the placement."""

    at_s: Amount
    moved_experts: Count
    moved_bytes: Count
    decision: Literal["move", "stay", "busy"]
    saving_s: float | None
    cost_s: float | None
    finished_at_s: Amount | None


class LayerPart(ExtensibleModel):
    """Mean latency of a layer over decode steps with so many remote experts."""

    remote_experts: Count
    steps: Count
    mean: Amount | None


class TimelinePart(ExtensibleModel):
    """By time of arrival, bins from 0."""

    bin_s: AboveZero
    arrivals: ListOf[Count]
    mean_latency_s: ListOf[Amount | None]


class PhasePart(ExtensibleModel):
    """When a phase of the workload began, and what changed with it."""

    number: Positive
    at_s: Amount = Field(description="Arrival of its first request.")
    #: Arrival of its first request at the last server to reach it.
    everywhere_at_s: Amount
    #: Shares by task of the servers that changed.
    tasks: DictOf[str, DictOf[str, Share | None]]
    arrival_interval_s: AboveZero | None = Field(description="null: as before.")


class LostServerPart(ExtensibleModel):
    """One loss of a server; null where the run did not come to it."""

    server: NonEmpty
    at_s: Amount
    return_s: Amount | None = Field(description="null: it does not come back.")
    noticed_s: Amount | None = Field(description="When the other servers knew.")
    repaired_s: Amount | None = Field(description="End of the migration that followed.")
    restored_s: Amount | None = Field(description="End of the migration after its return.")


class FailurePart(ExtensibleModel):
    """Why requests failed, and how many."""

    reason: NonEmpty
    requests: Count


class WhenPart(ExtensibleModel):
    """The answered requests of a part of the run."""

    requests: Count
    latency_s: TimesPart
    ttft_s: TimesPart


class LossesPart(ExtensibleModel):
    """Lost servers and what they did; requests without an answer count in no time."""

    servers: ListOf[LostServerPart]
    not_served: Count = Field(description="Arrivals at servers that were away.")
    lost_requests: Count = Field(description="In progress at their home server when it was lost.")
    failed_requests: Count
    failures: ListOf[FailurePart]
    restarted_requests: Count
    repeated_calls: Count = Field(description="Messages whose calls were sent again.")
    before: WhenPart = Field(description="Requests answered before the first loss.")
    during: WhenPart = Field(description="Requests that were there between a loss and its repair.")
    after: WhenPart = Field(description="All others.")


class RunPart(ExtensibleModel):
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
    user_tokens_per_s: Amount | None = Field(
        default=None,
        description="Output tokens a second after the first, for a user: 1 / mean of tpot_s. "
        "Older files lack it.",
    )
    queueing_s: TimesPart
    remote_share: Share | None
    waiting_share: Share | None
    destinations: Amount | None
    expert_calls: Count
    remote_calls: Count
    messages: Count
    hops: Count = ABSENT
    bytes_sent: Count
    #: Share of the busiest place, GPU or link that the arrivals ask for; 1 or more is unstable.
    busiest: Amount | None = None
    servers: ListOf[ServerPart]
    #: Reviews of the placement in order of time.
    migrations: ListOf[MigrationPart]
    layer_latency_s: ListOf[LayerPart] = Field(description="From 0 remote experts to top-k.")
    #: 0 %, 1 %, ..., 100 %; empty if nothing finished.
    latency_quantiles_s: ListOf[Amount]
    timeline: TimelinePart
    phases: ListOf[PhasePart] = Field(default=[], description="Only with a schedule of phases.")
    losses: LossesPart = Field(default=ABSENT, description="Only where servers are lost.")
    loads: Count
    loaded_bytes: Count
    events: Count
    simulated_s: Amount
    runtime_s: Amount


class ReviewPart(ExtensibleModel):
    """How migrations are decided."""

    every_s: AboveZero
    horizon_s: AboveZero
    half_life_s: AboveZero | None = Field(description="null: all since the last move.")
    cost: Literal["sum", "max"]
    solver: str | None


class LossOptionsPart(ExtensibleModel):
    """When losses are known, and for how long requests wait."""

    timeout_s: Amount
    request_timeout_s: AboveZero


class TracePart(ExtensibleModel):
    """The trace whose requests were simulated."""

    name: str
    sha256: str
    kind: Literal["tokens", "counts"]


class ClusterPart(ExtensibleModel):
    """The cluster that was simulated."""

    name: str
    sha256: str


class SimulationFile(FormatModel):
    """Latency of requests under placements, as simulated."""

    format: Literal["prism-plan/simulation"]
    version: Version1
    partial: bool = Field(description="Whether the simulation was interrupted.")
    seed: Count
    route: str
    migrate: str
    review: ReviewPart = Field(default=ABSENT, description="Only where migrations are decided.")
    losses: LossOptionsPart = Field(default=ABSENT, description="Only where servers are lost.")
    timing: str = Field(description="'cluster', or the name of the calibration file.")
    trace: TracePart
    cluster: ClusterPart
    notes: ListOf[str]
    runs: CheckedList[RunPart]


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
    """A report from the parsed JSON of its file; see :func:`read_simulation`."""
    remedy = "make reports with prism-plan simulate -o"
    validate(SimulationFile, values, source=source, remedy=remedy)
    for index, run in enumerate(values["runs"]):
        _check_run(run, source, f"runs[{index}]")
    return dict(values)


def _check_run(run: Mapping[str, Any], source: object, place: str) -> None:
    """Refuse values that contradict each other, which a schema cannot express."""

    def require(holds: bool, at: str, found: object, expected: str) -> None:
        if not holds:
            raise InputError(f"{found}", source=source, place=f"{place}.{at}", expected=expected)

    finished, requests = run["finished"], run["requests"]
    require(finished <= requests, "finished", finished, f"at most the {requests} requests")
    quantiles = run["latency_quantiles_s"]
    found = f"{len(quantiles)} numbers"
    require(len(quantiles) in (0, 101), "latency_quantiles_s", found, "101, or none")
    found = f"{len(quantiles)} numbers with {finished} requests finished"
    expected = "numbers exactly if a request finished"
    require(bool(quantiles) == (finished > 0), "latency_quantiles_s", found, expected)
    for a, b in itertools.pairwise(quantiles):
        require(a <= b, "latency_quantiles_s", f"{b} after {a}", "ascending numbers")
    for key, value in run["latency_s"].items():
        known = value is not None or not quantiles
        require(known, f"latency_s.{key}", "null", "a number, for requests finished")
    bins, means = (len(run["timeline"][key]) for key in ("arrivals", "mean_latency_s"))
    found, expected = f"{means} bins", f"{bins}, as in arrivals"
    require(bins == means, "timeline.mean_latency_s", found, expected)
    for number, phase in enumerate(run.get("phases", ())):
        begin, everywhere = phase["at_s"], phase["everywhere_at_s"]
        at, expected = f"phases[{number}].everywhere_at_s", f"at least at_s, {begin}"
        require(everywhere >= begin, at, everywhere, expected)
    for number, layer in enumerate(run["layer_latency_s"]):
        at, remote = f"layer_latency_s[{number}]", layer["remote_experts"]
        expected = f"{number}, one entry for each number from 0"
        require(remote == number, f"{at}.remote_experts", remote, expected)
        known = layer["mean"] is not None or not layer["steps"]
        require(known, f"{at}.mean", f"null with {layer['steps']} steps", "a number")
