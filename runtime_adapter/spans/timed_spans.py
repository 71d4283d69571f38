"""Spans of a replay: recorded routing, work as timed waits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.execution_table import Span
from prism_plan.simulate.requests import Requests
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.spans.messages import Bytes, RequestSetup


class RecordedRequest(NamedTuple):
    """What a trace has of one request: tokens of its prompt (0: none is recorded) and answer.

    ``experts`` [tokens, L, K] are the experts that each token called.
    """

    prefill: int
    decode: int
    experts: npt.NDArray[Any]

    @staticmethod
    def of(requests: Requests, number: int) -> RecordedRequest:
        """The request of a number over all servers."""
        prompts, prompt = requests.prompts, int(requests.prompt[number])
        prefill, decode = int(prompts.prefill_tokens[prompt]), int(prompts.decode_tokens[prompt])
        row = int(prompts.first_row[prompt])
        return RecordedRequest(prefill, decode, prompts.experts[row : row + prefill + decode])

    def passes_after(self, made: int) -> list[int]:
        """Tokens of each pass that is left where so many tokens are made.

        The first one prefills the prompt and all tokens so far.
        """
        passes = [self.prefill] * (self.prefill > 0) + [1] * self.decode
        return [sum(passes[: made + 1]), *passes[made + 1 :]]


def run_layers(
    lane: RemoteDispatcher, recorded: RecordedRequest, past: int, tokens: int, width: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """Run some tokens after ``past`` ones through the layer positions ``first`` to ``last``."""
    is_prefill = past == 0 and (recorded.prefill > 0 or tokens > 1)
    context = None if is_prefill else past
    hidden = torch.zeros((tokens, width), dtype=torch.uint8)
    experts = recorded.experts[past : past + tokens].astype(np.int64)
    top_k = experts.shape[2]
    weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
    for layer in range(first, last + 1):
        lane.compute.dense(layer, tokens, context)
        lane.run(layer, hidden, experts[:, layer], weights)


class EmptyStates:
    """Bytes that stand for hidden states, ``width`` a token: always the same ones, all zero."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._zeros = np.zeros(width, np.uint8)

    def of(self, tokens: int) -> Bytes:
        """Those of so many tokens, [bytes]; nobody may write to them."""
        size = tokens * self._width
        if size > len(self._zeros):
            self._zeros = np.zeros(size, np.uint8)
        return self._zeros[:size]


class TimedSpans:
    """A :class:`~runtime_adapter.spans.span_work.SpanWork` of the requests that all servers draw.

    ``width`` are the bytes that stand for a token's hidden states.
    """

    def __init__(self, requests: Requests, width: int) -> None:
        self._requests = requests
        self._width = width
        self._states = EmptyStates(width)

    def begin(self, setup: RequestSetup, span: Span) -> tuple[RecordedRequest, Span]:
        return RecordedRequest.of(self._requests, setup.request), span

    def run(
        self, state: tuple[RecordedRequest, Span], lane: RemoteDispatcher, inputs: Bytes,
        past: int, tokens: int,
    ) -> Bytes:  # fmt: skip
        recorded, span = state
        run_layers(lane, recorded, past, tokens, self._width, span.first, span.last)
        return self._states.of(tokens)

    def token(self, outputs: Any) -> int:
        """Any, for nobody reads it."""
        return 0

    def is_end(self, token: int) -> bool:
        """A request ends with its last recorded token."""
        return False
