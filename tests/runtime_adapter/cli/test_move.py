"""Experts that move while requests are served: servers as processes, real messages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from prism_plan.check.report import check_file
from prism_plan.instance import Instance
from prism_plan.io.placement import placement_to_json, read_placement
from prism_plan.objective import score
from prism_plan.simulate.sampling import sample_requests
from runtime_adapter.control import move_command
from runtime_adapter.control.move_command import request_move
from runtime_adapter.control.store.client import StoreAddress
from runtime_adapter.transport.rendezvous import RuntimeFailure
from tests.runtime_adapter.replays import (
    PATIENCE_S,
    SPEC,
    Material,
    Replays,
    cluster_text,
    experts_of,
    free_port,
    striped,
)


def asked(run: Replays, placement: Any) -> tuple[int, str]:
    """Ask a run for a placement, as the command does."""
    host, _, port = run.store.rpartition(":")
    return request_move(StoreAddress(host, int(port)), placement_to_json(placement), PATIENCE_S)


def called(material: Material, requests: int) -> int:
    """Expert calls of all requests of a run, counted from the trace."""
    sampled = sample_requests(
        material.trace, material.cluster, requests_per_server=requests, decode_tokens=32
    )
    prompts = sampled.prompts
    tokens = prompts.prefill_tokens[sampled.prompt] + prompts.decode_tokens[sampled.prompt]
    return int(tokens.sum()) * SPEC.num_layers * SPEC.top_k


def test_a_move_while_requests_are_served(tmp_path: Path) -> None:
    """All servers end at exactly the target; every request is served; all calls are counted.

    A placement that the servers cannot hold is refused in one line, and changes nothing.
    """
    material = Material(tmp_path, cluster_text(slots=16))
    material.placement("a.json", striped(4, 0))
    more = striped(4, 1) | (striped(4, 2) & (np.arange(SPEC.num_pairs) < 8))
    target = material.placement("b.json", more)
    number = 150
    options = ["--movable", "--requests", str(number), "--placements-dir", "out"]
    held = more.copy()
    held[:, 5] = False
    material.placement("bad.json", held)
    with Replays(material, "a.json", *options) as run:
        command = run.move("bad.json", "--join", str(PATIENCE_S))
        run.until_served("s0", 3)
        assert len(run.results("s0")) < number  # there is something left to serve as it begins
        code, text = asked(run, target)
        assert code == 0, text
        assert text.startswith("migration 1 is done")
        _, said = command.communicate(timeout=PATIENCE_S)
        assert (command.returncode, said) == (
            2,
            "prism-runtime: bad.json: refused: the placement: servers: layer 1 expert 5 is held "
            "nowhere\n",
        )
        assert run.wait() == {"s0": 0, "s1": 0, "s2": 0}
        stats = [run.stats(name) for name in run.names]
        for name, counted in zip(run.names, stats, strict=True):
            assert counted["gpus"] == experts_of(target, name)
            assert counted["failed"] == 0
            assert len(run.results(name)) == number
            assert all(result["error"] is None for result in run.results(name))
        assert sum(counted["calls"] for counted in stats) == called(material, number)
        # who drops an expert waits until nobody calls it: none was called in vain
        assert sum(counted["retries"] for counted in stats) == 0
    written = read_placement(tmp_path / "out" / "placement-1.json")
    assert (written.on_gpu == target.on_gpu).all()
    assert written.plan.solver == "hand"


def test_reviews_move_what_the_requests_call(tmp_path: Path) -> None:
    """Policy `partial` on counted calls: fewer are remote after it, and its files are sound."""
    material = Material(tmp_path, cluster_text(2, slots=16))
    start = material.placement("a.json", striped(3, 0))
    options = [
        *("--migrate", "partial", "--migrate-every", "0.8", "--horizon", "600"),
        *("--requests", "100", "--placements-dir", "out"),
    ]
    with Replays(material, "a.json", *options) as run:
        assert run.wait() == {"s0": 0, "s1": 0}
        stats = [run.stats(name) for name in run.names]
        said = run.errors("s0")
    assumed = "not given and assumed: memory_bandwidth_gbs 1555, tflops 312, launch_overhead_us 20"
    assert f"prism-runtime: cluster.toml: {assumed} of every GPU" in said
    assert "; call_overhead_ms 0.2 of links\n" in said  # reviews weigh calls by it
    assert sum(counted["failed"] + counted["retries"] for counted in stats) == 0
    assert sum(counted["calls"] for counted in stats) == called(material, 100)
    migrations = stats[0]["migrations"]
    moves = [m for m in migrations if m["decision"] == "move"]
    # only the last one may still have been under way at the end of the run
    finished = [m for m in moves if m["finished_at_s"] is not None]
    assert len(finished) >= max(len(moves) - 1, 1)
    assert all(m["finished_at_s"] >= m["at_s"] for m in finished)
    assert all(m["saving_s"] > m["cost_s"] > 0 for m in moves)
    assert moves[0]["moved_bytes"] == 1_000_000 * moves[0]["moved_experts"] > 0
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == len(finished)
    instance = Instance.build(material.trace, material.cluster)
    for path in files:
        assert not check_file(path).problems
        assert str(path.relative_to(tmp_path)) in said
    last = read_placement(tmp_path / "out" / f"placement-{len(files)}.json")
    assert last.plan.solver == "partial"
    if finished == moves:
        assert [s["gpus"] for s in stats] == [experts_of(last, name) for name in run.names]
    assert score(last, instance).share < score(start, instance).share
    # each server told its calls at each review
    told = sum(server["calls"] for m in migrations for server in m["servers"])
    assert 0 < told <= called(material, 100)


def test_servers_that_are_killed_while_experts_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server is killed in a move, later the first one with its store: the rest serves to the end.

    The move that is under way is abandoned, and a later one among those that are left is done.
    Who asks for a move as the store ends is told so. No request of the last server fails, for every
    expert that it needs is held by a server that lives.
    """
    monkeypatch.setattr(move_command, "RESTART_S", 1.0)  # nobody starts this store again
    material = Material(tmp_path, cluster_text(slots=24, load_s=1.0, interval_s=0.04))
    most = striped(4, 0)
    most[:2] |= striped(4, 1)[:2] | striped(4, 2)[:2]
    start = material.placement("a.json", most)
    assert start.on_gpu[:2].any(axis=0).all()
    everywhere = np.ones((4, SPEC.num_pairs), bool)
    everywhere[2:] = striped(2, 0)
    target = material.placement("b.json", everywhere)

    def among_two(held: Any) -> Any:
        return target.replace(
            servers=("s0", "s1"), gpu_capacity=target.gpu_capacity[:2],
            on_gpu=np.reshape(held, (2, *target.on_gpu.shape[1:])),
        )  # fmt: skip

    options = ["--movable", "--requests", "250", "--timeout", "2", "--placements-dir", "out"]
    with ThreadPoolExecutor() as threads, Replays(material, "a.json", *options) as run:
        run.until_served("s1", 10)
        moving = threads.submit(asked, run, target)
        run.until(run.migrates, "a migration begins")
        before = len(run.results("s1"))
        run.until_served("s1", before + 5)
        run.kill("s2")
        assert run.processes["s2"].wait() < 0
        code, text = moving.result(PATIENCE_S)
        assert code == 5
        assert "migration 1 is abandoned" in text
        assert "server 's2' is lost" in text
        stands = read_placement(tmp_path / "out" / "placement-1.json")
        assert stands.servers == ("s0", "s1")
        assert stands.plan.solver == "interrupted"
        loaded = int((stands.on_gpu & ~start.on_gpu[:2]).sum())
        left = 2 * SPEC.num_pairs - int(start.on_gpu[:2].sum())
        assert 0 < loaded < left  # it was in the middle, and what was loaded stays
        code, text = asked(run, among_two([most[0], everywhere[1]]))
        assert code == 0, text
        moving = threads.submit(asked, run, among_two(everywhere[:2]))
        run.until(run.migrates, "another migration begins")
        before = len(run.results("s1"))
        run.until_served("s1", before + 5)
        run.kill("s0")
        with pytest.raises(RuntimeFailure, match="the store of the run has not answered"):
            moving.result(PATIENCE_S)
        assert run.processes["s1"].wait(timeout=PATIENCE_S) == 0
        said, results, counted = run.errors("s1"), run.results("s1"), run.stats("s1")
    lines = said.splitlines()
    assert sum("server 's2' is down" in line for line in lines) == 1
    assert sum("server 's0' is suspect" in line for line in lines) == 1
    assert [result["error"] for result in results] == [None] * 250
    assert counted["lost"] == ["s0", "s2"]
    # what it held at first and what had been loaded: s1 serves it to itself to the end
    assert sum(len(ids) for gpu in counted["gpus"] for ids in gpu.values()) == SPEC.num_pairs


def test_a_move_of_a_run_that_is_not_there(tmp_path: Path) -> None:
    """The command says in one line that nobody answers, and leaves with exit code 5."""
    material = Material(tmp_path, cluster_text())
    material.placement("a.json", striped(4, 0))
    store = f"127.0.0.1:{free_port()}"
    with Replays(material, "a.json") as run:
        for process in run.processes.values():
            process.kill()
        run.store = store
        process = run.move("a.json", "--join", "1")
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 5
    assert f"--store {store}: the run's store at {store} does not answer within " in said, said
    assert said.count("\n") == 1
