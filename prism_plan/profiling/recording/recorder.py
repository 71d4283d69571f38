"""Record which experts a running Hugging Face model calls.

Forward hooks on the experts modules read the ids and gate weights that they are called with
(:mod:`.expert_modules`); nothing of the model is changed, so its output is the
same to the bit. A state in which rows could be wrong is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.io.location import Location
from prism_plan.io.trace_writer import TraceWriter
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.recording.decoder_cache import (
    cache_argument,
    cache_of,
    cached_tokens,
    require_grown,
    returned_cache,
)
from prism_plan.profiling.recording.expert_modules import (
    ID_ARGUMENTS,
    WEIGHT_ARGUMENTS,
    ExpertsModule,
    argument_reader,
    decoder_of,
    find_experts,
)
from prism_plan.profiling.recording.forward_passes import ForwardPass, RowBuilder
from prism_plan.profiling.recording.pass_checks import padding_mask, require_start
from prism_plan.profiling.recording.transformers_release import require_transformers
from prism_plan.provenance import stamped
from prism_plan.sizes.load import load_model_spec
from prism_plan.sizes.loaded_model import spec_from_loaded_model
from prism_plan.torch_private import is_compiled
from prism_plan.trace import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Recorded passes stay on their device until they hold so many tokens, padding included.
FLUSH_TOKENS = 4096

Sink = Callable[[TokenBatch, Sequence[str]], None]


@dataclasses.dataclass(frozen=True)
class _CurrentPass:
    """The pass that runs: its ``shape`` (B, S), and the tokens in ``cache`` before it."""

    shape: tuple[int, int]
    cached_tokens: int
    cache: Any
    mask: Any
    ids: Any


class Recorder:
    """Turns the forward passes of a model into token batches; :func:`record` makes one.

    A pass without cached tokens begins new requests, one for each sequence of the batch; later
    passes continue them. A pass of one token after cached ones is a decode step, any other is
    prefill (so a last chunk of one token of a prompt counts as decode). Padding is what the
    attention mask says. A sequence that is fed an end-of-sequence or padding token in a decode step
    has ended: what ``generate`` feeds it from then on is not recorded, until it is fed more than
    one token again. Passes that do not continue where the last one ended are refused, for their
    rows would be wrong: without a cache, with a cache that was cut, reordered or made elsewhere, or
    with one that does not report its length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        sink: Sink,
        *,
        weights: bool,
        end_tokens: Sequence[int] | None = None,
        first_request: int = 0,
    ) -> None:
        self.spec = spec
        self.tokens = 0
        self._model = model
        self._sink = sink
        self._weights = weights
        self._label: str | tuple[str, ...] = "unlabelled"
        self._row_builder = RowBuilder(
            spec, _end_tokens(model) if end_tokens is None else end_tokens
        )
        self._row_builder.num_requests = first_request
        self._passes: list[ForwardPass] = []  # not handed to the sink yet
        self._pending_tokens = 0
        self._selected: dict[int, tuple[Any, Any]] = {}
        self._current: _CurrentPass | None = None
        # arguments of the whole model's call, where the decoder is a part of it
        self._model_arguments: dict[str, Any] = {}
        # of the last pass: its tokens if they were new sequences, its cache, the tokens in that
        self._last_ids: Any = None
        self._last_cache: Any = None
        self._last_length = -1

    def label(self, tasks: str | Sequence[str]) -> None:
        """Set the task of the requests that begin from now on: one for all, or one for each."""
        names = (tasks,) if isinstance(tasks, str) else tuple(tasks or ())
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise Location("label").error(
                f"{tasks!r:.60}", "the name of a task, or one for each sequence"
            )
        self._label = tasks if isinstance(tasks, str) else names

    # ------------------------------------------------------------------------------------- hooks

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the decoder and the experts modules for the time of the block.

        Raises
        ------
        InputError
            The model cannot be recorded, or its layers and experts are not those of the spec.
        """
        experts = find_experts(self._model)
        self._require_spec(experts)
        self._require_uncompiled()
        decoder = decoder_of(self._model)
        cache_argument(decoder)  # refuses an unknown one
        handles = []
        if decoder is not self._model:
            handles += [
                self._model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self._model.register_forward_hook(self._after_model, always_call=True),
            ]
        handles += [
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass),
        ]
        for at, found in enumerate(experts.values()):
            hook = self._experts_hook(at, found.module)
            handles.append(found.module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _require_uncompiled(self) -> None:
        """Refuse compiled modules: hooks may be left out, and graphs overwrite what hooks kept."""
        for name, module in self._model.named_modules():
            if is_compiled(module):
                raise Location("record").error(
                    f"{name or 'the model'} is compiled",
                    "a model that runs as written",
                    "record before torch.compile",
                )

    def _require_spec(self, experts: dict[int, ExpertsModule]) -> None:
        if tuple(experts) != self.spec.moe_layers:
            raise Location(self.spec.name, "moe_layers").error(
                f"the spec has MoE layers {self.spec.layers_text()}",
                f"{_layers_text(tuple(experts))}, the layers of the model with experts modules",
            )
        for layer, found in experts.items():
            if found.num_experts not in (None, self.spec.num_experts):
                raise Location(self.spec.name, "num_experts").error(
                    f"the spec has {self.spec.num_experts} experts in layer {layer}",
                    f"{found.num_experts}, those of the model's {found.name}",
                )

    def _experts_hook(self, at: int, module: Any) -> Callable[..., None]:
        ids_of = argument_reader(module, ID_ARGUMENTS)
        weights_of = argument_reader(module, WEIGHT_ARGUMENTS)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._current is None:
                return  # called by itself, not within a pass of the decoder
            ids, weights = ids_of(args, kwargs), weights_of(args, kwargs)
            place = f"layer {self.spec.moe_layers[at]}"
            if at in self._selected:
                raise Location(self.spec.name, place).error(
                    "its experts module is called twice in one pass", "one call with all tokens"
                )
            tokens = self._current.shape[0] * self._current.shape[1]
            top_k = int(ids.shape[-1])
            if top_k != self.spec.top_k:
                raise Location(self.spec.name, "top_k").error(
                    f"the spec has {self.spec.top_k} experts a token",
                    f"{top_k}, as many as the model calls in {place}",
                )
            # in early releases some families give the weights of all experts, [T, E]
            kept = [("ids", ids), ("gate weights", weights)][: 2 if self._weights else 1]
            for what, tensor in kept:
                if tensor is None or tensor.numel() != tokens * top_k:
                    shape = "none" if tensor is None else list(tensor.shape)
                    raise Location(self.spec.name, place).error(
                        f"its experts module is called with {what} of shape {shape}",
                        f"[{tokens}, {top_k}], all tokens of the pass",
                    )
            self._selected[at] = (ids, weights)

        return hook

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model_arguments = _arguments_by_name(module, args, kwargs)

    def _after_model(self, module: Any, args: Any, output: Any) -> None:
        self._model_arguments = {}

    def _before_pass(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._selected = {}
        arguments = _arguments_by_name(module, args, kwargs)
        ids, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
        inputs = ids if ids is not None else embedded
        if inputs is None:
            raise Location("forward pass").error("neither input_ids nor inputs_embeds")
        shape = (int(inputs.shape[0]), int(inputs.shape[1]))
        if ids is None:  # a multimodal model embeds its tokens itself
            ids = self._model_arguments.get("input_ids")
            ids = ids if ids is not None and tuple(ids.shape) == shape else None
        cache = cache_of(arguments)
        num_cached = cached_tokens(cache)
        masks = (arguments.get("attention_mask"), self._model_arguments.get("attention_mask"))
        mask = padding_mask(masks, shape, num_cached)
        if num_cached == 0:
            require_start(arguments.get("position_ids"), mask)
        self._require_continuation(shape, num_cached, cache, ids)
        self._current = _CurrentPass(shape, num_cached, cache, mask, ids)

    def _require_continuation(
        self, shape: tuple[int, int], num_cached: int, cache: Any, ids: Any
    ) -> None:
        """Refuse a pass that does not continue the last one: its rows would be wrong."""
        if num_cached == 0:
            before = self._last_ids
            if (
                before is not None
                and ids is not None
                and tuple(ids.shape) == (before.shape[0], before.shape[1] + 1)
                and bool((ids[:, :-1] == before).all())
            ):
                raise Location("forward pass").error(
                    "sequences are fed again with one more token",
                    remedy="generate with use_cache=True, or every token counts many times",
                )
            self._last_ids, self._last_cache, self._last_length = ids, cache, shape[1]
            return
        other_cache = self._last_cache is not None and cache is not self._last_cache
        if num_cached != self._last_length or other_cache:
            raise Location("forward pass").error(
                f"a cache of {num_cached} tokens, where {self._last_length} were recorded last",
                remedy="record sequences from their start, one batch after the other, without "
                "speculative decoding or a cache that is cut",
            )
        self._last_ids, self._last_cache = None, cache
        self._last_length = num_cached + shape[1]

    def _after_pass(self, module: Any, args: Any, output: Any) -> None:
        current, self._current = self._current, None
        assert current is not None
        selected, self._selected = self._selected, {}
        layers = range(self.spec.num_layers)
        missing = next((at for at in layers if at not in selected), None)
        if missing is not None:
            raise Location(self.spec.name).error(
                f"the experts module of layer {self.spec.moe_layers[missing]} was not called",
                remedy="load the model without replacement kernels",
            )
        cache = current.cache if current.cache is not None else returned_cache(output)
        require_grown(cache, current.cached_tokens + current.shape[1])
        self._last_cache = cache
        decode = current.cached_tokens > 0 and current.shape[1] == 1 and current.ids is not None
        self._passes.append(
            ForwardPass(
                shape=current.shape,
                tasks=self._labels(current.shape[0]) if current.cached_tokens == 0 else None,
                mask=current.mask,
                fed=current.ids[:, 0] if decode else None,
                experts=[selected[at][0] for at in layers],
                weights=[selected[at][1] for at in layers] if self._weights else None,
            )
        )
        self._pending_tokens += current.shape[0] * current.shape[1]
        if self._pending_tokens >= FLUSH_TOKENS:
            self.flush()

    def _labels(self, sequences: int) -> tuple[str, ...]:
        if isinstance(self._label, str):
            return (self._label,) * sequences
        if len(self._label) != sequences:
            raise Location("Recorder.label").error(
                f"{len(self._label)} labels for {sequences} sequences",
                "one task for all, or one for each sequence of the batch",
            )
        return self._label

    def flush(self) -> None:
        """Hand everything recorded so far to the sink."""
        passes, self._passes, self._pending_tokens = self._passes, [], 0
        for batch in self._row_builder.rows(passes):
            self.tokens += len(batch)
            self._sink(batch, self._row_builder.tasks)


def _arguments_by_name(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, by name."""
    if not args:  # models call their decoder by name
        return kwargs
    return inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments


