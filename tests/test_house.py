"""Rules of the house: which module may import which, who prints, what is exported."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prism_plan

PACKAGE = Path(prism_plan.__file__).parent
#: The runtime, a package of its own that needs PyTorch; read here, not imported.
RUNTIME = PACKAGE.parent / "runtime_adapter"

MODULES = sorted(PACKAGE.rglob("*.py"))
#: The command line of the runtime.
RUNTIME_COMMANDS = ("cli",)
RUNTIME_MODULES = sorted(RUNTIME.rglob("*.py"))


def part(path: Path) -> str:
    """The module or package directly under prism_plan that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_imports_run_one_way_and_in_no_circle() -> None:
    """The import contracts of pyproject.toml hold: layers, circles, forbidden libraries."""
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_wrong_import_breaks_a_contract(tmp_path: Path) -> None:
    """A figure that imports a recorder, and a solver that closes a circle, are both told."""
    for name in ("prism_plan", "runtime_adapter", "pyproject.toml"):
        source = PACKAGE.parent / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    with open(tmp_path / "prism_plan" / "solvers" / "flow.py", "a") as module:
        module.write("import prism_plan.solvers.exact\n")
    with open(tmp_path / "prism_plan" / "plotting" / "placements.py", "a") as module:
        module.write("import prism_plan.profiling.esft\n")
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    command = [sys.executable, "-P", "-c", code, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "prism_plan.plotting.placements -> prism_plan.profiling.esft" in result.stdout
    assert "prism_plan.solvers" in result.stdout.split("No cycles are allowed in")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    """Print and sys.exit are found in the command line alone; pyplot nowhere."""
    text = path.read_text(encoding="utf-8")
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if part(path) != "cli":
        assert not calls & {"print", "exit", "quit"}
        assert "sys.exit" not in text
    assert "import pyplot" not in text
    assert "matplotlib.pyplot" not in text


@pytest.mark.parametrize("path", RUNTIME_MODULES, ids=lambda p: str(p.relative_to(RUNTIME)))
def test_only_the_commands_of_the_runtime_print_or_exit(path: Path) -> None:
    """Print and sys.exit are found in the files of the runtime's two commands alone."""
    text = path.read_text(encoding="utf-8")
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if path.relative_to(RUNTIME).parts[0] not in RUNTIME_COMMANDS:
        assert not calls & {"print", "exit", "quit"}
        assert "sys.exit" not in text


def last_line(code: str) -> str:
    """The last line that some Python code prints in a process of its own."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


def test_exported_names() -> None:
    """Every name of `__all__` exists, and importing the package loads nothing heavy."""
    for name in prism_plan.__all__:
        assert getattr(prism_plan, name) is not None
    code = "import sys, prism_plan; print(sorted({'numpy', 'numba', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as it does in any module."""
    with pytest.raises(AttributeError, match="no attribute 'slove'"):
        prism_plan.slove  # noqa: B018


def test_help_loads_nothing_heavy() -> None:
    """`prism-plan --help` imports neither numpy nor any other heavy library."""
    code = (
        "import sys\nfrom prism_plan.cli.main import cli\n"
        "try:\n    cli(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'pyarrow', 'numba', 'rich', 'pulp', 'matplotlib', 'scipy', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
