"""Errors name parameters; the command line puts the options of the running command there."""

from __future__ import annotations

import ast
import dataclasses
import pickle
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import prism_plan
from prism_plan.cli.error_boundary import run_command
from prism_plan.cli.main import cli
from prism_plan.cli.options_dataclass import option_names
from prism_plan.errors import InputError, LimitReached, UnsupportedFeature
from prism_plan.evaluate.simulation_options import SimulationOptions
from runtime_adapter.cli.main import cli as runtime_cli
from studies.testbed import command as testbed_command

ROOT = Path(prism_plan.__file__).parent.parent
#: The command lines themselves, which may speak of options.
COMMAND_LINES = ("cli",)
LIBRARY = [
    path
    for package in ("prism_plan", "runtime_adapter")
    for path in sorted((ROOT / package).rglob("*.py"))
    if not set(path.relative_to(ROOT / package).parts) & set(COMMAND_LINES)
]
#: Options of other programs: of SGLang and vLLM, of git, and of ours as a program to call.
FOREIGN = re.compile(
    r"--enable-return-routed-experts|--disable-shared-experts-fusion|--enable-eplb"
    r"|^--(always|dirty|exclude)$|prism-plan simulate --sweep"
)
#: Parameters that only Python callers give, and parts of what they give.
PYTHON_ONLY = {"level", "frame", "comparison", "scenario"}


def texts(path: Path) -> Iterator[str]:
    """The texts in a file's code, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in docstrings:
            yield node.value


def named_parameters(path: Path) -> set[str]:
    """The parameters that messages in a file name."""
    found = {name for text in texts(path) for name in re.findall(r"``(\w+)``", text)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "parameter":
            inside = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            found |= {str(n.value) for n in inside if isinstance(n.value, str) and n.value}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_integer":
            found |= {a.value for a in node.args[3:] if isinstance(a, ast.Constant)}
    return found


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """All commands below one, with their full names."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for inner in command.list_commands(context):
        found = command.get_command(context, inner)
        assert found is not None
        yield from leaves(found, f"{name} {inner}".strip())


COMMANDS = dict(leaves(cli, ""))
RUNTIME_COMMANDS = dict(leaves(runtime_cli, "")) | {"testbed": testbed_command.cli}


#: These write and read the command lines of other programs.
ENGINES = {
    ROOT / "prism_plan" / "export" / f"{name}.py"
    for name in ("llamacpp", "pipeline_partitions", "whole_layers", "expert_maps/export_map")
}


