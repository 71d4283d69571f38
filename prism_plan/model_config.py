"""Sizes of a MoE model, computed from its Hugging Face ``config.json``.

A family is described by the tensors that a checkpoint of it holds: the shapes stand below as code,
one function per kind of layer, and every size is a sum over them. Shapes, layer rules and the
defaults of absent keys follow the classes of transformers 5.23.0 (``configuration_*.py`` and
``modeling_*.py`` of each family); nothing of transformers or torch is imported.

Sizes are those of the tensors **as the checkpoint stores them**:

* ``dense_bytes`` is everything of the causal language model but the routed experts. The router's
  ``e_score_correction_bias`` (DeepSeek-V3) is float32 whatever the dtype. Multi-token-prediction
  layers (``num_nextn_predict_layers``) are left out, as transformers and the engines leave them
  out of ordinary decoding. Of a multimodal model it is the text model alone.
* ``kv_bytes_per_token`` is for a cache in the model's dtype. A sliding window does not lower it:
  it is what one more token adds while it is inside every window. For multi-head latent attention
  (DeepSeek) it is the latent cache, ``kv_lora_rank + qk_rope_head_dim`` numbers a layer, which is
  what the serving engines store; an implementation that caches expanded keys and values needs far
  more.
* Quantised checkpoints are read in two forms: block-wise fp8 (``quant_method`` ``fp8`` with a
  ``weight_block_size``) and the MXFP4 experts of gpt-oss. All others are refused, wherever the
  checkpoint says so (:mod:`prism_plan.checkpoint_folder`).
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from prism_plan.checkpoint_folder import (
    QUANTISATION_KEYS,
    cached_repository,
    model_name,
    quantisation_beside,
    quantisation_key,
)
from prism_plan.errors import InputError, did_you_mean
from prism_plan.files import parse_json, read_text
from prism_plan.limits import MAX_EXPERTS, MAX_LAYERS
from prism_plan.model import ModelSpec

BY_HAND = (
    "write the sizes by hand as a model spec (JSON: moe_layers, expert_bytes, dense_bytes, ...) "
    "and give that file"
)

_UNQUANTISED = "bfloat16, float16 or float32"
_NO_EXPERTS = "give the config.json of a Mixture-of-Experts model"

#: Bytes of one number, by the name in ``dtype`` (older configs: ``torch_dtype``).
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

#: No model has more of anything; a larger value is a slip and would only exhaust memory here.
MAX_SIZE = 2**31 - 1

_FLOAT32_BYTES = 4
_MXFP4_GROUP = 32


def spec_from_config_file(path: Path) -> ModelSpec:
    """Read the model spec that a JSON file describes.

    The file is a Hugging Face ``config.json`` of a known MoE family, or a model spec of ours (an
    object with the keys ``moe_layers`` and ``expert_bytes``, as :meth:`ModelSpec.to_json` writes
    it). The second form serves every model whose sizes the first cannot tell.

    The model of a file named ``config.json`` is called after its folder or, in the hub's cache,
    after its repository (:func:`~prism_plan.checkpoint_folder.model_name`), as it is when the
    checkpoint itself is run. Of other files ``_name_or_path`` in it names the model, else the file.

    Raises
    ------
    InputError
        The file cannot be read, is not JSON, or :func:`spec_from_config` refuses it; a file beside
        it says that the weights are quantised.

    """
    path = Path(path)
    values = parse_json(read_text(path), path, non_finite=True)
    if isinstance(values, Mapping) and "moe_layers" in values and "expert_bytes" in values:
        return ModelSpec.from_json(values, source=path)
    whole = path.name == "config.json"
    for folder in dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)):
        require_unquantised(folder, gguf=whole)
    if whole:
        return _spec(values, source=path, name=model_name(path.parent), fallback="")
    name = cached_repository(Path(os.path.abspath(path)).parent)
    return _spec(values, source=path, name=name, fallback=path.stem)


def require_unquantised(folder: Path, *, gguf: bool = True) -> None:
    """Refuse a checkpoint folder in which a file says that the weights are quantised.

    Raises
    ------
    InputError
        Names the file, its key and the algorithm.

    """
    found = quantisation_beside(folder, gguf=gguf)
    if found is not None:
        raise InputError(
            found.found,
            source=found.file,
            place=found.place,
            expected=_UNQUANTISED,
            remedy=BY_HAND,
        )


def spec_from_config(
    values: Mapping[str, Any], *, source: object = "", name: str = ""
) -> ModelSpec:
    """Compute the model spec from the values of a Hugging Face ``config.json``.

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
        No MoE layers, an unknown family, an unknown quantisation, a missing key that the sizes
        need, or a value that makes no sense. Names the key, the value and what was expected.

    """
    return _spec(values, source=source, name=name, fallback="")


def _spec(values: Any, *, source: object, name: str, fallback: str) -> ModelSpec:
    if not isinstance(values, Mapping):
        raise InputError(_show(values), source=source, expected="a JSON object, a config.json")
    outer = _Config(values, source)
    config, family_name = _language_model(outer)
    family = FAMILIES[family_name]
    name = name or _name_of(outer) or fallback or family_name

    layers = config.whole("num_hidden_layers", most=MAX_LAYERS)
    hidden = config.whole("hidden_size")
    num_experts = _num_experts(config, family)
    top_k = config.whole(*family.top_k_keys)
    if top_k > num_experts:
        config.refuse(family.top_k_keys[0], top_k, f"at most the {num_experts} experts of a layer")
    moe_layers = family.moe_layers(config)
    _check_other_layer_keys(config, moe_layers)
    if not moe_layers:
        raise InputError(f"{name} has no MoE layers", source=source, remedy=_NO_EXPERTS)

    storage = _storage(config, family_name)
    expert_bytes = tuple(
        storage.total(family.expert(config, f"model.layers.{layer}.mlp.experts"))
        for layer in moe_layers
    )
    dense_bytes = storage.total(_dense_tensors(config, family, moe_layers, num_experts))
    return ModelSpec(
        name=name,
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        dtype_bytes=storage.number_bytes,
        # One number where the layers agree, the usual case; a list where some layers' experts
        # were left unquantised.
        expert_bytes=expert_bytes[0] if len(set(expert_bytes)) == 1 else expert_bytes,
        dense_bytes=dense_bytes,
        kv_bytes_per_token=layers * family.kv_numbers(config) * storage.number_bytes,
    )


# ------------------------------------------------------------------------------ reading the keys


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN or Infinity, as Python writes them into the file
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of thousands of digits"


class _Config:
    """The values of a ``config.json``, read key by key; every error names file, key and value."""

    def __init__(self, values: Mapping[str, Any], source: object, place: str = "") -> None:
        self.values = values
        self.source = source
        self._place = place

    def place(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def refuse(self, key: str, value: object, expected: str, remedy: str = "") -> NoReturn:
        raise InputError(
            _show(value),
            source=self.source,
            place=self.place(key),
            expected=expected,
            remedy=remedy,
        )

    def inner(self, key: str) -> _Config:
        """Enter the object under ``key``."""
        value = self.values[key]
        if not isinstance(value, Mapping):
            self.refuse(key, value, "an object")
        return _Config(value, self.source, self.place(key))

    def with_values(self, values: Mapping[str, Any]) -> _Config:
        """Other values in the same place."""
        return _Config(values, self.source, self._place)

    def given(self, key: str) -> bool:
        return self.values.get(key) is not None

    def whole(self, *keys: str, least: int = 1, most: int = MAX_SIZE) -> int:
        """Read a whole number that must be there; ``keys`` are the spellings it may have."""
        found = [key for key in keys if key in self.values]
        if not found:
            raise InputError(
                f"key {keys[0]!r} is missing",
                source=self.source,
                place=self._place,
                expected="a config.json with every key that the sizes depend on",
                remedy=BY_HAND,
            )
        value = self.values[found[0]]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(found[0], value, f"a whole number from {least} to {most}")
        for other in found[1:]:
            if self.values[other] != value:
                self.refuse(other, self.values[other], f"{found[0]} = {value}, the same thing")
        return value

    def whole_or(self, key: str, default: int | None, *, otherwise: int = 0) -> int:
        """Read a whole number that may be absent.

        With a ``default`` an absent key has that value. Without one an absent key or a null
        means ``otherwise``.
        """
        if default is None:
            return self.whole(key) if self.given(key) else otherwise
        return self.whole(key) if key in self.values else default

    def flag(self, key: str, absent: bool) -> bool:
        value = self.values.get(key, absent)
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value

    def text(self, key: str) -> str:
        """Read a text; absent or null is empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, value, "a text")
        return value or ""

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of texts; absent or null is empty."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, value, "a list of texts")
        return tuple(value)


