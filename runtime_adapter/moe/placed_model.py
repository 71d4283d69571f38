"""One server's part of a checkpoint: the dense model, and the experts that a placement gives it.

The model is made without weights; its dense weights are read one by one, and its experts modules
are replaced, so that routed experts take memory only in the slots of an
:class:`~runtime_adapter.weights.expert_store.ExpertStore`. Beyond dense weights and slots loading
needs room for one tensor or one expert at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prism_plan.errors import InputError, PrismError, did_you_mean
from prism_plan.model import require_same_model
from prism_plan.placement import Placement
from prism_plan.profiling.recording.decoder_cache import cache_argument
from prism_plan.profiling.recording.expert_modules import find_experts
from runtime_adapter.moe.placed_experts import Dispatcher, PlacedExperts
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.weights.expert_store import ExpertStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Stored by old releases for every layer; transformers computes it.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


# -------------------------------------------------------------------------------------- placement


def require_placed_model(
    placement: Placement, checkpoint: Checkpoint, *, source: object = "the placement"
) -> None:
    """Refuse a placement that was made for another model than the checkpoint's.

    Layers, experts, top-k and sizes must agree. The name need not: a checkpoint is called after its
    folder, which may have any name.

    Raises
    ------
    WrongModel
        Names the first field that differs, with both values.
    """
    model = dataclasses.replace(placement.model, name=checkpoint.spec.name)
    require_same_model(model, checkpoint.spec, source=source, other=checkpoint.folder)


def server_index(placement: Placement, name: str, *, source: object = "the placement") -> int:
    """The server of that name.

    Raises
    ------
    InputError
        There is none.
    """
    if name not in placement.servers:
        raise InputError(
            f"no server {name!r}{did_you_mean(name, placement.servers)}",
            source=source,
            expected=f"one of {', '.join(placement.servers)}",
        )
    return placement.servers.index(name)


def server_devices(gpus: int, device: str = "auto") -> list[torch.device]:
    """Where the GPUs of a server are: ``cuda:g`` each, one device for all, or the CPU.

    ``device`` is ``"auto"`` (CUDA where there is any, else the CPU), ``"cpu"``, ``"cuda"``, or one
    card such as ``"cuda:0"`` that all GPUs of the placement share.

    Raises
    ------
    InputError
        There are not so many CUDA devices.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if there else "cpu"
    if device == "cpu":
        return [torch.device("cpu")] * gpus
    found = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", device)
    if found is None:
        raise InputError(
            f"{device!r:.60}", parameter="device", expected="auto, cpu, cuda, or a card like cuda:0"
        )
    cards = list(range(gpus)) if found[1] is None else [int(found[1])] * gpus
    if max(cards, default=-1) >= there:
        raise InputError(
            f"{device} needs {max(cards) + 1} CUDA devices",
            parameter="device",
            expected=f"at most the {there} that are here",
            remedy="cuda:0 lets the server's GPUs share one card, cpu does without",
        )
    return [torch.device("cuda", card) for card in cards]


