"""Where errors leave the programs: one line, the right exit code, no traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import click
import pytest

from prism_plan.cli.error_boundary import run_command
from prism_plan.cli.internal_errors import TRACEBACK_VARIABLE, error_location
from prism_plan.cli.main import run
from prism_plan.errors import Infeasible, InputError

FAULT = re.compile(
    r"\S+: internal error: (?P<what>.*) \[(?P<at>.*), prism-plan \S+\]; please report this line "
    r"with the command and its files \(PRISM_PLAN_TRACEBACK=1 shows the traceback\)\n"
)


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


def ended(error: BaseException) -> int:
    """The exit code of a program whose command raises this."""

    @click.command()
    def command() -> None:
        raise error

    return run_command(command, "tool", program="tool", arguments=[])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("bad", source="a"), 2, "tool: a: bad"),
        (Infeasible("full", shortfall=1, unit="slots"), 3, "tool: infeasible: full; short by 1 s"),
        (click.UsageError("no\nsuch option."), 2, "tool: no such option; see tool --help"),
        (click.ClickException("1 of 2 failed"), 2, "tool: 1 of 2 failed"),
        (click.Abort(), 130, "tool: interrupted"),
        (KeyboardInterrupt(), 130, "tool: interrupted"),
        (MemoryError(), 4, "tool: out of memory; use a smaller trace"),
        (OutOfMemoryError("CUDA"), 4, "tool: out of memory"),
        (OSError(errno.ENOSPC, "No space", "a\x1b"), 2, r"tool: a\x1b: no space"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "tool: the operating system, raised"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "tool: No module named"),
    ],
)
def test_foreseen_errors(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    """Each has its exit code and one line; an error of the system names its file or its place."""
    line = line.replace("system, raised", "system, tests.cli.test_error_boundary:")
    assert ended(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (AssertionError("broke\na \x1b[2Jconstraint"), r"AssertionError: broke a \\x1b\[2Jconstr"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (RecursionError("maximum depth"), "RecursionError: maximum depth"),
        (OSError("damaged"), "OSError: damaged"),  # of a library: the system gives a number
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "BrokenPipeError: .*Broken pipe"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "ModuleNotFoundError: No mod"),
        (RuntimeError("x" * 5000), "RuntimeError: x{300}…$"),
    ],
)
def test_unforeseen_errors(
    capsys: pytest.CaptureFixture[str], error: BaseException, what: str
) -> None:
    """Any other exception is exit code 70 and one line with type, message, place and version."""
    assert ended(error) == 70
    out, err = capsys.readouterr()
    found = FAULT.fullmatch(err)
    assert out == ""
    assert found is not None, err
    assert re.match(what, found["what"])
    assert re.fullmatch(r"tests\.cli\.test_error_boundary:\d+", found["at"])


def test_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment variable brings the traceback before the line; 0 does not."""
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    assert ended(AssertionError("\x1b[2J")) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert FAULT.fullmatch(err.splitlines(keepends=True)[-1])
    assert "\x1b" not in err
    monkeypatch.setenv(TRACEBACK_VARIABLE, "0")
    assert ended(AssertionError("x")) == 70
    assert FAULT.fullmatch(capsys.readouterr().err)


def test_the_place_of_a_librarys_exception() -> None:
    """Of an exception from a library, the library's line and ours that called it are named."""
    from prism_plan.io.cluster import parse_cluster

    try:
        parse_cluster(None)  # type: ignore[arg-type]
    except Exception as error:
        place = error_location(error)
    assert re.fullmatch(r"\S+:\d+(, called from prism_plan\.\S+:\d+)?", place)


