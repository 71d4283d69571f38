"""The comparison of commits: each runs its own cases and its own code, in turn."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.cases import CASES
from tests.benchmarks.comparing import (
    HEADER,
    ROUNDS,
    chosen_names,
    compare,
    markdown,
    other_work,
    print_comparison,
)

NAMES = [case.name for case in CASES]
#: A project of one case, which tells the module that ran and notes each run in a file.
REGISTRY = """\
import dataclasses, os, tempfile
from pathlib import Path
from typing import Any, Callable
from {module} import WORK

@dataclasses.dataclass
class Case:
    name: str
    run: Callable[[Any], dict[str, Any]]
    prepare: Callable[[Path], Any] = Path
    repeats: int = 1
    limit_s: float | None = None
    limit_mib: float | None = None
    events_per_s: int | None = None
    small: bool = False

def run(prepared):
    with open({log!r}, "a") as log:
        log.write("{module} " + os.environ["PRISM_TRACES"] + "\\n")
    return {{"work": WORK, "runtime_s": 1.0}}

CASES = [Case("own", run), *{more}]
folder = tempfile.TemporaryDirectory
"""


def commit(root: Path) -> str:
    """Commit all files of a repository."""
    words = ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x")
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", *words], cwd=root, check=True)
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True)
    return told.stdout.decode().strip()


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, str, Path]:
    """A repository whose package was renamed since a commit, that commit, and the log of runs."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    root, log = tmp_path / "project", tmp_path / "log"
    benchmarks = root / "tests" / "benchmarks"
    benchmarks.mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for package in (benchmarks.parent, benchmarks):
        (package / "__init__.py").touch()
    registry = {"log": str(log), "more": "[]"}
    (root / "older.py").write_text("WORK = 1\n")
    (benchmarks / "cases.py").write_text(REGISTRY.format(module="older", **registry))
    base = commit(root)
    (root / "older.py").rename(root / "newer.py")
    registry["more"] = '[Case("added", run)]'
    (benchmarks / "cases.py").write_text(REGISTRY.format(module="newer", **registry))
    return root, base, log


def test_an_older_commit_and_the_working_tree_take_turns(moved: tuple[Path, str, Path]) -> None:
    """Each tree runs its own modules, one after the other in every round, on the same data."""
    root, base, log = moved
    ((name, was, now),) = compare(base, ["own"], root=root, traces=Path("data"))
    assert name == "own"
    assert not isinstance(was, str), was
    assert not isinstance(now, str), now
    assert len(was) == len(now) == ROUNDS
    assert {row["outcome"]["work"] for row in [*was, *now]} == {1}
    order = ["older", "newer", "newer", "older", "older", "newer"]
    data = Path("data").resolve()
    # every measurement has one run that is not counted
    assert log.read_text().splitlines() == [f"{each} {data}" for each in order for _ in range(2)]


def test_the_table_and_cases_that_are_new(moved: tuple[Path, str, Path]) -> None:
    """Medians and ratios are printed; a case that the commit lacks is told, and is no failure."""
    root, base, _ = moved
    said: list[str] = []
    assert print_comparison(base, ["own", "added"], root=root, traces=root, say=said.append) == 0
    text = "\n".join(said)
    assert f"{base[:10]} and the working tree in turn, 3 rounds" in text
    rows = [line for line in text.splitlines() if line.startswith("| own ")]
    assert len(rows) == 1
    assert len(rows[0].split("|")) == len(HEADER) + 2
    assert f"added: does not run in {base}: there is no case 'added'" in text
    assert print_comparison(base, ["added"], root=root, traces=root, say=said.append) == 1


def test_other_work_is_told() -> None:
    """A figure that differs is told, a time is not."""
    was = {"outcome": {"events": 7, "runtime_s": 1.0}}
    now = {"outcome": {"events": 8, "runtime_s": 2.0}}
    assert other_work("x", was, was | {"outcome": {"events": 7, "runtime_s": 9.0}}) is None
    assert other_work("x", was, now) == "x: the outcome differs: events 7 was, 8 is"


def test_names_of_cases_with_commas() -> None:
    """Names are told apart from the commas in them; patterns name several; others are refused."""
    some = NAMES[3:6]
    assert chosen_names(",".join(some), NAMES) == some
    assert chosen_names(f" {some[0]} , {some[1]}", NAMES) == some[:2]
    small = [name for name in NAMES if name.startswith("small: ")]
    assert chosen_names("small: *", NAMES) == small
    for wrong in ("nothing", "small: exact,nothing", ""):
        with pytest.raises(SystemExit, match="no case is called"):
            chosen_names(wrong, NAMES)


def test_tables_are_aligned() -> None:
    """Columns have one width, so that the source of a document can be read too."""
    lines = markdown([("a", "1"), ("longer", "22")], ("case", "s")).splitlines()
    assert lines == ["| case   | s  |", "|--------|----|", "| a      | 1  |", "| longer | 22 |"]
