"""Every use that prism_plan makes of undocumented parts of torch and transformers.

Read in torch 2.13.0 and transformers 5.24.0, the versions of .ci/constraints.txt; where another one
differs, tests/test_torch_private.py says in what. The runtime has a module of this name of its own.
Nothing is imported here: all are attributes of models and classes that callers have loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module is compiled, so that its hooks may be left out.

    ``Module.compile()`` sets ``_compiled_call_impl``; ``torch.compile(module)`` wraps the module,
    which is then ``_orig_mod``.
    """
    return bool(getattr(module, "_compiled_call_impl", None)) or hasattr(module, "_orig_mod")


def is_expert_parallel(module: torch.nn.Module) -> bool:
    """Whether transformers has spread the experts of a module over processes.

    5.24 sets ``_is_expert_parallel`` on the module; before that its parameters are DTensors.
    """
    if getattr(module, "_is_expert_parallel", False):
        return True
    return any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False))


def model_from_config(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> Any:
    """A model of the class ``kind``, as ``AutoModel.from_config`` makes it for its own classes."""
    return kind._from_config(config, dtype=dtype)


def decode_special_floats(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Infinities and NaN as numbers, which transformers writes as words into ``config.json``."""
    decoded: dict[str, Any] = kind._decode_special_floats(dict(values))
    return decoded


def loaded_from(config: Any) -> Any:
    """The folder or hub id that a configuration was loaded from, or something empty."""
    return getattr(config, "_name_or_path", "")
