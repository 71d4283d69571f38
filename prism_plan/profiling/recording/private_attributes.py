"""Private attributes of PyTorch and transformers that recording reads, and the versions read.

They only refuse models that would be recorded wrong; where one is missing nothing is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_plan.io.location import Location

if TYPE_CHECKING:
    import torch


def require_uncompiled(model: torch.nn.Module) -> None:
    """Refuse compiled modules: hooks may be left out, and graphs overwrite what hooks kept.

    ``Module._compiled_call_impl`` is set by ``module.compile()``, ``_orig_mod`` is the module
    wrapped by ``torch.compile(module)`` (PyTorch 2.11).

    Raises
    ------
    InputError
        Names the module.
    """
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise Location("record").error(
                f"{name or 'the model'} is compiled",
                "a model that runs as written",
                "record before torch.compile",
            )


def is_expert_parallel(module: torch.nn.Module) -> bool:
    """Whether transformers has spread the experts of a module over processes.

    5.24 sets ``_is_expert_parallel`` on the module; before that its parameters are DTensors.
    """
    if getattr(module, "_is_expert_parallel", False):
        return True
    return any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False))
