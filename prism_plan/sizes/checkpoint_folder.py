"""What a checkpoint tells outside the sizes in its ``config.json``.

Two things: what the model is called, and that its weights are quantised. The second stands in one
of several keys of ``config.json`` or in a file beside it, depending on the tool that quantised:

============================  ====================================================
``quantization_config``       key; transformers and the tools that write its form
``compression_config``        key; compressed-tensors before it took the key above
``quantization``              key; MLX
``hf_quant_config.json``      file; NVIDIA ModelOpt
``quantize_config.json``      file; AutoGPTQ and GPTQModel
``quant_config.json``         file; AutoAWQ
``quantization_config.json``  file; ExLlamaV3, AutoRound
``*.gguf``                    weights of llama.cpp, where a folder holds no others
============================  ====================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prism_plan.io.json import parse_json
from prism_plan.io.text_files import read_text

#: Keys of config.json under which a checkpoint says that it is quantised, and who writes them.
QUANTISATION_KEYS = {
    "quantization_config": "transformers",
    "compression_config": "compressed-tensors",
    "quantization": "MLX",
}
#: Files beside config.json that say so, and who writes them.
QUANTISATION_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quantization_config.json": "ExLlamaV3 or AutoRound",
}
#: Keys of those files that tell the algorithm or the width, the most telling first.
_ALGORITHM_KEYS = ("quant_algo", "quant_method", "bits", "w_bit")

#: A commit of a repository, by which the hub's cache names the folder of a snapshot.
_COMMIT = re.compile(r"[0-9a-f]{40}")


# ------------------------------------------------------------------------------------------ names


def model_name(folder: str | os.PathLike[str]) -> str:
    """Tell what a model is called whose checkpoint lies in ``folder``.

    In the hub's cache (``models--ORG--NAME/snapshots/COMMIT``) it is the repository's NAME, so
    that a model has one name however it is given. A snapshot outside of such a cache is called
    after the folder that holds ``snapshots``. Any other folder gives its own name, that of the
    folder itself where ``folder`` is a link to it or a relative path. Empty for a root folder.
    """
    given, real = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))
    repository = cached_repository(given) or cached_repository(real)
    if repository:
        return repository
    if real.parent.name == "snapshots" and _COMMIT.fullmatch(real.name):
        return real.parent.parent.name or real.name
    return real.name


def checkpoint_name(checkpoint: str) -> str:
    """Tell what the model of a checkpoint is called: a folder, or a hub id ``ORG/NAME``."""
    if os.path.isdir(checkpoint):
        return model_name(checkpoint)
    return cached_repository(Path(os.path.abspath(checkpoint))) or Path(checkpoint).name


def cached_repository(folder: Path) -> str:
    """Tell the NAME of ``models--ORG--NAME`` for one of its folders; empty for other folders.

    ``folder`` is an absolute path: the folder of a snapshot, or the one of all blobs.
    """
    owner = folder.parent if folder.name == "blobs" else folder.parent.parent
    if folder.name != "blobs" and folder.parent.name != "snapshots":
        return ""
    kind, _, repository = owner.name.partition("--")
    # Names of organisations and repositories hold no double hyphen.
    return repository.rpartition("--")[2] if kind == "models" else ""


# ------------------------------------------------------------------------------- quantised weights


class Quantisation(NamedTuple):
    """Where a checkpoint says that its weights are quantised.

    ``place`` is the key in ``file`` (empty: the file as a whole), ``found`` its value and what
    that means, for a message.
    """

    file: Path
    place: str
    found: str


def quantisation_key(
    values: Mapping[str, Any], keys: Iterable[str] = tuple(QUANTISATION_KEYS)
) -> str:
    """Tell the first of the ``keys`` under which a config says that it is quantised, or nothing.

    A null says that it is not. Any other value says that it is, also an empty one: it is not
    guessed what that means. Under ``quantization`` the form of ModelOpt is known too.
    """
    for key in keys:
        value = values.get(key)
        if value is not None and not (key == "quantization" and _names_no_algorithm(value)):
            return key
    return ""


def quantisation_beside(folder: Path, *, gguf: bool = True) -> Quantisation | None:
    """Find a file in ``folder`` that says that the weights there are quantised.

    Parameters
    ----------
    folder
        Where ``config.json`` lies. Nothing is said of folders below it.
    gguf
        Whether GGUF files, where there are no other weights, count as such.

    Raises
    ------
    InputError
        Such a file is there and cannot be read, or is not JSON.

    """
    for name, tool in QUANTISATION_FILES.items():
        path = folder / name
        # A link into a cache that lost the file is an error when it is read, not an absent file.
        if not os.path.lexists(path) or path.is_dir():
            continue
        values = parse_json(read_text(path), path, non_finite=True)
        inner = values.get("quantization") if isinstance(values, Mapping) else None
        place, stated = ("quantization.", inner) if isinstance(inner, Mapping) else ("", values)
        if name == "hf_quant_config.json" and _names_no_algorithm(stated):
            continue  # ModelOpt quantised the cache alone, or nothing
        if isinstance(stated, Mapping):
            for key in _ALGORITHM_KEYS:
                if stated.get(key) is not None:
                    found = f"{stated[key]!r:.40}: the weights are quantised, by {tool}"
                    return Quantisation(path, place + key, found)
        return Quantisation(path, "", f"is there: the weights are quantised, by {tool}")
    weights = sorted(_weight_files(folder)) if gguf else []
    if weights and all(name.endswith(".gguf") for name in weights):
        found = "the weights are in GGUF, whose sizes config.json does not tell"
        return Quantisation(folder / weights[0], "", found)
    return None


def _names_no_algorithm(value: object) -> bool:
    """Whether a ``quantization`` in the form of ModelOpt says that no weights are quantised."""
    return (
        isinstance(value, Mapping)
        and "quant_algo" in value
        and value["quant_algo"] is None
        and not value.get("quantized_layers")
    )


def _weight_files(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:  # config.json can be read where its folder cannot be listed
        return []
    return [
        name
        for name in names
        if name.endswith((".gguf", ".safetensors")) or name.startswith("pytorch_model")
    ]
