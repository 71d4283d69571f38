"""The program `prism-runtime` and `python -m runtime_adapter` are one."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def help_of(*python: str) -> str:
    """What a way to start the program prints for ``--help``."""
    command = [sys.executable, *python, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_both_names_start_one_program() -> None:
    """The console script of pyproject.toml shows the help of the module, under its own name."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["prism-runtime"].partition(":")
    script = help_of("-c", f"from {module} import {function}; {function}()")
    assert script == help_of("-m", "runtime_adapter")
    assert script.startswith("Usage: prism-runtime [OPTIONS] COMMAND")
