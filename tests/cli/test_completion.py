"""What a shell and a newcomer's first words get from the installed command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from prism_plan.cli.main import COMMANDS
from prism_plan.solvers import ALL_SOLVERS

#: The installed command.
COMMAND = str(Path(sys.executable).parent / "prism-plan")
Run = Callable[..., CompletedProcess[str]]


def completions(line: str) -> list[tuple[str, str]]:
    """(kind, value) of what bash is offered for the last word of a command line."""
    words = line.split(" ")
    result = subprocess.run(
        [COMMAND],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            "_PRISM_PLAN_COMPLETE": "bash_complete",
        },
    )
    assert result.returncode == 0, result.stderr
    pairs = [text.split(",", 1) for text in result.stdout.splitlines()]
    return [(kind, value) for kind, value in pairs]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str) -> None:
    """`_PRISM_PLAN_COMPLETE=bash_source prism-plan` prints a script that names the program."""
    result = subprocess.run(
        [COMMAND],
        capture_output=True,
        text=True,
        env={**os.environ, "_PRISM_PLAN_COMPLETE": f"{shell}_source"},
    )
    assert result.returncode == 0, result.stderr
    assert f"_PRISM_PLAN_COMPLETE={shell}_complete" in result.stdout


def test_bash_completes() -> None:
    """A real bash, given the script, completes the name of a command."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    script = """
    eval "$(_PRISM_PLAN_COMPLETE=bash_source prism-plan)"
    COMP_WORDS=(prism-plan simu) COMP_CWORD=1
    _prism_plan_completion prism-plan
    echo "${COMPREPLY[@]}"
    """
    folder = Path(COMMAND).parent
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([bash, "-c", script], capture_output=True, text=True, env=env)
    assert result.stdout.split() == ["simulate"], result.stderr


def test_commands_solvers_and_files() -> None:
    """Names of commands and solvers are offered, also after a comma; files go to the shell."""
    assert {value for _, value in completions("prism-plan ")} == set(COMMANDS)
    assert {value for _, value in completions("prism-plan solve --solver ")} == set(ALL_SOLVERS)
    assert completions("prism-plan compare --solvers prism,il") == [("plain", "prism,ilp")]
    assert completions("prism-plan compare tra") == [("file", "tra")]
    assert completions("prism-plan solve --cluster c") == [("file", "c")]
    assert completions("prism-plan plot cdf s") == [("file", "s")]


def test_module_and_command_are_one(prism_plan: Run, tmp_path: Path) -> None:
    """`python -m prism_plan` is the installed command."""
    module = subprocess.run(
        [sys.executable, "-m", "prism_plan", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert module.returncode == 0
    assert module.stdout == prism_plan("--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("gpus", "plot")])
def test_no_arguments_show_the_help(prism_plan: Run, tmp_path: Path, command: str) -> None:
    """A command that needs arguments and gets none shows its help and leaves with 2."""
    result = prism_plan(command, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"Usage: prism-plan {command} ")
    assert "--help" in result.stderr
