"""What a server computes of a span: layers of a real model, or timed waits in a replay."""

from __future__ import annotations

from typing import Any, Protocol

from prism_plan.execution_table import Span
from prism_plan.model_spec import ModelSpec
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.spans.messages import Bytes, RequestSetup


class SpanWork(Protocol):
    """Runs spans of requests; several threads at once, each with a dispatcher of its own."""

    def begin(self, setup: RequestSetup, span: Span) -> Any:
        """State of one request in one of its spans, with an empty cache."""

    def run(self, state: Any, lane: RemoteDispatcher, inputs: Bytes, past: int, tokens: int) -> Any:
        """Run some tokens after ``past`` ones.

        ``inputs`` are the payload of a message: ids for the first span, else hidden states. Gives
        the payload for the next span (:data:`Bytes`), or of the last one what :meth:`token` takes.
        """

    def token(self, outputs: Any) -> int:
        """The token that a pass has made, from the last span's outputs."""

    def is_end(self, token: int) -> bool:
        """Whether a request ends with this token, however many more it may have."""


def decoder_layers(span: Span, model: ModelSpec) -> tuple[int, int]:
    """The first and the last decoder layer of a span of MoE layer positions.

    Layers without routed experts execute with the MoE layer that follows them, those after the last
    MoE layer with it (docs/design.md, section 10).
    """
    first = model.moe_layers[span.first - 1] + 1 if span.first else 0
    is_last = span.last == model.num_layers - 1
    last = model.num_decoder_layers - 1 if is_last else model.moe_layers[span.last]
    return first, last
