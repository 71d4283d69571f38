"""On a card, where there is one: the same tokens as one process has on it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.io.placement import placement_to_json  # noqa: E402
from prism_plan.solvers import solve  # noqa: E402
from runtime_adapter.control.move_command import request_move  # noqa: E402
from runtime_adapter.transport.rendezvous import Rendezvous  # noqa: E402
from tests.runtime_adapter.checkpoints import TINY, TRACES, reference  # noqa: E402
from tests.runtime_adapter.cli.test_serve import NEW_TOKENS, lines  # noqa: E402
from tests.runtime_adapter.moe.test_placed_experts import instance  # noqa: E402
from tests.runtime_adapter.replays import PATIENCE_S, experts_of  # noqa: E402
from tests.runtime_adapter.servers import Servers  # noqa: E402

CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(CARDS == 0, reason="needs a CUDA card")


@functools.cache
def alone(model: str, prompt: str) -> list[int]:
    """What the single process adds to a prompt on the card, in float32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TRACES / f"tiny-{model}")
    whole = reference(model, torch.float32).to("cuda:0")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device="cuda:0")
    with torch.no_grad():
        found = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    whole.to("cpu")  # other tests have the same one
    tokens: list[int] = found[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("transport", "device"),
    [
        ("gloo", "cuda:0"),
        pytest.param(
            "nccl", "cuda:{n}", marks=pytest.mark.skipif(CARDS < 3, reason="needs three cards")
        ),
    ],
)
@pytest.mark.parametrize("model", TINY)
def test_tokens_on_cards(model: str, transport: str, device: str, tmp_path: Path) -> None:
    """Three servers with a card each, or all on one: the tokens before, during and after moves."""
    start, target = (solve(instance(model, 3), name) for name in ("exact", "uniform"))
    prompts = [line for task in lines().values() for line in task[:4]]
    asked = {
        name: [{**prompts[(i + n) % len(prompts)], "id": i, "at_s": 0.2 * i} for i in range(40)]
        for n, name in enumerate(start.servers)
    }
    own = ["--concurrency", "2", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS)]
    own += ["--transport", transport, "--movable"]
    with Servers(tmp_path, start, f"tiny-{model}", *own) as run:
        for n, (name, requests) in enumerate(asked.items()):
            run.start(name, requests, "--device", device.format(n=n))
        run.until(lambda: len(run.answers(start.servers[0])) > 2)
        rendezvous = Rendezvous(1, -1, port=run.port, rendezvous_timeout_s=PATIENCE_S)
        for placement in (target, start, target):
            code, text = request_move(rendezvous, placement_to_json(placement))
            assert code == 0, text
        assert set(run.codes().values()) == {0}, [run.errors(name) for name in start.servers]
    for name, requests in asked.items():
        answers = {answer["id"]: answer for answer in run.answers(name)}
        for request in requests:
            assert answers[request["id"]]["error"] is None
            assert answers[request["id"]]["tokens"] == alone(model, str(request["prompt"]))
        assert run.stats(name)["gpus"] == experts_of(target, name)


@pytest.mark.parametrize("model", TINY)
def test_two_servers_on_one_card_are_told(model: str, tmp_path: Path) -> None:
    """NCCL cannot join them: both say so, and the run ends."""
    placement = solve(instance(model, 2), "exact")
    with Servers(tmp_path, placement, f"tiny-{model}", "--transport", "nccl") as run:
        for name in placement.servers:
            run.start(name, [], "--device", "cuda:0")
        assert set(run.codes().values()) == {2}
    for name in placement.servers:
        assert "has the GPU of server" in " ".join(run.errors(name))
