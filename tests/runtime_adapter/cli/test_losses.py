"""One lost server ends no other: long prompts after a loss."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_adapter.tokenized_requests import load_tokenizer  # noqa: E402
from tests.runtime_adapter.checkpoints import committed  # noqa: E402
from tests.runtime_adapter.cli.test_faults import MODEL, OWN, replicated, start  # noqa: E402
from tests.runtime_adapter.cli.test_serve import alone, lines  # noqa: E402
from tests.runtime_adapter.servers import Servers, gone  # noqa: E402

#: Tokens of the prompt that follows the loss; with top-k a retry of all its calls has many more
#: rows than any server has memory for.
LONG = 98


def long_prompt() -> str:
    """A text of so many tokens."""
    tokenizer = load_tokenizer(committed(MODEL))
    text = " ".join(line["prompt"] for line in lines()["narrative"][:5])
    ids = tokenizer(text)["input_ids"]
    while len(ids) > LONG:
        text = text[:-1]
        ids = tokenizer(text)["input_ids"]
    return text


def test_a_long_prompt_after_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert is held twice and one holder is killed: all prompts are answered rightly.

    What is said are lines of our own: neither torch nor the store's client writes what it thinks of
    the loss, though the user has not told torch to be quiet.
    """
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    prompt = long_prompt()
    short = lines()["ascii-word"][0]["prompt"]
    with Servers(tmp_path, replicated(), f"tiny-{MODEL}", *OWN, "--timeout", "4") as run:
        processes = start(run, short)
        run.send("edge-2", signal.SIGKILL)
        for name in ("edge-0", "edge-1"):
            for which in (1, 2):
                run.ask(name, {"prompt": prompt, "id": which})
            run.finish(name)
        codes = run.codes()
        assert codes == {"edge-0": 0, "edge-1": 0, "edge-2": -signal.SIGKILL}
        run.until(lambda: all(map(gone, processes.values())))
    for name in ("edge-0", "edge-1"):
        assert [answer["error"] for answer in run.answers(name)] == [None] * 3
        for answer in run.answers(name):
            text = short if answer["id"] == "first" else prompt
            assert answer["tokens"] == alone(MODEL, text, 8)
        assert run.stats(name)["lost"] == ["edge-2"]
        said = run.errors(name)
        assert all(line.startswith("prism-runtime: ") for line in said), said
        assert any("'edge-2' is suspect: its port refuses connections" in line for line in said)
        assert any("'edge-2' is down" in line for line in said), said
