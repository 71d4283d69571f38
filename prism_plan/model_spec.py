"""Sizes of Mixture-of-Experts models, and the presets of common ones."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError, WrongModel
from prism_plan.input_limits import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_NAME_LENGTH,
    MAX_PAIRS,
    require_at_most,
    require_integer,
)
from prism_plan.printable_text import shown

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


@dataclass(frozen=True)
class ModelShape:
    """The MoE layers and experts of a model: all that a placement says of it.

    Parameters
    ----------
    name
        Name of the model in files and messages.
    moe_layers
        Decoder indices of the MoE layers, ascending (DeepSeek-V2-Lite: 1..26, Mixtral: 0..31).
    num_experts, top_k
        Routed experts of a layer, and how many of them the gate selects for a token.
    expert_bytes
        Bytes of one routed expert; one number, or one per MoE layer where sizes differ.

    Raises
    ------
    InputError
        A size is not positive, layers are not ascending, ``top_k`` exceeds ``num_experts``.
    """

    name: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_bytes: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            _refuse("name", self.name, "a non-empty text")
        if len(self.name) > MAX_NAME_LENGTH:
            _refuse("name", self.name, f"at most {MAX_NAME_LENGTH:,} characters")
        for field in ("num_experts", "top_k"):
            _require_size(field, getattr(self, field), 1)
        layers = self.moe_layers
        if not isinstance(layers, tuple):
            _refuse("moe_layers", layers, "a list of decoder indices")
        require_at_most(len(layers), MAX_LAYERS, "layers", place="moe_layers")
        for layer in layers:
            _require_size("moe_layers", layer, 0, 2**31 - 1)
        if not layers or any(a >= b for a, b in itertools.pairwise(layers)):
            _refuse("moe_layers", list(layers), "at least one decoder index, ascending")
        if self.num_experts > MAX_EXPERTS:
            _refuse("num_experts", self.num_experts, f"at most {MAX_EXPERTS}")
        if self.top_k > self.num_experts:
            _refuse("top_k", self.top_k, f"at most num_experts = {self.num_experts}")
        pairs = f"experts in all ({self.num_experts:,} in each of {len(layers):,} layers)"
        require_at_most(self.num_pairs, MAX_PAIRS, pairs, place="num_experts")
        if len(self.expert_bytes_by_layer) != len(layers):
            expected = f"one size, or one for each of the {len(layers)} MoE layers"
            _refuse("expert_bytes", f"{len(self.expert_bytes_by_layer)} sizes", expected)
        for size in self.expert_bytes_by_layer:
            _require_size("expert_bytes", size, 1)

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.moe_layers)

    @property
    def num_pairs(self) -> int:
        """J = L·E, the number of (layer, expert) pairs."""
        return self.num_layers * self.num_experts

    @property
    def expert_bytes_by_layer(self) -> tuple[int, ...]:
        """Bytes of an expert of each MoE layer, [L]."""
        if isinstance(self.expert_bytes, tuple):
            return self.expert_bytes
        return (self.expert_bytes,) * self.num_layers

    @property
    def equal_expert_bytes(self) -> bool:
        """Whether all experts of all layers have the same size."""
        return len(set(self.expert_bytes_by_layer)) == 1

    def layers_text(self) -> str:
        """The MoE layers for a message, ``"1..26"`` or ``"1, 3, 5"``."""
        first, last = self.moe_layers[0], self.moe_layers[-1]
        if last - first + 1 == self.num_layers and self.num_layers > 1:
            return f"{first}..{last}"
        return ", ".join(map(str, self.moe_layers))

    def pair_text(self, pair: int) -> str:
        """A (layer, expert) pair for a message, from its index ``l * E + e``."""
        layer, expert = divmod(pair, self.num_experts)
        return f"layer {self.moe_layers[layer]} expert {expert}"

    def shape(self) -> ModelShape:
        """Only the fields of a :class:`ModelShape`."""
        return ModelShape(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelShape)})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values in the order of :data:`JSON_ORDER`, without unset ones."""
        values = {key: getattr(self, key) for key in JSON_ORDER if hasattr(self, key)}
        if values.get("num_decoder_layers") == self.moe_layers[-1] + 1:
            del values["num_decoder_layers"]
        for key, unset in (("attention_flops", None), ("state_bytes_per_request", 0)):
            if values.get(key, 1) == unset:
                del values[key]
        values["moe_layers"] = list(self.moe_layers)
        if isinstance(self.expert_bytes, tuple):
            values["expert_bytes"] = list(self.expert_bytes)
        return values


