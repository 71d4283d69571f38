"""Measure all cases, each in a process of its own: ``make bench``.

Results go to tests/benchmarks/results.json (machine, commit, seeds, every timing).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from studies.machine import commit, processor
from tests.benchmarks import recording
from tests.benchmarks.cases import CASES, Case, folder

RESULTS = Path(__file__).parent / "results.json"


def measure(case: Case) -> dict[str, Any]:
    """Wall seconds of each run after one that is not counted, and the peak memory growth."""
    with folder() as place:
        prepared = case.prepare(Path(place))
        case.run(prepared)  # compiled code is loaded, the file is in the page cache
        reset_peak()
        before = peak_mib()
        times, outcome = [], {}
        for _ in range(case.repeats):
            begin = time.perf_counter()
            outcome = case.run(prepared)
            times.append(time.perf_counter() - begin)
    return {
        "name": case.name,
        "median_s": round(median(times), 4),
        "min_s": round(min(times), 4),
        "max_s": round(max(times), 4),
        "runs": case.repeats,
        "limit_s": case.limit_s,
        "process_peak_mib": round(peak_mib()),
        "before_mib": round(before),
        "limit_mib": case.limit_mib,
        "events_per_s": case.events_per_s,
        "outcome": outcome,
    }


def reset_peak() -> None:
    """Let the kernel forget the peak of the preparation (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    """Run the named cases, or all but the small ones, and write the results."""
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        case = next(case for case in CASES if case.name == sys.argv[2])
        print(json.dumps(measure(case)))
        return
    rows = []
    for case in CASES:
        if case.small:
            continue
        command = [sys.executable, "-m", "tests.benchmarks", "--one", case.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(output.splitlines()[-1])
        rows.append(row)
        limit = "" if row["limit_s"] is None else f" (limit {row['limit_s']} s)"
        rate = row["outcome"].get("events_per_s")
        speed = f", {rate:,} events/s" if rate else ""
        print(f"{row['name']}: {row['median_s']} s{limit}, {row['process_peak_mib']} MiB{speed}")
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


if __name__ == "__main__":
    main()
