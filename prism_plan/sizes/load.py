"""Read the sizes of a model from whatever names it: preset, folder, file or hub id."""

from __future__ import annotations

import os
from pathlib import Path

from prism_plan.errors import InputError, did_you_mean
from prism_plan.io.open_file import unreadable
from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.sizes.checkpoint_folder import spec_from_file, spec_from_folder
from prism_plan.sizes.hub import spec_from_hub


def load_model_spec(reference: str | os.PathLike[str]) -> ModelSpec:
    """Read the model spec that a reference names.

    Parameters
    ----------
    reference
        A preset (:data:`~prism_plan.model_spec.PRESETS`); a checkpoint folder, whose safetensors
        headers are read; a ``.gguf`` file; a ``config.json``, which stands for its folder where
        weights lie beside it, else the model is built on PyTorch's meta device (extra ``hf``); a
        spec file (:meth:`ModelSpec.to_json`); or a checkpoint on the Hugging Face Hub,
        ``ORG/NAME``.

    Raises
    ------
    InputError
        It is none of these; a file is missing, damaged or makes no sense; the model has no MoE
        layers; it is quantised, and there are no weights to read their sizes from.
    """
    text = os.fspath(reference)
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    try:
        folder, found = bool(text) and path.is_dir(), bool(text) and path.exists()
    except OSError as error:
        raise unreadable(error, text) from error
    if folder:
        return spec_from_folder(path)
    if found or text.endswith((".json", ".gguf")):
        return spec_from_file(path)
    if text.count("/") == 1 and not text.startswith(("/", ".", "~")):
        return spec_from_hub(text)
    raise InputError(
        f"{text!r} is neither a preset nor a file{did_you_mean(text, PRESETS)}",
        expected="a checkpoint folder or hub id, a .gguf file, a config.json, a spec file or a "
        f"preset ({', '.join(PRESETS)})",
    )
