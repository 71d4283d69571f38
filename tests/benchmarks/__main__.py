"""Measure all cases, each in a process of its own: ``make bench``.

Results go to tests/benchmarks/results.json (machine, commit, seeds, every timing). ``--base REV``
compares an older commit with the working tree instead (:mod:`tests.benchmarks.comparing`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.machine import commit, processor
from tests.benchmarks import comparing, measuring, recording
from tests.benchmarks.cases import CASES, ROOT, traces_dir

RESULTS = Path(__file__).parent / "results.json"
HEADER = ("case", "wall s", "CPU s", "limit s", "MiB", "events/s")


def run_cases(names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of these cases, each printed as it is measured.

    Raises
    ------
    SystemExit
        A case does not run.
    """
    rows = []
    environment = {**os.environ, "PRISM_TRACES": str(traces_dir().resolve())}
    for name in names:
        row = comparing.run_case(ROOT, name, environment)
        if isinstance(row, str):
            sys.exit(f"{name}: {row}")
        rows.append(row)
        print(f"{name}: {row['median_s']} s, {row['cpu_s']} CPU s", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    cells = [
        (
            row["name"],
            f"{row['median_s']:.4g}",
            f"{row['cpu_s']:.4g}",
            "" if row["limit_s"] is None else f"{row['limit_s']:g}",
            str(row["process_peak_mib"]),
            f"{row['outcome']['events_per_s']:,}" if "events_per_s" in row["outcome"] else "",
        )
        for row in rows
    ]
    return comparing.markdown(cells, HEADER)


def record(rows: Sequence[dict[str, Any]]) -> None:
    """Write the results of all cases, with machine and commit."""
    by_name = {row["name"]: row for row in rows}
    ratio = (
        by_name["ilp CBC, V2-Lite, 64 servers x 80"]["median_s"]
        / by_name["exact, V2-Lite, 64 servers x 80"]["median_s"]
    )
    print(f"exact is {ratio:.0f} times faster than ilp with CBC on 64 servers")
    results = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "commit": commit(),
        "ilp_cbc_over_exact_64_servers": round(ratio, 1),
        "cases": rows,
        "recording": recording.measure(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> int:
    """Record all cases, measure some, or compare some with an older commit."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--one", metavar="NAME", help="measure one case here, and print JSON")
    parser.add_argument("--base", metavar="REV", help="compare this commit with the working tree")
    parser.add_argument("--cases", metavar="A,B", help="these only; nothing is recorded")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measuring.measure(given.one)))
        return 0
    names = [case.name for case in CASES if not case.small]
    if given.cases:
        names = comparing.chosen_names(given.cases, [case.name for case in CASES])
    if given.base is not None:
        return comparing.print_comparison(given.base, names, traces=traces_dir())
    print(f"{commit()} on {processor()}, {os.cpu_count()} cores")
    rows = run_cases(names)
    print(f"\n{table(rows)}")
    if not given.cases:
        record(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
