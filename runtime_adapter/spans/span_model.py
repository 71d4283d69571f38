"""Executes runs of a model's decoder layers, each with a KV cache of its own.

No model code is repeated here: a span is executed by the decoder's own ``forward``, over a shallow
copy of the decoder that has the span's layers alone, and the last span by the model's, head
included. Rotary embeddings, masks and caches are those of transformers, computed once a span and
pass. Tensors are shared with the model.

A decoder layer knows its index in the whole model, and caches are indexed by it. With a plain cache
of transformers the layers before the span would be empty, the cache would tell that nothing is
cached, and a second step of several tokens would be wrong without an error. So a
:class:`SpanCache` counts layers from the span's first, and its length is compared with every step.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from prism_plan.errors import InputError
from prism_plan.profiling.recording.decoder_cache import cache_argument
from runtime_adapter.torch_private import keeps_states, shallow_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Kinds of attention whose caches hold keys and values alone, as configurations name them.
ATTENTION = ("full_attention", "sliding_attention")


class SpanCache(DynamicCache):  # type: ignore[misc]
    """The KV cache of one request in one span.

    ``config`` is that of the span's layers, of which the first has the index ``first`` in the whole
    model.
    """

    def __init__(self, config: Any, first: int) -> None:
        super().__init__(config=config)
        self._first = first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Add keys and values of a layer, by its index in the whole model; returns all of them."""
        return super().update(key_states, value_states, layer_idx - self._first, *args, **kwargs)


class ModelSpan:
    """Decoder layers ``first`` to ``last`` of a model, both included.

    Takes token ids where it has the model's first layer, else hidden states; gives logits of the
    last token where it has the model's last layer, else hidden states.
    """

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        decoder = model.get_decoder()
        layers = list(decoder.layers)
        self.is_first, self.is_last = first == 0, last == len(layers) - 1
        self._first = first
        self._cache_name = cache_argument(decoder)
        self._config = copy.copy(decoder.config)
        self._config.num_hidden_layers = last + 1 - first
        kinds = getattr(self._config, "layer_types", None)
        if kinds is not None:
            self._config.layer_types = list(kinds)[first : last + 1]
        span = shallow_copy(decoder)
        span.config = self._config
        span.layers = torch.nn.ModuleList(layers[first : last + 1])
        if not self.is_last:
            span.norm = torch.nn.Identity()
            self._module = span
        else:
            self._module = shallow_copy(model)
            setattr(self._module, model.base_model_prefix, span)

    def new_cache(self) -> SpanCache:
        """An empty cache of one request."""
        return SpanCache(self._config, self._first)

    def run(self, inputs: torch.Tensor, cache: SpanCache, past: int) -> torch.Tensor:
        """Run T tokens after ``past`` cached ones.

        Parameters
        ----------
        inputs
            Token ids [T], or hidden states [T, H].
        cache
            Of the request; it grows by T.
        past
            Tokens that the cache must hold.

        Returns
        -------
        torch.Tensor
            Hidden states [T, H], or the last token's logits [vocabulary] in float32.

        Raises
        ------
        ValueError
            The cache holds another number of tokens; nothing is computed.
        """
        if cache.get_seq_length() != past:
            raise ValueError(
                f"a cache of {cache.get_seq_length()} tokens where {past} are expected"
            )
        positions = torch.arange(past, past + len(inputs), device=inputs.device)
        arguments: dict[str, Any] = {
            "input_ids" if self.is_first else "inputs_embeds": inputs[None],
            "position_ids": positions[None],
            self._cache_name: cache,
            "use_cache": True,
        }
        if self.is_last:
            arguments["logits_to_keep"] = 1
        with torch.no_grad():
            output = self._module(**arguments)
        if cache.get_seq_length() != past + len(inputs):
            raise ValueError(
                f"a cache of {cache.get_seq_length()} tokens after a step from {past} to "
                f"{past + len(inputs)}"
            )
        if self.is_last:
            logits: torch.Tensor = output.logits[0, -1].to(torch.float32)
            return logits
        states: torch.Tensor = output.last_hidden_state[0]
        return states


class SpanModel:
    """A model whose runs of decoder layers can be executed apart.

    Raises
    ------
    InputError
        Its layers keep something else than keys and values, or its decoder is built in another way;
        names the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._require_supported()
        self._lock = threading.Lock()
        self._spans: dict[tuple[int, int], ModelSpan] = {}

    def span(self, first: int, last: int) -> ModelSpan:
        """Decoder layers ``first`` to ``last``; the same object each time."""
        with self._lock:
            if (first, last) not in self._spans:
                self._spans[first, last] = ModelSpan(self._model, first, last)
            return self._spans[first, last]

    def _require_supported(self) -> None:
        model = self._model
        decoder = model.get_decoder()
        name = type(model).__name__
        kinds = set(getattr(decoder.config, "layer_types", None) or ())
        if keeps_states(model) or not kinds.issubset(ATTENTION):
            others = ", ".join(sorted(kinds.difference(ATTENTION))) or "a state"
            raise InputError(
                f"{name}: its layers keep {others}",
                expected="layers that keep nothing but keys and values, where layers execute on "
                "other servers than the request's home",
                remedy="plan it with every layer at home",
            )
        for part in ("layers", "norm", "embed_tokens"):
            if not isinstance(getattr(decoder, part, None), torch.nn.Module):
                raise InputError(
                    f"{name}: its decoder has no {part!r}",
                    expected="a decoder whose layers can be executed apart",
                    remedy="plan it with every layer at home",
                )
