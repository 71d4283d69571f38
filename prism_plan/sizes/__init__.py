"""Sizes of MoE models, read where they stand: checkpoints, GGUF files, loaded models, configs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError, did_you_mean
from prism_plan.io.json import parse_json
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.text_files import read_text
from prism_plan.model import PRESETS, ModelSpec
from prism_plan.sizes.checkpoint_folder import cached_repository, model_name, quantisation_beside
from prism_plan.sizes.config import read_facts
from prism_plan.sizes.stored import spec_from_tensors


def load_model_spec(reference: str | os.PathLike[str]) -> ModelSpec:
    """Read the sizes of a model from whatever names it.

    Parameters
    ----------
    reference
        A preset (:data:`~prism_plan.model.PRESETS`); a checkpoint folder, whose safetensors headers
        are read; a ``.gguf`` file; a ``config.json``, which stands for its folder where weights lie
        beside it, and is built on PyTorch's meta device where none do (extra ``hf``); a spec file
        (:meth:`ModelSpec.to_json`); or a checkpoint on the Hugging Face Hub, ``ORG/NAME``.

    Raises
    ------
    InputError
        It is none of these; a file is missing, damaged or makes no sense; the model has no MoE
        layers; it is quantised, and no weights are there to tell their sizes.
    """
    text = os.fspath(reference)
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    try:
        folder, found = bool(text) and path.is_dir(), bool(text) and path.exists()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=text, remedy="give a readable file") from error
    if folder:
        return spec_of_folder(path)
    if found or text.endswith((".json", ".gguf")):
        return spec_from_gguf(path) if text.endswith(".gguf") else spec_from_file(path)
    if text.count("/") == 1 and not text.startswith(("/", ".", "~")):
        from prism_plan.sizes.hub import spec_from_hub

        return spec_from_hub(text)
    raise InputError(
        f"{text!r} is neither a preset nor a file{did_you_mean(text, PRESETS)}",
        expected="a checkpoint folder or hub id, a .gguf file, a config.json, a spec file or a "
        f"preset ({', '.join(PRESETS)})",
    )


#: The older name.
load_model = load_model_spec


def spec_from_gguf(path: Path) -> ModelSpec:
    """Read the sizes of a GGUF file; see :func:`prism_plan.sizes.gguf_file.spec_from_gguf`."""
    from prism_plan.sizes.gguf_file import spec_from_gguf

    return spec_from_gguf(path)


def spec_from_file(path: Path) -> ModelSpec:
    """Read the sizes that a JSON file tells: a spec of ours, or a ``config.json``.

    A file named ``config.json`` beside weights stands for its folder. Without weights its model is
    called after the folder or, in the hub's cache, after the repository
    (:func:`~prism_plan.sizes.checkpoint_folder.model_name`), as it is when the checkpoint is run.
    Of other files ``_name_or_path`` in it names the model, else the file.

    Raises
    ------
    InputError
        The file cannot be read or is not JSON; see :func:`load_model_spec`.
    """
    values = parse_json(read_text(path), path, non_finite=True)
    if is_spec(values):
        return spec_from_json(values, path)
    whole = path.name == "config.json"
    if whole and _weights(path.parent):
        return spec_of_folder(path.parent)
    from prism_plan.sizes.meta import spec_from_config

    for folder in dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)):
        _require_unquantised(folder)
    name = (
        model_name(path.parent) if whole else cached_repository(Path(os.path.abspath(path)).parent)
    )
    named = isinstance(values, dict) and values.get("_name_or_path")
    return spec_from_config(values, source=path, name=name or ("" if named else path.stem))


def is_spec(values: Any) -> bool:
    """Whether a JSON value is meant as a spec of ours, not as a ``config.json``."""
    keys = {"moe_layers", "expert_bytes", "dense_bytes"}
    return isinstance(values, dict) and "model_type" not in values and bool(keys & set(values))


def spec_of_folder(folder: Path) -> ModelSpec:
    """Read the sizes of a checkpoint folder.

    From the headers of its safetensors files; else from its only GGUF file; else from its
    ``config.json`` alone.

    Raises
    ------
    InputError
        See :func:`load_model_spec`.
    """
    weights = _weights(folder)
    if weights and weights[0].endswith(".gguf"):
        return spec_from_gguf(_one_gguf(folder, weights))
    config = folder / "config.json"
    if not weights:
        return spec_from_file(config)
    from prism_plan.sizes.safetensors_headers import tensors_of_folder

    facts = read_facts(parse_json(read_text(config), config, non_finite=True), source=config)
    tensors = tensors_of_folder(folder)
    return spec_from_tensors(tensors, facts, name=model_name(folder), source=folder)


def _weights(folder: Path) -> list[str]:
    """Files of weights whose headers can be read: safetensors, or GGUF where there are none."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # config.json can be read where its folder cannot be listed
        return []
    for ending in (".safetensors", ".gguf"):
        found = [name for name in names if name.endswith(ending)]
        if found:
            return found
    return []


def _one_gguf(folder: Path, names: list[str]) -> Path:
    stems = {name.partition("-00001-of-")[0] for name in names if "-of-" not in name}
    stems |= {name.rpartition("-of-")[0].rpartition("-")[0] for name in names if "-of-" in name}
    if len(stems) > 1:
        raise InputError(
            f"{' and '.join(names[:2])}{' and others' if len(names) > 2 else ''}",
            source=folder,
            expected="one GGUF model in the folder",
            remedy="give the file",
        )
    return folder / names[0]


def _require_unquantised(folder: Path) -> None:
    """Refuse a folder without weights in which a file says that they are quantised."""
    from prism_plan.sizes.meta import CHECKPOINT_OR_BY_HAND

    found = quantisation_beside(folder, gguf=False)
    if found is not None:
        raise InputError(
            found.found,
            source=found.file,
            place=found.place,
            remedy=CHECKPOINT_OR_BY_HAND,
        )
