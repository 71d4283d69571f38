"""Compilation ahead of the first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

#: Prints the modules of the functions that are compiled from here on.
COMPILED = """
import sys
from numba.core import event

class Names(event.Listener):
    def on_start(self, event):
        print("compiled", event.data["dispatcher"].py_func.__module__)

    def on_end(self, event):
        pass

event.register("numba:compile", Names())
"""
#: Runs a command.
LISTEN = (
    COMPILED
    + """
from prism_plan.cli.main import run
sys.argv = ["prism-plan", *sys.argv[1:]]
run()
"""
)

#: Packs eight experts on two GPUs.
PACK = (
    COMPILED
    + """
import numpy as np
from prism_plan.solvers.latency.gpu_packing import GpuPacking

together = np.arange(16, dtype=np.uint16).reshape(8, 1, 2) % 8
packing = GpuPacking(together, np.ones(1, np.int64))
packing.pack((4, 4), np.ones((1, 8), bool), np.ones((1, 8)))
"""
)


def test_warm_leaves_nothing_to_compile(tmp_path: Path) -> None:
    """After ``python -m prism_plan.warm`` neither solve nor simulate compiles anything.

    Neither does a solver that plans where layers execute, nor a simulation of its table.
    """
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    warm = [sys.executable, "-m", "prism_plan.warm"]
    result = subprocess.run(warm, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "compiling what is not compiled yet" in result.stderr
    trace = root / "traces" / "tiny-mixtral.parquet"
    cluster = root / "traces" / "tiny-cluster.toml"
    for command in (
        ("solve", str(trace), "--cluster", str(cluster), "-o", "p.json"),
        ("simulate", "--trace", str(trace), "--cluster", str(cluster), "--solvers", "exact",
         "--requests", "1", "--offload", "--route", "nearest"),
        ("compare", str(trace), "--cluster", str(cluster), "--solvers", "exact,prism,pipeline"),
        ("solve", str(trace), "--cluster", str(cluster), "--solver", "layer-partition",
         "--execution", "paths", "-o", "paths.json"),
        ("simulate", "paths.json", "--trace", str(trace), "--cluster", str(cluster),
         "--solvers", "prism+paths", "--requests", "1"),
    ):  # fmt: skip
        listened = [sys.executable, "-c", LISTEN, *command]
        result = subprocess.run(
            listened, env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert "compiled prism_plan" not in result.stdout


def _copy_that_cannot_be_written(folder: Path) -> None:
    """Copy the package; files named ``__pycache__`` keep everybody from making those folders."""
    root = Path(__file__).resolve().parent.parent / "prism_plan"
    shutil.copytree(root, folder / "prism_plan", ignore=shutil.ignore_patterns("__pycache__"))
    for inner in [folder / "prism_plan", *(folder / "prism_plan").rglob("*")]:
        if inner.is_dir():
            (inner / "__pycache__").touch()


def test_a_read_only_installation_compiles_once(tmp_path: Path) -> None:
    """Code that cannot be kept beside the package is kept in the user's cache folder."""
    _copy_that_cannot_be_written(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    traces = Path(__file__).resolve().parent.parent / "traces"
    command = ("solve", str(traces / "tiny-mixtral.parquet"), "--cluster",
               str(traces / "tiny-cluster.toml"), "--solver", "exact", "-o", "p.json")  # fmt: skip
    compiled = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", LISTEN, *command], env=environment, capture_output=True,
            text=True, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        compiled.append(result.stdout.count("compiled prism_plan"))
    assert compiled[0] > 0
    assert compiled[1] == 0


def test_without_any_cache_folder_commands_work(tmp_path: Path) -> None:
    """Nothing can be written anywhere: a placement all the same; warm says that it is of no use."""
    _copy_that_cannot_be_written(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment |= {"HOME": os.devnull, "XDG_CACHE_HOME": f"{os.devnull}/cache",
                    "PYTHONPATH": str(tmp_path)}  # fmt: skip
    warm = [sys.executable, "-m", "prism_plan.warm"]
    result = subprocess.run(warm, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "set NUMBA_CACHE_DIR to one that can" in result.stderr.splitlines()[-1]
    traces = Path(__file__).resolve().parent.parent / "traces"
    command = ("solve", str(traces / "tiny-mixtral.parquet"), "--cluster",
               str(traces / "tiny-cluster.toml"), "--solver", "exact", "-o", "p.json")  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "prism_plan", *command], env=environment, capture_output=True,
        text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "p.json").exists()


def test_a_changed_helper_is_compiled_anew(tmp_path: Path) -> None:
    """Machine code of a kernel is not kept across a change of a helper in another file.

    The packing of GPUs takes a helper from another module, which is changed in a copy.
    """
    root = Path(__file__).resolve().parent.parent
    package = tmp_path / "prism_plan"
    shutil.copytree(root / "prism_plan", package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)
    }  # fmt: skip
    helper = package / "compiled_loops.py"
    kernels = package / "solvers" / "latency" / "gpu_packing.py"
    assert "from prism_plan.compiled_loops import" in kernels.read_text()
    counts = []
    for change in ("", "", "\n# another version\n"):
        helper.write_text(helper.read_text() + change)
        result = subprocess.run(
            [sys.executable, "-c", "import prism_plan; print(prism_plan.__file__)\n" + PACK],
            env=environment, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert str(tmp_path) in result.stdout
        counts.append(result.stdout.count("compiled prism_plan.solvers.latency.gpu_packing"))
    assert counts[0] > 0
    assert counts == [counts[0], 0, counts[0]]