def _name_of(config: _Config) -> str:
    path = config.text("_name_or_path").strip().replace("\\", "/")
    last = PurePosixPath(path).name
    return "" if last == ".." else last


#: Keys under which multimodal configs hold their language model: most families; DeepSeek-VL2 and
#: DeepSeek-OCR; InternVL; the Omni models of Qwen, with a text_config in it.
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")


def _language_model(outer: _Config) -> tuple[_Config, str]:
    """Find the part of the config that describes the language model, and its family.

    A multimodal config holds it under one of several keys, in the Omni models two levels down. Its
    sizes are those that stand there, whatever stands outside, as transformers has it; what belongs
    to the checkpoint as a whole (dtype, quantisation, tied embeddings) may stand in either.
    """
    wrappers: list[_Config] = []
    config, family = outer, outer.text("model_type")
    while family not in FAMILIES:
        keys = [key for key in _NESTED if config.given(key)]
        if not keys:
            _refuse_model_type(config, family)
        if len(keys) > 1:
            config.refuse(
                keys[1],
                config.values[keys[1]],
                f"one language model, and there is {keys[0]} too",
                BY_HAND,
            )
        inner = config.inner(keys[0])
        wrappers.append(config)
        config = inner.with_values(_with_shared_keys(config, inner))
        family = config.text("model_type") or _family_of_architecture(config)
    for wrapper in wrappers:
        # Its module names carry the wrapper's prefixes, and it may spare or include the rest.
        _refuse_quantisation(
            wrapper, tuple(QUANTISATION_KEYS), "no quantisation of a multimodal model"
        )
    return config, family


