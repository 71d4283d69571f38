"""What a model's configuration says beyond the sizes of its tensors: top-k, layers, KV cache.

Read from the JSON of a ``config.json``, so that neither transformers nor PyTorch is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prism_plan.input_limits import MAX_EXPERTS, MAX_LAYERS
from prism_plan.io.location import Location
from prism_plan.printable_text import shown
from prism_plan.sizes.config_keys import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TOP_K,
    Config,
)
from prism_plan.sizes.quantisation import quantisation_key
from prism_plan.sizes.recurrent_state import recurrent_state_numbers

#: Keys under which multimodal configs hold their language model.
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")

#: Bytes of one number, by the name in ``dtype`` (older configs: ``torch_dtype``).
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Types of layers whose attention has a sliding window.
_SLIDING = ("sliding_attention", "hybrid_sliding", "chunked_attention")


@dataclass(frozen=True)
class ModelFacts:
    """What the tensors of a model do not show.

    ``num_experts`` are the values that the configuration gives; where there are several, the
    tensors decide. ``kv_numbers`` (that a token adds to the cache) and ``attention_flops_by_layer``
    (of a token pair) have one entry a decoder layer, as if every layer had attention: the tensors
    show which layers have. ``state_numbers`` is the size of the state of one of the other layers
    (:mod:`prism_plan.sizes.recurrent_state`). ``nested`` says that the language model is a part of
    a larger one.
    """

    num_decoder_layers: int
    num_experts: tuple[int, ...]
    top_k: int
    hidden_size: int
    dtype_bytes: int
    kv_numbers: tuple[int, ...]
    attention_flops_by_layer: tuple[int, ...] | None
    state_numbers: int = 0
    tied_embeddings: bool = False
    nested: bool = False
    source: object = ""
    top_k_place: str = field(default="", repr=False)

    def top_k_of(self, num_experts: int) -> int:
        """Return top-k; refuse it where it exceeds the number of experts."""
        if self.top_k > num_experts:
            raise Location(self.source, self.top_k_place).error(
                f"{self.top_k}", f"at most the {num_experts} experts of a layer"
            )
        return self.top_k

    def kv_bytes(self, caches: Mapping[int, int]) -> int:
        """Bytes that a token adds to the KV caches of all layers together.

        ``caches`` maps the index of a decoder layer to its number of caches.
        """
        return self.dtype_bytes * sum(n * self.kv_numbers[layer] for layer, n in caches.items())

    def attention_flops(self, caches: Mapping[int, int]) -> int | None:
        """FLOPs of a token pair in the mean decoder layer; None where the heads are unknown."""
        if self.attention_flops_by_layer is None:
            return None
        total = sum(n * self.attention_flops_by_layer[layer] for layer, n in caches.items())
        return round(total / self.num_decoder_layers)


def config_levels(values: Any, source: object) -> list[Config]:
    """The configurations nested in each other, from the whole model to its language model.

    Raises
    ------
    InputError
        It is no JSON object, or holds two language models.
    """
    if not isinstance(values, Mapping):
        raise Location(source).error(shown(values), "a JSON object, a config.json")
    found = [Config(values, source)]
    while True:
        config = found[-1]
        keys = [key for key in NESTED if config.values.get(key) is not None]
        if not keys:
            return found
        if len(keys) > 1:
            config.refuse(
                keys[1], config.values[keys[1]], f"one language model, and there is {keys[0]} too"
            )
        inner = config.values[keys[0]]
        if not isinstance(inner, Mapping):
            config.refuse(keys[0], inner, "an object")
        found.append(Config(inner, source, config.place(keys[0])))


def find_quantisation(chain: Iterable[Config]) -> tuple[Config, str] | None:
    """Find the configuration and key that say that the weights are quantised."""
    for config in chain:
        key = quantisation_key(config.values)
        if key:
            return config, key
    return None


def read_facts(values: Any, *, source: object = "") -> ModelFacts:
    """Read the facts of a ``config.json``.

    Raises
    ------
    InputError
        A key that is needed is missing, or its value makes no sense: names key and value.
    """
    chain = config_levels(values, source)
    config = chain[-1]
    require_experts(chain[0])
    if config.flag("is_encoder_decoder"):
        config.refuse("is_encoder_decoder", True, "a model that decodes only")
    layers = num_layers(config)
    top_k_key, top_k = _top_k(config)
    kv_numbers, flops = _attention(config, layers)
    return ModelFacts(
        num_decoder_layers=layers,
        num_experts=_num_experts(config),
        top_k=top_k,
        hidden_size=config.integer(*HIDDEN),
        dtype_bytes=DTYPE_BYTES[dtype_name(chain)],
        kv_numbers=kv_numbers,
        attention_flops_by_layer=flops,
        state_numbers=recurrent_state_numbers(config),
        tied_embeddings=bool(tied_embeddings(chain)),
        nested=len(chain) > 1,
        source=source,
        top_k_place=config.place(top_k_key),
    )


def require_experts(config: Config) -> None:
    """Refuse a configuration in which no key, at any depth (DBRX: ``ffn_config``), is of experts.

    Raises
    ------
    InputError
        It has no MoE layers.
    """
    family = config.values.get("model_type")
    pending: list[Mapping[str, Any]] = [config.values]
    while pending:
        for key, value in pending.pop().items():
            if value and ("expert" in str(key).lower() or "moe" in str(key).lower()):
                return
            if isinstance(value, Mapping):
                pending.append(value)
    if "moe" not in str(family).lower():
        raise Location(config.source, "model_type" if family else "").error(
            f"{family!r} has no MoE layers" if family else "the model has no MoE layers",
            remedy="give the config.json of a Mixture-of-Experts model",
        )


def num_layers(config: Config) -> int:
    """Count the decoder layers; Nemotron-H gives a list of their types alone."""
    types = [
        value
        for key in ("layers_block_type", "hybrid_override_pattern")
        if (value := config.get(key))
    ]
    if not config.present(LAYERS) and types and isinstance(types[0], list | str):
        return config.require_integer(LAYERS[0], len(types[0]), maximum=MAX_LAYERS)
    return config.integer(*LAYERS, maximum=MAX_LAYERS)


def _num_experts(config: Config) -> tuple[int, ...]:
    counts = dict.fromkeys(
        config.require_integer(key, config.get(key), 0, MAX_EXPERTS)
        for key in config.present(EXPERTS)
    )
    return tuple(count for count in counts if count)


def _top_k(config: Config) -> tuple[str, int]:
    """Key and value of top-k; a list with a number for each layer (Hunyuan) must be constant."""
    key = (config.present(TOP_K) or [TOP_K[0]])[0]
    value = config.get(key)
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    return key, config.integer(*TOP_K) if value is None else config.require_integer(key, value)


def dtype_name(chain: list[Config]) -> str:
    """Name of the model's dtype; bfloat16 where there is none, as engines then load 2 bytes."""
    for config in reversed(chain):
        for key in ("dtype", "torch_dtype"):
            dtype = config.values.get(key)
            if dtype is None:
                continue
            name = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
            if name not in DTYPE_BYTES:
                config.refuse(key, dtype, f"one of {', '.join(DTYPE_BYTES)}")
            return name
    return "bfloat16"


