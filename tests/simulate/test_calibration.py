"""Calibration files: what is read, and every bad value refused with file, place and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_plan.errors import InputError
from prism_plan.io.calibration import calibration_from_json, read_calibration
from prism_plan.simulate.calibration import Calibration, GpuCurves

GPU = {"dense_ms": [[1, 80], [64, 100.5]], "expert_ms": [[1, 30], [64, 40], [65, 0]]}
CURVES = GpuCurves(((1, 0.08), (64, 0.1005)), ((1, 0.03), (64, 0.04), (65, 0.0)))
HEAD = {"format": "prism-plan/calibration", "version": 1}


def test_a_whole_file(tmp_path: Path) -> None:
    """Every key: milliseconds become seconds, link figures stay as they are written."""
    values = {
        **HEAD,
        "call_overhead_ms": 0,
        "bandwidth_mbps": 480.5,
        "rtt_ms": 1.25,
        "burst_kb": 43.5,
        "short_kb": 131.072,
        "default": GPU,
        "servers": [{"name": "edge-1", "gpus": [GPU, GPU]}, {"name": "edge-0", "gpus": []}],
        "provenance": {"tool": "anything"},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(values))
    assert read_calibration(path) == Calibration(
        name=str(path),
        default=CURVES,
        gpus={("edge-1", 0): CURVES, ("edge-1", 1): CURVES},
        call_overhead_ms=0.0,
        bandwidth_mbps=480.5,
        rtt_ms=1.25,
        burst_kb=43.5,
        short_kb=131.072,
    )


def test_a_short_file() -> None:
    """All but one source of times may be left out; what is left out is not measured."""
    short = calibration_from_json({**HEAD, "default": GPU})
    assert (short.call_overhead_ms, short.bandwidth_mbps, short.rtt_ms) == (None, None, None)
    assert short.of("any", 7) == CURVES
    one = calibration_from_json({**HEAD, "servers": [{"name": "a", "gpus": [GPU]}]})
    assert one.of("a", 0) == CURVES


def dense(points: Any) -> dict[str, Any]:
    return {**HEAD, "default": {**GPU, "dense_ms": points}}


def server(**changes: Any) -> dict[str, Any]:
    return {**HEAD, "servers": [{"name": "a", "gpus": [GPU], **changes}]}


HUGE = 10**400

BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "null; expected an object"),
    "no format": ({"version": 1}, "key 'format' is missing"),
    "a newer version": ({**HEAD, "version": 2}, "version: 2; expected 1; a newer file"),
    "unknown key": (
        {**HEAD, "default": GPU, "rtt_sm": 1},
        "unknown key 'rtt_sm', did you mean 'rtt_ms'?; expected one of format, version,",
    ),
    "no times": (HEAD, "no times in it; expected default, or servers"),
    "no times of any server": ({**HEAD, "servers": []}, "no times in it"),
    "zero bandwidth": (
        {**HEAD, "default": GPU, "bandwidth_mbps": 0},
        "bandwidth_mbps: 0; expected more than 0",
    ),
    "negative round trip": (
        {**HEAD, "default": GPU, "rtt_ms": -0.1},
        "rtt_ms: -0.1; expected at least 0",
    ),
    "unknown curve": (
        {**HEAD, "default": {**GPU, "expert_s": []}},
        "default: unknown key 'expert_s', did you mean 'expert_ms'?",
    ),
    "a curve is missing": (
        {**HEAD, "default": {"dense_ms": GPU["dense_ms"]}},
        "default: key 'expert_ms' is missing",
    ),
    "one point": (dense([[1, 2]]), "default.dense_ms: 1 entries; expected at least 2"),
    "a point of three": (
        dense([[1, 2], [2, 3, 4]]),
        "default.dense_ms[1]: 3 entries; expected at most 2",
    ),
    "zero tokens": (dense([[0, 2], [2, 3]]), "default.dense_ms[0][0]: 0; expected at least 1"),
    "tokens beyond int32": (dense([[1, 2], [2**31, 3]]), "default.dense_ms[1][0]: 2147483648;"),
    "tokens twice": (
        dense([[1, 2], [5, 3], [5, 4]]),
        "default.dense_ms[2]: 5 tokens after 5; expected more tokens",
    ),
    "tokens descend": (dense([[8, 2], [5, 3]]), "default.dense_ms[1]: 5 tokens after 8; expected"),
    "negative time": (
        dense([[1, 2], [5, -3]]),
        "default.dense_ms[1][1]: -3; expected at least 0",
    ),
    "a server has an unknown key": (
        server(gpu=[GPU]),
        "servers[0]: unknown key 'gpu', did you mean 'gpus'?; expected one of name, gpus",
    ),
    "a GPU has a bad time": (
        server(gpus=[{**GPU, "expert_ms": [[1, 1], [2, -1]]}]),
        "servers[0].gpus[0].expert_ms[1][1]: -1; expected at least 0",
    ),
    "a server twice": (
        {**HEAD, "servers": [{"name": "a", "gpus": [GPU]}, {"name": "a", "gpus": [GPU]}]},
        "servers[1].name: 'a' is duplicated",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_values(case: str) -> None:
    """One line: the file, the place in it, what was found and what was expected."""
    values, message = BAD[case]
    with pytest.raises(InputError) as error:
        calibration_from_json(values, source="c.json")
    assert str(error.value).startswith("c.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"format": NaN}', "[" * 5000], ids=range(4))
def test_not_json(tmp_path: Path, text: str) -> None:
    """A file that is no JSON is an input error that names it."""
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.json: "):
        read_calibration(path)


def test_numbers_beyond_floating_point_in_a_file(tmp_path: Path) -> None:
    """JSON may spell numbers of any length: refused like any other bad value."""
    path = tmp_path / "huge.json"
    path.write_text(json.dumps({**HEAD, "default": GPU, "rtt_ms": HUGE}))
    with pytest.raises(InputError, match=r"huge\.json: rtt_ms: 1000"):
        read_calibration(path)
