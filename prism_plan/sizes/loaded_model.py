"""Read the sizes of a model that is in memory, or that was built on the meta device.

What the model would store is counted: its parameters and buffers in their dtypes, and a quantised
module (bitsandbytes, HQQ, torchao, …) as it is quantised. Shared parameters count once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prism_plan.model_spec import ModelSpec
from prism_plan.sizes.checkpoint_name import checkpoint_name
from prism_plan.sizes.model_facts import ModelFacts, read_facts
from prism_plan.sizes.stored_tensors import StoredTensor, spec_from_tensors
from prism_plan.torch_private import loaded_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def spec_from_loaded_model(model: PreTrainedModel, name: str = "") -> ModelSpec:
    """Read the model spec of a loaded model from its own parameters.

    It is named ``name``, else after the checkpoint that it was loaded from.

    Raises
    ------
    InputError
        The model has no MoE layers, or its sizes make no sense.
    """
    config = model.config
    checkpoint = os.fspath(loaded_from(config) or "")
    origin = checkpoint_name(checkpoint) if checkpoint else ""
    name = name or origin or str(config.model_type)
    facts = facts_of_model(model, {}, source=name)
    return spec_from_tensors(tensors_of_model(model, facts), facts, name=name, source=name)


def facts_of_model(
    model: PreTrainedModel, config_values: Mapping[str, Any], *, source: object
) -> ModelFacts:
    """Read the facts of a model of transformers.

    ``config_values`` are those of its language model's ``config.json``, where there is one; for
    other keys the defaults of the class are used. The dtype is that of the model.
    """
    whole, text = model.config, model.config.get_text_config(decoder=True)
    values = {**text.to_dict(), **config_values, "dtype": str(model.dtype).removeprefix("torch.")}
    values.pop("torch_dtype", None)
    if text is whole:
        return read_facts(values, source=source)
    tied = {"tie_word_embeddings": bool(getattr(whole, "tie_word_embeddings", False))}
    return read_facts({**tied, "text_config": values}, source=source)


def tensors_of_model(model: PreTrainedModel, facts: ModelFacts) -> Iterator[StoredTensor]:
    """List the tensors that a model would store.

    transformers holds the routers of some families in float32. They count in the model's dtype, as
    checkpoints store them.
    """
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or not hasattr(tensor, "element_size"):
            continue
        seen.add(id(tensor))
        shape = tuple(tensor.shape)
        router = (
            len(shape) == 2
            and shape[0] in facts.num_experts
            and shape[1] == facts.hidden_size
            and tensor.dtype.is_floating_point
            and "shared" not in name
        )
        size = tensor.numel() * facts.dtype_bytes if router else _bytes(tensor)
        yield StoredTensor(name, str(tensor.dtype).removeprefix("torch."), shape, size)


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor; a quantised one of torchao is made of several."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return int(tensor.numel()) * int(tensor.element_size())
    return sum(_bytes(getattr(tensor, part)) for part in parts()[0])
