"""Whether a checkpoint says that its weights are quantised, and where.

It stands in one of several keys of ``config.json`` or in a file beside it, depending on the tool
that quantised:

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prism_plan.io.json import parse_json
from prism_plan.io.text_files import read_text
from prism_plan.sizes.weight_files import file_names

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
#: Keys of those files that name the algorithm or the width, the most specific first.
_ALGORITHM_KEYS = ("quant_algo", "quant_method", "bits", "w_bit")


class Quantisation(NamedTuple):
    """Where a checkpoint says that its weights are quantised.

    ``place`` is the key in ``file`` (empty: the file as a whole), ``found`` its value and what
    that means, for a message.
    """

    file: Path
    place: str
    found: str


def quantisation_key(values: Mapping[str, Any]) -> str:
    """The first key under which the values of a config say that it is quantised, or nothing.

    A null says that it is not. Any other value says that it is, even an empty one. Under
    ``quantization`` the form of ModelOpt is understood too.
    """
    for key in QUANTISATION_KEYS:
        value = values.get(key)
        if value is not None and not (key == "quantization" and _names_no_algorithm(value)):
            return key
    return ""


def quantisation_beside(folder: Path, *, gguf: bool = True) -> Quantisation | None:
    """Find a file beside ``config.json`` in ``folder`` that says that the weights are quantised.

    With ``gguf`` also GGUF files count as such, where there are no other weights.

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
            continue  # ModelOpt quantised only the cache, or nothing
        if isinstance(stated, Mapping):
            for key in _ALGORITHM_KEYS:
                if stated.get(key) is not None:
                    found = f"{stated[key]!r:.40}: the weights are quantised, by {tool}"
                    return Quantisation(path, place + key, found)
        return Quantisation(path, "", f"is there: the weights are quantised, by {tool}")
    weights = [
        name
        for name in (file_names(folder) if gguf else [])
        if name.endswith((".gguf", ".safetensors")) or name.startswith("pytorch_model")
    ]
    if weights and all(name.endswith(".gguf") for name in weights):
        found = "the weights are in GGUF, whose sizes config.json does not tell"
        return Quantisation(folder / weights[0], "", found)
    return None


def _names_no_algorithm(value: object) -> bool:
    """Whether ModelOpt's ``quantization`` object says that no weights are quantised.

    It does if ``quant_algo`` is there and null, and ``quantized_layers`` is empty or absent.
    """
    return (
        isinstance(value, Mapping)
        and "quant_algo" in value
        and value["quant_algo"] is None
        and not value.get("quantized_layers")
    )
