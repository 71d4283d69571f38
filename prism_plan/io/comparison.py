"""Comparison files: the JSON that ``prism-plan compare -o`` writes, version 1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from prism_plan.io.pydantic_base import (
    Amount,
    CheckedList,
    Count,
    DictOf,
    FormatModel,
    NonEmpty,
    Positive,
    Share,
    Version1,
    validate,
)
from prism_plan.io.text_files import read_text

#: Shares that must agree may differ by rounding.
TOLERANCE = 1e-9

_PLACED = ("remote_share_by_server", "termination", "runtime_s")
_WAITING = ("destinations", "destinations_method", "waiting_share_by_server")
#: A share for each server; null for one that calls nothing.
ByServer = Annotated[DictOf[NonEmpty, Share | None], Field(min_length=1)]


class RowPart(FormatModel):
    """A placement and its scores; all but the name are null where there is none."""

    name: Annotated[NonEmpty, Field(description="Of the solver, or of the placement's file.")]
    solver: str | None = Field(
        default=None, description="That made the placement. Older files lack it."
    )
    remote_share: Share | None
    #: The server with the largest remote share; null: none calls anything.
    worst_server: str | None
    worst_server_share: Share | None
    waiting_share: Share | None
    worst_waiting_server: str | None
    worst_waiting_share: Share | None
    destinations: Annotated[
        Amount | None,
        Field(description="Mean number of remote servers of a (token, layer) step."),
    ]
    #: 'exact', or in which share of the steps they were found greedily.
    destinations_method: NonEmpty | None
    remote_share_by_server: ByServer | None
    waiting_share_by_server: ByServer | None
    #: Remote share on the requests that were planned on.
    planned_share: Share | None
    latency_mean_s: Amount | None = Field(
        default=None, description="Of simulated requests; null: none were. Older files lack it."
    )
    latency_p95_s: Amount | None = None
    #: To the first token.
    ttft_mean_s: Amount | None = None
    user_tokens_per_s: Amount | None = Field(
        default=None,
        description="Output tokens a second after the first, for a user: 1 / mean of the requests' "
        "time per output token. Older files lack it.",
    )
    latency_above_best_low: float | None = Field(
        default=None,
        description="95 % interval of latency_mean_s over the least of all rows, less 1.",
    )
    latency_above_best_high: float | None = None
    bound: float | None = Field(description="Lower bound on planned_share, where the plan has one.")
    termination: Literal["optimal", "heuristic", "time_limit"] | None
    runtime_s: Amount | None
    #: How many constraints of the cluster the placement breaks.
    violations: Count
    note: str = Field(description="Why there is no placement, or empty.")


class ComparisonFile(FormatModel):
    """Solvers and existing placements scored side by side on the same requests."""

    format: Literal["prism-plan/comparison"]
    version: Version1
    trace: str
    cluster: str
    kind: Literal["tokens", "counts"] = Field(description="Of the trace.")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="Share of the requests that are scored and not planned on; null: all are both."
    )
    planned_requests: Count | None = Field(description="null: a counts-only trace.")
    scored_requests: Count | None = Field(description="null: a counts-only trace.")
    seed: Count
    min_replicas: Positive
    simulated_requests: Positive | None = Field(
        default=None, description="Of each server, the same for all rows; null: none."
    )
    simulated_samples: Positive | None = Field(
        default=None, description="Simulations of so many requests, with seeds of their own."
    )
    rows: CheckedList[RowPart]


def read_comparison(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a comparison file, checked.

    Raises
    ------
    InputError
        Not JSON, not a comparison, a newer version, a value that the schema does not allow, or
        values that contradict each other; names the place and the value.
    """
    return comparison_from_json(parse_json(read_text(path), path), source=path)


def comparison_from_json(values: Any, source: object = "") -> dict[str, Any]:
    """A comparison from the parsed JSON of its file; see :func:`read_comparison`."""
    remedy = "make comparisons with prism-plan compare -o"
    validate(ComparisonFile, values, source=source, remedy=remedy)
    rows = values["rows"]
    try:
        _check_requests(values)
        servers: list[str] | None = None
        for index, row in enumerate(rows):
            place = f"rows[{index}]"
            _check_row(row, values["kind"], place)
            if row["remote_share"] is None:
                continue
            found = list(row["remote_share_by_server"])
            servers = servers or found
            _require(
                found == servers, f"servers {', '.join(found)}", f"{place}.remote_share_by_server",
                f"those of the rows before, {', '.join(servers)}",
            )  # fmt: skip
        _require(
            servers is not None, "no row with a remote_share", "rows", "the score of a placement"
        )
    except InputError as error:
        raise error.within(source) from None
    return dict(values)


