"""Tables as a user sees them: on a terminal of any width, in a pipe, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from prism_plan.cli.tables import (
    Column,
    count_column,
    duration_column,
    fitting,
    share_column,
    size_column,
    text_column,
)
from prism_plan.jit import before_first_compilation, jit

Run = Callable[..., CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
TRACE = str(ROOT / "traces" / "tiny-mixtral.parquet")
CLUSTER = str(ROOT / "traces" / "tiny-cluster.toml")
COMPARE = ("compare", TRACE, "--cluster", CLUSTER, "--holdout", "0.5", "--solvers", "eplb,exact")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(width: int, *args: str, env: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit code and lines of the installed command on a terminal of that many columns."""
    command = str(Path(sys.executable).parent / "prism-plan")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    variables = {**os.environ, "TERM": "xterm", **(env or {})}
    variables.pop("COLUMNS", None)
    with subprocess.Popen(
        [command, *args], stdin=theirs, stdout=theirs, stderr=theirs, env=variables
    ) as process:
        os.close(theirs)
        data = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says EIO when the other side is closed
                break
            if not part:
                break
            data += part
    os.close(ours)
    text = ESCAPES.sub("", data.decode()).replace("\r", "\n")
    return process.returncode, [line.rstrip() for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_number_is_split_on_a_terminal(width: int) -> None:
    """Each row stands on one line that fits; columns left out are named, never a number broken."""
    code, lines = on_terminal(width, *COMPARE)
    assert code == 0, lines
    rows = [line for line in lines if re.match(r" ?(eplb|exact) +\d", line)]
    header = next(line for line in lines if line.strip().startswith("placement"))
    assert len(rows) == 2
    assert all(len(line) <= width for line in [*rows, header])
    assert all(re.search(r"^ ?(eplb|exact) +\d+\.\d+ m?s .*\d\.\d\d %", row) for row in rows)
    told = [line for line in lines if "left out for width" in line]
    assert bool(told) == ("solved in" not in header)
    for heading in (
        "mean",
        "ttft",
        "remote",
        "as planned",
        "vs best",
        "waiting",
        "dest.",
        "solved in",
    ):
        assert heading in header or heading in told[0]


def test_a_pipe_gets_every_column(prism_plan: Run, tmp_path: Path) -> None:
    """What does not go to a terminal is cut nowhere."""
    result = prism_plan(*COMPARE, cwd=tmp_path)
    header = next(line for line in result.stdout.splitlines() if "placement" in line)
    assert "solved in" in header
    assert len(result.stderr.splitlines()) == 1  # what is assumed of GPUs


def test_csv_has_the_numbers_of_the_file(prism_plan: Run, tmp_path: Path) -> None:
    """--format csv: unrounded numbers, exactly those of the JSON file, one row a placement."""
    result = prism_plan(*COMPARE, "--format", "csv", "-o", "c.json", cwd=tmp_path)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    values = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert rows[0]["latency_mean_s"] != ""
    assert [row["placement"] for row in rows] == [row["name"] for row in values]
    for row, value in zip(rows, values, strict=True):
        for key in ("remote_share", "planned_share", "waiting_share", "destinations", "runtime_s"):
            assert float(row[key]) == value[key]


@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_documents(prism_plan: Run, tmp_path: Path, form: str) -> None:
    """Markdown and LaTeX rows all have as many cells as the header; percent signs are escaped."""
    result = prism_plan(*COMPARE, "--format", form, cwd=tmp_path)
    sign = "|" if form == "markdown" else "&"
    lines = [line for line in result.stdout.splitlines() if sign in line]
    assert len({line.count(sign) for line in lines}) == 1
    assert len(lines) == (4 if form == "markdown" else 3)
    if form == "latex":
        assert not re.search(r"(?<!\\)%", "".join(lines))
        assert result.stdout.count(r"\begin{tabular}") == result.stdout.count(r"\end{tabular}") == 1


def test_every_command_with_tables(prism_plan: Run, tmp_path: Path) -> None:
    """solve, simulate, diff and migrate print CSV that is read back, with keys that name units."""
    common = (TRACE, "--cluster", CLUSTER, "--format", "csv")
    for solver in ("uniform", "exact"):
        args = ("--solver", solver, "-o", f"{solver}.json")
        solved = prism_plan("solve", *common, *args, cwd=tmp_path)
        rows = list(csv.DictReader(io.StringIO(solved.stdout)))
        assert all(0 < int(row["experts"]) <= int(row["slots"]) for row in rows)
    two = ("uniform.json", "exact.json")
    for command in (("diff", *two), ("migrate", *two, "--cluster", CLUSTER)):
        result = prism_plan(*command, "--format", "csv", cwd=tmp_path)
        first = list(csv.DictReader(io.StringIO(result.stdout.split("\n\n")[0])))
        loads = [int(row["loads"]) for row in first]
        assert sum(loads[:-1]) == loads[-1]
        assert first[-1]["server"] == "total"
        assert "bytes_to_load" in first[0]
    args = ("--trace", TRACE, "--cluster", CLUSTER, "--requests", "3", "--format", "csv")
    result = prism_plan("simulate", *two, *args, "-o", "s.json", cwd=tmp_path)
    row = next(csv.DictReader(io.StringIO(result.stdout)))
    run = json.loads((tmp_path / "s.json").read_text())["runs"][0]
    assert float(row["latency_mean_s"]) == run["latency_s"]["mean"]


def test_one_unit_a_column() -> None:
    """The largest value chooses the unit; what would round to zero is told to be below."""
    assert size_column("sent", "bytes", [45_660_000, 12, 0, None]).cells == (
        "45.66 MB", "<0.01 MB", "0 MB", "–",
    )  # fmt: skip
    assert size_column("sent", "bytes", [999, 0]).cells == ("999 B", "0 B")
    assert duration_column("mean", "s", [0.05, 0.002]).cells == ("50.00 ms", "2.00 ms")
    assert duration_column("mean", "s", [1.5, 0.002]).cells == ("1.500 s", "0.002 s")
    assert duration_column("mean", "s", [12_345.6, 1.0]).cells == ("12,346 s", "1 s")
    assert share_column("remote", "share", [0.123456, 1.0]).cells == ("12.35 %", "100.00 %")
    assert count_column("loads", "loads", [1234567]).cells == ("1,234,567",)


def test_columns_leave_by_rank() -> None:
    """The highest rank leaves first, rank 0 never, and what fits is not left out."""
    columns: list[Column] = [text_column("name", "name", ["x"])]
    columns += [count_column(f"c{rank}", f"c{rank}", [10**6], rank=rank) for rank in (0, 2, 1)]
    assert [column.heading for column in fitting(columns, 100)] == ["name", "c0", "c2", "c1"]
    assert [column.heading for column in fitting(columns, 35)] == ["name", "c0", "c1"]
    assert [column.heading for column in fitting(columns, 1)] == ["name", "c0"]


def test_compilation_is_announced_once() -> None:
    """A notice comes before the first compilation of a process and before no other."""
    told: list[str] = []
    before_first_compilation(lambda: told.append("compiling"))

    # made from text, so that no cache on disk knows them
    made: dict[str, Callable[[int], int]] = {}
    exec("def add_one(x): return x + 1\n\ndef add_two(x): return x + 2", made)
    first, second = jit(made["add_one"]), jit(made["add_two"])
    assert told == []
    assert first(1) == 2
    assert told == ["compiling"]
    assert first(2) == 3
    assert second(1) == 3
    assert told == ["compiling"]


@pytest.mark.long
def test_a_fresh_machine_is_told_that_kernels_compile(tmp_path: Path) -> None:
    """With an empty cache a terminal is told once; with a filled one it is not."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    simulate = ("simulate", "--trace", TRACE, "--cluster", CLUSTER, "--solvers", "exact")
    for expected in (1, 0):
        code, lines = on_terminal(200, *simulate, "--requests", "1", env=env)
        assert code == 0, lines
        assert sum("compiling for this machine" in line for line in lines) == expected