def _family_of_architecture(config: _Config) -> str:
    """Tell the family by the class name: DeepSeek-VL2 gives its language model no model_type."""
    return next(filter(None, map(_ARCHITECTURES.get, config.texts("architectures"))), "")


def _refuse_quantisation(config: _Config, keys: tuple[str, ...], expected: str) -> None:
    """Refuse a config that says under one of the ``keys`` that it is quantised."""
    key = quantisation_key(config.values, keys)
    if key:
        raise InputError(
            f"{_show(config.values[key])}: the weights are quantised, as {QUANTISATION_KEYS[key]} "
            "writes it",
            source=config.source,
            place=config.place(key),
            expected=expected,
            remedy=BY_HAND,
        )


def _with_shared_keys(outer: _Config, inner: _Config) -> dict[str, Any]:
    values = dict(inner.values)
    if not (inner.given("dtype") or inner.given("torch_dtype")):
        for key in ("dtype", "torch_dtype"):
            if outer.given(key):
                values[key] = outer.values[key]
    tied = "tie_word_embeddings"
    if tied in outer.values and values.setdefault(tied, outer.values[tied]) != outer.values[tied]:
        # Which of the two counts has changed between versions of transformers.
        inner.refuse(tied, values[tied], f"{outer.values[tied]!r} as outside of it", BY_HAND)
    return values


def _refuse_model_type(config: _Config, model_type: str) -> NoReturn:
    if not model_type:
        raise InputError(
            "key 'model_type' is missing",
            source=config.source,
            place=config.place("model_type"),
            expected="a Hugging Face config.json",
        )
    if not _mentions_experts(config.values) and "moe" not in model_type.lower():
        raise InputError(
            f"{model_type!r} has no MoE layers",
            source=config.source,
            place=config.place("model_type"),
            expected=f"one of {', '.join(FAMILIES)}",
            remedy=_NO_EXPERTS,
        )
    raise InputError(
        f"unknown MoE family {model_type!r}{did_you_mean(model_type, FAMILIES)}",
        source=config.source,
        place=config.place("model_type"),
        expected=f"one of {', '.join(FAMILIES)}",
        remedy=BY_HAND,
    )


def _mentions_experts(values: Mapping[str, Any]) -> bool:
    """Whether a key of the config, at any depth (DBRX: ``ffn_config``), speaks of experts."""
    pending: list[Mapping[str, Any]] = [values]
    while pending:
        for key, value in pending.pop().items():
            if value and ("expert" in str(key).lower() or "moe" in str(key).lower()):
                return True
            if isinstance(value, Mapping):
                pending.append(value)
    return False


def _num_experts(config: _Config, family: _Family) -> int:
    found = [key for key in family.expert_count_keys if key in config.values]
    counts = [config.values[key] for key in found]
    # A family member without routed experts says so with null or 0 experts.
    if found and all(count is None or (count == 0 and count is not False) for count in counts):
        raise InputError(
            f"{_show(counts[0])} experts: the model has no MoE layers",
            source=config.source,
            place=config.place(found[0]),
            remedy=_NO_EXPERTS,
        )
    return config.whole(*family.expert_count_keys, most=MAX_EXPERTS)


# ------------------------------------------------------------------------- which layers are MoE


def _every_layer(config: _Config) -> tuple[int, ...]:
    return tuple(range(config.whole("num_hidden_layers")))


def _layers_after_dense(config: _Config) -> tuple[int, ...]:
    """Apply DeepSeek's rule: dense up to ``first_k_dense_replace``, then MoE.

    transformers 5 does not read ``moe_layer_freq``; DeepSeek's own code and the engines make only
    every so-many-th layer MoE. Both agree on 1, the value of every published checkpoint.
    """
    frequency = config.values.get("moe_layer_freq", 1)
    if frequency != 1 or isinstance(frequency, bool):
        config.refuse("moe_layer_freq", frequency, "1, where all loaders agree", BY_HAND)
    first = config.whole("first_k_dense_replace", least=0)
    return tuple(range(first, config.whole("num_hidden_layers")))


