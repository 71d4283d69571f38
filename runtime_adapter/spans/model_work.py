"""Runs spans of a real model, with greedy decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prism_plan.errors import InputError
from prism_plan.execution_table import Span
from prism_plan.model_spec import ModelSpec
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
from runtime_adapter.spans.messages import Bytes, RequestSetup
from runtime_adapter.spans.span_model import ModelSpan, SpanCache, SpanModel
from runtime_adapter.spans.span_work import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Settings of ``generate`` that change logits before the largest is taken, and their values that do
#: not (transformers 5.24.0).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "stop_strings": (),
    "watermarking_config": (),
}


class _State(NamedTuple):
    """One request in one span."""

    span: ModelSpan
    cache: SpanCache
    request: int


class ModelWork:
    """A :class:`~runtime_adapter.spans.span_work.SpanWork` of a model with placed experts.

    ``generation`` are the settings of greedy decoding, ``backend`` is the model's.

    Raises
    ------
    InputError
        The model's layers cannot be executed apart, or its settings change logits before a token is
        chosen, which is done at home alone.
    """

    def __init__(
        self, model: PreTrainedModel, spec: ModelSpec, backend: ThreadLocalDispatcher,
        generation: Any,
    ) -> None:  # fmt: skip
        self._model = SpanModel(model)
        self._spec = spec
        self._backend = backend
        self._device = model.device
        self._dtype = model.get_input_embeddings().weight.dtype
        ends = generation.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        for name, neutral in _NEUTRAL.items():
            value = getattr(generation, name, None)
            if value is not None and value not in neutral:
                raise InputError(
                    f"{value!r:.60}",
                    source="generation_config.json",
                    place=name,
                    expected="none, where layers execute on other servers than the request's home",
                    remedy="remove it, or plan with every layer at home",
                )

    def begin(self, setup: RequestSetup, span: Span) -> _State:
        part = self._model.span(*decoder_layers(span, self._spec))
        return _State(part, part.new_cache(), setup.request)

    def run(
        self, state: _State, lane: RemoteDispatcher, inputs: Bytes, past: int, tokens: int
    ) -> torch.Tensor | Bytes:
        received = torch.from_numpy(inputs)
        if state.span.is_first:
            taken = received.view(torch.int32).to(self._device, torch.int64)
        else:
            taken = received.view(self._dtype).view(tokens, -1).to(self._device)
        with self._backend.using(lane, state.request):
            given = state.span.run(taken, state.cache, past)
        if state.span.is_last:
            return given
        payload: Bytes = given.contiguous().cpu().view(torch.uint8).view(-1).numpy()
        return payload

    def token(self, outputs: torch.Tensor) -> int:
        return int(outputs.argmax())

    def is_end(self, token: int) -> bool:
        return token in self._ends
