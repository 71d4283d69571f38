"""Measures one case in this process; stands alone, for it measures any commit's cases.

    PYTHONPATH=TREE python -P measuring.py CASE

prints what :func:`measure` gives for the case of that name in ``TREE/tests/benchmarks/cases.py``,
as JSON in the last line. Both sides of a comparison are measured by this one file, whatever the
older commit's protocol was.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any


def measure(name: str) -> dict[str, Any]:
    """Wall and CPU seconds of each run after one that is not counted, and the peak memory.

    CPU seconds are those of all threads, and of child processes that have ended.

    Raises
    ------
    SystemExit
        There is no case of this name.
    """
    from tests.benchmarks.cases import CASES, folder

    case = next((case for case in CASES if case.name == name), None)
    if case is None:
        sys.exit(f"there is no case {name!r}")
    with folder() as place:
        prepared = case.prepare(Path(place))
        case.run(prepared)  # compiled code is loaded, the file is in the page cache
        reset_peak()
        before = peak_mib()
        times, cpu_times, outcome = [], [], {}
        for _ in range(case.repeats):
            begin, cpu_begin = time.perf_counter(), cpu_s()
            outcome = case.run(prepared)
            times.append(time.perf_counter() - begin)
            cpu_times.append(cpu_s() - cpu_begin)
    return {
        "name": case.name,
        "median_s": round(median(times), 4),
        "min_s": round(min(times), 4),
        "max_s": round(max(times), 4),
        "cpu_s": round(median(cpu_times), 4),
        "runs": case.repeats,
        "limit_s": case.limit_s,
        "process_peak_mib": round(peak_mib()),
        "before_mib": round(before),
        "limit_mib": case.limit_mib,
        "events_per_s": case.events_per_s,
        "outcome": outcome,
    }


def cpu_s() -> float:
    """CPU seconds of this process so far, and of its children that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def reset_peak() -> None:
    """Let the kernel forget the peak of the preparation (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
