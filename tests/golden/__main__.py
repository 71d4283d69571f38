"""Record golden values, and compare commits: see ``tests/golden/README.md``.

    python -m tests.golden same BASE [--extras hf] [--only PATTERN] [--keep FOLDER]
    python -m tests.golden compare [--only PATTERN]
    python -m tests.golden record

``same`` and ``record`` install what they compare in virtual environments below a temporary folder;
``compare`` runs the command that is installed beside the Python that runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tests.golden import revisions
from tests.golden.catalogue import ROOT, Case, catalogue
from tests.golden.comparing import Difference, differences, judge, read_exceptions
from tests.golden.golden import COMMIT, TOLERANCE, read_values, write_values
from tests.golden.running import outcome, run, start
from tests.golden.values import recorded, without


def chosen(only: str, *, hf: bool) -> tuple[list[Case], list[Case]]:
    """The cases that run, and those that are left out."""
    cases = catalogue()
    wanted = [case for case in cases if fnmatchcase(case.name, only) and (hf or not case.needs_hf)]
    return wanted, [case for case in cases if case not in wanted]


def report(
    found: Sequence[Difference],
    ran: Sequence[Case],
    left_out: Sequence[Case],
    *,
    hf: bool,
    golden: bool,
) -> int:
    """Print what differs; 1 if anything does that is no exception.

    Exceptions are of the ``golden`` commit: compared with another one, they need not be met.
    """
    exceptions = read_exceptions()
    names, others = ([case.name for case in cases] for cases in (ran, left_out))
    wrong, excepted = judge(found, exceptions, names if golden else [], others)
    for line in excepted:
        print(f"excepted: {line}")
    for line in wrong:
        print(line)
    if not hf:
        number = sum(case.needs_hf for case in left_out)
        print(f"left out: {number} cases that need PyTorch (SAME_EXTRAS=hf)")
    print(f"{len(ran)} cases: {len(wrong)} differences, and {len(excepted)} that are excepted")
    return 1 if wrong else 0


def same(base: str, extras: str, only: str, keep: str | None) -> int:
    """Install a commit and the working tree, and go on in the latter's Python."""
    old = revisions.revision(base)
    golden = revisions.revision(COMMIT) == old
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        work = Path(temporary if keep is None else keep).resolve()
        print(f"comparing {old} with the working tree, uncommitted changes included", flush=True)
        pythons = revisions.install([old, revisions.Revision()], work, extras)
        words = ["--extras", extras, "--only", only, *(["--golden"] if golden else [])]
        command = [pythons[1], "-m", "tests.golden", "installed", *pythons, work, *words]
        return subprocess.run([str(word) for word in command], cwd=ROOT, check=False).returncode


def installed(old: Path, new: Path, work: Path, extras: str, only: str, *, golden: bool) -> int:
    """Run all cases with both commands at once, a process each, and compare."""
    hf = "hf" in extras.split(",")
    ran, left_out = chosen(only, hf=hf)
    if not ran:
        sys.exit(f"no case is called {only!r}")
    workers = [
        start(ran, python, python.parent / "prism-plan", work / name, processes=1)
        for python, name in ((old, "old"), (new, "new"))
    ]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        sys.exit(f"the workers ended with {codes}")
    was, now = ({case.name: outcome(case, work / name) for case in ran} for name in ("old", "new"))
    return report(differences(was, now), ran, left_out, hf=hf, golden=golden)


def compare(only: str) -> int:
    """Compare the command that is installed here with the recorded values."""
    hf = importlib.util.find_spec("torch") is not None
    ran, left_out = chosen(only, hf=hf)
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        outcomes = run(ran, Path(temporary), processes=os.cpu_count() or 1)
    now = {case.name: recorded(without(outcomes[case.name], case.same_machine)) for case in ran}
    was = {name: values for name, values in read_values().items() if name in now}
    return report(differences(was, now, tolerance=TOLERANCE), ran, left_out, hf=hf, golden=True)


def record() -> int:
    """Write the values of the golden commit anew."""
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        work = Path(temporary)
        (python,) = revisions.install([revisions.revision(COMMIT)], work, "hf")
        command = [str(python), "-m", "tests.golden", "write", str(python), str(work / "run")]
        return subprocess.run(command, cwd=ROOT, check=False).returncode


def write(python: Path, work: Path) -> int:
    """Run all cases with an installed command and write their values."""
    cases = catalogue()
    outcomes = run(cases, work, python=python, processes=os.cpu_count() or 1)
    write_values(cases, outcomes)
    print(f"{len(cases)} cases recorded")
    return 0


def main() -> int:
    """Do what the words on the command line say."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("same", help="compare a commit with the working tree")
    one.add_argument("base")
    one.add_argument("--keep", help="an empty folder for all files, which stays")
    two = commands.add_parser("installed")  # the second half of `same`
    for name in ("old", "new", "work"):
        two.add_argument(name, type=Path)
    two.add_argument("--golden", action="store_true")
    three = commands.add_parser("compare", help="compare this Python's command with the values")
    for part in (one, two):
        part.add_argument("--extras", default="", help="hf: also the cases that need PyTorch")
    for part in (one, two, three):
        part.add_argument("--only", default="*", help="a pattern of names of cases")
    commands.add_parser("record", help=f"write the values of {COMMIT} anew")
    four = commands.add_parser("write")  # the second half of `record`
    four.add_argument("python", type=Path)
    four.add_argument("work", type=Path)
    given = parser.parse_args()
    if given.command == "same":
        return same(given.base, given.extras, given.only, given.keep)
    if given.command == "installed":
        paths = (given.old, given.new, given.work)
        return installed(*paths, given.extras, given.only, golden=given.golden)
    if given.command == "compare":
        return compare(given.only)
    return record() if given.command == "record" else write(given.python, given.work)


if __name__ == "__main__":
    sys.exit(main())