def _layers_text(layers: tuple[int, ...]) -> str:
    """Layers for a message, ``"1..26"`` or ``"1, 3, 5"``."""
    if len(layers) > 1 and layers[-1] - layers[0] + 1 == len(layers):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(map(str, layers)) or "(none)"


def _end_tokens(model: PreTrainedModel) -> list[int]:
    config = getattr(model, "generation_config", None) or model.config
    ends = getattr(config, "eos_token_id", None)
    found = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]
    # generate feeds it to a sequence that ended for another reason, such as a stop string
    padding = getattr(config, "pad_token_id", None)
    return found if padding is None else [*found, int(padding)]


@contextlib.contextmanager
def record(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    task: str = "unlabelled",
    weights: bool = False,
    name: str = "",
    spec: ModelSpec | str | os.PathLike[str] | None = None,
    end_tokens: Sequence[int] | None = None,
) -> Iterator[Recorder]:
    """Record every forward pass and ``generate`` call of the block into a trace file.

    ::

        with record(model, "trace.parquet") as recorder:
            recorder.label(["law", "summary"])      # one task for each sequence of the batch
            model.generate(**inputs, max_new_tokens=32)

    The file appears when the block ends without an error. See :class:`Recorder` for what is a
    request, a decode step and padding. With beam search every beam is a request.
    ``spec`` is the model spec where it cannot be made from the model: a :class:`ModelSpec`, a
    preset, or the path of a JSON file. Its layers, experts and top-k are compared with the model's.
    ``end_tokens`` are those that end a sequence, if not the generation configuration's; give ``()``
    where ``generate`` continues beyond them.

    Recorded ids were compared with the routers' own, family by family, in transformers 5.24.0, and
    as far as families were there in 5.0.0.

    Raises
    ------
    InputError
        The model has no MoE layers, calls its experts in a way that cannot be recorded, or is not
        the spec's; nothing was recorded; the release of transformers is not supported.
    OutputError
        The file cannot be written.
    """
    require_transformers()
    if spec is None:
        find_experts(model)  # its reason comes before that of missing sizes
        spec = spec_from_loaded_model(model, name)
    elif not isinstance(spec, ModelSpec):
        spec = load_model_spec(os.fspath(spec))
    spec = dataclasses.replace(spec, name=name or spec.name)
    provenance = stamped({"source": "record", "checkpoint": spec.name})
    with TraceWriter(path, spec, weights=weights, provenance=provenance) as writer:
        recorder = Recorder(model, spec, writer.write, weights=weights, end_tokens=end_tokens)
        recorder.label(task)
        with recorder.attached():
            yield recorder
        recorder.flush()
        if not recorder.tokens:
            raise Location("record").error("nothing was recorded", remedy="run the model in it")
