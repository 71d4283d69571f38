"""Tests of model specs: presets, derived numbers, JSON, and comparison of two models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError, WrongModel
from prism_plan.io.model_spec import ShapePart, spec_from_json, spec_from_part
from prism_plan.io.pydantic_base import validate
from prism_plan.model_spec import PRESETS, ModelShape, ModelSpec, require_same_model
from prism_plan.sizes.load import load_model_spec

SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 3, 4),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=1000,
    kv_bytes_per_token=16,
)


def changed(**changes: Any) -> ModelSpec:
    return dataclasses.replace(SPEC, **changes)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    layers = tuple(sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=6))))
    experts = draw(st.integers(1, 65536))
    size = st.integers(1, 2**50)
    by_layer = st.lists(size, min_size=len(layers), max_size=len(layers)).map(tuple)
    return ModelSpec(
        name=draw(st.text(min_size=1)),
        moe_layers=layers,
        num_experts=experts,
        top_k=draw(st.integers(1, experts)),
        hidden_size=draw(st.integers(1, 2**20)),
        dtype_bytes=draw(st.integers(1, 8)),
        expert_bytes=draw(size | by_layer),
        dense_bytes=draw(st.integers(0, 2**50)),
        kv_bytes_per_token=draw(st.integers(0, 2**30)),
    )


# --------------------------------------------------------------------------------- presets


def test_mixtral_preset() -> None:
    """Mixtral's sizes are those of its matrices, counted by hand, in bf16."""
    model = PRESETS["mixtral-8x7b"]
    hidden, keys = 4096, 8 * 128
    attention = 2 * hidden * hidden + 2 * hidden * keys
    layer = attention + hidden * 8 + 2 * hidden
    assert model.moe_layers == tuple(range(32))
    assert (model.num_experts, model.top_k, model.num_pairs) == (8, 2, 256)
    assert model.expert_bytes == 3 * 4096 * 14336 * 2 == 352_321_536
    assert model.dense_bytes == 2 * (2 * 32000 * hidden + 32 * layer + hidden) == 3_211_272_192
    assert model.kv_bytes_per_token == 32 * 2 * keys * 2


def test_deepseek_v2_lite_preset() -> None:
    """V2-Lite's sizes are those of its matrices, counted by hand, in bf16; layer 0 is dense."""
    model = PRESETS["deepseek-v2-lite"]
    hidden, heads, latent, rope = 2048, 16, 512, 64
    attention = (
        hidden * heads * (128 + rope)  # queries
        + hidden * (latent + rope) + latent  # compressed keys and values, and their norm
        + latent * heads * (128 + 128)
        + heads * 128 * hidden
    )  # fmt: skip
    moe_layer = 64 * hidden + 3 * hidden * 2 * 1408  # gate and two shared experts
    dense = 2 * 102400 * hidden + 27 * (attention + 2 * hidden) + hidden
    dense += 3 * hidden * 10944 + 26 * moe_layer
    assert model.moe_layers == tuple(range(1, 27))
    assert (model.num_experts, model.top_k, model.num_pairs) == (64, 6, 1664)
    assert model.expert_bytes == 3 * 2048 * 1408 * 2 == 17_301_504
    assert model.dense_bytes == 2 * dense == 2_623_265_792
    assert model.kv_bytes_per_token == 27 * (latent + rope) * 2


@pytest.mark.parametrize("name", PRESETS)
def test_load_preset(name: str) -> None:
    """A preset is loaded by its name, which is the name it carries."""
    assert load_model_spec(name) is PRESETS[name]
    assert PRESETS[name].name == name


