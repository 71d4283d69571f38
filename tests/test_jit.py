"""Compilation ahead of the first use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Runs a command and prints the functions of ours that it compiles.
LISTEN = """
import sys
from numba.core import event

class Names(event.Listener):
    def on_start(self, event):
        print("compiled", event.data["dispatcher"].py_func.__module__)

    def on_end(self, event):
        pass

event.register("numba:compile", Names())
from prism_plan.cli.main import run
sys.argv = ["prism-plan", *sys.argv[1:]]
run()
"""


def test_warm_leaves_nothing_to_compile(tmp_path: Path) -> None:
    """After ``python -m prism_plan.warm`` neither solve nor simulate compiles anything."""
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    warm = [sys.executable, "-m", "prism_plan.warm"]
    result = subprocess.run(warm, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "compiling for this machine" in result.stderr
    trace = root / "traces" / "tiny-mixtral.parquet"
    cluster = root / "traces" / "tiny-cluster.toml"
    for command in (
        ("solve", str(trace), "--cluster", str(cluster), "-o", "p.json"),
        ("simulate", "--trace", str(trace), "--cluster", str(cluster), "--solvers", "exact",
         "--requests", "1", "--offload", "--route", "nearest"),
        ("compare", str(trace), "--cluster", str(cluster), "--solvers", "exact,prism"),
    ):  # fmt: skip
        listened = [sys.executable, "-c", LISTEN, *command]
        result = subprocess.run(
            listened, env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert "compiled prism_plan" not in result.stdout
