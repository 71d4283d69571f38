"""Recording which experts a running Hugging Face model calls.

In transformers 5 every MoE family calls its experts module with the tokens' hidden states, the
chosen experts and their gate weights (``hidden_states, top_k_index, top_k_weights``; gpt-oss names
them ``router_indices, routing_weights``). Forward hooks read the last two; nothing of the model is
changed, so its output is the same to the bit.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.trace_writer import TraceWriter
from prism_plan.model import ModelSpec
from prism_plan.profiling.decoder_cache import cache_argument, cache_of
from prism_plan.provenance import stamped
from prism_plan.sizes.loaded import spec_of
from prism_plan.trace import PHASES, TokenBatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?experts$")
PREFILL, DECODE = PHASES.index("prefill"), PHASES.index("decode")
#: Recorded steps are kept on their device until they hold so many tokens, padding included.
FLUSH_TOKENS = 4096

Sink = Callable[[TokenBatch, Sequence[str]], None]


@dataclass
class _Step:
    """One forward pass of B sequences of S new tokens, as the hooks saw it, still on its device.

    ``mask`` bool [B, S] or ``None``; ``fed`` int64 [B], the token fed in a decode step;
    ``experts`` and ``weights``: for each MoE layer [B·S, K]. ``tasks`` is set where the sequences
    are new.
    """

    shape: tuple[int, int]
    tasks: tuple[str, ...] | None
    mask: torch.Tensor | None
    fed: torch.Tensor | None
    experts: list[torch.Tensor]
    weights: list[torch.Tensor] | None

    @property
    def decode(self) -> bool:
        """One token for each sequence of the cache."""
        return self.tasks is None and self.shape[1] == 1


class Recorder:
    """Turns forward passes into token batches. Made by :func:`record`.

    A pass without cached tokens begins new requests, one for each sequence of the batch; passes
    that follow go on with them. A pass of one token after cached ones is a decode step, any other
    is prefill (so a last chunk of one token of a prompt counts as decode). Padding is what the
    attention mask says. A sequence that is fed an end-of-sequence or padding token in a decode step
    has ended: what ``generate`` feeds it from then on is not recorded, until it is fed more than
    one token again. Passes that do not go on where the last one ended are refused, for their rows
    would be wrong: without a cache, with a cache that was cut, reordered or made elsewhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        sink: Sink,
        *,
        weights: bool,
        end_tokens: Sequence[int] | None = None,
    ) -> None:
        self.spec = spec
        self.tokens = 0
        self.num_requests = 0
        self._model = model
        self._sink = sink
        self._weights = weights
        self._label: str | tuple[str, ...] = "unlabelled"
        self._tasks: list[str] = []
        self._ends = _end_tokens(model) if end_tokens is None else list(end_tokens)
        self._steps: list[_Step] = []
        self._held = 0
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._step: tuple[tuple[int, int], bool, Any, Any] | None = None
        # of the last pass: its tokens if they were new sequences, its cache, the tokens in that
        self._ids: Any = None
        self._cache: Any = None
        self._fed = -1
        # of the sequences in the cache, as far as steps were flushed
        self._requests = np.zeros(0, np.int64)
        self._codes = np.zeros(0, np.int32)
        self._lengths = np.zeros(0, np.int64)
        self._alive = np.zeros(0, bool)

    def label(self, tasks: str | Sequence[str]) -> None:
        """Say which task the requests that begin from now on are of: one for all, or one each."""
        names = (tasks,) if isinstance(tasks, str) else tuple(tasks or ())
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise InputError(
                f"{tasks!r:.60}",
                source="label",
                expected="the name of a task, or one for each sequence",
            )
        self._label = tasks if isinstance(tasks, str) else names

    # ------------------------------------------------------------------------------------- hooks

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the decoder and on the experts modules, for the time of the block."""
        modules = expert_modules(self._model)
        if tuple(modules) != self.spec.moe_layers:
            raise InputError(
                f"experts modules in layers {', '.join(map(str, modules)) or '(none)'}",
                source=self.spec.name,
                expected=f"one in each MoE layer, {self.spec.layers_text()}",
                remedy="a model with experts of its own code cannot be recorded",
            )
        decoder: Any = self._model.get_decoder()
        cache_argument(decoder)  # one that is not known is refused
        handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        for at, module in enumerate(modules.values()):
            handles.append(module.register_forward_pre_hook(self._hook(at), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, at: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = list(args[1:])
            index = _argument(rest, kwargs, "top_k_index", "router_indices")
            weights = _argument(rest, kwargs, "top_k_weights", "routing_weights")
            self._seen[at] = (index, weights)

        return hook

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = {}
        if len(args) > 1:  # seldom: by name is how models call their decoder
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids = args[0] if args else kwargs.get("input_ids")
        inputs = ids if ids is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise InputError("neither input_ids nor inputs_embeds", source="forward pass")
        shape = (int(inputs.shape[0]), int(inputs.shape[1]))
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            _require_start(kwargs.get("position_ids"))
        self._follow(shape, past, cache, ids)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if getattr(mask, "ndim", 0) != 2:
                raise InputError(
                    "an attention mask that is not [sequences, tokens]",
                    source="forward pass",
                    remedy="give the two-dimensional mask, which tells padding, and generate "
                    "without a static cache, which replaces it",
                )
            mask = mask[:, -shape[1] :].bool()
        fed = ids[:, 0] if ids is not None and past > 0 and shape[1] == 1 else None
        self._step = (shape, past == 0, mask, fed)

    def _follow(self, shape: tuple[int, int], past: int, cache: Any, ids: Any) -> None:
        """Refuse passes that do not go on where the last one ended: their rows would be wrong."""
        if past == 0:
            before = self._ids
            if (
                before is not None
                and ids is not None
                and tuple(ids.shape) == (before.shape[0], before.shape[1] + 1)
                and bool((ids[:, :-1] == before).all())
            ):
                raise InputError(
                    "sequences are fed again with one more token",
                    source="forward pass",
                    remedy="generate with use_cache=True, or every token counts many times",
                )
            self._ids, self._cache, self._fed = ids, cache, shape[1]
            return
        if past != self._fed or (self._cache is not None and cache is not self._cache):
            raise InputError(
                f"a cache of {past} tokens, where {self._fed} were recorded last",
                source="forward pass",
                remedy="record sequences from their start, one batch after the other, without "
                "speculative decoding or a cache that is cut",
            )
        self._ids, self._cache, self._fed = None, cache, past + shape[1]

    def _after(self, module: Any, args: Any, output: Any) -> None:
        assert self._step is not None
        shape, fresh, mask, fed = self._step
        layers = self.spec.num_layers
        if len(self._seen) != layers:
            missing = next(at for at in range(layers) if at not in self._seen)
            raise InputError(
                f"the experts module of layer {self.spec.moe_layers[missing]} was not called",
                source=self.spec.name,
                remedy="load the model without replacement kernels",
            )
        seen, self._seen = self._seen, {}
        self._steps.append(
            _Step(
                shape=shape,
                tasks=self._labels(shape[0]) if fresh else None,
                mask=mask,
                fed=fed,
                experts=[seen[at][0] for at in range(layers)],
                weights=[seen[at][1] for at in range(layers)] if self._weights else None,
            )
        )
        self._held += shape[0] * shape[1]
        if self._held >= FLUSH_TOKENS:
            self.flush()

    def _labels(self, sequences: int) -> tuple[str, ...]:
        if isinstance(self._label, str):
            return (self._label,) * sequences
        if len(self._label) != sequences:
            raise InputError(
                f"{len(self._label)} labels for {sequences} sequences",
                source="Recorder.label",
                expected="one task for all, or one for each sequence of the batch",
            )
        return self._label

    # ----------------------------------------------------------------------------------- writing

    def flush(self) -> None:
        """Hand everything recorded so far to the sink."""
        steps, self._steps, self._held = self._steps, [], 0
        # passes are many and small: those of one kind in a row are taken together
        for kind, alike in itertools.groupby(steps, key=_kind):
            group = list(alike)
            if kind[0] == "new":
                parts = [[_merged(group)]]
            else:
                parts = [group] if kind[0] == "decode" else [[step] for step in group]
            for part in parts:
                batch = self._batch(part)
                if len(batch):
                    self.tokens += len(batch)
                    self._sink(batch, self._tasks)
            if kind[0] == "new":  # only the last pass has its sequences in the cache
                last = -group[-1].shape[0]
                self._requests, self._codes = self._requests[last:], self._codes[last:]
                self._lengths, self._alive = self._lengths[last:], self._alive[last:]

    def _batch(self, steps: list[_Step]) -> TokenBatch:
        """The tokens of one pass, or of decode steps in a row; rows step by step."""
        first = steps[0]
        sequences, length = first.shape
        if first.tasks is not None:
            self._begin(first.tasks)
        elif not first.decode:
            self._alive[:] = True  # another turn
        if first.tasks is None and len(self._requests) != sequences:
            raise InputError(
                f"{sequences} sequences go on with a cache of {len(self._requests)}",
                source="forward pass",
                expected="the same sequences in the same order",
            )
        # real [steps, B, S]: neither padding nor fed after the sequence's end
        real = np.ones((len(steps), sequences, length), bool)
        for row, step in zip(real, steps, strict=True):
            if step.mask is not None:
                row[:] = step.mask.cpu().numpy()
        if first.decode and first.fed is not None and self._ends:
            fed = _stack([step.fed for step in steps if step.fed is not None])
            ended = np.logical_or.accumulate(np.isin(fed, self._ends), axis=0)
            real &= (self._alive & ~ended)[:, :, None]
            self._alive &= ~ended[-1]
        else:
            real &= self._alive[None, :, None]
        in_order = real.swapaxes(0, 1).reshape(sequences, -1)  # [B, steps · S]
        position = self._lengths[:, None] + np.cumsum(in_order, axis=1) - 1
        position = position.reshape(sequences, len(steps), length).swapaxes(0, 1)
        self._lengths += in_order.sum(axis=1)
        keep = real.ravel()
        number = int(keep.sum())
        shape = (len(steps) * sequences * length, self.spec.num_layers, self.spec.top_k)
        weights = None
        if first.weights is not None:
            found = [_stack(step.weights or [], number=True) for step in steps]
            weights = self._rows(found, shape)[keep].astype(np.float16)
        experts = self._rows([_stack(step.experts) for step in steps], shape)[keep]
        return TokenBatch(
            request=np.tile(np.repeat(self._requests, length), len(steps))[keep].astype(np.int32),
            position=position.ravel()[keep].astype(np.int32),
            phase=np.full(number, DECODE if first.decode else PREFILL, np.int8),
            task=np.tile(np.repeat(self._codes, length), len(steps))[keep],
            experts=experts.astype(np.uint16),
            weights=weights,
        )

    def _rows(self, by_step: list[npt.NDArray[Any]], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """[steps][L, B·S, K] as [steps · B · S, L, K]."""
        layers = self.spec.num_layers
        stacked = np.stack([step.reshape(layers, -1, self.spec.top_k) for step in by_step])
        return stacked.swapaxes(1, 2).reshape(shape)

    def _begin(self, tasks: tuple[str, ...]) -> None:
        for task in tasks:
            if task not in self._tasks:
                self._tasks.append(task)
        self._codes = np.array([self._tasks.index(task) for task in tasks], np.int32)
        self._requests = self.num_requests + np.arange(len(tasks))
        self.num_requests += len(tasks)
        self._lengths = np.zeros(len(tasks), np.int64)
        self._alive = np.ones(len(tasks), bool)


def _kind(step: _Step) -> tuple[str, tuple[int, int], bool, bool]:
    name = "new" if step.tasks is not None else "decode" if step.decode else "prefill"
    return name, step.shape, step.mask is None, step.fed is None


def _merged(steps: list[_Step]) -> _Step:
    """Passes over new sequences of one length as one pass over all of them."""
    import torch

    first = steps[0]
    if len(steps) == 1:
        return first
    layers = range(len(first.experts))
    masks = [step.mask for step in steps if step.mask is not None]
    weights = None
    if first.weights is not None:
        weights = [torch.cat([(step.weights or [])[at] for step in steps]) for at in layers]
    return _Step(
        shape=(sum(step.shape[0] for step in steps), first.shape[1]),
        tasks=tuple(task for step in steps for task in step.tasks or ()),
        mask=torch.cat(masks) if masks else None,
        fed=None,
        experts=[torch.cat([step.experts[at] for step in steps]) for at in layers],
        weights=weights,
    )


def _stack(tensors: list[torch.Tensor], *, number: bool = False) -> npt.NDArray[Any]:
    """Tensors of one shape, on whatever devices, as one array; gate weights become float32."""
    import torch

    device = tensors[0].device
    stacked = torch.stack([tensor.to(device) for tensor in tensors])
    if number:
        stacked = stacked.float()
    elif device.type != "cpu":
        stacked = stacked.to(torch.int32)  # half the way over the bus
    array: npt.NDArray[Any] = stacked.detach().cpu().numpy()
    return array


def _require_start(positions: Any) -> None:
    """Refuse a pass without cached tokens that does not begin at the start of its sequences.

    It has a cache of a kind or name that is not known here; its tokens would become requests of
    their own. A padded sequence's real tokens still begin at position 0.
    """
    if positions is not None and positions.numel() and int(positions.min()) > 0:
        raise InputError(
            f"tokens from position {int(positions.min())} on without a cache",
            source="forward pass",
            expected="a cache in past_key_values or cache, or sequences from their start",
            remedy="generate with use_cache=True, with a release of transformers that works",
        )


def _argument(rest: list[Any], kwargs: dict[str, Any], *names: str) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    if not rest:
        raise InputError(
            f"an experts module called without {' or '.join(names)}",
            source="forward pass",
            remedy="this model's code cannot be recorded",
        )
    return rest.pop(0)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    config = getattr(model, "generation_config", None) or model.config
    ends = getattr(config, "eos_token_id", None)
    found = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]
    # what generate feeds a sequence that ended for another reason, such as a stop string
    padding = getattr(config, "pad_token_id", None)
    return found if padding is None else [*found, int(padding)]


def expert_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The modules that hold routed experts, by decoder layer, ascending."""
    found = {}
    for name, module in model.named_modules():
        match = EXPERTS.search(name)
        if match:
            found[int(match.group(1))] = module
    return dict(sorted(found.items()))