def test_load_spec_file(tmp_path: Path) -> None:
    """A JSON file with a spec of ours is a model too."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SPEC.to_json()))
    assert load_model_spec(str(path)) == SPEC


def test_load_unknown() -> None:
    """A name that is neither preset nor file is refused, with the closest preset."""
    with pytest.raises(InputError, match="did you mean 'mixtral-8x7b'"):
        load_model_spec("mixtral-8x7")


# --------------------------------------------------------------------------------- numbers


@given(specs())
@settings(max_examples=40)
def test_derived_numbers(model: ModelSpec) -> None:
    """L, J and the sizes by layer follow from the fields."""
    assert model.num_layers == len(model.moe_layers)
    assert model.num_pairs == len(model.moe_layers) * model.num_experts
    sizes = model.expert_bytes_by_layer
    assert len(sizes) == model.num_layers
    if isinstance(model.expert_bytes, int):
        assert set(sizes) == {model.expert_bytes}
        assert model.equal_expert_bytes
    else:
        assert sizes == model.expert_bytes
        assert model.equal_expert_bytes == all(size == sizes[0] for size in sizes)


def test_pair_text() -> None:
    """Pair l·E + e is named by its decoder layer, not by the position of the layer."""
    texts = [SPEC.pair_text(pair) for pair in range(SPEC.num_pairs)]
    assert texts == [f"layer {layer} expert {e}" for layer in (1, 3, 4) for e in range(4)]


@pytest.mark.parametrize(
    ("layers", "text"),
    [((1, 2, 3), "1..3"), ((0, 1), "0..1"), ((5,), "5"), ((1, 3, 5), "1, 3, 5"), ((1, 3), "1, 3")],
)
def test_layers_text(layers: tuple[int, ...], text: str) -> None:
    """A run of layers is written as its ends, anything else in full."""
    assert changed(moe_layers=layers, num_decoder_layers=0).layers_text() == text


def test_shape() -> None:
    """The shape of a spec has its experts and nothing else."""
    shape = SPEC.shape()
    assert type(shape) is ModelShape
    assert shape == ModelShape("tiny", (1, 3, 4), 4, 2, 100)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", 5),
        ("moe_layers", ()),
        ("moe_layers", [1, 3, 4]),
        ("moe_layers", (1, 1, 2)),
        ("moe_layers", (3, 1, 4)),
        ("moe_layers", (-1, 0, 1)),
        ("moe_layers", (1.0, 2, 3)),
        ("num_experts", 0),
        ("num_experts", 65537),
        ("num_experts", True),
        ("top_k", 0),
        ("top_k", 5),
        ("top_k", 2.0),
        ("expert_bytes", 0),
        ("expert_bytes", (100, 100)),
        ("expert_bytes", (100, 0, 100)),
        ("expert_bytes", 1e9),
        ("hidden_size", 0),
        ("dtype_bytes", 0),
        ("dense_bytes", -1),
        ("kv_bytes_per_token", -1),
        ("kv_bytes_per_token", None),
    ],
)
def test_wrong_fields(field: str, value: object) -> None:
    """A spec with a wrong field cannot be made, and the error names the field."""
    with pytest.raises(InputError) as caught:
        changed(**{field: value})
    assert caught.value.place == field


# --------------------------------------------------------------------------------- JSON


@given(specs())
@settings(max_examples=40)
def test_json_round_trip(model: ModelSpec) -> None:
    """Spec and shape come back from JSON text as they were."""
    assert spec_from_json(json.loads(json.dumps(model.to_json()))) == model
    shape = model.shape()
    part = ShapePart.model_validate(json.loads(json.dumps(shape.to_json())))
    assert spec_from_part(ModelShape, part, "f") == shape


def test_json_keys() -> None:
    """The keys are those of docs/design.md, section 6, in that order."""
    assert " ".join(SPEC.to_json()) == (
        "name moe_layers num_experts top_k hidden_size dtype_bytes expert_bytes dense_bytes "
        "kv_bytes_per_token"
    )
    assert " ".join(SPEC.shape().to_json()) == "name moe_layers num_experts top_k expert_bytes"
    assert changed(expert_bytes=(1, 2, 3)).to_json()["expert_bytes"] == [1, 2, 3]


def test_json_missing_unknown_wrong() -> None:
    """Any missing key, an unknown one and a wrong value are refused by name and place."""
    for key in SPEC.to_json():
        values = SPEC.to_json()
        del values[key]
        with pytest.raises(InputError, match=f"f: model: key '{key}' is missing"):
            spec_from_json(values, "f", place="model")
    with pytest.raises(InputError, match="unknown key 'topk', did you mean 'top_k'"):
        spec_from_json({**SPEC.to_json(), "topk": 1})
    with pytest.raises(InputError, match="unknown key 'hidden_size'"):
        validate(ShapePart, SPEC.to_json())
    with pytest.raises(InputError, match=r"f: model\.top_k: 9; expected at most num_experts"):
        spec_from_json({**SPEC.to_json(), "top_k": 9}, "f", place="model")
    with pytest.raises(InputError, match="expected an object"):
        spec_from_json([1, 2])


# --------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("field", "value", "texts"),
    [
        ("name", "other", ["name is 'tiny'", "'other'"]),
        ("moe_layers", (1, 2, 3), ["moe_layers is (1, 3, 4)", "(1, 2, 3)"]),
        ("num_experts", 5, ["num_experts is 4", "expected 5"]),
        ("top_k", 1, ["top_k is 2", "expected 1"]),
        ("expert_bytes", 99, ["expert_bytes is 100 in 3 layers", "99 in 3 layers"]),
        ("expert_bytes", (100, 100, 99), ["expert_bytes is 100 in 3 layers", "(100, 100, 99)"]),
    ],
)
def test_different_models(field: str, value: Any, texts: list[str]) -> None:
    """Two files of different models are refused: the field, both values and both files."""
    with pytest.raises(WrongModel) as caught:
        require_same_model(SPEC, changed(**{field: value}), source="p.json", other="t.parquet")
    for text in ["p.json", "t.parquet", *texts]:
        assert text in str(caught.value)


def accepted(one: Any, two: Any) -> bool:
    """Whether files of both can be used together."""
    try:
        require_same_model(one, two, source="a", other="b")
    except WrongModel:
        return False
    return True


def test_same_model() -> None:
    """Equal experts are enough: a shape agrees with its spec, and one size with it repeated."""
    for other in (SPEC, SPEC.shape(), changed(hidden_size=9), changed(expert_bytes=(100,) * 3)):
        assert accepted(SPEC, other)
        assert accepted(other, SPEC)
    assert not accepted(SPEC, changed(top_k=1))
