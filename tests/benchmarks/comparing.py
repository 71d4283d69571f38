"""Compares an older commit with the working tree, case by case in turn: ``make bench BASE=REV``.

The older commit is written into a temporary folder, and its own cases run its own code there, with
the libraries of this Python. Only the names of cases and the file ``tests/benchmarks/cases.py``
have to be the same: modules may have moved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import measuring
from tests.golden.revisions import ROOT, revision

ROUNDS = 3
#: Figures of an outcome that are times themselves, and differ from run to run.
TIMES = frozenset({"runtime_s", "events_per_s", "requests_per_s"})
HEADER = ("case", "wall s", "wall s now", "ratio", "CPU s", "CPU s now", "ratio", "MiB", "MiB now")

Row = dict[str, Any]


def chosen_names(text: str, names: Sequence[str]) -> list[str]:
    """The names of a list with commas, whose own commas are understood; ``*`` and ``?`` match any.

    Raises
    ------
    SystemExit
        A part of the list is no name.
    """
    words = text.split(",")
    found: list[str] = []
    start = 0
    while start < len(words):
        for end in range(len(words), start, -1):
            pattern = ",".join(words[start:end]).strip()
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if matching:
                found += matching
                start = end
                break
        else:
            sys.exit(f"no case is called {words[start].strip()!r}; see tests/benchmarks/cases.py")
    return list(dict.fromkeys(found))


def run_case(tree: Path, name: str, environment: Mapping[str, str]) -> Row | str:
    """What a tree's case measures in a process of its own, or the line of the error."""
    command = [sys.executable, "-P", measuring.__file__, name]
    own = {**environment, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def compare(
    base: str, names: Sequence[str], *, root: Path = ROOT, traces: Path | None = None
) -> Iterator[tuple[str, list[Row] | str, list[Row] | str]]:
    """Each case with the rows of the older commit and of the working tree, a row a round.

    In place of rows stands the line of the error of a tree in which the case does not run. The two
    take turns, and every second round begins with the other one.
    """
    environment = dict(os.environ)
    if traces is not None:  # a relative one, and the default, are relative to a tree
        environment["PRISM_TRACES"] = str(traces.resolve())
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        older = Path(temporary) / "base"
        revision(base, root).copy_to(older, root)
        for name in names:
            rows: dict[Path, list[Row] | str] = {older: [], root: []}
            for number in range(ROUNDS):
                for tree in (older, root) if number % 2 == 0 else (root, older):
                    kept = rows[tree]
                    if isinstance(kept, str):
                        continue
                    found = run_case(tree, name, environment)
                    if isinstance(found, str):
                        rows[tree] = found
                    else:
                        kept.append(found)
            yield name, rows[older], rows[root]


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Medians over the rounds: wall and CPU seconds, MiB."""
    keys = ("median_s", "cpu_s", "process_peak_mib")
    return {key: median(row[key] for row in rows) for key in keys}


def table_row(name: str, was: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """The cells of a case; a ratio below 1 says that the working tree is faster."""
    old, new = figures(was), figures(now)
    cells = [name]
    for key in ("median_s", "cpu_s"):
        ratio = new[key] / old[key] if old[key] else float("nan")
        cells += [f"{old[key]:.4g}", f"{new[key]:.4g}", f"{ratio:.2f}"]
    return [*cells, *(f"{each['process_peak_mib']:.0f}" for each in (old, new))]


def other_work(name: str, was: Row, now: Row) -> str | None:
    """A line where the two did other work: figures of the outcome that differ."""
    old, new = was["outcome"], now["outcome"]
    keys = [key for key in {**old, **new} if key not in TIMES and old.get(key) != new.get(key)]
    told = "; ".join(f"{key} {old.get(key)} was, {new.get(key)} is" for key in keys)
    return f"{name}: the outcome differs: {told}" if keys else None


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table in Markdown with columns of one width each."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def print_comparison(
    base: str,
    names: Sequence[str],
    *,
    root: Path = ROOT,
    traces: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Measure and print medians and ratios; 1 where no case could be compared."""
    table, remarks = [], []
    for name, was, now in compare(base, names, root=root, traces=traces):
        for tree, rows in ((base, was), ("the working tree", now)):
            if isinstance(rows, str):
                remarks.append(f"{name}: does not run in {tree}: {rows}")
        if isinstance(was, str) or isinstance(now, str):
            say(remarks[-1])
            continue
        table.append(table_row(name, was, now))
        if line := other_work(name, was[0], now[0]):
            remarks.append(line)
        say(": ".join((name, f"wall {table[-1][3]}, CPU {table[-1][6]} of {base}")))
    say(f"\n{revision(base, root)} and the working tree in turn, {ROUNDS} rounds, medians:\n")
    say(markdown(table, HEADER))
    for line in remarks:
        say(line)
    return 0 if table else 1