def test_a_solver_that_breaks_a_constraint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The check after each solve, should it ever fire, is a line of the command and no file."""
    from prism_plan.placement_check import Violation
    from prism_plan.solvers import run as module

    root = Path(__file__).parents[2] / "traces"
    broken = Violation("capacity", "gpu", 1, "bytes", "gpu[0] holds a byte too much")
    monkeypatch.setattr(module, "violations", lambda *_, **__: [broken])
    output = str(tmp_path / "p.json")
    words = ["solve", str(root / "tiny-mixtral.parquet"), "--cluster"]
    words += [str(root / "tiny-cluster.toml"), "--solver", "exact", "-o", output]
    monkeypatch.setattr(sys, "argv", ["prism-plan", *words])
    assert run() == 70
    found = FAULT.fullmatch(capsys.readouterr().err)
    assert found is not None
    assert "solver 'exact' broke a constraint: gpu[0] holds a byte too much" in found["what"]
    assert found["at"].startswith("prism_plan.solvers.run:")
    assert list(tmp_path.iterdir()) == []


def test_warnings_and_threads_are_lines_too(capfd: pytest.CaptureFixture[str]) -> None:
    """A library's warning has no path and no source line, a thread's fault no traceback."""

    @click.command()
    def command() -> None:
        warnings.simplefilter("always")
        warnings.warn("glyph \x1b\nmissing", UserWarning, stacklevel=1)

        def work() -> None:
            raise AssertionError("in a thread")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with warnings.catch_warnings():
        assert run_command(command, "tool", program="tool", arguments=[]) == 0
    first, second = capfd.readouterr().err.splitlines(keepends=True)
    assert first == "tool: warning: UserWarning: glyph \\x1b missing\n"
    found = FAULT.fullmatch(second)
    assert found is not None
    assert found["what"] == "AssertionError: in a thread"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some Python as a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


PLANNER = """
import sys
import prism_plan.check.report
def fire(*_, **__):
    assert False, "\\x1b[2J"
prism_plan.check.report.check_file = fire
sys.argv = ["prism-plan", "check", "p.json"]
from prism_plan.cli import main
main()
"""
RUNTIME = """
import sys
import prism_plan.io.placement
def fire(*_, **__):
    assert False, "\\x1b[2J"
prism_plan.io.placement.read_placement = fire
sys.argv = ["runtime_adapter", "move", "--placement", "p.json"]
from runtime_adapter.cli import main
main()
"""


@pytest.mark.parametrize(
    ("code", "program"), [(PLANNER, "prism-plan"), (RUNTIME, "prism-runtime")], ids=str
)
def test_a_fault_ends_either_program_with_70(code: str, program: str) -> None:
    """An internal check that fires in a command: exit code 70 and one printable line."""
    if program == "prism-runtime":
        pytest.importorskip("torch")
    result = python(code)
    assert result.returncode == 70
    assert result.stdout == ""
    assert result.stderr.startswith(rf"{program}: internal error: AssertionError: \x1b[2J [")
    assert FAULT.fullmatch(result.stderr)


CHILD = """
import multiprocessing
from prism_plan.cli.internal_errors import run_process
if __name__ == "__main__":
    for function, argument in ((divmod, (1, 0)), (exec, (
        "from prism_plan.errors import LimitReached; raise LimitReached('\\x1b[2J')",
    ))):
        child = multiprocessing.get_context("spawn").Process(
            target=run_process, args=("tool", function, *argument)
        )
        child.start()
        child.join()
        print(child.exitcode)
"""


def test_faults_of_child_processes(tmp_path: Path) -> None:
    """A process of the runtime that fails says so in one line, and ends with the exit code."""
    script = tmp_path / "main.py"
    script.write_text(CHILD)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "70\n4\n"
    fault, limit = result.stderr.splitlines(keepends=True)
    assert FAULT.fullmatch(fault)
    assert "ZeroDivisionError" in fault
    assert limit == "tool: \\x1b[2J\n"


def test_the_exit_codes_are_documented() -> None:
    """The help of both programs and the README name exit code 70."""
    from prism_plan.cli.main import cli

    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    runtime = (root / "runtime_adapter" / "cli" / "main.py").read_text(encoding="utf-8")
    for text in (cli.help or "", readme, runtime):
        assert re.search(r"\b70\b,? (?:is )?an\s+internal\s+error", text)
