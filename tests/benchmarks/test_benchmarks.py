"""The benchmarks run and do the work they claim; timings are recorded elsewhere, never tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.cases import CASES, Case

SMALL = [case for case in CASES if case.small]


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_small_cases_run(case: Case, tmp_path: Path) -> None:
    """Every kind of case prepares and runs, and does the same work twice."""
    prepared = case.prepare(tmp_path)
    first, second = case.run(prepared), case.run(prepared)
    for outcome in (first, second):
        for key in ("runtime_s", "events_per_s", "requests_per_s"):
            outcome.pop(key, None)
    assert first == second
    assert first


def test_recorded_results_are_of_the_registry() -> None:
    """The committed results cover every case, name machine and commit, and tell the limits."""
    results = json.loads((Path(__file__).parent / "results.json").read_text())
    assert [row["name"] for row in results["cases"]] == [c.name for c in CASES if not c.small]
    assert results["machine"]["processor"]
    assert results["commit"]
    assert set(results["recording"]["overhead"]) == {"tiny-mixtral", "tiny-deepseek-v2"}
    limits = {case.name: (case.limit_s, case.limit_mib) for case in CASES}
    for row in results["cases"]:
        assert (row["limit_s"], row["limit_mib"]) == limits[row["name"]]