def _layers_by_step(config: _Config) -> tuple[int, ...]:
    """Apply Qwen's rule: every ``decoder_sparse_step``-th layer not in ``mlp_only_layers``.

    Both keys are absent from early checkpoints (Qwen1.5-MoE has no ``mlp_only_layers``), which
    rely on the defaults 1 and none.
    """
    layers = config.whole("num_hidden_layers")
    step = config.whole_or("decoder_sparse_step", 1)
    dense = config.values.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < layers
        for layer in dense
    ):
        config.refuse("mlp_only_layers", dense, f"a list of decoder indices 0 to {layers - 1}")
    return tuple(sorted({i for i in range(layers) if (i + 1) % step == 0}.difference(dense)))


def _check_other_layer_keys(config: _Config, moe_layers: tuple[int, ...]) -> None:
    """Refuse keys of other families that would make the layers differ from what was computed.

    transformers 5.23 reads ``mlp_layer_types`` in newer families only, and ``per_layer_config``
    in heterogeneous models.
    """
    if config.values.get("per_layer_config"):
        config.refuse(
            "per_layer_config", config.values["per_layer_config"], "layers of one kind", BY_HAND
        )
    kinds = config.values.get("mlp_layer_types")
    if kinds is None:
        return
    moe = set(moe_layers)
    ours = ["sparse" if i in moe else "dense" for i in _every_layer(config)]
    if kinds != ours:
        config.refuse(
            "mlp_layer_types",
            kinds,
            f"sparse in exactly the {len(moe)} layers that the family's other keys name",
            BY_HAND,
        )


# ----------------------------------------------------------------------- tensors of a checkpoint


class _Kind(enum.Enum):
    """What quantisation may do to a tensor."""

    MATRIX = "weight of a linear layer of the dense part"
    EXPERT = "weight of a linear layer of a routed expert"
    PLAIN = "always in the model's dtype: embeddings, output head, norms, gates, biases"
    FLOAT32 = "always in float32"


class _Tensor(NamedTuple):
    """One tensor: the module it belongs to, and its shape (matrices: [out, in])."""

    module: str
    kind: _Kind
    shape: tuple[int, ...]


def _linear(module: str, out: int, into: int, *, bias: bool = False) -> Iterator[_Tensor]:
    yield _Tensor(module, _Kind.MATRIX, (out, into))
    if bias:
        yield _Tensor(module, _Kind.PLAIN, (out,))


def _plain(module: str, *shape: int) -> _Tensor:
    return _Tensor(module, _Kind.PLAIN, shape)


def _swiglu(module: str, hidden: int, width: int, *, bias: bool = False) -> Iterator[_Tensor]:
    yield from _linear(f"{module}.gate_proj", width, hidden, bias=bias)
    yield from _linear(f"{module}.up_proj", width, hidden, bias=bias)
    yield from _linear(f"{module}.down_proj", hidden, width, bias=bias)


def _dense_tensors(
    config: _Config, family: _Family, moe_layers: tuple[int, ...], num_experts: int
) -> Iterator[_Tensor]:
    """Yield every tensor of the model but the routed experts."""
    hidden = config.whole("hidden_size")
    vocabulary = config.whole("vocab_size")
    yield _plain("model.embed_tokens", vocabulary, hidden)
    # Untied is the default of all seven families (not of transformers at large).
    if not config.flag("tie_word_embeddings", absent=False):
        yield _plain("lm_head", vocabulary, hidden)
    yield _plain("model.norm", hidden)
    moe = set(moe_layers)
    for layer in _every_layer(config):
        module = f"model.layers.{layer}"
        yield from family.attention(config, f"{module}.self_attn")
        yield _plain(f"{module}.input_layernorm", hidden)
        yield _plain(f"{module}.post_attention_layernorm", hidden)
        if layer in moe:
            yield from family.moe_rest(config, f"{module}.mlp", num_experts)
        else:
            yield from family.dense_mlp(config, f"{module}.mlp")


