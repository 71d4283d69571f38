"""Read the sizes of a bare ``config.json`` by building the model on PyTorch's meta device.

Needs the extra ``hf``. transformers builds the model without memory for the weights, and its
tensors are counted in the dtype of the configuration.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import require_at_most
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import shown
from prism_plan.sizes.config_keys import HEAD_DIM, KV_HEADS, LAYERS, Config
from prism_plan.sizes.loaded_model import facts_of_model, tensors_of_model
from prism_plan.sizes.model_facts import (
    config_levels,
    dtype_name,
    find_quantisation,
    num_layers,
    require_experts,
    tied_embeddings,
)
from prism_plan.sizes.quantisation import QUANTISATION_KEYS
from prism_plan.sizes.stored_tensors import BY_HAND, spec_from_tensors
from prism_plan.torch_private import decode_special_floats, model_from_config

CHECKPOINT_OR_BY_HAND = f"give the checkpoint (its folder or hub id), or {BY_HAND}"
#: Bound on the layers that are built; each takes milliseconds and some 100 kB.
MAX_BUILT_LAYERS = 1_000
#: Keys that change sizes. Where the class of a configuration has one, it must be given (null is
#: allowed), for the class's default is that of one checkpoint.
_SIZE_KEYS = (
    *("hidden_size", "num_attention_heads", "vocab_size"),
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_local_experts", "num_experts", "moe_num_experts"),
)

#: Those of the keys that may be 0.
_MAY_BE_ZERO = (
    *("n_shared_experts", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "n_routed_experts", "num_local_experts", "num_experts"),
    *("moe_num_experts", "shared_expert_intermediate_size", "head_dim"),
)
#: Tasks of transformers' model classes; the first one that has a class for the model is taken.
TASKS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")


def spec_from_config(values: Any, *, source: object = "", name: str = "") -> ModelSpec:
    """Compute the model spec of the values of a Hugging Face ``config.json``.

    Parameters
    ----------
    values
        The parsed JSON object.
    source
        What errors name as the file.
    name
        What to call the model; without it the last part of ``_name_or_path``, else its family.

    Raises
    ------
    InputError
        It says that the weights are quantised, so that their sizes are unknown; it has no MoE
        layers; transformers is missing, does not know the family or cannot build it; a key that
        sizes depend on is missing or makes no sense.
    """
    chain = config_levels(values, source)
    _require_unquantised(chain)
    name = name or _name(chain[0])
    _check_numbers(chain)
    model = build_meta_model(chain, dtype_name(chain), source)
    facts = facts_of_model(model, chain[-1].values, source=source)
    return spec_from_tensors(tensors_of_model(model, facts), facts, name=name, source=source)


def _require_unquantised(chain: list[Config]) -> None:
    """Refuse a configuration that says that the weights are quantised."""
    found = find_quantisation(chain)
    if found is not None:
        config, key = found
        raise Location(config.source, config.place(key)).error(
            f"{shown(config.values[key])}: the weights are quantised, as {QUANTISATION_KEYS[key]} "
            "writes it, and no weights are here",
            remedy=CHECKPOINT_OR_BY_HAND,
        )


def _name(config: Config) -> str:
    path = config.values.get("_name_or_path") or ""
    if not isinstance(path, str):
        config.refuse("_name_or_path", path, "a text")
    last = PurePosixPath(path.strip().replace("\\", "/")).name
    return last if last not in ("", "..") else str(config.values.get("model_type") or "model")


def _check_numbers(chain: list[Config]) -> None:
    """Refuse numbers that make no sense before PyTorch is imported and a model is built."""
    require_experts(chain[0])
    config = chain[-1]
    for key in (*_SIZE_KEYS, *KV_HEADS, *HEAD_DIM):
        value = config.get(key)
        if value is not None and not isinstance(value, list):
            config.require_integer(key, value, minimum=int(key not in _MAY_BE_ZERO))
    layers = num_layers(config)
    place = config.place((config.present(LAYERS) or LAYERS)[0])
    require_at_most(layers, MAX_BUILT_LAYERS, "layers", source=config.source, place=place)


def build_meta_model(chain: list[Config], dtype: str, source: object) -> Any:
    """Build the innermost model of a configuration that transformers has a class for."""
    try:
        import torch
        import transformers
        from transformers.models.auto import modeling_auto
        from transformers.utils import logging
    except ImportError as error:
        raise Location(source).error(
            f"{error.name or error} is not installed, which tells the sizes of a config.json alone",
            remedy=f"pip install 'prism-plan[hf]', {CHECKPOINT_OR_BY_HAND}",
        ) from error
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING", {}) for task in TASKS]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), _building(source):
            warnings.simplefilter("ignore")
            for config in reversed(chain):
                hf_config = _configuration(config, chain, transformers)
                classes = (maps[type(hf_config)] for maps in mappings if type(hf_config) in maps)
                kind = next(classes, None)
                if hf_config is not None and kind is not None:
                    _require_keys(hf_config, config)
                    with torch.device("meta"):
                        return model_from_config(kind, hf_config, getattr(torch, dtype))
    finally:
        logging.set_verbosity(level)
    family = str(chain[-1].values.get("model_type") or "")
    if not family:
        raise Location(source, chain[-1].place("model_type")).error(
            "key 'model_type' is missing", "a Hugging Face config.json"
        )
    raise Location(source, chain[-1].place("model_type")).error(
        f"{family!r} is no language model that transformers {transformers.__version__} knows"
        + did_you_mean(family, transformers.CONFIG_MAPPING),
        remedy=CHECKPOINT_OR_BY_HAND,
    )


def _configuration(config: Config, chain: list[Config], transformers: Any) -> Any:
    """Make the configuration object, by ``model_type`` or else by ``architectures``."""
    family = config.values.get("model_type")
    known = transformers.CONFIG_MAPPING
    kind = known[family] if isinstance(family, str) and family in known else None
    names = config.values.get("architectures")
    if kind is None and isinstance(names, list) and names and isinstance(names[0], str):
        model = getattr(transformers, names[0], None) if names[0].isidentifier() else None
        kind = getattr(model, "config_class", None)
    if kind is None:
        return None
    outside = {"tie_word_embeddings": tied} if (tied := tied_embeddings(chain)) is not None else {}
    left_out = ("model_type", "dtype", "torch_dtype", "quantization_config")
    values = {key: one for key, one in config.values.items() if key not in left_out}
    values = decode_special_floats(kind, {**values, **outside})
    return kind.from_dict(values)


def _require_keys(hf_config: Any, config: Config) -> None:
    """Refuse a configuration without a key whose default would be that of another model."""
    spellings: Mapping[str, str] = type(hf_config).attribute_map
    present = {spellings.get(key, key) for key in config.values}
    needed = {spellings.get(key, key): None for key in _SIZE_KEYS}
    missing = [key for key in needed if hasattr(type(hf_config), key) and key not in present]
    if missing:
        raise Location(config.source, config.place("")[:-1]).error(
            f"missing: {', '.join(missing)}",
            "a config.json with every key that the sizes depend on",
            CHECKPOINT_OR_BY_HAND,
        )


@contextlib.contextmanager
def _building(source: object) -> Iterator[None]:
    """Turn whatever transformers raises on values that make no sense into InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise Location(source).error(
            f"transformers cannot build the model: {error}", remedy=BY_HAND
        ) from error
