"""The golden values: every committed file is covered, and the comparison sees what it claims."""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from tests.golden.catalogue import OTHER_READERS, Case, catalogue, checked_files, committed, is_data
from tests.golden.comparing import Exempted, differences, judge, read_exceptions
from tests.golden.golden import TOLERANCE, read_values
from tests.golden.running import run
from tests.golden.values import read_file, recorded, without

#: Cases of each group that `make test` runs; `make test-long` runs all that need no PyTorch.
QUICK = (
    "check/traces/*",
    "check/studies/shift.toml",
    "check/on-trace/v2-*",
    "profile/config/*",
    "profile/counts/*",
    "profile/vllm/*",
    "profile/esft/toy",
    "solve/v2/*",
    "solve/unequal/*",
    "compare/v2/all",
    "simulate/v2/migrate-partial",
    "simulate/v2/phases",
    "diff/*",
)


def compared(cases: list[Case], folder: Path) -> list[str]:
    """What differs from the recorded values and is no exception."""
    outcomes = run(cases, folder)
    now = {case.name: recorded(without(outcomes[case.name], case.same_machine)) for case in cases}
    was = {name: values for name, values in read_values().items() if name in now}
    found = differences(was, now, tolerance=TOLERANCE)
    wrong, _ = judge(found, read_exceptions(), [])
    return wrong


def test_the_present_code_gives_the_golden_values(tmp_path: Path) -> None:
    """A part of every group of cases, through the installed command."""
    cases = [
        case
        for case in catalogue()
        if not case.needs_hf and any(fnmatchcase(case.name, pattern) for pattern in QUICK)
    ]
    assert len(cases) > 60
    assert compared(cases, tmp_path) == []


@pytest.mark.long
def test_all_golden_values(tmp_path: Path) -> None:
    """Every case that needs no PyTorch."""
    assert compared([case for case in catalogue() if not case.needs_hf], tmp_path) == []


def test_every_committed_data_file_is_read_by_some_case() -> None:
    """A data file is checked by a case, or its other reader is named."""
    names = committed()
    checked = set(checked_files())
    for name in names:
        if is_data(name) and name not in checked:
            assert any(fnmatchcase(name, pattern) for pattern in OTHER_READERS), name
    for pattern in OTHER_READERS:
        if not pattern.startswith(".github"):
            assert any(fnmatchcase(name, pattern) for name in names), pattern
    assert {f"check/{name}" for name in checked} <= {case.name for case in catalogue()}


def test_every_case_is_recorded() -> None:
    """No case runs without a golden value, and no value is of a case that is gone."""
    assert set(read_values()) == {case.name for case in catalogue()}


OUTCOME: dict[str, Any] = {
    "solve/a": {"exit": 0, "p.json": {"share": 0.1, "count": 3, "list": [1, 2]}},
    "solve/b": {"exit": 2, "p.json": None},
}


def changed(place: list[Any], value: Any) -> list[str]:
    """The differences, as printed, after one value of the outcome has changed."""
    now = copy.deepcopy(OUTCOME)
    inner: Any = now
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return [str(one) for one in differences(OUTCOME, now)]


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (["solve/a", "exit"], 3, "solve/a: exit: was 0, is 3"),
        (["solve/a", "p.json"], None, "solve/a: p.json: was"),
        (["solve/b", "p.json"], {}, "solve/b: p.json: was null, is {}"),
        (["solve/a", "p.json", "share"], 0.1 + 2**-55, "solve/a: p.json:share: was 0.1, is 0.1"),
        (["solve/a", "p.json", "count"], 3.0, "solve/a: p.json:count: was 3, is 3.0"),
        (["solve/a", "p.json", "list"], [1, 2, 3], "solve/a: p.json:list"),
        (["solve/a", "p.json", "list", 1], 1, "solve/a: p.json:list[1]: was 2, is 1"),
        (["solve/a", "p.json", "new"], 1, "solve/a: p.json:new: was (absent), is 1"),
        (["solve/a", "p.json", "count"], KeyError, "solve/a: p.json:count: was 3, is (absent)"),
        (["solve/b"], KeyError, "solve/b: case: was there, is (absent)"),
    ],
)
def test_one_change_is_one_difference(place: list[Any], value: Any, line: str) -> None:
    """Exit codes, files, the last bit of a number, its kind, lists and keys: each is told."""
    found = changed(place, value)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_equal_outcomes_have_no_difference() -> None:
    """Nothing is told where nothing changed; a tolerance forgives what is within it alone."""
    assert differences(OUTCOME, copy.deepcopy(OUTCOME)) == []
    near, far = ({"a": {"x": 1.0 + by}} for by in (1e-12, 1e-6))
    assert differences({"a": {"x": 1.0}}, near, tolerance=TOLERANCE) == []
    assert len(differences({"a": {"x": 1.0}}, far, tolerance=TOLERANCE)) == 1


def test_exceptions_are_narrow() -> None:
    """One that meets no difference is wrong, as is a difference that none covers."""
    found = differences({"a/x": {"f": 1, "g": 1}}, {"a/x": {"f": 2, "g": 2}})
    used = Exempted("a/*", "f", "It has to.")
    unused = Exempted("a/*", "h", "It had to.")
    wrong, excepted = judge(found, [used, unused], ["a/x"])
    assert wrong == [
        "a/x: g: was 1, is 2",
        "exceptions.toml: a/*: h: meets no difference; remove it",
    ]
    assert excepted == ["a/x: f: was 1, is 2 [It has to.]"]
    exact = Exempted("a/x", "f", "It is three.", now=3)
    assert judge(found, [exact], ["a/x"])[0][0] == "a/x: f: was 1, is 2"


def test_times_and_wording_are_left_out(tmp_path: Path) -> None:
    """Of times nothing is compared, of sentences their number, of all else everything."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"runtime_s": 1.5, "notes": ["slow", "old"], "x": {"date": "now"}}))
    assert read_file(path) == {"notes": "2 sentences", "x": {}}
    path.write_text("{")
    assert read_file(path) == "no JSON"
