"""What a user sees: the installed command, its files, its output, its exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest

from prism_plan.cli.main import COMMANDS, cli
from prism_plan.evaluate.comparison import DEFAULT_SOLVERS
from prism_plan.io.placement import placement_schema, read_placement
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.solvers import ALL_SOLVERS, SOLVER_NAMES
from tests.profiling.synthetic import synthetic_trace

Run = Callable[..., CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=8,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100_000_000,
    dense_bytes=500_000_000,
    kv_bytes_per_token=0,
)
CLUSTER = """
name = "small"
[[server]]
name = "a"
arrival_interval_s = 10.0
tasks = { x = 0.75, y = 0.25 }
[[server.gpu]]
memory_gb = 1.5
[[server]]
name = "b"
arrival_interval_s = 5.0
tasks = { y = 1.0 }
[[server.gpu]]
memory_gb = 1.0
[[server.gpu]]
memory_gb = 0.5
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a trace t.parquet and a cluster c.toml."""
    write_trace(tmp_path / "t.parquet", synthetic_trace(SPEC, ["x", "y"], requests=4, seed=1))
    (tmp_path / "c.toml").write_text(CLUSTER)
    return tmp_path


def strip_times(text: str) -> str:
    """A placement without its time field."""
    return re.sub(r'"runtime_s": [^,\n]+', '"runtime_s": 0', text)


@pytest.mark.parametrize("solver", [*SOLVER_NAMES, "ilp-cbc"])
def test_standard_output_is_json_alone(prism_plan: Run, here: Path, solver: str) -> None:
    """`-o -` writes a valid placement and nothing else to standard output, with every back end."""
    name, _, backend = solver.partition("-cbc")
    options = ["--backend", "cbc"] if backend or solver.endswith("-cbc") else []
    result = prism_plan(
        "solve", "t.parquet", "--cluster", "c.toml", "--solver", name, "-o", "-", *options, cwd=here
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["plan"]["solver"] == name
    assert values["format"] == placement_schema()["properties"]["format"]["const"]


@pytest.mark.parametrize("solver", ["redundance", "exact"])
def test_same_seed_same_bytes(prism_plan: Run, here: Path, solver: str) -> None:
    """Two runs give the same file but for its time; another seed may not."""
    texts = []
    for name in ("one.json", "two.json"):
        result = prism_plan(
            "solve", "t.parquet", "--cluster", "c.toml", "--solver", solver, "--seed", "3",
            "-o", name, cwd=here,
        )  # fmt: skip
        assert result.returncode == 0
        texts.append(strip_times((here / name).read_text()))
    assert texts[0] == texts[1]


def test_the_main_job(installed_prism_plan: Run, here: Path) -> None:
    """Solve, check, compare, diff and plot lead from a trace to proven placements and pictures."""
    prism_plan = installed_prism_plan
    common = ("t.parquet", "--cluster", "c.toml")
    for solver in ("prism", "exact"):
        result = prism_plan("solve", *common, "--solver", solver, "-o", f"{solver}.json", cwd=here)
        assert (result.returncode, result.stderr) == (0, "")
        assert "of calls are remote" in result.stdout
    exact = read_placement(here / "exact.json")
    assert exact.plan.termination == "optimal"
    # 1.5 GB, 1.0 GB and 0.5 GB, less 0.5 GB for the dense part on each server's first GPU
    assert exact.gpu_capacity == ((10,), (5, 5))

    checked = prism_plan(
        "check", "t.parquet", "c.toml", "exact.json", "--cluster", "c.toml", "--trace",
        "t.parquet", "--json", cwd=here,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert [report["valid"] for report in json.loads(checked.stdout)] == [True] * 3

    compared = prism_plan(
        "compare", *common, "prism.json", "--holdout", "0.5", "--json", "-o", "r.json", cwd=here
    )
    assert compared.returncode == 0, compared.stderr
    rows = json.loads(compared.stdout)["rows"]
    assert [row["name"] for row in rows] == [*DEFAULT_SOLVERS, "prism.json"]
    assert json.loads((here / "r.json").read_text())["rows"] == rows

    moved = prism_plan("diff", "prism.json", "exact.json", "--json", cwd=here)
    assert moved.returncode == 0
    total = json.loads(moved.stdout)
    assert total["moved_bytes"] == 100_000_000 * (total["loads"] + total["shifts"])

    for kind, source in (
        ("heatmap", "t.parquet"),
        ("entropy", "t.parquet"),
        ("placement", "exact.json"),
        ("comparison", "r.json"),
    ):
        drawn = prism_plan("plot", kind, source, "-o", f"{kind}.png", cwd=here)
        assert (drawn.returncode, drawn.stderr) == (0, "")
        assert (here / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_tables_for_people(prism_plan: Run, here: Path) -> None:
    """Without --json, compare and diff print tables with every row and a total."""
    common = ("t.parquet", "--cluster", "c.toml")
    compared = prism_plan("compare", *common, "--solvers", "prism,exact", cwd=here)
    assert re.search(r"^ ?exact .*best", compared.stdout, re.MULTILINE)
    for solver in ("uniform", "exact"):
        prism_plan("solve", *common, "--solver", solver, "-o", f"{solver}.json", cwd=here)
    moved = prism_plan("diff", "uniform.json", "exact.json", cwd=here)
    assert re.search(r"^ ?total ", moved.stdout, re.MULTILINE)


def test_plan_near(prism_plan: Run, here: Path) -> None:
    """--from with a high price loads nothing; the file tells price and loads."""
    common = ("t.parquet", "--cluster", "c.toml")
    prism_plan("solve", *common, "--solver", "uniform", "-o", "old.json", cwd=here)
    result = prism_plan(
        "solve", *common, "--from", "old.json", "--load-price", "1e9", "-o", "new.json", cwd=here
    )
    assert result.returncode == 0, result.stderr
    values = json.loads((here / "new.json").read_text())
    assert values["plan"]["loads"] == 0
    assert values["servers"] == json.loads((here / "old.json").read_text())["servers"]


def test_exit_codes(prism_plan: Run, here: Path) -> None:
    """2 for bad input, 3 for infeasible, also as check finds it; one line each."""
    common = ("t.parquet", "--cluster", "c.toml")
    bad = prism_plan("solve", *common, "--solver", "exakt", "-o", "p.json", cwd=here)
    assert bad.returncode == 2
    assert "unknown solver 'exakt', did you mean 'exact'?" in bad.stderr
    full = prism_plan("solve", *common, "--min-replicas", "2", "-o", "p.json", cwd=here)
    assert full.returncode == 3
    assert "short by 12 slots" in full.stderr
    prism_plan("solve", *common, "-o", "p.json", cwd=here)
    values = json.loads((here / "p.json").read_text())
    values["servers"][0]["gpus"][0]["slots"] = 1
    (here / "p.json").write_text(json.dumps(values))
    broken = prism_plan("check", "p.json", cwd=here)
    assert broken.returncode == 3
    for result in (bad, full, broken):
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("prism-plan: ")


def test_a_limit_without_a_placement(prism_plan: Run, tmp_path: Path) -> None:
    """The time limit ends a long ilp with exit code 4, one line, and no file."""
    sizes = tuple(90_000_000 + 1_234_567 * layer for layer in range(24))
    spec = dataclasses.replace(
        SPEC, moe_layers=tuple(range(24)), num_decoder_layers=24, num_experts=64, expert_bytes=sizes
    )
    write_trace(tmp_path / "t.parquet", synthetic_trace(spec, ["x", "y"], requests=1))
    (tmp_path / "c.toml").write_text(re.sub(r"memory_gb = \S+", "memory_gb = 90", CLUSTER))
    result = prism_plan(
        "solve", "t.parquet", "--cluster", "c.toml", "--solver", "ilp", "--time-limit", "0.001",
        "-o", "p.json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 4, result.stderr
    assert "found no placement within 0.001 s" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml", "t.parquet"]


def test_profile_counts(prism_plan: Run, tmp_path: Path) -> None:
    """Two labelled tables make one trace; the provenance tells tool and files."""
    (tmp_path / "model.json").write_text(json.dumps(SPEC.to_json()))
    for name, scale in (("one", 1), ("two", 3)):
        rows = [
            f"{layer},{expert},{scale * (expert + 1)}" for layer in (1, 2) for expert in range(8)
        ]
        (tmp_path / f"{name}.csv").write_text("layer,expert,count\n" + "\n".join(rows) + "\n")
    result = prism_plan(
        "profile", "--format", "counts", "--model", "model.json", "x=one.csv", "y=two.csv",
        "-o", "t.parquet", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    trace = read_trace(tmp_path / "t.parquet")
    assert trace.tasks == ("x", "y")
    assert trace.tokens.tolist() == [18, 54]
    assert trace.counts[1, 0].tolist() == [3 * (e + 1) for e in range(8)]
    assert trace.provenance["source"] == "counts"


def commands() -> dict[str, click.Command]:
    """All commands with their full names."""
    context = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": c for sub, c in command.commands.items()}
        else:
            found[name] = command
    return found


def test_every_command_and_option_is_documented() -> None:
    """The README names each command and each option; each has a help text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, command in commands().items():
        assert f"`{name}" in readme or f"{name} " in readme, name
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert any(option in readme for option in parameter.opts), (name, parameter.opts)