def load_experts(
    checkpoint: Checkpoint,
    placement: Placement,
    server: int,
    devices: Sequence[torch.device],
    dtype: torch.dtype | None = None,
) -> ExpertStore:
    """A store with the slots of a server, and the experts that the placement gives it.

    ``devices`` are those of the server's GPUs; ``dtype`` is the checkpoint's if not given.

    Raises
    ------
    InputError
        Too little memory, more experts than slots, or a file that cannot be read.
    """
    sizes = placement.model.expert_bytes_by_layer
    slots = list(placement.gpu_capacity[server])
    if not placement.model.equal_expert_bytes:  # then capacities are bytes
        slots = [capacity // max(sizes) for capacity in slots]
    dtype = checkpoint.dtype if dtype is None else dtype
    store = ExpertStore.create(checkpoint.experts, slots, devices, dtype)
    experts = checkpoint.spec.num_experts
    for gpu, index in enumerate(placement.gpus_of(server)):
        for layer, expert in np.argwhere(placement.on_gpu[index]).tolist():
            store.put(layer * experts + expert, gpu, checkpoint.expert(layer, expert))
    return store


# ------------------------------------------------------------------------------------------ model


def load_model(
    checkpoint: Checkpoint,
    dispatcher: Dispatcher,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The checkpoint's model with placed experts, ready for ``generate``.

    Everything but the routed experts equals, to the bit, what ``from_pretrained`` loads: weights in
    ``dtype`` (the checkpoint's if not given) but for those that transformers keeps in float32, tied
    weights, buffers, generation configuration.

    Raises
    ------
    InputError
        A tensor is missing, of another shape, or none of the model's; transformers cannot make the
        model; the device cannot be used; the decoder takes no cache that is known.
    """
    dtype = checkpoint.dtype if dtype is None else dtype
    device = torch.device(device)
    with torch.no_grad(), _quiet(), _transformers(checkpoint):
        model = _empty_model(checkpoint, dtype)
        _replace_experts(model, checkpoint, dispatcher)
        missing = _read_dense(model, checkpoint, device)
        _compute_buffers(model, device)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        _configure_generation(model, checkpoint)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if left:
        raise InputError(f"{left[0]} has no value", source=checkpoint.folder)
    cache_argument(model.get_decoder())  # without one, every step would be a prefill of all tokens
    model.requires_grad_(False)
    model.eval()
    return model


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, where tensors have shapes and no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    model.name_or_path = str(checkpoint.folder)
    return model


def _replace_experts(
    model: PreTrainedModel, checkpoint: Checkpoint, dispatcher: Dispatcher
) -> None:
    found = find_experts(model)
    for position, experts in enumerate(found.values()):
        parent, _, last = experts.name.rpartition(".")
        setattr(model.get_submodule(parent), last, PlacedExperts(position, dispatcher))
    if tuple(found) != checkpoint.spec.moe_layers:
        raise InputError(
            f"transformers has experts in layers {', '.join(map(str, found)) or '(none)'}",
            source=checkpoint.folder,
            expected=f"them in layers {checkpoint.spec.layers_text()}",
        )


def _read_dense(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> set[str]:
    """Read every weight and stored buffer; the names of tied ones that are not stored."""
    wanted = dict(model.state_dict(keep_vars=True))
    stored = set(checkpoint.dense_names())
    _refuse_strangers(model, checkpoint, stored - wanted.keys())
    missing = wanted.keys() - stored
    ties = model.all_tied_weights_keys.items()
    partners = {a: b for tie in ties for a, b in (tie, tie[::-1])}
    for name in sorted(missing):
        if name not in partners or partners[name] in missing:
            file, _ = checkpoint.place(name)
            raise InputError(
                f"tensor {name} is missing",
                source=file,
                expected=f"shape {list(wanted[name].shape)}",
                remedy="copy or download the checkpoint again",
            )
    for name in sorted(stored & wanted.keys()):
        shape = tuple(wanted[name].shape)
        if checkpoint.dense_shape(name) != shape:
            file, inside = checkpoint.place(name)
            raise InputError(
                f"shape {list(checkpoint.dense_shape(name))}",
                source=file,
                place=inside,
                expected=f"{list(shape)}, as config.json says",
            )
        # the model was made in `dtype`; what it has in another, it has so on purpose (gates)
        _set(model, name, checkpoint.read(name).to(device=device, dtype=wanted[name].dtype))
    return set(missing)


def _refuse_strangers(model: PreTrainedModel, checkpoint: Checkpoint, names: set[str]) -> None:
    """A tensor that the model has no place for makes it another model."""
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    for name in sorted(names):
        if not any(pattern.search(name) for pattern in (_COMPUTED, *ignored)):
            file, inside = checkpoint.place(name)
            raise InputError(
                "no tensor of this model",
                source=file,
                place=inside,
                expected=f"tensors of {type(model).__name__} with this config.json",
            )


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give values to the buffers that no checkpoint stores, by the model's own initialisation."""
    for module in model.modules():
        names = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            # weights that were read are marked, and transformers initialises no marked weight
            model._init_weights(module)


def _configure_generation(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Settings of ``generate`` from their file, else from config.json, as transformers does."""
    from transformers import GenerationConfig

    where: dict[str, Any] = {"local_files_only": True}
    if not (checkpoint.folder / "generation_config.json").is_file():
        where |= {"config_file_name": "config.json", "_from_model_config": True}
    model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, **where)


def _set(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        value = torch.nn.Parameter(value, requires_grad=False)
        module._parameters[last] = value
    else:
        module._buffers[last] = value
    value._is_hf_initialized = True


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextlib.contextmanager
def _transformers(checkpoint: Checkpoint) -> Iterator[None]:
    """Failures within transformers, which come as many kinds of exception, as one line."""
    try:
        yield
    except PrismError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            "too little memory on the device for the dense part",
            source=checkpoint.folder,
            expected=f"{checkpoint.spec.dense_bytes:,} bytes free beside the experts",
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"cannot load the model: {error!s:.160}",
            source=checkpoint.folder,
            remedy="check the files in it",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of transformers about what is not stored here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
