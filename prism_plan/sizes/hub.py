"""Read the sizes of a checkpoint on the Hugging Face Hub without downloading its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_plan.io.json import parse_json
from prism_plan.io.location import Location
from prism_plan.io.text_files import read_text
from prism_plan.model_spec import ModelSpec
from prism_plan.sizes.checkpoint_folder import spec_from_folder
from prism_plan.sizes.checkpoint_name import checkpoint_name
from prism_plan.sizes.model_facts import read_facts
from prism_plan.sizes.stored_tensors import StoredTensor, spec_from_tensors

_NOT_THERE = "no such folder, and no checkpoint of that name can be had from the hub"


def spec_from_hub(repository: str) -> ModelSpec:
    """Read ``config.json`` and the safetensors headers of ``ORG/NAME``, some MB.

    Where the local cache holds the checkpoint it is read there, also without a network.

    Raises
    ------
    InputError
        ``huggingface_hub`` is not installed; there is no such repository, no access to it, no
        network; it has no safetensors files; see :func:`~prism_plan.sizes.load.load_model_spec`.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise Location(repository).error(
            "huggingface_hub is not installed",
            remedy="pip install 'prism-plan[hf]', or give a checkpoint folder",
        ) from error
    with _loading(repository, huggingface_hub):  # raises where it cannot be a name
        cached = huggingface_hub.try_to_load_from_cache(repository, "config.json")
    if isinstance(cached, str):
        folder = Path(cached).parent
        if any(folder.glob("*.safetensors")):
            return spec_from_folder(folder)
    with _loading(repository, huggingface_hub):
        config = huggingface_hub.hf_hub_download(repository, "config.json")
        stored = huggingface_hub.get_safetensors_metadata(repository)
    facts = read_facts(parse_json(read_text(config), config, non_finite=True), source=repository)
    return spec_from_tensors(
        _tensors(stored), facts, name=checkpoint_name(repository), source=repository
    )


def _tensors(stored: Any) -> Iterator[StoredTensor]:
    for name, file in stored.weight_map.items():
        tensor = stored.files_metadata[file].tensors[name]
        begin, end = tensor.data_offsets
        yield StoredTensor(name, tensor.dtype, tuple(tensor.shape), end - begin)


@contextlib.contextmanager
def _loading(repository: str, hub: Any) -> Iterator[None]:
    """Turn the exceptions of the hub's client, which are of many classes, into InputError."""
    remedy = "give a checkpoint folder, or a hub id and a network connection"
    try:
        yield
    except hub.errors.NotASafetensorsRepoError as error:
        found, remedy = "has no safetensors files", "give a .gguf file, or a checkpoint folder"
        raise Location(repository).error(found, remedy=remedy) from error
    except hub.errors.GatedRepoError as error:
        found = "the checkpoint is gated or private"
        remedy = "ask for access on its page and log in with: hf auth login"
        raise Location(repository).error(found, remedy=remedy) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise Location(repository).error(_NOT_THERE, remedy=remedy) from error
    except Exception as error:
        found = f"{_NOT_THERE} ({' '.join(str(error).split()):.100})"
        raise Location(repository).error(found, remedy=remedy) from error
