"""Every use of parts of torch and transformers that neither documents: nothing else touches them.

Read in torch 2.13.0 and transformers 5.24.0, the versions of .ci/constraints.txt; where another one
differs, tests/runtime_adapter/test_torch_private.py says in what. What is used, and why nothing
public does:

* ``ProcessGroupGloo._Options``: ``init_process_group`` makes one group for all processes, and a
  group of two that is made from it cannot outlive the others' failures;
* ``Module._parameters``, ``_buffers``, ``_non_persistent_buffers_set``: a tensor on the meta device
  is replaced by one of another device, which ``setattr`` refuses for buffers;
* ``Module._modules`` of a copy: ``copy.copy`` shares it with the original, whose parts must stay;
* ``PreTrainedModel._is_stateful``: whether a model keeps states that are no keys and values;
* ``PreTrainedModel._init_weights``, ``_keys_to_ignore_on_load_unexpected``, the mark
  ``_is_hf_initialized`` and ``from_pretrained(_from_model_config=...)``: what ``from_pretrained``
  does itself, for a model whose weights are not all loaded.
"""

from __future__ import annotations

import copy
import datetime
import os
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# --------------------------------------------------------------------------------- process groups


def gloo_device(interface: str) -> Any:
    """The device by which gloo uses a network interface; RuntimeError where it cannot."""
    return dist.ProcessGroupGloo.create_device(interface=interface)


def gloo_pair(store: dist.Store, rank: int, device: Any, timeout_s: float) -> dist.ProcessGroupGloo:
    """A gloo group of two ranks; waits up to ``timeout_s`` for the other one.

    Raises
    ------
    RuntimeError
        The other rank does not come.
    """
    options = dist.ProcessGroupGloo._Options()
    options._devices = [device]
    options._threads = 1
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return dist.ProcessGroupGloo(store, rank, 2, options)


def nccl_pair(store: dist.Store, rank: int, device: torch.device, timeout_s: float) -> Any:
    """An NCCL group of two ranks on a card of this machine."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    with torch.cuda.device(device):
        return dist.ProcessGroupNCCL(store, rank, 2, options)


# ----------------------------------------------------------------------------------------- models


def set_tensor(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a loaded tensor in the place of a parameter or buffer, whatever its device.

    It is marked as loaded, so that :func:`init_buffers` leaves it as it is.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        value = torch.nn.Parameter(value, requires_grad=False)
        module._parameters[last] = value
    else:
        module._buffers[last] = value
    value._is_hf_initialized = True


def init_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give values to the buffers that no checkpoint stores, by the model's own initialisation."""
    for module in model.modules():
        names = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            model._init_weights(module)  # skips tensors that are marked as loaded


def ignorable_tensors(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """Names of stored tensors that transformers ignores for this model, as patterns."""
    return [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]


def shallow_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with the same tensors, whose submodules can be replaced without the original's."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether a model keeps states beside keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def generation_config_of_model(folder: os.PathLike[str]) -> Any:
    """The generation settings that a checkpoint's ``config.json`` implies."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(
        folder, local_files_only=True, config_file_name="config.json", _from_model_config=True
    )
