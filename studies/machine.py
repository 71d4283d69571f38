"""Describes the machine and the commit for recorded results."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The processor's name according to the kernel."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(besides: str | None = None) -> str | None:
    """The commit of this package, marked if the tree has changes; None outside of git.

    Changes to the file ``besides``, a path from the root of the repository, do not count: a record
    that grows while it is made.
    """
    described = _git("describe", "--always", "--dirty", "--exclude", "*")
    if not described or besides is None or not described.endswith("-dirty"):
        return described or None
    changes = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){besides}"
    )
    return described if changes else described.removesuffix("-dirty")


def _git(*arguments: str) -> str:
    """What git prints of this package's repository; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
