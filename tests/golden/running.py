"""Runs cases with an installed command and reads what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.golden.catalogue import INPUTS, ROOT, Case, taken
from tests.golden.values import read_file, read_json

WORKER = Path(__file__).resolve().parent / "worker.py"
#: Fixed for all runs: dates, threads, no network, no settings of the user's.
ENVIRONMENT = {
    "SOURCE_DATE_EPOCH": "1764288000",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "agg",
}


def start(
    cases: Sequence[Case], python: Path, script: Path, work: Path, *, processes: int,
    loaded: Sequence[str] = (),
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start the worker that runs the cases below the folder ``work``.

    It has ``loaded`` a package and called a function, where they are given: see worker.py.
    """
    inputs = work / "inputs"
    (inputs / "taken").mkdir(parents=True)
    for name, values in taken().items():
        (inputs / "taken" / name).write_text(json.dumps(values))
    (inputs / "repo").symlink_to(ROOT)
    (inputs / "golden").symlink_to(INPUTS)
    calls = []
    for case in cases:
        folder = folder_of(case, work)
        folder.mkdir(parents=True)
        (folder / "in").symlink_to(inputs)
        calls.append({"folder": str(folder), "arguments": case.arguments})
    plan = work / "calls.json"
    plan.write_text(json.dumps(calls))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PRISM"))}
    command = [str(python), "-I", str(WORKER), str(script), str(plan), str(processes), *loaded]
    return subprocess.Popen(command, env=environment | ENVIRONMENT)


def folder_of(case: Case, work: Path) -> Path:
    """Where a case runs."""
    return work / "cases" / case.name


def outcome(case: Case, work: Path) -> dict[str, Any]:
    """What came of a case: its exit code and the values of its files; absent files are null."""
    folder = folder_of(case, work)
    found: dict[str, Any] = {"exit": int((folder / "exit").read_text())}
    if case.stdout:
        found["stdout"] = read_json((folder / "stdout").read_text(encoding="utf-8"))
    for name in case.files:
        path = folder / name
        found[name] = read_file(path) if path.exists() else None
    return found


def run(
    cases: Sequence[Case], work: Path, *, python: Path | None = None, processes: int = 2,
    loaded: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the cases with the command installed beside ``python`` (default: this one).

    The process that forks has ``loaded`` what is given: see worker.py.

    Raises
    ------
    RuntimeError
        The worker failed.

    """
    python = Path(sys.executable) if python is None else python
    script = python.parent / "prism-plan"
    code = start(cases, python, script, work, processes=processes, loaded=loaded).wait()
    if code:
        raise RuntimeError(f"the worker of {python} ended with {code}")
    return {case.name: outcome(case, work) for case in cases}
