"""A checkpoint whose experts move while it serves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.io.placement import read_placement
from prism_plan.solvers import solve
from tests.runtime_adapter.checkpoints import TRACES
from tests.runtime_adapter.cli.test_serve import alone, lines
from tests.runtime_adapter.moe.test_placed_experts import SLOTS, TASKS, instance
from tests.runtime_adapter.replays import experts_of
from tests.runtime_adapter.servers import Servers

MODEL = "tiny-deepseek-v2"


def two_servers() -> str:
    """The cluster file of two servers that hold tiny-deepseek-v2 together."""
    text = ['name = "two"']
    for n, gpus in enumerate(SLOTS["deepseek-v2"][2]):
        text += ["[[server]]", f'name = "edge-{n}"', f"tasks = {{ {TASKS[n]} = 1.0 }}"]
        text += ["arrival_interval_s = 0.1"]
        text += [line for slots in gpus for line in ("[[server.gpu]]", f"slots = {slots}")]
    return "\n".join(text) + "\n"


def test_weights_come_from_peers(tmp_path: Path) -> None:
    """Experts move although the checkpoint is gone by then: those that hold them give them.

    The tokens before and after are the single process's; nothing is read from a file.
    """
    start = solve(instance("deepseek-v2", 2), "exact")
    target = solve(instance("deepseek-v2", 2), "uniform")
    prompts = lines()[TASKS[0]][:2]
    copy = tmp_path / "checkpoint"
    shutil.copytree(TRACES / MODEL, copy)
    run = Servers(
        tmp_path, start, str(copy), "--movable", "--dtype", "float32",
        "--max-new-tokens", "10", "--weights", "peer",
    )  # fmt: skip
    asked_for = [{**prompts[0], "id": 0}, {**prompts[1], "id": 1}]
    with run:
        for name in start.servers:
            run.start(name, None)
            run.ask(name, asked_for[0])
        run.until(lambda: all(run.answers(name) for name in start.servers))
        for path in copy.glob("*.safetensors"):
            path.unlink()
        code, text = run.move(target)
        assert code == 0, text
        for name in start.servers:
            run.ask(name, asked_for[1])
            run.finish(name)
        assert set(run.codes().values()) == {0}
    for name in start.servers:
        answers = {answer["id"]: answer for answer in run.answers(name)}
        for request in asked_for:
            assert answers[request["id"]]["tokens"] == alone("deepseek-v2", request["prompt"])
        assert run.stats(name)["gpus"] == experts_of(target, name)
        assert not any("read from the checkpoint" in line for line in run.errors(name))


def test_reviews_of_a_checkpoint_that_serves(tmp_path: Path) -> None:
    """`serve --migrate partial --cluster`: a review moves experts, and the tokens stay right.

    Here with states on channels beside the messages, as NCCL has them.
    """
    start = solve(instance("deepseek-v2", 2), "uniform")
    (tmp_path / "cluster.toml").write_text(two_servers())
    run = Servers(
        tmp_path, start, MODEL, "--dtype", "float32", "--max-new-tokens", "10",
        "--cluster", "cluster.toml", "--migrate", "partial", "--migrate-every", "1.5",
        "--horizon", "600", "--placements-dir", "out", "--transport", "gloo",
    )  # fmt: skip
    asked_for = {
        name: [
            {**prompt, "id": i, "at_s": 0.1 * i}
            for i, prompt in enumerate(3 * lines()[TASKS[n]][:15])
        ]
        for n, name in enumerate(start.servers)
    }
    with run:
        for name, requests in asked_for.items():
            run.start(name, requests)
        assert set(run.codes().values()) == {0}
    for name, requests in asked_for.items():
        answers = {answer["id"]: answer for answer in run.answers(name)}
        for request in requests:
            assert answers[request["id"]]["error"] is None
            assert answers[request["id"]]["tokens"] == alone("deepseek-v2", request["prompt"])
    reviews = run.stats(start.servers[0])["migrations"]
    moves = [review for review in reviews if review["decision"] == "move"]
    # only the last one may still have been under way at the end of the run
    finished = [move for move in moves if move["finished_at_s"] is not None]
    assert len(finished) >= max(len(moves) - 1, 1)
    last = read_placement(tmp_path / "out" / f"placement-{len(finished)}.json")
    assert (last.on_gpu != start.on_gpu).any()
    if finished == moves:
        for name in start.servers:
            assert run.stats(name)["gpus"] == experts_of(last, name)
