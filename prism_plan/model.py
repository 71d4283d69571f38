"""What the planner needs to know of a Mixture-of-Experts model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from prism_plan.errors import InputError, WrongModel, did_you_mean
from prism_plan.limits import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_NAME_LENGTH,
    MAX_PAIRS,
    require_at_most,
)
from prism_plan.text import shown


@dataclass(frozen=True)
class ModelShape:
    """The experts of a model: what a placement file needs to know of it.

    Parameters
    ----------
    name
        What the model is called in files and messages.
    moe_layers
        Decoder indices of the MoE layers, ascending (DeepSeek-V2-Lite: 1..26, Mixtral: 0..31).
    num_experts, top_k
        Routed experts of a layer, and how many of them a token is sent to.
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
            _wrong("name", self.name, "a non-empty text")
        if len(self.name) > MAX_NAME_LENGTH:
            _wrong("name", self.name, f"at most {MAX_NAME_LENGTH:,} characters")
        for field in ("num_experts", "top_k"):
            _whole(field, getattr(self, field), 1)
        layers = self.moe_layers
        if not isinstance(layers, tuple):
            _wrong("moe_layers", layers, "a list of decoder indices")
        require_at_most(len(layers), MAX_LAYERS, "layers", place="moe_layers")
        for layer in layers:
            _whole("moe_layers", layer, 0, 2**31)
        if not layers or any(a >= b for a, b in itertools.pairwise(layers)):
            _wrong("moe_layers", list(layers), "at least one decoder index, ascending")
        if self.num_experts > MAX_EXPERTS:
            _wrong("num_experts", self.num_experts, f"at most {MAX_EXPERTS}")
        if self.top_k > self.num_experts:
            _wrong("top_k", self.top_k, f"at most num_experts = {self.num_experts}")
        pairs = f"experts in all ({self.num_experts:,} in each of {len(layers):,} layers)"
        require_at_most(self.num_pairs, MAX_PAIRS, pairs, place="num_experts")
        if isinstance(self.expert_bytes, tuple):
            if len(self.expert_bytes) != len(layers):
                _wrong(
                    "expert_bytes",
                    f"{len(self.expert_bytes)} sizes",
                    f"one size, or one for each of the {len(layers)} MoE layers",
                )
            for size in self.expert_bytes:
                _whole("expert_bytes", size, 1)
        else:
            _whole("expert_bytes", self.expert_bytes, 1)

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
        """The fields as JSON values, in the order of DESIGN section 6."""
        values = {key: getattr(self, key) for key in JSON_ORDER if hasattr(self, key)}
        values["moe_layers"] = list(self.moe_layers)
        if isinstance(self.expert_bytes, tuple):
            values["expert_bytes"] = list(self.expert_bytes)
        return values

    @classmethod
    def from_json(cls, values: Any, source: object = "", place: str = "model") -> Self:
        """The reverse of :meth:`to_json`.

        Raises
        ------
        InputError
            A key is missing, unknown, or has a value of the wrong kind.
        """
        if not isinstance(values, Mapping):
            raise InputError(shown(values), source=source, place=place, expected="an object")
        fields = {field.name for field in dataclasses.fields(cls)}
        known = [key for key in JSON_ORDER if key in fields]
        for key in values:
            if key not in fields:
                raise InputError(
                    f"unknown key {key!r}{did_you_mean(str(key), known)}",
                    source=source,
                    place=place,
                    expected=f"the keys {', '.join(known)}",
                )
        for key in known:
            if key not in values:
                raise InputError(f"key {key!r} is missing", source=source, place=place)
        kinds = dict(values)
        for key in ("moe_layers", "expert_bytes"):
            if isinstance(kinds[key], list):
                kinds[key] = tuple(kinds[key])
        try:
            return cls(**kinds)
        except InputError as error:
            raise InputError(
                error.found,
                source=source,
                place=f"{place}.{error.place}",
                expected=error.expected,
            ) from error


#: The order of keys in our files.
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
)


@dataclass(frozen=True)
class ModelSpec(ModelShape):
    """All that planning and simulating need to know of one MoE language model.

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
        Bytes that one token adds to the KV cache, over all decoder layers.

    The other parameters, and the errors raised, are those of :class:`ModelShape`.
    """

    hidden_size: int
    dtype_bytes: int
    dense_bytes: int
    kv_bytes_per_token: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("hidden_size", "dtype_bytes"):
            _whole(field, getattr(self, field), 1)
        for field in ("dense_bytes", "kv_bytes_per_token"):
            _whole(field, getattr(self, field), 0)


def _wrong(field: str, value: object, expected: str) -> None:
    raise InputError(shown(value, 80), place=field, expected=expected)


def _whole(field: str, value: object, least: int, below: int = 2**53) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < below:
        _wrong(field, value, f"a whole number from {least:,} to {below - 1:,}")


def require_same_model(a: ModelShape, b: ModelShape, *, source: object, other: object) -> None:
    """Refuse to use two files together that speak of different models.

    The name, the layers, the experts, top-k and the expert sizes must agree.

    Raises
    ------
    WrongModel
        Names the first field that differs, with both values.
    """
    for field in ("name", "moe_layers", "num_experts", "top_k", "expert_bytes_by_layer"):
        ours, theirs = getattr(a, field), getattr(b, field)
        if ours != theirs:
            label = field.removesuffix("_by_layer")
            show = _short_layers if isinstance(ours, tuple) else repr
            raise WrongModel(
                f"made for another model: {label} is {show(ours)}",
                source=source,
                place="model",
                expected=f"{show(theirs)} as in {other}",
                remedy="use files of one model",
            )


def _short_layers(values: tuple[int, ...]) -> str:
    if len(set(values)) == 1 and len(values) > 1:
        return f"{values[0]} in {len(values)} layers"
    return f"{values[0]}..{values[-1]} ({len(values)} values)" if len(values) > 4 else str(values)


PRESETS: dict[str, ModelSpec] = {
    "mixtral-8x7b": ModelSpec(
        name="mixtral-8x7b",
        moe_layers=tuple(range(32)),
        num_experts=8,
        top_k=2,
        hidden_size=4096,
        dtype_bytes=2,
        expert_bytes=352_321_536,
        dense_bytes=3_211_272_192,
        kv_bytes_per_token=131_072,
    ),
    "deepseek-v2-lite": ModelSpec(
        name="deepseek-v2-lite",
        moe_layers=tuple(range(1, 27)),
        num_experts=64,
        top_k=6,
        hidden_size=2048,
        dtype_bytes=2,
        expert_bytes=17_301_504,
        dense_bytes=2_623_265_792,
        kv_bytes_per_token=31_104,
    ),
}


def load_model(reference: str) -> ModelSpec:
    """The spec of a preset name, of a ``config.json``, or of a checkpoint folder that holds one.

    Raises
    ------
    InputError
        Neither a preset nor a readable configuration of a known MoE family.
    """
    from pathlib import Path

    if reference in PRESETS:
        return PRESETS[reference]
    path = Path(reference)
    try:
        if path.is_dir():
            path = path / "config.json"
        found = path.exists()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=reference, remedy="give a readable file") from error
    if not found:
        raise InputError(
            f"{reference!r} is neither a preset nor a file{did_you_mean(reference, PRESETS)}",
            expected=f"one of {', '.join(PRESETS)}, or a Hugging Face config.json",
        )
    from prism_plan.model_config import spec_from_config_file

    return spec_from_config_file(path)