@contextlib.contextmanager
def record(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    task: str = "unlabelled",
    weights: bool = False,
    name: str = "",
    end_tokens: Sequence[int] | None = None,
) -> Iterator[Recorder]:
    """Record every forward pass and ``generate`` call of the block into a trace file.

    ::

        with record(model, "trace.parquet") as recorder:
            recorder.label(["law", "summary"])      # one task for each sequence of the batch
            model.generate(**inputs, max_new_tokens=32)

    The file appears when the block ends well, and not at all when it fails. See :class:`Recorder`
    for what is a request, a decode step and padding. With beam search every beam is a request.
    ``end_tokens`` are those that end a sequence, if not the generation configuration's; give ``()``
    where ``generate`` is told to go on beyond them.

    Raises
    ------
    InputError
        The model has no MoE layers or calls its experts in a way that cannot be recorded, or
        nothing was recorded.
    OutputError
        The file cannot be written.
    """
    spec = spec_of(model, name)
    provenance = stamped({"source": "record", "checkpoint": spec.name})
    with TraceWriter(path, spec, weights=weights, provenance=provenance) as writer:
        recorder = Recorder(model, spec, writer.write, weights=weights, end_tokens=end_tokens)
        recorder.label(task)
        with recorder.attached():
            yield recorder
        recorder.flush()
        if not recorder.tokens:
            raise InputError("nothing was recorded", source="record", remedy="run the model in it")
