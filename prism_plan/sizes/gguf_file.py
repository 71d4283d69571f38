"""Read the sizes of a GGUF file from its header: its tensors, and the keys on the model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_plan.input_limits import MAX_LAYERS, require_at_most
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import shown
from prism_plan.sizes.config_keys import MAX_SIZE
from prism_plan.sizes.gguf_header import MAX_GGUF_TENSORS, read_gguf_header
from prism_plan.sizes.model_facts import ModelFacts
from prism_plan.sizes.stored_tensors import StoredTensor, spec_from_tensors

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
#: Bytes of a number of the cache, which llama.cpp keeps in half precision.
_CACHE_BYTES = 2


def spec_from_gguf(path: str | os.PathLike[str]) -> ModelSpec:
    """Read the model spec of a GGUF file, or of all parts of a split one of which one is given.

    Raises
    ------
    InputError
        The package ``gguf`` is not installed; a file cannot be read, is truncated, or is no GGUF
        file; a part is missing; it has no MoE layers.
    """
    path = Path(path)
    tensors: list[StoredTensor] = []
    keys: dict[str, Any] = {}
    for part in _parts(path):
        own, found = read_gguf_header(part)
        keys = own | keys
        tensors += found
        require_at_most(len(tensors), MAX_GGUF_TENSORS, "tensors", source=part)
    match = _PART.fullmatch(path.name)
    name = match["stem"] if match else path.stem
    return spec_from_tensors(tensors, _facts(keys, tensors, path), name=name, source=path)


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    require_at_most(count, 10_000, "parts", source=path)
    parts = [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise Location(missing[0]).error(
            f"no such file, {len(missing)} of {count} parts are missing",
            f"all parts of {match['stem']}",
            "copy or download the checkpoint again",
        )
    return parts


def _facts(keys: Mapping[str, Any], tensors: list[StoredTensor], path: Path) -> ModelFacts:
    """Read the facts from GGUF's keys, whose names begin with that of the architecture."""
    architecture = keys.get("general.architecture")

    def value_of(key: str) -> Any:
        return keys.get(f"{architecture}.{key}")

    def integer(
        key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE
    ) -> int:
        value = value_of(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise Location(path, f"{architecture}.{key}").error(
                shown(value), f"a whole number from {minimum} to {maximum}"
            )
        return value

    def by_layer(key: str, default: int | None = None) -> list[int]:
        """Read a number, or one a layer (0 where a layer has no attention)."""
        value = value_of(key)
        if not isinstance(value, list):
            return [integer(key, default)] * blocks
        if len(value) < blocks or not all(
            isinstance(one, int) and 0 <= one <= MAX_SIZE for one in value
        ):
            raise Location(path, f"{architecture}.{key}").error(shown(value), "one a layer")
        return value[:blocks]

    if not value_of("expert_count"):
        raise Location(path).error(
            f"the architecture {architecture!r} has no MoE layers",
            remedy="give a Mixture-of-Experts model",
        )
    blocks = integer("block_count", maximum=MAX_LAYERS)
    layers = blocks - integer("nextn_predict_layers", 0, minimum=0, maximum=blocks - 1)
    hidden = integer("embedding_length")
    heads = by_layer("attention.head_count")
    mean_width = max(hidden // max(*heads, 1), 1)
    rank = integer("attention.kv_lora_rank", 0, minimum=0)
    key_width = integer("attention.key_length", mean_width)
    value_width = integer("attention.value_length", mean_width)
    latent = any(re.search(r"\.attn_kv_a", tensor.name) for tensor in tensors)
    if rank and latent:
        numbers = [rank + integer("rope.dimension_count")] * blocks
        key_width = integer("attention.key_length_mla", key_width)
        value_width = integer("attention.value_length_mla", value_width)
    else:
        kv_heads = by_layer("attention.head_count_kv", max(heads))
        numbers = [count * (key_width + value_width) for count in kv_heads]
    return ModelFacts(
        num_decoder_layers=layers,
        num_experts=(integer("expert_count"),),
        top_k=integer("expert_used_count"),
        hidden_size=hidden,
        dtype_bytes=_CACHE_BYTES,
        kv_numbers=tuple(numbers[:layers]),
        attention_flops_by_layer=tuple(2 * n * (key_width + value_width) for n in heads[:layers]),
        source=path,
        top_k_place=f"{architecture}.expert_used_count",
    )