def _require(holds: bool, found: str, place: str, expected: str) -> None:
    if not holds:
        raise InputError(found, place=place, expected=expected)


def _check_requests(values: Mapping[str, Any]) -> None:
    """Refuse numbers of requests that contradict the kind of trace or the holdout."""
    planned, scored = values["planned_requests"], values["scored_requests"]
    for key in ("planned_requests", "scored_requests"):
        known = values["kind"] == "tokens"
        _require(
            (values[key] is not None) == known, f"{_json(values[key])}", key,
            "a whole number" if known else "null, for the trace is counts-only",
        )  # fmt: skip
    if values["holdout"] is None:
        _require(
            planned == scored, _json(scored), "scored_requests",
            f"{_json(planned)} as planned_requests, for there is no holdout",
        )  # fmt: skip


def _check_row(row: Mapping[str, Any], kind: str, place: str) -> None:
    """What a schema cannot say: which values of a row belong together."""
    _require_null_together(row, "remote_share", _PLACED, place)
    _require_null_together(row, "waiting_share", _WAITING, place)
    placed, waiting = row["remote_share"] is not None, row["waiting_share"] is not None
    wanted = placed and kind == "tokens"
    _require(
        waiting == wanted, _json(row["waiting_share"]), f"{place}.waiting_share",
        "a number" if wanted else "null without a placement and for counts-only traces",
    )  # fmt: skip
    _check_worst(row, "remote_share", "worst_server", "worst_server_share", place)
    _check_worst(row, "waiting_share", "worst_waiting_server", "worst_waiting_share", place)
    if not waiting:
        return
    _require(
        list(row["waiting_share_by_server"]) == list(row["remote_share_by_server"]),
        "other servers", f"{place}.waiting_share_by_server", "those of remote_share_by_server",
    )  # fmt: skip
    most = row["waiting_share"] * (len(row["waiting_share_by_server"]) - 1)
    _require(
        row["destinations"] <= most + TOLERANCE, _json(row["destinations"]),
        f"{place}.destinations",
        f"at most {most:g}, every other server in each step that waits",
    )  # fmt: skip


def _require_null_together(
    row: Mapping[str, Any], first: str, others: tuple[str, ...], place: str
) -> None:
    """Refuse a row where some of these values are null and others are not."""
    known = row[first] is not None
    for key in others:
        _require(
            (row[key] is not None) == known, _json(row[key]), f"{place}.{key}",
            f"a value, as {first} has one" if known else f"null, as {first}",
        )  # fmt: skip


def _check_worst(
    row: Mapping[str, Any], share: str, worst_server: str, worst_share: str, place: str
) -> None:
    """The worst server is one with the largest share, and the mean lies among the shares."""
    by_server: Mapping[str, float | None] = row[f"{share}_by_server"] or {}
    known = {name: value for name, value in by_server.items() if value is not None}
    name, value = row[worst_server], row[worst_share]
    most = max(known.values(), default=None)
    _require(
        value == most, _json(value), f"{place}.{worst_share}",
        f"{_json(most)}, the largest of {share}_by_server",
    )  # fmt: skip
    _require(
        name is None if most is None else known.get(name) == most,
        f"{name!r:.60}", f"{place}.{worst_server}",
        "null" if most is None else f"a server whose {share} is {most}",
    )  # fmt: skip
    if row[share] is not None:
        low = min(known.values(), default=0.0)
        high = max(known.values(), default=0.0)
        _require(
            low - TOLERANCE <= row[share] <= high + TOLERANCE, _json(row[share]),
            f"{place}.{share}", f"{low:g} to {high:g}, a mean of {share}_by_server",
        )  # fmt: skip


def _json(value: Any) -> str:
    return "null" if value is None else f"{value!r:.60}"
