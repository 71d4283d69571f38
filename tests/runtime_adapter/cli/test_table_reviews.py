"""Reviews that change where layers execute, in runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.execution_table import executes_at_home
from prism_plan.instance import Instance
from prism_plan.io.placement import read_placement, write_placement
from prism_plan.solvers import solve
from tests.runtime_adapter.checkpoints import TRACES
from tests.runtime_adapter.cli.test_move import called
from tests.runtime_adapter.cli.test_move_while_serving import two_servers
from tests.runtime_adapter.cli.test_serve import alone, lines
from tests.runtime_adapter.moe.test_placed_experts import TASKS, instance
from tests.runtime_adapter.replays import Material, Replays, cluster_text
from tests.runtime_adapter.servers import Servers


def test_a_review_begins_a_table(tmp_path: Path) -> None:
    """Replay with solver `latency`: a move pays, its table begins, and later reviews know it.

    Servers tell the calls of each home, also those that they make for the layers of others.
    """
    material = Material(tmp_path, cluster_text(3, slots=9, interval_s=0.1))
    write_placement(
        tmp_path / "a.json", solve(Instance.build(material.trace, material.cluster), "exact")
    )
    options = [
        *("--migrate", "prism", "--migrate-solver", "latency", "--migrate-every", "1.5"),
        *("--horizon", "600", "--requests", "200", "--placements-dir", "out"),
    ]
    with Replays(material, "a.json", *options) as run:
        assert set(run.wait().values()) == {0}, [run.errors(name) for name in run.names]
        stats = [run.stats(name) for name in run.names]
    assert sum(counted["failed"] for counted in stats) == 0
    assert sum(counted["calls"] for counted in stats) == called(material, 200)
    reviews = stats[0]["migrations"]
    moves = [review for review in reviews if review["finished_at_s"] is not None]
    assert moves[0]["saving_s"] > moves[0]["cost_s"] > 0
    first = read_placement(tmp_path / "out" / "placement-1.json")
    assert first.plan.solver == "latency"
    assert not executes_at_home(first.execution_table)
    assert sum(counted["hops"] for counted in stats) > 0
    told = sum(server["calls"] for review in reviews for server in review["servers"])
    assert 0 < told <= called(material, 200)
    after = [review for review in reviews if review["at_s"] > moves[0]["finished_at_s"]]
    assert all(server["calls"] > 0 for server in after[0]["servers"])


def test_tokens_while_reviews_change_tables(tmp_path: Path) -> None:
    """`serve --migrate prism --migrate-solver latency --trace`: every token stays right."""
    start = solve(instance("deepseek-v2", 2), "uniform")
    (tmp_path / "cluster.toml").write_text(two_servers())
    run = Servers(
        tmp_path, start, "tiny-deepseek-v2", "--dtype", "float32", "--max-new-tokens", "10",
        "--cluster", "cluster.toml", "--migrate", "prism", "--migrate-solver", "latency",
        "--trace", str(TRACES / "tiny-deepseek-v2.parquet"), "--migrate-every", "1.5",
        "--horizon", "600", "--placements-dir", "out",
    )  # fmt: skip
    prompts = {name: lines()[TASKS[n]] for n, name in enumerate(start.servers)}

    def ask_all(number: int) -> None:
        for name in start.servers:
            run.ask(name, {**prompts[name][number % len(prompts[name])], "id": number})
        run.until(lambda: all(len(run.answers(name)) > number for name in start.servers))

    reached = tmp_path / "out" / "placement-1.json"
    with run:
        for name in start.servers:
            run.start(name, None)
        number = 0
        while not reached.exists():  # reviews go by what is asked for
            ask_all(number)
            number += 1
        run.until(lambda: any("is done" in line for line in run.said(start.servers[0])))
        for more in range(number, number + 4):
            ask_all(more)
        for name in start.servers:
            run.finish(name)
        assert set(run.codes().values()) == {0}, [run.errors(name) for name in start.servers]
    for name in start.servers:
        for answer in run.answers(name):
            assert answer["error"] is None
            prompt = prompts[name][answer["id"] % len(prompts[name])]["prompt"]
            assert answer["tokens"] == alone("deepseek-v2", prompt)
    assert not executes_at_home(read_placement(reached).execution_table)
    assert sum(run.stats(name)["hops"] for name in start.servers) > 0
