"""``--execution paths`` and placements with a table, as a user meets them."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest

from prism_plan.io.trace_reader import read_trace
from tests.conftest import ROOT
from tests.limits import HANG_S
from tests.warm_processes import run_warm

TRACE = ROOT / "traces" / "tiny-mixtral.parquet"
#: A slow server whose users gain by the fast one beside it, over a fast link.
SERVERS = """
[link]
bandwidth_mbps = 100000
rtt_ms = 0.01
call_overhead_ms = 0.001
[[server]]
name = "slow"
arrival_interval_s = 10.0
tasks = { TASK = 1.0 }
[[server.gpu]]
slots = SLOTS
memory_bandwidth_gbs = 1
tflops = 0.1
[[server]]
name = "fast"
[[server.gpu]]
slots = SLOTS
"""
CLUSTER = "c.toml"


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_warm([str(argument) for argument in arguments], cwd=folder, timeout_s=HANG_S)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``home.json`` and ``paths.json``, one placement of experts."""
    folder = tmp_path_factory.mktemp("execution")
    trace = read_trace(TRACE)
    text = SERVERS.replace("TASK", trace.tasks[0])
    (folder / CLUSTER).write_text(text.replace("SLOTS", str(trace.model.num_pairs * 3 // 4)))
    (folder / "model.json").write_text(json.dumps(trace.model.to_json()))
    # room for three quarters of the experts beside the caches of one user group, not of two
    size = trace.model.expert_bytes_by_layer[0]
    kept = 5 * size // trace.model.kv_bytes_per_token
    memory = trace.model.dense_bytes + (trace.model.num_pairs * 3 // 4 + 5) * size
    text = text.replace("slots = SLOTS", f"memory_gb = {memory / 1e9:.9f}")
    (folder / "memory.toml").write_text(
        text.replace("arrival_interval_s", f"kv_tokens = {kept}\narrival_interval_s")
    )
    for execution in ("home", "paths"):
        done = run(
            "solve", TRACE, "--cluster", CLUSTER, "--solver", "layer-partition",
            "--execution", execution, "-o", f"{execution}.json", folder=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def test_solve_writes_a_table(planned: Path) -> None:
    """The same experts on the same GPUs; the file says who executes what, in version 2."""
    home, paths = (json.loads((planned / f"{name}.json").read_text()) for name in ("home", "paths"))
    assert (home["version"], paths["version"]) == (1, 2)
    assert paths["servers"] == home["servers"]
    assert set(paths["execution"]) == {server["name"] for server in home["servers"]}
    assert paths["plan"]["solver"] == "layer-partition+paths"
    assert "assumed" not in home["plan"]
    assert "launch_overhead_us 20" in " ".join(paths["plan"]["assumed"])


def test_check_diff_and_plot_know_the_table(planned: Path) -> None:
    """`check` names the version, `diff` the layers elsewhere, and a figure is drawn."""
    checked = run("check", "paths.json", "--cluster", CLUSTER, "--trace", TRACE, folder=planned)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "version 2: layers of" in checked.stdout
    found = run("diff", "home.json", "paths.json", "--json", folder=planned)
    servers = json.loads(found.stdout)["servers"]
    assert sum(len(server["reroutes"]) for server in servers) > 0
    assert json.loads(found.stdout)["moved_bytes"] == 0
    table = run("diff", "home.json", "paths.json", "--format", "csv", folder=planned)
    assert "layers_elsewhere" in table.stdout
    assert run("plot", "placement", "paths.json", "-o", "p.png", folder=planned).returncode == 0


def test_simulate_and_compare_use_the_table(planned: Path) -> None:
    """A file and a solver with paths give the same run; hops are reported, and fewer calls."""
    done = run(
        "simulate", "home.json", "paths.json", "--trace", TRACE, "--cluster", CLUSTER,
        "--solvers", "layer-partition+paths", "--requests", 5, "-o", "s.json", folder=planned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    home, paths, again = json.loads((planned / "s.json").read_text())["runs"]
    assert "hops" not in home
    assert paths["hops"] == again["hops"] > 0
    assert paths["latency_s"] == again["latency_s"]
    assert paths["latency_s"]["mean"] < home["latency_s"]["mean"]
    assert run("check", "s.json", folder=planned).returncode == 0
    scored = run(
        "compare", TRACE, "--cluster", CLUSTER, "--solvers", "layer-partition+paths", "home.json",
        "paths.json", "--json", folder=planned,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    rows = {row["name"]: row for row in json.loads(scored.stdout)["rows"]}
    assert rows["paths.json"]["remote_share"] == rows["layer-partition+paths"]["remote_share"]
    assert rows["paths.json"]["remote_share"] <= rows["home.json"]["remote_share"]


def test_reviews_plan_tables_and_keep_them(planned: Path) -> None:
    """A review weighs a table by its communication; `partial` keeps that of its plan.

    Here the table pays by a faster GPU alone, and its messages cost more than remote calls.
    """
    common = ("--trace", TRACE, "--cluster", CLUSTER, "--requests", 20, "--migrate-every", 40)
    done = run(
        "simulate", "home.json", *common, "--migrate", "prism", "--horizon", 1e5,
        "--migrate-solver", "layer-partition+paths", "-o", "r.json", folder=planned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((planned / "r.json").read_text())
    assert report["review"]["solver"] == "layer-partition+paths"
    (stays,) = report["runs"]
    assert len(stays["migrations"]) > 0
    assert all(review["decision"] == "stay" for review in stays["migrations"])
    assert all(review["saving_s"] < 0 for review in stays["migrations"])
    assert run("check", "r.json", folder=planned).returncode == 0
    done = run(
        "simulate", "paths.json", *common, "--migrate", "partial", "--json", folder=planned
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (kept,) = json.loads(done.stdout)["runs"]
    assert len(kept["migrations"]) > 0
    assert kept["hops"] > 0


def test_migrate_tells_that_the_table_changes(planned: Path) -> None:
    """Equal experts and another table: no steps, the line, and a file that `check` reads."""
    done = run(
        "migrate", "home.json", "paths.json", "--cluster", CLUSTER, "-o", "m.json", folder=planned
    )
    assert done.returncode == 0, done.stderr
    line = "where layers execute changes for requests of slow: for new ones at once\n"
    assert done.stdout.endswith(line)
    values = json.loads((planned / "m.json").read_text())
    assert values["steps"] == []
    paths = json.loads((planned / "paths.json").read_text())
    assert values["table"] == {
        "begins_after": 0, "waits_from": 0, "execution": paths["execution"]
    }  # fmt: skip
    checked = run("check", "m.json", folder=planned)
    assert checked.returncode == 0
    assert "the execution table changes" in checked.stdout
    same = run(
        "migrate", "paths.json", "paths.json", "--cluster", CLUSTER, "--json", folder=planned
    )
    assert "table" not in json.loads(same.stdout)


def test_migrate_beside_the_caches_of_both_tables(planned: Path) -> None:
    """The fast server's new caches need room that its experts have: they leave first."""
    done = run(
        "solve", TRACE, "--cluster", "memory.toml", "--solver", "layer-partition", "-o", "a.json",
        folder=planned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        "solve", TRACE, "--cluster", "memory.toml", "--solver", "layer-partition", "--execution",
        "paths", "-o", "b.json", folder=planned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        "migrate", "a.json", "b.json", "--cluster", "memory.toml", "--model", "model.json",
        "-o", "m.json", folder=planned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((planned / "m.json").read_text())
    begins = values["table"]["begins_after"]
    assert values["table"]["waits_from"] >= begins > 0
    dropped = [step for step in values["steps"][:begins] if step["do"] == "drop"]
    assert len(dropped) >= 5
    assert {step["server"] for step in dropped} == {"fast"}
    assert f"for new ones when the first {begins} steps are complete" in done.stdout


def test_pipeline(planned: Path) -> None:
    """Its plan says what it minimised and how long a request takes, and who executes what.

    `simulate`, `compare` and `check` take the file as they take the solver.
    """
    solve = ("solve", TRACE, "--cluster", CLUSTER, "--solver", "pipeline", "-o", "pipeline.json")
    done = run(*solve, folder=planned)
    assert done.returncode == 0, done.stderr
    assert "s a request, first token " in done.stdout
    assert "executes layers" in done.stdout
    plan = json.loads((planned / "pipeline.json").read_text())["plan"]
    assert (plan["objective"], plan["bound"], plan["remote_share"]) == ("latency", None, 0.0)
    assert 0 < plan["expected_latency_s"] < 10
    summary = json.loads(run(*solve, "--json", folder=planned).stdout)
    executed = {server["server"]: server["executes"] for server in summary["servers"]}
    assert executed["fast"] != ""
    checked = run("check", "pipeline.json", "--cluster", CLUSTER, "--trace", TRACE, folder=planned)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    scored = run(
        "compare", TRACE, "--cluster", CLUSTER, "--solvers", "layer-partition,pipeline",
        "pipeline.json", "--json", "-o", "r.json", folder=planned,
    )  # fmt: skip
    home, solver, file = json.loads(scored.stdout)["rows"]
    assert solver["latency_mean_s"] == file["latency_mean_s"] < home["latency_mean_s"]
    assert run("check", "r.json", folder=planned).returncode == 0


def test_tables_in_sweeps(planned: Path) -> None:
    """A sweep plans with paths and pipelines, and its table is valid."""
    done = run(
        "simulate", "--trace", TRACE, "--cluster", CLUSTER, "--requests", 3, "--sweep",
        "bandwidth_mbps=100,10000", "--sweep", "solver=exact,exact+paths,pipeline", "--jobs", 1,
        "-o", "sweep.csv", folder=planned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (planned / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["exact", "exact+paths", "pipeline"]
    assert sorted(row["solver"] for row in rows) == sorted(names * 2)
    assert {row["status"] for row in rows} == {"ok"}
    assert run("check", "sweep.csv", folder=planned).returncode == 0


def changed_table(planned: Path, name: str, **changes: object) -> str:
    """``paths.json`` with other values of its keys."""
    values = json.loads((planned / "paths.json").read_text()) | changes
    (planned / name).write_text(json.dumps(values))
    return name


def test_bad_tables(planned: Path) -> None:
    """A hole, an unknown server and an unknown version are told with their place, in one line."""
    execution = json.loads((planned / "paths.json").read_text())["execution"]
    last = execution["slow"][-1]["last"]
    for run_of_slow, words in (
        ([{"first": 0, "last": last - 1, "server": "fast"}], f"execution.slow.*{last}"),
        ([{"first": 0, "last": last, "server": "fats"}], "'fats', did you mean 'fast'"),
        ([{"first": 1, "last": last, "server": "fast"}], "execution.slow"),
    ):
        name = changed_table(planned, "bad.json", execution={**execution, "slow": run_of_slow})
        done = run("check", name, folder=planned)
        assert done.returncode == 2
        assert re.search(words, done.stdout + done.stderr), done.stdout + done.stderr
    name = changed_table(planned, "bad.json", version=3)
    done = run("check", name, folder=planned)
    assert done.returncode == 2
    assert "version: 3" in done.stdout + done.stderr


def test_what_a_file_must_not_do(planned: Path) -> None:
    """`check` refuses tables that move layers of execute_at_home, and caches of another size."""
    text = (planned / CLUSTER).read_text()
    (planned / "kept.toml").write_text(
        text.replace('name = "slow"', 'name = "slow"\nexecute_at_home = true')
    )
    given = ("--cluster", "kept.toml", "--trace", TRACE)
    done = run("check", "paths.json", *given, folder=planned)
    assert done.returncode == 3
    assert "'slow' has execute_at_home = true" in done.stderr
    name = changed_table(planned, "huge.json", kv_tokens={"slow": 10**12})
    done = run("check", name, "--cluster", CLUSTER, "--trace", TRACE, folder=planned)
    assert done.returncode == 3
    assert "kv_tokens 1,000,000,000,000 in the placement, 0 in the cluster" in done.stderr


def test_caches_that_fit_nowhere(planned: Path) -> None:
    """Exit code 3, with the server and its bytes, for paths and pipelines alike."""
    text = (planned / CLUSTER).read_text()
    text = re.sub(r"slots = \d+", "memory_gb = 0.02", text)
    text = text.replace('name = "slow"', 'name = "slow"\nkv_tokens = 100000000')
    (planned / "kv.toml").write_text(text)
    for solver, words in (
        (
            "layer-partition",
            "'slow' gpu[0]: 20,000,000 usable bytes do not hold the dense part",
        ),
        ("layer-partition+paths", "'fast' gpu[0]: 20,000,000 usable bytes do not hold the dense"),
        ("pipeline", "holds all 4 layers: they hold 0 whole layers beside the KV caches"),
    ):
        done = run("solve", TRACE, "--cluster", "kv.toml", "--solver", solver, "-o", "x",
                   folder=planned)  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("solve", TRACE, "--cluster", CLUSTER, "--execution", "away", "-o", "x"), "'away'"),
        (
            ("solve", TRACE, "--cluster", CLUSTER, "--solver", "exakt+paths", "-o", "x"),
            "did you mean 'exact+paths'",
        ),
        (
            ("solve", TRACE, "--cluster", CLUSTER, "--solver", "pipeline", "--execution", "paths",
             "-o", "x"),
            "--execution: solver 'pipeline' plans by itself where layers execute",
        ),
        (
            ("solve", TRACE, "--cluster", CLUSTER, "--solver", "exact+paths", "--execution", "home",
             "-o", "x"),
            "--execution: solver 'exact+paths' plans where layers execute",
        ),
        (
            ("compare", TRACE, "--cluster", CLUSTER, "--solvers", ""),
            "--solvers: no solver and no placement",
        ),
        (
            ("compare", TRACE, "--cluster", CLUSTER, "--solvers", "pipeline+paths"),
            "expected pipeline, without +paths",
        ),
        (
            ("compare", TRACE, "--cluster", CLUSTER, "--solvers", "prism", "--requests", -1),
            "--requests: -1",
        ),
        (
            ("simulate", "home.json", "--trace", TRACE, "--cluster", CLUSTER, "--requests", 2,
             "--migrate", "prism", "--migrate-solver", "exakt+paths"),
            "--migrate-solver: 'exakt+paths', did you mean 'exact'?; expected one of uniform",
        ),
        (
            ("simulate", "home.json", "--trace", TRACE, "--cluster", CLUSTER, "--requests", 2,
             "--migrate", "prism", "--migrate-solver", "pipeline"),
            "--migrate-solver: 'pipeline' plans whole layers, whichever of their experts are",
        ),
        (
            ("simulate", "home.json", "--trace", TRACE, "--cluster", CLUSTER, "--requests", 2,
             "--migrate", "prism", "--migrate-solver", "latency+paths"),
            "--migrate-solver: 'latency+paths' plans by itself where layers execute; expected one",
        ),
        (
            ("migrate", "home.json", "paths.json", "--cluster", "memory.toml", "-o", "x"),
            "--model: home.json and paths.json differ in where layers execute, and memory.toml",
        ),
        (
            ("migrate", "home.json", "paths.json", "--cluster", "memory.toml", "-o", "x",
             "--model", "mixtral-8x7b"),
            "mixtral-8x7b",
        ),
    ],
)  # fmt: skip
def test_bad_input(planned: Path, arguments: tuple[object, ...], words: str) -> None:
    """One line, exit code 2, nothing written."""
    done = run(*arguments, folder=planned)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (planned / "x").exists()
