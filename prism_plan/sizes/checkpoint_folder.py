"""Read the sizes of a model that lies on this machine: a checkpoint folder or one of its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prism_plan.io.json import parse_json
from prism_plan.io.location import Location
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.text_files import read_text
from prism_plan.model_spec import ModelSpec
from prism_plan.sizes.checkpoint_name import cached_repository, model_name
from prism_plan.sizes.gguf_file import spec_from_gguf
from prism_plan.sizes.meta_device import CHECKPOINT_OR_BY_HAND, spec_from_config
from prism_plan.sizes.model_facts import read_facts
from prism_plan.sizes.quantisation import quantisation_beside
from prism_plan.sizes.safetensors_headers import tensors_of_folder
from prism_plan.sizes.stored_tensors import spec_from_tensors
from prism_plan.sizes.weight_files import file_names


def spec_from_file(path: Path) -> ModelSpec:
    """Read the model spec of a file: ``.gguf``, a spec of ours in JSON, or a ``config.json``.

    A file named ``config.json`` beside weights stands for its folder. From any other
    configuration the model is built on PyTorch's meta device, which needs the extra ``hf``. It
    is named as when the checkpoint is run (:func:`~prism_plan.sizes.checkpoint_name.model_name`)
    if the file's name is ``config.json``; else by its repository in the hub's cache, else by its
    ``_name_or_path``, else by the file.

    Raises
    ------
    InputError
        The file cannot be read or is not JSON; see :func:`~prism_plan.sizes.load.load_model_spec`.
    """
    if path.name.endswith(".gguf"):
        return spec_from_gguf(path)
    values = parse_json(read_text(path), path, non_finite=True)
    if _is_spec(values):
        return spec_from_json(values, path)
    of_folder = path.name == "config.json"
    if of_folder and _weights(path.parent):
        return spec_from_folder(path.parent)
    for folder in dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)):
        _require_unquantised(folder)
    folder = Path(os.path.abspath(path)).parent
    name = model_name(path.parent) if of_folder else cached_repository(folder)
    named = isinstance(values, dict) and values.get("_name_or_path")
    return spec_from_config(values, source=path, name=name or ("" if named else path.stem))


def _is_spec(values: Any) -> bool:
    """Whether a JSON value is a spec of ours rather than a ``config.json``."""
    keys = {"moe_layers", "expert_bytes", "dense_bytes"}
    return isinstance(values, dict) and "model_type" not in values and bool(keys & set(values))


def spec_from_folder(folder: Path) -> ModelSpec:
    """Read the model spec of a checkpoint folder.

    From the headers of its safetensors files; else from its only GGUF file; else from its
    ``config.json`` alone.

    Raises
    ------
    InputError
        See :func:`~prism_plan.sizes.load.load_model_spec`.
    """
    weights = _weights(folder)
    if weights and weights[0].endswith(".gguf"):
        return spec_from_file(_one_gguf(folder, weights))
    config = folder / "config.json"
    if not weights:
        return spec_from_file(config)
    facts = read_facts(parse_json(read_text(config), config, non_finite=True), source=config)
    tensors = tensors_of_folder(folder)
    return spec_from_tensors(tensors, facts, name=model_name(folder), source=folder)


def _weights(folder: Path) -> list[str]:
    """Files of weights whose headers can be read: safetensors, or GGUF where there are none."""
    names = file_names(folder)
    for ending in (".safetensors", ".gguf"):
        found = [name for name in names if name.endswith(ending)]
        if found:
            return found
    return []


def _one_gguf(folder: Path, names: list[str]) -> Path:
    stems = {name.partition("-00001-of-")[0] for name in names if "-of-" not in name}
    stems |= {name.rpartition("-of-")[0].rpartition("-")[0] for name in names if "-of-" in name}
    if len(stems) > 1:
        raise Location(folder).error(
            f"{' and '.join(names[:2])}{' and others' if len(names) > 2 else ''}",
            "one GGUF model in the folder",
            "give the file",
        )
    return folder / names[0]


def _require_unquantised(folder: Path) -> None:
    """Refuse a folder without weights in which a file says that they are quantised."""
    found = quantisation_beside(folder, gguf=False)
    if found is not None:
        raise Location(found.file, found.place).error(found.found, remedy=CHECKPOINT_OR_BY_HAND)