@pytest.mark.parametrize(
    "path", sorted(set(LIBRARY) - ENGINES), ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_library_names_no_options(path: Path) -> None:
    """No text of library code holds an option of our command line."""
    assert not [t for t in texts(path) if re.search(r"--[a-z]", t) and not FOREIGN.search(t)]


def test_every_parameter_named_is_one_of_a_command() -> None:
    """What library errors name is an option or argument of a command, or Python's alone."""
    known = {
        str(parameter.name)
        for command in (*COMMANDS.values(), *RUNTIME_COMMANDS.values())
        for parameter in command.params
    }
    named = {name for path in LIBRARY for name in named_parameters(path)}
    assert len(named) > 30
    assert named <= known | PYTHON_ONLY
    assert not known & PYTHON_ONLY


@pytest.mark.parametrize("name", [*COMMANDS, *RUNTIME_COMMANDS])
def test_each_command_has_a_frozen_dataclass(name: str) -> None:
    """Its fields are the parameters that click declares, and the set of those given."""
    command = (COMMANDS | RUNTIME_COMMANDS)[name]
    if name == "testbed":
        return  # a bench of its own, whose only function takes what click gives
    kind = typing.get_type_hints(command.callback.__wrapped__)["args"]  # type: ignore[union-attr]
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == {str(parameter.name) for parameter in command.params} | {"explicit_names"}
    assert kind.__dataclass_params__.frozen


def test_a_python_caller_reads_the_names_of_python() -> None:
    """A wrong value is told under the name that the caller wrote, and so is a remedy."""
    with pytest.raises(InputError) as caught:
        SimulationOptions(migrate_every_s=-1)
    assert str(caught.value).startswith("migrate_every_s: -1; expected seconds above 0")
    assert caught.value.parameter == "migrate_every_s"
    error = LimitReached("out of memory; lower ``batch_size``")
    assert str(error) == "out of memory; lower batch_size"


def test_names_outlast_processes_and_files() -> None:
    """An error that comes from a worker process, or is told to be of a file, keeps its names."""
    error = UnsupportedFeature("use ``seed`` 1")
    assert pickle.loads(pickle.dumps(error)).line({"seed": "--seed"}) == "use --seed 1"
    wrong = InputError("2", remedy="lower ``seed``").within("a.toml")
    assert str(wrong) == "a.toml: 2; lower seed"
    assert wrong.line({"seed": "--seed"}) == "a.toml: 2; lower --seed"
    assert wrong.within(parameter="seed") is wrong


def test_arguments_are_told_as_they_were_given() -> None:
    """An option stands under its long name, an argument as its value."""
    context = COMMANDS["solve"].make_context("solve", ["t.parquet", "--cluster=c", "-o", "p.json"])
    names = option_names(context)
    assert names["trace"] == "t.parquet"
    assert (names["reference"], names["output"]) == ("--from", "--output")


TINY = ("--cluster", str(ROOT / "traces/tiny-cluster.toml"))
TRACE = str(ROOT / "traces/tiny-mixtral.parquet")
#: Words with which each command does something, up to the option under test.
WORDS: dict[str, tuple[str, ...]] = {
    "profile": ("no-checkpoint", "--prompts", "p.jsonl", "-o", "o.parquet"),
    "solve": (TRACE, *TINY, "-o", "o.json"),
    "compare": (TRACE, *TINY, "--solvers", "uniform"),
    "simulate": ("--trace", TRACE, *TINY, "--solvers", "uniform"),
    **{f"plot {kind}": (TRACE, "-o", "f.png") for kind in ("heatmap", "entropy")},
}
#: What an option needs beside it to have an effect.
BESIDE = {
    **dict.fromkeys(("migrate_every_s", "half_life_s", "horizon_s"), ("--migrate", "prism")),
    **dict.fromkeys(("timeout_s", "request_timeout_s"), ("--lose", "edge-0@5")),
    "jobs": ("--sweep", "solver=uniform", "-o", "o.csv"),
}
NUMBERS = [
    (name, parameter)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if name in WORDS
    and isinstance(parameter.type, click.types.FloatParamType | click.types.IntParamType)
]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that is refused with exit code 2."""
    code = run_command(cli, "prism-plan", program="prism-plan", arguments=words)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err.removeprefix("prism-plan: ").rstrip("\n")


@pytest.mark.parametrize(
    ("name", "parameter"), NUMBERS, ids=[f"{name} {p.opts[0]}" for name, p in NUMBERS]
)
def test_each_number_out_of_range_is_told_by_its_option(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    parameter: click.Parameter,
) -> None:
    """Whichever part of the library refuses it, the user reads the option and the value."""
    monkeypatch.chdir(tmp_path)
    option = max(parameter.opts, key=len)
    words = (*name.split(), *WORDS[name], *BESIDE.get(str(parameter.name), ()), option, "-7")
    assert re.match(rf"{option}: -7(\.0)?; expected ", said(capsys, *words))
    assert not list(tmp_path.iterdir())


SOLVE, SIMULATE = ("solve", *WORDS["solve"]), ("simulate", *WORDS["simulate"])
NO_EFFECT: list[tuple[tuple[str, ...], str]] = [
    ((*SIMULATE, "--half-life", "5"), "--half-life: has no effect without --migrate; leave it out"),
    ((*SIMULATE, "--migrate-every", "300"), "--migrate-every: has no effect without --migrate"),
    ((*SIMULATE, "--migrate-solver", "exact"), "--migrate-solver: has no effect without --migr"),
    (
        (*SIMULATE, "--migrate", "prism", "--statistics", "cumulative", "--half-life", "5"),
        "--half-life: has no effect with cumulative --statistics",
    ),
    ((*SIMULATE, "--timeout", "5"), "--timeout: has no effect without --lose; leave it out"),
    ((*SIMULATE, "--request-timeout", "5"), "--request-timeout: has no effect without --lose"),
    (
        (*SIMULATE, "--sweep", "seed=1", "-o", "o.csv", "--lose", "edge-0@5"),
        "--lose: not in a sweep (--sweep)",
    ),
    (
        (*SIMULATE, "--lose", "edge-0@5", "--migrate", "prism"),
        "--lose: servers are lost while --migrate prism moves experts; expected no reviews",
    ),
    ((*SIMULATE, "--jobs", "2"), "--jobs: has no effect without --sweep"),
    ((*SIMULATE, "--backend", "dask"), "--backend: has no effect without --sweep"),
    ((*SIMULATE, "--scheduler", "h:1"), "--scheduler: has no effect without --sweep"),
    (
        (*SIMULATE, "--sweep", "seed=1", "--backend", "ray", "--scheduler", "h:1", "--jobs", "2"),
        "--jobs: has no effect with --scheduler",
    ),
    (
        (*SIMULATE, "--sweep", "seed=1", "--scheduler", "h:1"),
        "--scheduler: has no effect with the --backend processes",
    ),
    ((*SIMULATE, "--requests", "2", "--duration", "5"), "--requests: 2 with --duration, which"),
    (
        (*SIMULATE, "--sweep", "seed=1", "-o", "o.csv", "--phases", "f.toml"),
        "--phases: not in a sweep (--sweep)",
    ),
    ((*SIMULATE, "--per-request", "r.csv"), "--per-request: 'r.csv'; expected the name of a .par"),
    ((*SIMULATE, "--per-request", "-"), "--per-request: '-'; expected the name of a .parquet"),
    ((*SOLVE, "--solver", "uniform", "--backend", "cbc"), "--backend: has no effect on solver 'u"),
    (
        (*SOLVE, "--solver", "exact", "--time-limit", "5"),
        "--time-limit: has no effect on solver 'e",
    ),
    ((*SIMULATE, "--prompt-tokens", "5"), "--prompt-tokens: has no effect on tiny-mixtral.parquet"),
    (
        (*SIMULATE, "--sweep", "seed=1", "-o", "o.csv", "--prompt-tokens", "5"),
        "--prompt-tokens: has no effect on tiny-mixtral.parquet",
    ),
    (
        (*SIMULATE, "--migrate", "partial", "--migrate-solver", "exact"),
        "--migrate-solver: has no effect on policy partial, only on prism",
    ),
    ((*SOLVE, "--json", "--format", "csv"), "--format: has no effect with --json"),
    (("compare", *WORDS["compare"], "--backend", "cbc"), "--backend: has no effect without"),
    (("compare", TRACE, *TINY, "--solvers", " ,,"), "--solvers: ' ,,' names no solver; expected"),
    (("check", TRACE, "--json", "--format", "table"), "--format: has no effect with --json"),
    (
        ("profile", "x", "--format", "esft", "--dtype", "auto", "-o", "o.parquet"),
        "--dtype: has no effect with --format esft",
    ),
    (
        (*SIMULATE, "-o", "./r.parquet", "--per-request", "r.parquet"),
        "--per-request: r.parquet: the report and the table would be one file",
    ),
    ((*SIMULATE[:-2], "p.json", "--min-replicas", "2"), "--min-replicas: has no effect without"),
]


@pytest.mark.parametrize(("words", "line"), NO_EFFECT, ids=[line for _, line in NO_EFFECT])
def test_options_without_effect_are_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    line: str,
) -> None:
    """An option that would change nothing beside the others is named, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert said(capsys, *words).startswith(line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--max-prompt-tokens", "0"), "--max-prompt-tokens: given with a file of requests"),
        (("--journal", "j"), "--journal: "),
        (("--secret-file", "s", "--insecure"), "--insecure: has no effect with --secret-file"),
        (("--migrate", "prism"), "--migrate: prism needs to know the links; expected --cluster"),
        (("--horizon", "5"), "--horizon: has no effect without --migrate"),
        (("--trace", "t"), "--trace: has no effect without reviews, --migrate"),
        (("--threads", "0"), "--threads: 0; expected a whole number from 1 to 1,024"),
    ],
    ids=str,
)
def test_options_of_the_runtime(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    """The runtime's commands have the same boundary: parameters become their options."""
    serve = ("serve", "--placement", "p", "--checkpoint", "d", "--requests", "r", "--server", "a")
    arguments = [*serve, *words]
    assert run_command(runtime_cli, "tool", program="tool", arguments=arguments) == 2
    assert capsys.readouterr().err.startswith(f"tool: {line}")