#: The order of a model's keys in files.
JSON_ORDER = (
    "name",
    "moe_layers",
    "num_experts",
    "top_k",
    "hidden_size",
    "dtype_bytes",
    "expert_bytes",
    "dense_bytes",
    "kv_bytes_per_token",
    "num_decoder_layers",
    "attention_flops",
    "state_bytes_per_request",
)


@dataclass(frozen=True)
class ModelSpec(ModelShape):
    """Sizes of one MoE language model, as planning and simulation need them.

    Parameters
    ----------
    hidden_size
        Width of a token's hidden state.
    dtype_bytes
        Bytes of one number of a hidden state on the wire and in the KV cache.
    dense_bytes
        Bytes of everything but the routed experts: embeddings, attention, norms, gates, shared
        experts, dense layers, output head.
    kv_bytes_per_token
        Bytes that one token adds to the KV cache, over all decoder layers. Layers with a window
        count as with full attention, layers with a state of one size (linear attention) as 0.
    num_decoder_layers
        Decoder layers, with experts or without; without it the last MoE layer + 1.
    attention_flops
        Operations of attention for a pair of tokens, on average over the decoder layers; ``None``
        where they are not known.
    state_bytes_per_request
        Bytes of a request's state in layers without keys and values (linear attention, Mamba).

    The other parameters, and the errors raised, are those of :class:`ModelShape`.
    """

    hidden_size: int
    dtype_bytes: int
    dense_bytes: int
    kv_bytes_per_token: int
    num_decoder_layers: int = 0
    attention_flops: int | None = None
    state_bytes_per_request: int = 0

    @property
    def decoder_layers_by_layer(self) -> tuple[int, ...]:
        """How many decoder layers execute with each MoE layer, [L]; they sum to all of them.

        Layers without routed experts execute with the MoE layer that follows them, those after the
        last MoE layer with it.
        """
        ends = [*self.moe_layers[:-1], self.num_decoder_layers - 1]
        return tuple(end - before for before, end in itertools.pairwise((-1, *ends)))

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("hidden_size", "dtype_bytes"):
            _require_size(field, getattr(self, field), 1)
        for field in ("dense_bytes", "kv_bytes_per_token", "state_bytes_per_request"):
            _require_size(field, getattr(self, field), 0)
        needed = self.moe_layers[-1] + 1
        if self.num_decoder_layers == 0 and self.num_decoder_layers is not False:
            object.__setattr__(self, "num_decoder_layers", needed)
        _require_size("num_decoder_layers", self.num_decoder_layers, needed, 2**31)
        if self.attention_flops is not None:
            _require_size("attention_flops", self.attention_flops, 0)


def _refuse(field: str, value: object, expected: str) -> None:
    raise InputError(shown(value, 80), place=field, expected=expected)


def _require_size(field: str, value: object, minimum: int, maximum: int = 2**53 - 1) -> None:
    require_integer(value, minimum, maximum, place=field, kind=int)  # one that JSON can hold


def require_same_model(a: ModelShape, b: ModelShape, *, source: object, other: object) -> None:
    """Refuse to use two files of different models together.

    The name, the layers, the experts, top-k and the expert sizes must agree.

    Raises
    ------
    WrongModel
        Names the first field that differs, with both values.
    """
    for field in ("name", "moe_layers", "num_experts", "top_k", "expert_bytes_by_layer"):
        of_a, of_b = getattr(a, field), getattr(b, field)
        if of_a != of_b:
            label = field.removesuffix("_by_layer")
            text = _summary if isinstance(of_a, tuple) else repr
            raise WrongModel(
                f"made for another model: {label} is {text(of_a)}",
                source=source,
                place="model",
                expected=f"{text(of_b)} as in {other}",
                remedy="use files of one model",
            )


def _summary(values: tuple[int, ...]) -> str:
    if len(set(values)) == 1 and len(values) > 1:
        return f"{values[0]} in {len(values)} layers"
    return f"{values[0]}..{values[-1]} ({len(values)} values)" if len(values) > 4 else str(values)


class _Presets(Mapping[str, ModelSpec]):
    """The specs in ``presets/*.json``, each read on first use."""

    def __getitem__(self, name: str) -> ModelSpec:
        return _preset(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_preset_files())

    def __len__(self) -> int:
        return len(_preset_files())


@functools.cache
def _preset_files() -> dict[str, Traversable]:
    folder = importlib.resources.files("prism_plan") / "presets"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}


@functools.cache
def _preset(name: str) -> ModelSpec:
    file = _preset_files()[name]
    spec = json.loads(file.read_text(encoding="utf-8"))["model"].items()
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in spec}
    return ModelSpec(**values)


#: Sizes of common models by name; the files hold the commands that made them.
PRESETS: Mapping[str, ModelSpec] = _Presets()