def tied_embeddings(chain: list[Config]) -> bool | None:
    """Whether the output head is tied to the embeddings; None where the family decides.

    The whole model's key takes precedence over its language model's, as in transformers 5.
    """
    flags = [config.flag("tie_word_embeddings") for config in chain]
    return next((flag for flag in flags if flag is not None), None)


# ------------------------------------------------------------------------------------ attention


def _attention(config: Config, layers: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Numbers that a token adds to the cache of each layer, and FLOPs of a token pair in each.

    Multi-head latent attention caches the latent and the rotary key, as the serving engines store
    it; an indexer (sparse attention) caches one key more. A sliding window does not lower the
    numbers: a token adds them while it is inside of every window.
    """
    heads = config.integer_or(0, *HEADS)
    index = config.integer_or(0, "index_head_dim", "indexer_head_dim", minimum=0)
    rank = config.values.get("kv_lora_rank")
    if rank and config.flag("use_mla") is not False:
        rope = config.integer("qk_rope_head_dim", minimum=0)
        numbers = config.integer("kv_lora_rank") + rope + index
        flops = None
        if heads and config.present(["qk_nope_head_dim"]) and config.present(["v_head_dim"]):
            width = config.integer("qk_nope_head_dim") + rope + config.integer("v_head_dim")
            flops = (2 * heads * width,) * layers
        return (numbers,) * layers, flops
    # Keys of single layers (Gemma 4, as transformers saves it).
    per_layer = config.values.get("per_layer_config")
    per_layer = per_layer if isinstance(per_layer, Mapping) else {}
    shapes = []
    for layer, kind in enumerate(_kinds(config, layers)):
        values = per_layer.get(str(layer), per_layer.get(layer))
        one = config
        if isinstance(values, Mapping):
            one = Config({**config.values, **values}, config.source, config.place("")[:-1])
        shapes.append(_heads_of(one, kind))
    numbers_by_layer = tuple(kv * (key + value) + index for _, kv, key, value in shapes)
    return numbers_by_layer, tuple(2 * q * (key + value) for q, _, key, value in shapes)


def _kinds(config: Config, layers: int) -> list[str]:
    """Type of attention of each layer; empty texts where the configuration does not say."""
    kinds = config.values.get("layer_types")
    pattern = config.values.get("hybrid_layer_pattern")  # MiMo: 1 where a window slides
    if isinstance(pattern, list) and not kinds:
        kinds = ["sliding_attention" if one == 1 else "full_attention" for one in pattern]
    if not isinstance(kinds, list) or len(kinds) < layers:
        return [""] * layers
    return [str(kind) for kind in kinds[:layers]]


def _heads_of(config: Config, kind: str) -> tuple[int, int, int, int]:
    """Heads, key-value heads, width of a key and of a value, for one type of layer."""
    prefix = "swa_" if kind in _SLIDING else "global_" if kind == "full_attention" else ""
    heads = config.integer(f"{prefix}num_attention_heads", *HEADS)
    own = {"swa_": "swa_num_key_value_heads", "global_": "num_global_key_value_heads"}
    spellings = (*([own[prefix]] if prefix else []), *KV_HEADS)
    if any(key in config.values for key in KV_HEADS):
        kv_heads = config.integer_or(heads, *spellings)  # null: as many as heads
    else:
        kv_heads = config.integer(*spellings)
    if heads % kv_heads:
        config.refuse(KV_HEADS[0], kv_heads, f"a divisor of the {heads} heads")
    keys = [f"{prefix}{name}" for name in HEAD_DIM] if prefix else []
    if config.present([*keys, *HEAD_DIM]):
        key = config.integer(*keys, *HEAD_DIM)
    else:
        hidden = config.integer(*HIDDEN)
        if hidden % heads:
            config.refuse(HEADS[0], heads, f"a divisor of hidden_size = {hidden}, or head_dim")
        key = hidden // heads
    value = config.integer_or(key, *([f"{prefix}v_head_dim"] if prefix else []), "v_head_dim")
    return heads, kv_heads, key, value
