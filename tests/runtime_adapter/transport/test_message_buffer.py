"""What a server has memory for: no call, no retry and no prompt is sent that exceeds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prism_plan.model_spec import ModelShape  # noqa: E402
from prism_plan.placement import Placement, SolveReport  # noqa: E402
from runtime_adapter.moe.counters import Counters  # noqa: E402
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher  # noqa: E402
from runtime_adapter.moe.router import Router, uniform_network  # noqa: E402
from runtime_adapter.transport.connection import Connection  # noqa: E402
from runtime_adapter.transport.peer import ConnectionLost, Peer  # noqa: E402
from runtime_adapter.transport.secrets import NO_SECRET  # noqa: E402
from runtime_adapter.transport.send_queue import SendQueue  # noqa: E402
from runtime_adapter.transport.wire_format import (  # noqa: E402
    ANSWER,
    HEADER_BYTES,
    MISSING,
    Header,
    MessageBuffer,
    StepTooLong,
    WireError,
    id_bits,
)
from runtime_adapter.transport.wire_kernels import unpack_calls  # noqa: E402
from runtime_adapter.weights.expert_map import ExpertMap  # noqa: E402

MODEL = ModelShape("tiny", (1,), 8, 4, 1)
TOKENS, WIDTH = 6, 4


class Other(Connection):
    """A server whose expert e multiplies by e + 1; ``dead`` ones take no call.

    ``missing`` are experts that it does not have at the first call for them.
    """

    def __init__(
        self, buffer: MessageBuffer, *, dead: bool = False, missing: tuple[int, ...] = ()
    ) -> None:
        super().__init__(Peer("home", "other", NO_SECRET, 1.0), 0, SendQueue(), buffer)
        self.dead = dead
        self.missing = set(missing)
        self.calls: list[Header] = []

    def send(self, header: Header, states: Any, rows: Any) -> None:
        """Compute at once."""
        self.calls.append(header)
        if self.dead:
            raise ConnectionLost("it does not answer")
        raw = self._message.array[HEADER_BYTES : self._states_begin]
        ids, token = np.zeros(header.calls, np.int64), np.zeros(header.calls, np.int64)
        weights = np.zeros(header.calls, np.float32)
        unpack_calls(
            raw.view(np.uint32), id_bits(8), 0, np.zeros(8, np.int32), ids,
            weights.view(np.uint32), token,
        )  # fmt: skip
        self._lacks = set(ids.tolist()) & self.missing
        self.missing -= self._lacks
        own = states if rows is None else states[rows]
        hidden = torch.from_numpy(own.copy()).view(torch.float32).reshape(-1, WIDTH)
        self._sums = torch.zeros_like(hidden)
        self._sums.index_add_(
            0, torch.from_numpy(token),
            hidden[token] * torch.from_numpy(weights * (ids + 1).astype(np.float32))[:, None],
        )  # fmt: skip

    def answer(self) -> Header:
        """What was computed, or that an expert is not there."""
        return Header(MISSING if self._lacks else ANSWER, self.calls[-1].tokens)

    def sums(self, dtype: Any, width: int) -> Any:
        """Of the last call."""
        return self._sums


class Nothing:
    """Home computes nothing: it holds no expert."""

    def use(self, expert_map: Any) -> None:
        """It needs no map."""

    def partial_sums(self, batch: Any) -> Any:
        """Is not asked for."""

    def dense(self, tokens: int) -> None:
        """Is not asked for."""

    def apply(self, change: Any) -> None:
        """Is not asked for."""


def dispatcher(*others: Other) -> RemoteDispatcher:
    """Of the first server of three; both others hold every expert."""
    held = np.ones((3, 1, 8), bool)
    held[0] = False
    placement = Placement(MODEL, ("s0", "s1", "s2"), ((8,), (8,), (8,)), held, SolveReport("hand"))
    expert_map = ExpertMap(placement)
    router = Router(expert_map, 0, MODEL, uniform_network(3, 4 * WIDTH), "spread")
    connections = dict(enumerate(others, start=1))
    return RemoteDispatcher(
        MODEL, router, connections, Nothing(), Counters(1, 8),
        on_lost=lambda lost: expert_map.suspect(lost.server),
    )  # fmt: skip


def step(tokens: int = TOKENS) -> tuple[Any, Any, Any, Any]:
    """Hidden states, experts and weights of a step, and what comes of it."""
    rng = np.random.default_rng(0)
    experts = np.array([rng.permutation(8)[:4] for _ in range(tokens)])
    weights = rng.choice([0.25, 0.5, 1.0], (tokens, 4)).astype(np.float32)
    hidden = torch.from_numpy(rng.integers(1, 9, (tokens, WIDTH)).astype(np.float32))
    return (
        hidden,
        experts,
        weights,
        hidden * torch.from_numpy((weights * (experts + 1)).sum(1))[:, None],
    )


@pytest.mark.parametrize(
    "others",
    [
        {"dead": (True, False), "missing": ((), ())},
        {"dead": (False, False), "missing": ((0, 1, 2, 3), (4, 5, 6, 7))},
        {"dead": (True, False), "missing": ((), tuple(range(8)))},
    ],
    ids=["lost", "moved", "both"],
)
def test_retries_fit_the_buffer(others: dict[str, Any]) -> None:
    """Of a step with top-4 all failed calls are made again, none with more tokens than the step.

    Servers have memory for just the step; the result is the same.
    """
    buffer = MessageBuffer(TOKENS, 4)
    connections = [
        Other(buffer, dead=dead, missing=missing)
        for dead, missing in zip(others["dead"], others["missing"], strict=True)
    ]
    hidden, experts, weights, wanted = step()
    found = dispatcher(*connections).run(0, hidden, experts, weights)
    assert torch.equal(found, wanted)
    assert sum(len(connection.calls) for connection in connections) > 2
    assert max(call.tokens for connection in connections for call in connection.calls) <= TOKENS


def test_a_step_that_is_too_long_reaches_nobody() -> None:
    """The message names request, tokens and bound; the next step goes as ever."""
    connections = [Other(MessageBuffer(TOKENS, 4)), Other(MessageBuffer(TOKENS + 2, 4))]
    lane = dispatcher(*connections)
    lane.request = 17
    with pytest.raises(StepTooLong) as error:
        lane.run(0, *step(TOKENS + 1)[:3])
    assert "request 17: a step of 7 tokens; expected at most 6, for which" in str(error.value)
    assert [connection.calls for connection in connections] == [[], []]
    assert lane.passes == 0
    hidden, experts, weights, wanted = step()
    assert torch.equal(lane.run(0, hidden, experts, weights), wanted)


@pytest.mark.parametrize(("tokens", "calls"), [(7, 7), (0, 0), (3, 2), (3, 13)])
def test_a_connection_checks_the_buffer(tokens: int, calls: int) -> None:
    """Whatever it is given, a connection writes no message that the other side cannot take."""
    with pytest.raises(WireError, match=f"a call of {tokens} tokens and {calls} experts"):
        Other(MessageBuffer(TOKENS, 4)).words(tokens, calls, 4 * WIDTH)


def test_a_prompt_that_is_too_long_fails_alone() -> None:
    """`serve` refuses it at home; the requests before and after are answered."""
    pytest.importorskip("transformers")
    from prism_plan.io.serve_requests import Request
    from runtime_adapter.driver import Driver
    from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
    from runtime_adapter.request_counts import RequestCounts
    from runtime_adapter.tokenized_requests import TokenizedRequest, load_tokenizer
    from tests.runtime_adapter.checkpoints import committed, reference

    class One:
        """A server with one lane, whose model needs no other server."""

        name = "s0"

        def __init__(self) -> None:
            self.requests = RequestCounts()
            self.lanes = [
                dispatcher(Other(MessageBuffer(TOKENS, 4)), Other(MessageBuffer(TOKENS, 4)))
            ]

    jobs = [TokenizedRequest(Request(n, "", id=n), n, list(range(3, 3 + n)), 2) for n in (2, 7, 6)]
    model = reference("deepseek-v2", torch.float32)
    tokenizer = load_tokenizer(committed("deepseek-v2"))
    one: Any = One()
    answers: list[Any] = []
    driver = Driver(one, model, tokenizer, ThreadLocalDispatcher(), 0.0, answers.append)
    driver.serve(jobs)
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert "request 7: a step of 7 tokens; expected at most 6" in str(answers[1].error)
    assert answers[1].tokens == []
