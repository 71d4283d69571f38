"""Simulation reports: JSON, format ``prism-plan/simulation`` version 1 (DESIGN section 6)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError
from prism_plan.files import parse_json, read_text
from prism_plan.schema import check_format, check_strictly, shipped_schema

FORMAT = "prism-plan/simulation"
VERSION = 1


def simulation_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a simulation report, as shipped."""
    return shipped_schema("simulation-1")


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
    check_format(values, FORMAT, VERSION, source=source, remedy=remedy)
    check_strictly(values, simulation_schema(), source=source)
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
