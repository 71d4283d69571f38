"""Simulation reports are read as they are, and what contradicts the format or itself is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from prism_plan.check.report import check_file
from prism_plan.errors import InputError
from prism_plan.io.shared_fields import shipped_schema
from prism_plan.io.simulation import read_simulation, simulation_from_json
from tests.evaluate.simulation_reports import make_report, make_run

REPORT = make_report(
    [make_run("exact.json", moves=[300], stays=[600], busy=[900]), make_run("none", finished=0)]
)


PHASE: dict[str, Any] = {
    "number": 2,
    "at_s": 5.0,
    "everywhere_at_s": 6.5,
    "tasks": {"edge-0": {"law": 1.0}},
    "arrival_interval_s": None,
}


def broken(*path: str | int, value: Any) -> dict[str, Any]:
    """The report with one value changed."""
    values = copy.deepcopy(REPORT)
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def test_a_report_is_read_as_it_is(tmp_path: Path) -> None:
    """Reading gives the values that were written, runs with more keys and empty ones included."""
    values = broken("runs", 0, "kv_bytes", value=12)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(values))
    assert read_simulation(path) == values
    report = check_file(path)
    assert (report.kind, report.problems) == ("simulation", ())
    assert report.summary == "2 runs, 300 of 600 requests finished"


def test_phases_are_read_and_may_be_left_out() -> None:
    """Phases of a run are optional: readers of reports from before they were written accept them.

    Those readers allow any more keys in a run.
    """
    values = broken("runs", 0, "phases", value=[PHASE])
    assert simulation_from_json(values)["runs"][0]["phases"] == [PHASE]
    earlier = shipped_schema("simulation-1")
    del earlier["$defs"]["RunPart"]["properties"]["phases"]
    jsonschema.Draft202012Validator(earlier).validate(values)


#: Keys that reports of before lack.
LATER = {"user_tokens_per_s"}


def test_reports_of_before_are_read() -> None:
    """Keys that came later may be missing."""
    values = copy.deepcopy(REPORT)
    for key in LATER:
        del values["runs"][0][key]
    assert simulation_from_json(values) == values


@pytest.mark.parametrize(
    "key",
    [*(key for key in REPORT["runs"][0] if key not in LATER), "timeline.bin_s", "servers.0.gpus"],
)
def test_a_missing_key_is_named(key: str) -> None:
    """Each other key of a run is required."""
    values = copy.deepcopy(REPORT)
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    place = values["runs"][0]
    for part in path:
        place = place[part]
    del place[last]
    with pytest.raises(InputError, match=f"key {last!r} is missing"):
        simulation_from_json(values)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "prism-plan/placement", "format: 'prism-plan/placement'; expected"),
        (("version",), 2, "version: 2; expected 1; a newer file"),
        (("sede",), 1, "unknown key 'sede'"),
        (("seed",), -1, "seed: -1; expected at least 0"),
        (("trace", "kind"), "token", "trace.kind: 'token'; expected 'tokens' or 'counts'"),
        (("runs", 0, "events"), 2.0, r"runs\[0\].events: 2.0; expected a whole number"),
        (("runs", 0, "bytes_sent"), 10**400, "expected less than 9,223"),
        (("runs", 0, "runtime_s"), float("inf"), "runtime_s: inf; expected a finite number"),
        (
            ("runs", 0, "remote_share"),
            1.5,
            "remote_share: 1.5; expected at most 1",
        ),
        (
            ("runs", 0, "latency_s", "p95"),
            -1.0,
            "latency_s.p95: -1.0; expected at least 0",
        ),
        (("runs", 0, "latency_s", "p95"), None, "latency_s.p95: null; expected a number"),
        (("runs", 0, "finished"), 301, "finished: 301; expected at most the 300 requests"),
        (("runs", 0, "latency_quantiles_s"), [1.0] * 100, "100 numbers; expected 101, or none"),
        (("runs", 0, "latency_quantiles_s"), [], "0 numbers with 300 requests finished"),
        (("runs", 1, "latency_quantiles_s"), [1.0] * 101, "101 numbers with 0 requests finished"),
        (("runs", 0, "latency_quantiles_s"), [2.0] + [1.0] * 100, "1.0 after 2.0; expected ascend"),
        (("runs", 0, "timeline", "arrivals"), [1], "60 bins; expected 1, as in arrivals"),
        (
            ("runs", 0, "phases"),
            [PHASE | {"number": 0}],
            r"phases\[0\].number: 0; expected at least 1",
        ),
        (
            ("runs", 0, "phases"),
            [PHASE | {"tasks": {"a": {"x": 2}}}],
            "x: 2; expected at most 1",
        ),
        (
            ("runs", 0, "phases"),
            [PHASE | {"everywhere_at_s": 4.0}],
            "4.0; expected at least at_s, 5",
        ),
        (("runs", 0, "phases"), [{"number": 1}], "keys 'at_s', .* are missing"),
        (("runs", 0, "layer_latency_s", 2, "remote_experts"), 3, "3; expected 2, one entry"),
        (("runs", 0, "layer_latency_s", 2, "mean"), None, "null with 500 steps; expected a number"),
    ],
)
def test_a_bad_value_is_named(path: tuple[str | int, ...], value: Any, words: str) -> None:
    """The error names the file, the place, the value and what was expected, in one line."""
    with pytest.raises(InputError, match=words) as error:
        simulation_from_json(broken(*path, value=value), source="s.json")
    assert str(error.value).startswith("s.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [[], "text", None, {}])
def test_other_values_are_refused(values: Any) -> None:
    """What is no object of the format is refused as such."""
    with pytest.raises(InputError):
        simulation_from_json(values)


def test_infinity_spelt_as_a_number(tmp_path: Path) -> None:
    """JSON can spell 1e999; it is no finite number."""
    path = tmp_path / "s.json"
    text = json.dumps(REPORT).replace('"simulated_s": 3000.0', '"simulated_s": 1e999', 1)
    path.write_text(text)
    read: Callable[[Path], Any] = read_simulation
    with pytest.raises(InputError, match=r"runs\[0\]\.simulated_s: inf; expected a finite number"):
        read(path)