# ------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _GroupedQuery:
    """Grouped-query attention of one family.

    ``kv_heads`` and ``head_dim`` are the family's defaults for absent keys, which early
    checkpoints leave out. None stands for the number of heads and for hidden_size / heads; in
    these families a null in the config says the same, in the others it is an error.
    """

    kv_heads: int | None
    head_dim: int | None = None
    #: Key and default of the flag for biases on q, k, v ("": no such flag, no biases).
    bias_key: str = ""
    bias: bool = False
    #: Whether that flag gives the output projection a bias too.
    output_bias: bool = True
    #: Norms on q and k: none, over one head, or over all heads together.
    norms: str = ""
    #: gpt-oss has one learned attention sink a head.
    sinks: bool = False

    def shape(self, config: _Config) -> tuple[int, int, int]:
        """Tell the heads, the key-value heads, and the numbers of a head."""
        hidden = config.whole("hidden_size")
        heads = config.whole("num_attention_heads")
        kv_heads = config.whole_or("num_key_value_heads", self.kv_heads, otherwise=heads)
        if heads % kv_heads:
            config.refuse("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
        head_dim = config.whole_or("head_dim", self.head_dim, otherwise=hidden // heads)
        if self.head_dim is None and not config.given("head_dim") and hidden % heads:
            config.refuse(
                "num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or head_dim"
            )
        if self.norms == "width" and heads * head_dim != hidden:
            # The norm spans hidden_size numbers, the projection heads · head_dim: it cannot run.
            config.refuse("head_dim", head_dim, f"hidden_size / heads = {hidden / heads:g}")
        return heads, kv_heads, head_dim

    def tensors(self, config: _Config, module: str) -> Iterator[_Tensor]:
        hidden = config.whole("hidden_size")
        heads, kv_heads, head_dim = self.shape(config)
        bias = bool(self.bias_key) and config.flag(self.bias_key, absent=self.bias)
        yield from _linear(f"{module}.q_proj", heads * head_dim, hidden, bias=bias)
        yield from _linear(f"{module}.k_proj", kv_heads * head_dim, hidden, bias=bias)
        yield from _linear(f"{module}.v_proj", kv_heads * head_dim, hidden, bias=bias)
        output_bias = bias and self.output_bias
        yield from _linear(f"{module}.o_proj", hidden, heads * head_dim, bias=output_bias)
        if self.norms:
            over_head = self.norms == "head"
            yield _plain(f"{module}.q_norm", head_dim if over_head else heads * head_dim)
            yield _plain(f"{module}.k_norm", head_dim if over_head else kv_heads * head_dim)
        if self.sinks:
            yield _plain(f"{module}.sinks", heads)

    def kv_numbers(self, config: _Config) -> int:
        """Count the numbers of one token's key and value in one layer."""
        _, kv_heads, head_dim = self.shape(config)
        return 2 * kv_heads * head_dim


def _latent_attention(config: _Config, module: str) -> Iterator[_Tensor]:
    """Yield multi-head latent attention (DeepSeek), with or without the query's low rank.

    ``q_lora_rank`` has to be there: null (V2-Lite) and the class's default 1536 are both in use.
    The language models of some DeepSeek-VL2 and of DeepSeek-OCR have Llama's attention instead.
    """
    if not config.flag("use_mla", absent=True):
        config.refuse("use_mla", False, "true: the latent attention of this family", BY_HAND)
    hidden = config.whole("hidden_size")
    heads = config.whole("num_attention_heads")
    kv_rank = config.whole("kv_lora_rank")
    rope, nope = config.whole("qk_rope_head_dim"), config.whole("qk_nope_head_dim")
    value = config.whole("v_head_dim")
    bias = config.flag("attention_bias", absent=False)
    if "q_lora_rank" in config.values and config.values["q_lora_rank"] is None:
        yield from _linear(f"{module}.q_proj", heads * (nope + rope), hidden)
    else:
        q_rank = config.whole("q_lora_rank")
        yield from _linear(f"{module}.q_a_proj", q_rank, hidden, bias=bias)
        yield _plain(f"{module}.q_a_layernorm", q_rank)
        yield from _linear(f"{module}.q_b_proj", heads * (nope + rope), q_rank)
    yield from _linear(f"{module}.kv_a_proj_with_mqa", kv_rank + rope, hidden, bias=bias)
    yield _plain(f"{module}.kv_a_layernorm", kv_rank)
    yield from _linear(f"{module}.kv_b_proj", heads * (nope + value), kv_rank)
    yield from _linear(f"{module}.o_proj", hidden, heads * value, bias=bias)


def _latent_kv_numbers(config: _Config) -> int:
    """Count the numbers of one token's latent and rotary key in one layer."""
    return config.whole("kv_lora_rank") + config.whole("qk_rope_head_dim")


# ---------------------------------------------------------------------------- feed-forward parts


def _expert_of_width(key: str) -> Callable[[_Config, str], Iterator[_Tensor]]:
    """Make the tensors of one routed SwiGLU expert whose width stands under ``key``."""

    def expert(config: _Config, module: str) -> Iterator[_Tensor]:
        for tensor in _swiglu(f"{module}.0", config.whole("hidden_size"), config.whole(key)):
            yield tensor._replace(kind=_Kind.EXPERT)

    return expert


def _gpt_oss_expert(config: _Config, module: str) -> Iterator[_Tensor]:
    """Yield one routed expert of gpt-oss: gate and up in one matrix, a bias on each."""
    hidden, width = config.whole("hidden_size"), config.whole("intermediate_size")
    yield _Tensor(f"{module}.gate_up_proj", _Kind.EXPERT, (2 * width, hidden))
    yield _plain(f"{module}.gate_up_proj_bias", 2 * width)
    yield _Tensor(f"{module}.down_proj", _Kind.EXPERT, (hidden, width))
    yield _plain(f"{module}.down_proj_bias", hidden)


def _dense_mlp(config: _Config, module: str) -> Iterator[_Tensor]:
    width = config.whole("intermediate_size")
    yield from _swiglu(module, config.whole("hidden_size"), width)


def _deepseek_v2_dense_mlp(config: _Config, module: str) -> Iterator[_Tensor]:
    width, bias = config.whole("intermediate_size"), config.flag("mlp_bias", absent=False)
    yield from _swiglu(module, config.whole("hidden_size"), width, bias=bias)


def _gate(config: _Config, module: str, experts: int) -> Iterator[_Tensor]:
    yield _plain(f"{module}.gate", experts, config.whole("hidden_size"))


def _deepseek_shared(config: _Config, module: str, *, bias: bool) -> Iterator[_Tensor]:
    width = config.whole("moe_intermediate_size") * config.whole("n_shared_experts", least=0)
    yield from _swiglu(f"{module}.shared_experts", config.whole("hidden_size"), width, bias=bias)


def _deepseek_v2_rest(config: _Config, module: str, experts: int) -> Iterator[_Tensor]:
    yield from _gate(config, module, experts)
    yield from _deepseek_shared(config, module, bias=config.flag("mlp_bias", absent=False))


def _deepseek_v3_rest(config: _Config, module: str, experts: int) -> Iterator[_Tensor]:
    yield from _gate(config, module, experts)
    yield _Tensor(f"{module}.gate.e_score_correction_bias", _Kind.FLOAT32, (experts,))
    yield from _deepseek_shared(config, module, bias=False)


def _qwen2_rest(config: _Config, module: str, experts: int) -> Iterator[_Tensor]:
    hidden, width = config.whole("hidden_size"), config.whole("shared_expert_intermediate_size")
    yield from _gate(config, module, experts)
    yield from _swiglu(f"{module}.shared_expert", hidden, width)
    # Unlike the routers, a linear layer to transformers: fp8 converts it unless it is spared.
    yield from _linear(f"{module}.shared_expert_gate", 1, hidden)


def _gpt_oss_rest(config: _Config, module: str, experts: int) -> Iterator[_Tensor]:
    yield _plain(f"{module}.router", experts, config.whole("hidden_size"))
    yield _plain(f"{module}.router", experts)


# -------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class _Family:
    """What the members of one ``model_type`` have in common.

    Functions that take a module name yield the tensors below that module, in one layer.
    """

    #: Spellings of a key, the Hub's first (transformers 5 saves Qwen3's as num_local_experts).
    expert_count_keys: tuple[str, ...]
    moe_layers: Callable[[_Config], tuple[int, ...]]
    attention: Callable[[_Config, str], Iterator[_Tensor]]
    kv_numbers: Callable[[_Config], int]
    expert: Callable[[_Config, str], Iterator[_Tensor]]
    #: A MoE block without its routed experts: gate over so many experts, and shared experts.
    moe_rest: Callable[[_Config, str, int], Iterator[_Tensor]] = _gate
    dense_mlp: Callable[[_Config, str], Iterator[_Tensor]] = _dense_mlp
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)


_MIXTRAL = _GroupedQuery(kv_heads=8)
_QWEN2 = _GroupedQuery(kv_heads=16, bias_key="qkv_bias", bias=True, output_bias=False)
_QWEN3 = _GroupedQuery(kv_heads=4, bias_key="attention_bias", norms="head")
_OLMOE = _GroupedQuery(kv_heads=None, bias_key="attention_bias", norms="width")
_GPT_OSS = _GroupedQuery(kv_heads=8, head_dim=64, bias_key="attention_bias", bias=True, sinks=True)

FAMILIES: dict[str, _Family] = {
    "mixtral": _Family(
        expert_count_keys=("num_local_experts", "num_experts"),
        moe_layers=_every_layer,
        attention=_MIXTRAL.tensors,
        kv_numbers=_MIXTRAL.kv_numbers,
        expert=_expert_of_width("intermediate_size"),
    ),
    "deepseek_v2": _Family(
        expert_count_keys=("n_routed_experts", "num_experts"),
        moe_layers=_layers_after_dense,
        attention=_latent_attention,
        kv_numbers=_latent_kv_numbers,
        expert=_expert_of_width("moe_intermediate_size"),
        moe_rest=_deepseek_v2_rest,
        dense_mlp=_deepseek_v2_dense_mlp,
    ),
    "deepseek_v3": _Family(
        expert_count_keys=("n_routed_experts", "num_local_experts"),
        moe_layers=_layers_after_dense,
        attention=_latent_attention,
        kv_numbers=_latent_kv_numbers,
        expert=_expert_of_width("moe_intermediate_size"),
        moe_rest=_deepseek_v3_rest,
    ),
    "qwen2_moe": _Family(
        expert_count_keys=("num_experts",),
        moe_layers=_layers_by_step,
        attention=_QWEN2.tensors,
        kv_numbers=_QWEN2.kv_numbers,
        expert=_expert_of_width("moe_intermediate_size"),
        moe_rest=_qwen2_rest,
    ),
    "qwen3_moe": _Family(
        expert_count_keys=("num_experts", "num_local_experts"),
        moe_layers=_layers_by_step,
        attention=_QWEN3.tensors,
        kv_numbers=_QWEN3.kv_numbers,
        expert=_expert_of_width("moe_intermediate_size"),
    ),
    "olmoe": _Family(
        expert_count_keys=("num_experts", "num_local_experts"),
        moe_layers=_every_layer,
        attention=_OLMOE.tensors,
        kv_numbers=_OLMOE.kv_numbers,
        expert=_expert_of_width("intermediate_size"),
    ),
    "gpt_oss": _Family(
        expert_count_keys=("num_local_experts", "num_experts"),
        moe_layers=_every_layer,
        attention=_GPT_OSS.tensors,
        kv_numbers=_GPT_OSS.kv_numbers,
        expert=_gpt_oss_expert,
        moe_rest=_gpt_oss_rest,
        # OpenAI's own spelling stands beside the usual one in its configs.
        top_k_keys=("num_experts_per_tok", "experts_per_token"),
    ),
}


#: Families by the class names that checkpoints give as their ``architectures``.
_ARCHITECTURES = {
    "MixtralForCausalLM": "mixtral",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
}


# --------------------------------------------------------------------- bytes of a stored tensor


@dataclass(frozen=True)
class _Storage:
    """How a checkpoint stores its tensors: in one dtype, but for quantised matrices."""

    #: Bytes of a number in the model's dtype.
    number_bytes: int
    #: Bytes of a quantised matrix [out, in]; None where nothing is quantised.
    matrix_bytes: Callable[[int, int], int] | None = None
    quantised: frozenset[_Kind] = frozenset()
    #: Whether the matrices of a module stay in the model's dtype all the same.
    spared: Callable[[_Tensor], bool] = lambda tensor: False

    def total(self, tensors: Iterable[_Tensor]) -> int:
        """Sum the bytes of the tensors."""
        return sum(map(self._bytes, tensors))

    def _bytes(self, tensor: _Tensor) -> int:
        if (
            self.matrix_bytes is not None
            and tensor.kind in self.quantised
            and not self.spared(tensor)
        ):
            out, into = tensor.shape
            return self.matrix_bytes(out, into)
        number = _FLOAT32_BYTES if tensor.kind is _Kind.FLOAT32 else self.number_bytes
        return number * math.prod(tensor.shape)


def _storage(config: _Config, family: str) -> _Storage:
    number_bytes = _number_bytes(config)
    _refuse_quantisation(config, ("compression_config", "quantization"), _UNQUANTISED)
    if not config.given("quantization_config"):
        return _Storage(number_bytes)
    quantisation = config.inner("quantization_config")
    method = quantisation.text("quant_method")
    if method == "fp8" and family != "gpt_oss":
        return _block_fp8(quantisation, family, number_bytes)
    if method == "mxfp4" and family == "gpt_oss":
        return _mxfp4(quantisation, config, number_bytes)
    raise InputError(
        f"quantisation {method!r} of {family} is not understood",
        source=config.source,
        place=quantisation.place("quant_method"),
        expected="fp8 with weight_block_size (not for gpt_oss), or mxfp4 (for gpt_oss only)",
        remedy=BY_HAND,
    )


def _number_bytes(config: _Config) -> int:
    """Tell the bytes of a number; without a dtype 2, as engines then load bfloat16 or float16."""
    key = "dtype" if config.given("dtype") else "torch_dtype"
    dtype = config.values.get(key)
    if dtype is None:
        return 2
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    if name not in DTYPE_BYTES:
        config.refuse(key, dtype, f"one of {', '.join(DTYPE_BYTES)}", BY_HAND)
    return DTYPE_BYTES[name]


def _only_keys(quantisation: _Config, allowed: Mapping[str, tuple[object, ...] | None]) -> None:
    """Refuse a key that is not known, or a value outside the known ones (None: any value)."""
    for key, value in quantisation.values.items():
        if key not in allowed:
            raise InputError(
                f"unknown key {key!r}",
                source=quantisation.source,
                place=quantisation.place(key),
                expected=f"the keys {', '.join(allowed)}",
                remedy=BY_HAND,
            )
        choices = allowed[key]
        if choices is not None and value not in choices:
            quantisation.refuse(key, value, " or ".join(map(_show, choices)), BY_HAND)


def _block_fp8(quantisation: _Config, family: str, number_bytes: int) -> _Storage:
    """Describe block-wise fp8: a byte a weight and a float32 scale a block, experts included.

    Embeddings, output head, norms, gates and biases keep the model's dtype. The matrices of an
    expert (gate, up, down) are blocked one by one, as the checkpoint stores them.
    """
    _only_keys(
        quantisation,
        {
            "quant_method": None,
            "weight_block_size": None,
            "modules_to_not_convert": None,
            "ignored_layers": None,
            "fmt": ("e4m3", "e5m2", None),
            "activation_scheme": ("dynamic", None),  # static stores a scale more for each matrix
            "dequantize": (False, None),
            "modules_to_convert": ([], None),
            "expert_dtype": ("fp8", None),
            # DeepSeek-V3.1 rounds its scales to powers of two, and stores them as float32 still.
            # Elsewhere ue8m0 can mean scales of one byte.
            "scale_fmt": ("float", "ue8m0", None) if family == "deepseek_v3" else ("float", None),
        },
    )
    rows, columns = _block_shape(quantisation)

    def matrix_bytes(out: int, into: int) -> int:
        return out * into + _FLOAT32_BYTES * -(-out // rows) * -(-into // columns)

    return _Storage(
        number_bytes,
        matrix_bytes,
        frozenset({_Kind.MATRIX, _Kind.EXPERT}),
        _spared_modules(quantisation),
    )


def _block_shape(quantisation: _Config) -> tuple[int, int]:
    key = "weight_block_size"
    size = quantisation.values.get(key)
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    ):
        quantisation.refuse(key, size, "two whole numbers, like [128, 128]", BY_HAND)
    return size[0], size[1]


def _mxfp4(quantisation: _Config, config: _Config, number_bytes: int) -> _Storage:
    """Describe MXFP4: experts of 4 bits a weight and a byte of scale for 32 of a row."""
    _only_keys(
        quantisation,
        {"quant_method": None, "modules_to_not_convert": None, "dequantize": (False, None)},
    )
    for key in ("hidden_size", "intermediate_size"):
        if config.whole(key) % _MXFP4_GROUP:
            config.refuse(key, config.whole(key), f"a multiple of {_MXFP4_GROUP} for MXFP4")

    def matrix_bytes(out: int, into: int) -> int:
        return out * (into // 2 + into // _MXFP4_GROUP)

    return _Storage(
        number_bytes, matrix_bytes, frozenset({_Kind.EXPERT}), _spared_modules(quantisation)
    )


def _spared_modules(quantisation: _Config) -> Callable[[_Tensor], bool]:
    """Make the test whether a module is named by ``modules_to_not_convert``.

    The rule of transformers (``should_convert_module``): an entry names a module as a regular
    expression that matches from the start to the end of a part of the dotted name, or as a suffix.
    """
    key = "ignored_layers"
    if quantisation.given("modules_to_not_convert"):
        key = "modules_to_not_convert"
    # The Hub's Mixtral calls the block by its older name.
    entries = [name.replace("block_sparse_moe", "mlp") for name in quantisation.texts(key)]
    rules: list[tuple[str, re.Pattern[str]]] = []
    for entry in entries:
        try:
            pattern = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
        except (re.error, RecursionError, OverflowError):
            quantisation.refuse(key, entry, "names or regular expressions")
        if re.search(r"experts\\?\.\d", entry):
            quantisation.refuse(key, entry, "experts of a layer all alike", BY_HAND)
        rules.append((entry, pattern))

    def named(module: str) -> bool:
        return any(pattern.match(module) or module.endswith(entry) for entry, pattern in rules)

    def spared(tensor: _Tensor) -> bool:
        verdict = named(tensor.module)
        if tensor.kind is _Kind.EXPERT:
            head, _, _ = tensor.module.partition(".experts.")
            if verdict != named(f"{head}.experts"):
                # A rule for single matrices of the experts: loaders differ in what they make of it.
                quantisation.refuse(key, tensor.module, "experts spared whole or not", BY_HAND)
        return verdict

    return spared