def test_readme_tells_the_truth_about_solvers() -> None:
    """The README's table has a row for each solver, with nothing about one that is not there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| `--solver` |")[2].partition("\n\n`exact`, `ilp`")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == list(ALL_SOLVERS)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(prism_plan: Run, name: str) -> None:
    """--help works everywhere, and the group's lists every command."""
    result = prism_plan(*name.split(), "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: prism-plan {name}".rstrip())
    if not name:
        assert all(command in result.stdout for command in COMMANDS)


def test_a_placement_that_has_seen_what_is_held_out_is_named(prism_plan: Run, here: Path) -> None:
    """With --holdout compare and simulate say which placements were planned on the whole trace."""
    common = ("--cluster", "c.toml")
    prism_plan("solve", "t.parquet", *common, "-o", "p.json", cwd=here)
    told = "p.json: planned on all of t.parquet"
    for words in (
        ("compare", "t.parquet", "p.json", *common, "--solvers", "exact"),
        ("simulate", "p.json", "--trace", "t.parquet", *common, "--requests", "2"),
    ):
        assert told not in prism_plan(*words, cwd=here).stderr
        held = prism_plan(*words, "--holdout", "0.5", cwd=here)
        assert held.returncode == 0, held.stderr
        assert held.stderr.count(told) == 1


def test_a_backend_for_windows_is_not_needed(
    prism_plan: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure goes to a file whatever MPLBACKEND says: a shell may export a notebook's."""
    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    result = prism_plan("plot", "heatmap", "t.parquet", "-o", "f.png", cwd=here)
    assert result.returncode == 0, result.stderr
    assert (here / "f.png").stat().st_size > 0
