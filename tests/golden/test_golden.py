"""The command gives what 41342e8 gave, but for the exceptions that are listed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.golden.catalogue import (
    DATA,
    INPUTS,
    NO_DATA,
    OTHER_READERS,
    ROOT,
    Case,
    catalogue,
    checked_files,
    committed,
    is_data,
)
from tests.golden.comparing import differences, judge, read_exceptions
from tests.golden.golden import TOLERANCE, VALUES, read_values
from tests.golden.running import run
from tests.golden.values import recorded, without

if shutil.which("git") is None or not (ROOT / ".git").exists():
    pytest.skip("not a git checkout, which tells what is committed", allow_module_level=True)

CASES = catalogue()
LOADED = ("prism_plan", "prism_plan.evaluate.kernel_compilation:compile_kernels")
HF = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def short_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of the cases that are no long ones."""
    return outcomes([case for case in CASES if not case.long], tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def long_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of the long ones."""
    return outcomes([case for case in CASES if case.long], tmp_path_factory.mktemp("golden-long"))


def outcomes(cases: Sequence[Case], work: Path) -> dict[str, Any]:
    """The recorded form of what the installed command gives now."""
    able = [case for case in cases if HF or not case.needs_hf]
    found = run(able, work, processes=os.cpu_count() or 1, loaded=LOADED)
    return {case.name: recorded(without(found[case.name], case.same_machine)) for case in able}


def wrong(now: dict[str, Any], group: str) -> list[str]:
    """The differences of a group of cases from the recorded values that are no exceptions."""
    now = {name: values for name, values in now.items() if name.partition("/")[0] == group}
    was = {name: values for name, values in read_values().items() if name in now}
    left_out = [case.name for case in CASES if case.name not in now]
    found = differences(was, now, tolerance=TOLERANCE)
    return judge(found, read_exceptions(), now, left_out)[0]


@pytest.mark.parametrize("group", sorted({c.name.partition("/")[0] for c in CASES if not c.long}))
def test_short_cases_give_the_golden_values(group: str, short_cases: dict[str, Any]) -> None:
    """Exit codes, files and numbers are those of 41342e8, and every exception is needed."""
    assert wrong(short_cases, group) == []


@pytest.mark.long
@pytest.mark.parametrize("group", sorted({c.name.partition("/")[0] for c in CASES if c.long}))
def test_long_cases_give_the_golden_values(group: str, long_cases: dict[str, Any]) -> None:
    """The same of figures, runs of checkpoints, calibrations and simulations of large models."""
    assert wrong(long_cases, group) == []


def test_every_committed_file_is_told_data_or_not() -> None:
    """A committed file of an ending that nobody has classified fails here, by its name."""
    assert any(is_data(name) for name in committed())


def test_every_committed_data_file_is_a_case() -> None:
    """A data file that is committed later has a recorded value, or is read by another case."""
    values = read_values()
    missing = [name for name in checked_files() if f"check/{name}" not in values]
    assert missing == [], "record them: python -m tests.golden record"


def test_every_input_is_used() -> None:
    """No file of the inputs lies there for nothing: some case names it or its folder."""
    words = [word for case in CASES for word in case.arguments]
    used = "\n".join(words)
    unused = [
        path
        for path in INPUTS.rglob("*")
        if path.is_file()
        and not any(f"in/golden/{part}" in used for part in _with_parents(path.relative_to(INPUTS)))
        and f"in/repo/tests/golden/inputs/{path.relative_to(INPUTS)}" not in used
    ]
    assert unused == []


def _with_parents(path: Path) -> list[str]:
    return [str(path), *(str(parent) for parent in path.parents if parent != Path())]


def test_recorded_values_are_of_the_catalogue() -> None:
    """Each case has its values, no values are left of a case that is gone, and they are small."""
    assert set(read_values()) == {case.name for case in CASES}
    assert sum(path.stat().st_size for path in VALUES.iterdir()) < 1_500_000


def test_data_that_check_is_not_for_is_committed() -> None:
    """No pattern of files for other readers is stale, and no ending counts as both."""
    assert not set(DATA) & set(NO_DATA)
    assert all(reader for reader in OTHER_READERS.values())
