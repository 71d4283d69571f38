"""Rules of the house: which module may import which, who prints, what is exported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prism_plan

PACKAGE = Path(prism_plan.__file__).parent
#: The runtime, a package of its own that needs PyTorch; read here, not imported.
RUNTIME = PACKAGE.parent / "runtime_adapter"

#: A module may import those of its own and of lower floors; `solvers` and others of one floor that
#: are packages do not import each other.
FLOORS = [
    {"text", "errors", "jit", "limits", "machine", "open_file"},
    {"faults", "files", "kernels", "__init__"},
    {
        *("model", "checkpoint_folder", "cluster"),
        *("assumed", "trace", "trace_counts", "parquet_input", "provenance"),
    },
    {"workload"},
    {"instance"},
    {"placement", "objective", "feasibility", "memory", "moves"},
    {"solvers", "simulate"},
    {"migration"},
    {"io"},
    {"sizes"},
    {"profiling"},
    {
        *("comparison", "simulation", "request_table"),
        *("sweep", "frames"),
    },
    {"check", "cluster_check"},
    {"plotting"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
#: The command line of the runtime.
RUNTIME_COMMANDS = ("cli",)
RUNTIME_MODULES = sorted(RUNTIME.rglob("*.py"))


def part(path: Path) -> str:
    """The module or package directly under prism_plan that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of prism_plan that a file imports at run time, lazily or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = {
        id(inner)
        for node in checked
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prism_plan"):
            words = (node.module or "").split(".")
            found |= {words[1]} if len(words) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("prism_plan.")
            }
    return {name if name in FLOOR else "__init__" for name in found}


def test_every_module_has_a_floor() -> None:
    """A new module has to be given its place."""
    assert {part(path) for path in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    """No file imports from a higher floor, so data flows one way."""
    own = part(path)
    if own == "__init__":
        return  # names the public interface, lazily
    for name in imports(path):
        assert FLOOR[name] <= FLOOR[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_solvers_and_the_simulator_do_not_know_each_other(path: Path) -> None:
    """What plans and what measures the plans share types and nothing else."""
    strangers = {"solvers": "simulate", "simulate": "solvers"}
    assert strangers.get(part(path)) not in imports(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    """print, sys.exit and click are found in the command line alone; pyplot nowhere."""
    text = path.read_text(encoding="utf-8")
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if part(path) != "cli":
        assert not calls & {"print", "exit", "quit"}
        assert "sys.exit" not in text
        assert "import click" not in text
    if part(path) != "plotting":
        assert "import matplotlib" not in text
        assert "from matplotlib" not in text
    assert "import pyplot" not in text
    assert "matplotlib.pyplot" not in text


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_planner_does_not_know_the_runtime(path: Path) -> None:
    """runtime_adapter imports prism_plan, and never the reverse."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    assert "runtime_adapter" not in found


@pytest.mark.parametrize("path", RUNTIME_MODULES, ids=lambda p: str(p.relative_to(RUNTIME)))
def test_only_the_commands_of_the_runtime_print_or_exit(path: Path) -> None:
    """print, sys.exit and click are found in the files of the runtime's two commands alone."""
    text = path.read_text(encoding="utf-8")
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if path.relative_to(RUNTIME).parts[0] not in RUNTIME_COMMANDS:
        assert not calls & {"print", "exit", "quit"}
        assert "sys.exit" not in text
        assert "import click" not in text


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
