"""A checkpoint whose experts move while it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.placement_file import placement_to_json
from prism_plan.solvers import solve
from runtime_adapter.links import Meeting
from runtime_adapter.move import ask
from tests.runtime.replays import PATIENCE_S, experts_of
from tests.runtime.servers import Servers
from tests.runtime.test_placed import instance
from tests.runtime.test_serve import alone, lines


def test_tokens_are_the_same_before_during_and_after_moves(tmp_path: Path) -> None:
    """A real checkpoint, moved to and fro while it serves: every token is the single process's."""
    start = solve(instance("deepseek-v2", 2), "exact")
    target = solve(instance("deepseek-v2", 2), "uniform")
    assert (start.on_gpu != target.on_gpu).any()
    run = Servers(
        tmp_path, start, "tiny-deepseek-v2", "--movable", "--dtype", "float32",
        "--max-new-tokens", "10", "--placements-dir", "out",
    )  # fmt: skip
    prompts = [line for task in lines().values() for line in task[:3]]
    asked_for = {
        name: [{**prompts[(i + n) % len(prompts)], "id": i, "at_s": 0.1 * i} for i in range(60)]
        for n, name in enumerate(start.servers)
    }
    meeting = Meeting(1, -1, port=run.port, join_s=PATIENCE_S)
    with run:
        for name, requests in asked_for.items():
            run.start(name, requests)
        first = start.servers[0]
        run.until(lambda: len(run.answers(first)) > 2)
        moves = 0
        while moves < 5 and len(run.answers(first)) < 50:
            code, text = ask(meeting, placement_to_json(start if moves % 2 else target))
            assert code == 0, text
            moves += 1
        assert moves >= 2
        assert set(run.codes().values()) == {0}
    stands = target if moves % 2 else start
    for name, requests in asked_for.items():
        answers = {answer["id"]: answer for answer in run.answers(name)}
        for request in requests:
            assert answers[request["id"]]["error"] is None
            assert answers[request["id"]]["tokens"] == alone("deepseek-v2", request["prompt"])
        assert run.stats(name)["gpus"] == experts_of(stands, name)
        assert run.stats(name)["retries"] == 0
    assert len(list((tmp_path / "out").iterdir())) == moves
