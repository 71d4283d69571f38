"""``solve --solver latency`` as users see it: figures, reasons, options, files, one-line errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prism_plan.cli.plan_texts import plan_texts
from prism_plan.io.placement import read_placement
from prism_plan.io.trace_writer import write_trace
from tests.cli.test_commands import SPEC
from tests.profiling.synthetic import synthetic_trace

Run = Callable[..., CompletedProcess[str]]

#: 44 experts of 0.1 GB fit beside dense parts, 42 with the caches, where 32 are needed.
CLUSTER = """\
name = "edge"
[link]
bandwidth_mbps = 500
rtt_ms = 1.0
[[server]]
name = "edge-0"
arrival_interval_s = 10.0
kv_tokens = 1000
tasks = { x = 1.0 }
[[server.gpu]]
memory_gb = 1.6
memory_bandwidth_gbs = 300
[[server]]
name = "edge-1"
arrival_interval_s = 10.0
kv_tokens = 1000
tasks = { y = 1.0 }
[[server.gpu]]
memory_gb = 1.6
[[server]]
name = "edge-2-with-a-long-name"
arrival_interval_s = 10.0
kv_tokens = 1
tasks = { x = 0.5, y = 0.5 }
[[server.gpu]]
memory_gb = 1.5
[[server.gpu]]
memory_gb = 1.2
"""
LATENCY = ("solve", "t.parquet", "--cluster", "c.toml", "--solver", "latency")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a trace t.parquet, its model m.json and a cluster c.toml."""
    spec = dataclasses.replace(
        SPEC, moe_layers=(1, 2, 3, 4), hidden_size=2048, kv_bytes_per_token=20_000,
        num_decoder_layers=5,
    )  # fmt: skip
    write_trace(tmp_path / "t.parquet", synthetic_trace(spec, ["x", "y"], requests=4, seed=1))
    (tmp_path / "m.json").write_text(json.dumps(spec.to_json()))
    (tmp_path / "c.toml").write_text(CLUSTER)
    return tmp_path


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.long)])
def test_what_is_printed(
    prism_plan: Run, here: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Figures for users first; a table within the window with whole names; reason and bounds.

    The table's last column has the layers that a server executes by the file.
    """
    monkeypatch.setenv("COLUMNS", str(columns))
    result = prism_plan(*LATENCY, "-o", "p.json", cwd=here)
    assert result.returncode == 0, result.stderr
    title, *table = result.stdout.splitlines()
    assert title.startswith("latency: 0.")
    for text in ("s a request, first token ", " tokens/s; ", "of calls are remote (heuristic"):
        assert text in title
    assert max(map(len, table)) <= columns
    executed = read_placement(here / "p.json").execution_table
    for n, name in enumerate(("edge-0", "edge-1", "edge-2-with-a-long-name")):
        (line,) = (line for line in table if line.split()[:1] == [name])
        spans = line.partition("%")[2].replace(",", " ").split()
        told = {
            layer
            for first, _, last in (span.partition("-") for span in spans)
            for layer in range(int(first), int(last or first) + 1)
        }
        assert told == set((np.flatnonzero((executed == n).any(axis=0)) + 1).tolist())
    said = result.stderr.splitlines()
    assert all(line.startswith("prism-plan: ") for line in said)
    plan = json.loads((here / "p.json").read_text())["plan"]
    assert f"prism-plan: {plan['reason']}" in said
    assert plan["busiest_share"] < 1
    assert "overloaded: " not in result.stderr
    bounds = next(line for line in said if "ower bounds without queues: " in line)
    whole_s = max(plan["latency_bound_s"], plan["whole_layers_bound_s"])
    assert f"{plan['latency_bound_s']:.3g} s for any plan" in bounds
    assert f"{whole_s:.3g} s for whole layers" in bounds


def test_files_are_valid(prism_plan: Run, here: Path) -> None:
    """The plan passes `check` with the trace and with the model; `-o -` writes JSON and no more.

    KV caches lie where layers execute, and the file has what each server keeps.
    """
    result = prism_plan(*LATENCY, "-o", "-", cwd=here)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["version"] == 2
    assert values["kv_tokens"] == {"edge-0": 1000, "edge-1": 1000, "edge-2-with-a-long-name": 1}
    assert values["plan"]["objective"] == "latency"
    (here / "p.json").write_text(result.stdout)
    for known in (("--trace", "t.parquet"), ("--model", "m.json")):
        checked = prism_plan("check", "p.json", "--cluster", "c.toml", *known, cwd=here)
        assert checked.returncode == 0, checked.stderr
        assert "p.json: ok" in checked.stdout
    checked = prism_plan("check", "c.toml", "--model", "m.json", "--placement", "p.json", cwd=here)
    assert checked.returncode == 0, checked.stderr


def test_heads(prism_plan: Run, here: Path) -> None:
    """Users of one home: the plan is theirs, fits the whole cluster, and says whose it is.

    Caches of the others stay reserved; `check` counts remote calls of the same users.
    """
    result = prism_plan(
        *LATENCY, "--heads", "edge-0", "--heads", "edge-0", "-o", "h.json", cwd=here
    )
    assert result.returncode == 0, result.stderr
    placement = read_placement(here / "h.json")
    assert placement.plan.extra["heads"] == ["edge-0"]
    assert placement.execution_table[1].tolist() == [1] * 4
    assert placement.execution_table[2].tolist() == [2] * 4
    checked = prism_plan("check", "h.json", "--cluster", "c.toml", "--trace", "t.parquet", cwd=here)
    assert checked.returncode == 0, checked.stderr
    values = json.loads((here / "h.json").read_text())
    for heads in (["nobody"], [["edge-0"]]):
        values["plan"]["heads"] = heads
        (here / "wrong.json").write_text(json.dumps(values))
        wrong = prism_plan(
            "check", "wrong.json", "--cluster", "c.toml", "--trace", "t.parquet", cwd=here
        )
        assert wrong.returncode == 3
        assert "plan.heads: " in wrong.stderr.splitlines()[0]


def test_near_an_existing_placement(prism_plan: Run, here: Path) -> None:
    """At a price without end nothing is loaded; the file tells the unit of the price."""
    assert prism_plan(*LATENCY, "--whole-layers", "-o", "old.json", cwd=here).returncode == 0
    result = prism_plan(
        *LATENCY, "--from", "old.json", "--load-price", "1e9", "-o", "new.json", cwd=here
    )
    assert result.returncode == 0, result.stderr
    assert "0 experts to load" in result.stderr
    assert "in calls and loads together" not in result.stdout
    old, new = (read_placement(here / name) for name in ("old.json", "new.json"))
    assert (old.on_gpu == new.on_gpu).all()
    assert (old.local.any(axis=2) == old.local.all(axis=2)).all()
    assert new.plan.extra["load_price_unit"] == "seconds of a mean request a GiB"


def test_where_servers_are_faster_without_a_plan(prism_plan: Run, here: Path) -> None:
    """A server that holds everything, behind a link of 0.1 Mbit/s, is told."""
    text = CLUSTER.replace("bandwidth_mbps = 500", "bandwidth_mbps = 0.1")
    (here / "c.toml").write_text(text.replace("memory_gb = 1.2", "memory_gb = 3.0"))
    result = prism_plan(*LATENCY, "-o", "p.json", cwd=here)
    assert result.returncode == 0, result.stderr
    told = "faster without the plan: edge-2-with-a-long-name for all"
    assert any(told in line for line in result.stderr.splitlines())


def test_an_overloaded_cluster_is_told(prism_plan: Run, here: Path) -> None:
    """Requests come faster than they are answered: what is overloaded, and that queues grow."""
    (here / "c.toml").write_text(CLUSTER.replace("10.0", "0.01"))
    result = prism_plan(*LATENCY, "-o", "p.json", cwd=here)
    assert result.returncode == 0, result.stderr
    plan = json.loads((here / "p.json").read_text())["plan"]
    assert plan["busiest_share"] >= 1
    (told,) = (line for line in result.stderr.splitlines() if "overloaded: " in line)
    assert plan["busiest"] in told


@pytest.mark.parametrize(
    ("share", "word"),
    [(0.79, None), (0.8, "near its limit"), (0.99, "near its limit"), (1.0, "overloaded")],
)
def test_near_the_limit_is_told(share: float, word: str | None) -> None:
    """From 80 % on: means of few requests are too low there, for queues grow for long."""
    extra = {"busiest": "gpu[0] of a", "busiest_share": share}
    placement: Any = SimpleNamespace(plan=SimpleNamespace(extra=extra))
    told = list(plan_texts(placement, None))
    assert [text.partition(":")[0] for text in told] == ([] if word is None else [word])
    assert all("gpu[0] of a would be busy for " in text for text in told)


def test_bursts_are_told_in_place_of_bounds(prism_plan: Run, here: Path) -> None:
    """With `burst_kb` no figure of the formula, which leaves bursts out; one line says so.

    The same where rates are not known, and nothing can be simulated.
    """
    bursts = CLUSTER.replace("rtt_ms = 1.0", "rtt_ms = 1.0\nburst_kb = 100")
    weights = bursts.replace("arrival_interval_s = 10.0", "weight = 1.0")
    for text, said in (
        (bursts, "short simulations chose the plan"),
        (weights, "chosen as if there were none"),
    ):
        (here / "c.toml").write_text(text)
        result = prism_plan(*LATENCY, "-o", "p.json", cwd=here)
        assert result.returncode == 0, result.stderr
        for word in ("by the formula", "ower bounds without", "saves"):
            assert word not in result.stderr
        (line,) = (line for line in result.stderr.splitlines() if "(burst_kb)" in line)
        assert said in line
    assert " s a request on an idle cluster without bursts" in result.stdout


def test_one_server_that_holds_everything_is_no_faster_without_a_plan(
    prism_plan: Run, here: Path
) -> None:
    """What differs by rounding alone is not called faster."""
    head, _, rest = CLUSTER.partition("[[server]]")
    alone = rest.partition("[[server]]")[0].replace("1.6", "9.0")
    (here / "c.toml").write_text(f"{head}[[server]]{alone}")
    result = prism_plan(*LATENCY, "-o", "p.json", cwd=here)
    assert result.returncode == 0, result.stderr
    assert "faster without" not in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--heads", "edge0"), 2, "--heads: 'edge0', did you mean 'edge-0'?; expected servers"),
        (("--execution", "paths"), 2, "--execution: solver 'latency' plans by itself"),
        (("--time-limit", "0"), 2, "--time-limit: 0.0; expected seconds above 0"),
        (("--load-price", "1"), 2, "--load-price: a price without a placement to stay near"),
        (("--min-replicas", "2"), 3, "c.toml: infeasible: coverage: 32 experts with 2 replicas"),
        (("--from", "t.parquet"), 2, "t.parquet: "),
        (("--solver", "exact", "--heads", "edge-0"), 2, "--heads: has no effect on solver 'exact'"),
    ],
)
def test_errors_are_one_line(
    prism_plan: Run, here: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    """With the option or file, the value and the remedy; no placement is written."""
    result = prism_plan(*LATENCY, *options, "-o", "p.json", cwd=here)
    assert (result.returncode, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"prism-plan: {said}")
    assert not (here / "p.json").exists()


def test_caches_that_fit_nowhere(prism_plan: Run, here: Path) -> None:
    """Exit code 3 with the server and its bytes."""
    (here / "c.toml").write_text(CLUSTER.replace("kv_tokens = 1000", "kv_tokens = 100000"))
    result = prism_plan(*LATENCY, "-o", "p.json", cwd=here)
    assert (result.returncode, result.stdout) == (3, "")
    (line,) = result.stderr.splitlines()
    assert "server 'edge-0' gpu[0]: 1,600,000,000 usable bytes do not hold" in line
    assert "lower kv_tokens" in line
