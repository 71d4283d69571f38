"""Loads the dense part of a checkpoint as a model whose routed experts are placed elsewhere.

The model is made without weights; its dense weights are read one by one, and its experts modules
are replaced, so that routed experts take memory only in the slots of an
:class:`~runtime_adapter.weights.expert_store.ExpertStore`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from prism_plan.errors import InputError, PrismError
from prism_plan.profiling.recording.decoder_cache import cache_argument
from prism_plan.profiling.recording.expert_modules import find_experts
from runtime_adapter.moe.placed_experts import ExpertBackend, PlacedExperts
from runtime_adapter.torch_private import (
    generation_config_of_model,
    ignorable_tensors,
    init_buffers,
    set_tensor,
)
from runtime_adapter.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Old releases of transformers stored it for every layer; new ones compute it.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


def load_placed_model(
    checkpoint: Checkpoint,
    backend: ExpertBackend,
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
    with torch.no_grad(), _silenced_warnings(), _translated_errors(checkpoint):
        model = _empty_model(checkpoint, dtype)
        _replace_experts(model, checkpoint, backend)
        missing = _read_dense(model, checkpoint, device)
        init_buffers(model, device)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        _configure_generation(model, checkpoint)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(f"{name} has no value", source=checkpoint.folder)
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
    model: PreTrainedModel, checkpoint: Checkpoint, backend: ExpertBackend
) -> None:
    found = find_experts(model)
    for position, experts in enumerate(found.values()):
        parent, _, last = experts.name.rpartition(".")
        setattr(model.get_submodule(parent), last, PlacedExperts(position, backend))
    if tuple(found) != checkpoint.spec.moe_layers:
        raise InputError(
            f"transformers has experts in layers {', '.join(map(str, found)) or '(none)'}",
            source=checkpoint.folder,
            expected=f"them in layers {checkpoint.spec.layers_text()}",
        )


def _read_dense(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> set[str]:
    """Read every stored weight and buffer; returns the names of tied ones that are not stored."""
    expected = dict(model.state_dict(keep_vars=True))
    stored = set(checkpoint.dense_names())
    _refuse_unknown_tensors(model, checkpoint, stored - expected.keys())
    missing = expected.keys() - stored
    ties = model.all_tied_weights_keys.items()
    partners = {a: b for tie in ties for a, b in (tie, tie[::-1])}
    for name in sorted(missing):
        if name not in partners or partners[name] in missing:
            file, _ = checkpoint.location(name)
            raise InputError(
                f"tensor {name} is missing",
                source=file,
                expected=f"shape {list(expected[name].shape)}",
                remedy="copy or download the checkpoint again",
            )
    for name in sorted(stored & expected.keys()):
        shape = tuple(expected[name].shape)
        if checkpoint.dense_shape(name) != shape:
            file, inside = checkpoint.location(name)
            raise InputError(
                f"shape {list(checkpoint.dense_shape(name))}",
                source=file,
                place=inside,
                expected=f"{list(shape)}, as config.json says",
            )
        # the model was made in `dtype`; tensors that it has in another (gates) keep theirs
        set_tensor(model, name, checkpoint.read(name).to(device=device, dtype=expected[name].dtype))
    return set(missing)


def _refuse_unknown_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, names: set[str]
) -> None:
    """Refuse stored tensors that the model does not have: they are another model's."""
    ignorable = [_COMPUTED, *ignorable_tensors(model)]
    for name in sorted(names):
        if not any(pattern.search(name) for pattern in ignorable):
            file, inside = checkpoint.location(name)
            raise InputError(
                "no tensor of this model",
                source=file,
                place=inside,
                expected=f"tensors of {type(model).__name__} with this config.json",
            )


def _configure_generation(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Settings of ``generate`` from their file, else from config.json, as transformers does."""
    from transformers import GenerationConfig

    if (checkpoint.folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    else:
        config = generation_config_of_model(checkpoint.folder)
    model.generation_config = config


@contextlib.contextmanager
def _translated_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """In the block, the many kinds of exceptions that transformers raises become InputError."""
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
def _silenced_warnings() -> Iterator[None]:
    """In the block, transformers does not warn of weights that are not stored here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
