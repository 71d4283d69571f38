"""A home repeats what may pass, from prompt and tokens so far, and its answers are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.io.serve_requests import Request  # noqa: E402
from runtime_adapter.driver import Driver, RequestResult  # noqa: E402
from runtime_adapter.moe.placed_model import load_placed_model  # noqa: E402
from runtime_adapter.moe.router import ExpertsLost  # noqa: E402
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher  # noqa: E402
from runtime_adapter.request_counts import RequestCounts  # noqa: E402
from runtime_adapter.request_journal import RequestJournal  # noqa: E402
from runtime_adapter.request_repeats import (  # noqa: E402
    MAX_REPEATS,
    MAX_REPEATS_PER_MINUTE,
    RepeatBudget,
    may_pass,
)
from runtime_adapter.tokenized_requests import RequestTokenizer, load_tokenizer  # noqa: E402
from runtime_adapter.transport.rendezvous import RequestTimeout, RuntimeFailure  # noqa: E402
from runtime_adapter.transport.wire_format import WireError  # noqa: E402
from tests.runtime_adapter.checkpoints import committed, filled, reference  # noqa: E402
from tests.runtime_adapter.moe.local_backend import LocalBackend  # noqa: E402

NEW_TOKENS = 12
PROMPTS = ("What is the capital of France?", "def add(a, b):", "Water boils at")


class Lane:
    """A lane that computes all experts here, and fails at the passes that a test says."""

    max_tokens = 1 << 20

    def __init__(self, failures: dict[int, Exception]) -> None:
        self._backend = LocalBackend(filled(committed("mixtral"), torch.float32))
        self._failures = failures
        self.request = 0
        self.passes = 0

    def run(self, layer: int, hidden: Any, experts: Any, weights: Any) -> Any:
        """See `ExpertBackend`."""
        self.passes += 1
        if self.passes in self._failures:
            raise self._failures[self.passes]
        return self._backend.run(
            layer, hidden, torch.from_numpy(experts), torch.from_numpy(weights)
        )


def home(failures: dict[int, Exception]) -> Any:
    """What a driver needs of its server."""
    return SimpleNamespace(name="edge-a", lanes=[Lane(failures)], requests=RequestCounts())


def drive(
    server: Any, tokenized: list[Any], journal: RequestJournal | None = None
) -> list[RequestResult]:
    """Serve requests by the tiny Mixtral."""
    checkpoint, backend = committed("mixtral"), ThreadLocalDispatcher()
    model = load_placed_model(checkpoint, backend, torch.float32)
    results: list[RequestResult] = []
    driver = Driver(
        server, model, load_tokenizer(checkpoint), backend, 0.0, results.append, journal=journal
    )
    driver.serve(tokenized)
    return results


def requests() -> list[Any]:
    """The prompts as a home takes them."""
    checkpoint = committed("mixtral")
    tokenizing = RequestTokenizer(load_tokenizer(checkpoint), checkpoint, 0, NEW_TOKENS)
    lines = [Request(number, prompt) for number, prompt in enumerate(PROMPTS, start=1)]
    return tokenizing.tokenize(lines, "the test")


def plain_tokens(tokenized: Any) -> list[int]:
    """What transformers gives for a request."""
    model = reference("mixtral", torch.float32)
    ids = torch.tensor([tokenized.ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
    )
    return list(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
def test_a_step_that_fails_once_is_run_again(at: int) -> None:
    """Whatever step fails for a reason that may pass, all tokens are those of plain transformers.

    No token is given twice, and none is missing.
    """
    tokenized = requests()
    server = home({at: RuntimeFailure("a server could not compute a call")})
    results = drive(server, tokenized)
    assert [result.error for result in results] == [None] * len(PROMPTS)
    assert [result.tokens for result in results] == [plain_tokens(one) for one in tokenized]
    assert server.requests.to_json() == {"running": 0, "done": len(PROMPTS), "failed": 0}


def test_a_request_is_run_again_a_bounded_number_of_times() -> None:
    """A fault that stays fails the request that meets it, with its reason; others go on."""
    failures = {n: RuntimeFailure("it stays") for n in range(1, MAX_REPEATS + 2)}
    server = home(dict(failures))
    results = drive(server, requests())
    assert [result.error for result in results] == ["it stays", None, None]
    assert server.requests.last_error == "it stays"


def test_what_does_not_pass_is_not_repeated() -> None:
    """Experts that nobody holds, and waiting that took too long, fail at once with that reason."""
    server = home({3: ExpertsLost("held by no server"), 4: RequestTimeout(1.0, "edge-b")})
    results = drive(server, requests())
    assert results[0].error == "held by no server"
    assert "request_timeout" in (results[1].error or "")
    assert results[2].error is None


def test_only_passing_reasons_may_pass() -> None:
    """Failures of other servers and connections may pass; wrong input and lost experts do not."""
    assert may_pass(RuntimeFailure("x"))
    assert may_pass(WireError("x"))
    assert not may_pass(ExpertsLost("x"))
    assert not may_pass(RequestTimeout(1.0, "x"))
    assert not may_pass(ValueError("x"))


def test_the_budget_of_repeats_comes_back_after_a_minute() -> None:
    """At most so many repeats within any minute; twice for each lane, where these are many."""
    clock = [0.0]
    many = RepeatBudget(32)
    assert [many.take() for _ in range(65)] == [True] * 64 + [False]
    budget = RepeatBudget(now=lambda: clock[0])
    assert all(budget.take() for _ in range(MAX_REPEATS_PER_MINUTE))
    assert not budget.take()
    clock[0] = 59.9
    assert not budget.take()
    clock[0] = 60.0
    assert budget.take()


@pytest.mark.parametrize("had", [0, 1, 5, NEW_TOKENS])
def test_a_restarted_home_goes_on_with_its_journal(tmp_path: Path, had: int) -> None:
    """Finished requests are not served again; begun ones get exactly the tokens that they lack."""
    tokenized = requests()
    expected = [plain_tokens(one) for one in tokenized]
    path = tmp_path / "journal"
    with RequestJournal(path, {}) as journal:
        for key in ("1", "2"):
            journal.accept(key, {})
        journal.tokens("2", expected[1][:had])
        journal.end("1")
    server = home({})
    with RequestJournal(path, {}) as journal:
        results = drive(server, tokenized, journal)
    assert [result.id for result in results] == [2, 3]
    assert [result.tokens for result in results] == expected[1:]
    with RequestJournal(path, {}) as journal:
        assert journal.finished == {"1", "2", "3"}


def test_requests_of_standard_input_come_back_from_the_journal(tmp_path: Path) -> None:
    """A streamed request that was begun is rebuilt from its journal, with its id, task and limit.

    Requests that come after it have other keys.
    """
    checkpoint = committed("mixtral")
    tokenizing = RequestTokenizer(load_tokenizer(checkpoint), checkpoint, 0, NEW_TOKENS)
    line = {"prompt": PROMPTS[0], "id": "a", "task": "t", "max_new_tokens": 3}
    (first,) = tokenizing.tokenize_stream(_stream(line), 0.0)
    with RequestJournal(tmp_path / "journal", {}) as journal:
        journal.accept(first.key, first.line())
        journal.tokens(first.key, [1, 2])
    with RequestJournal(tmp_path / "journal", {}) as journal:
        (again,) = tokenizing.tokenize_journalled(journal, 0.0)
        assert (again.ids, again.new_tokens, again.key) == (first.ids, 3, first.key)
        assert (again.request.id, again.request.task) == ("a", "t")
        (second,) = tokenizing.tokenize_stream(_stream(line), 0.0, journal.next_key)
        assert second.key != first.key


def _stream(line: dict[str, Any]) -> Any:
    import io

    return io.BytesIO(json.dumps(line).encode() + b"\n")
