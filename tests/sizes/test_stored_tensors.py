"""Sizes from the headers of checkpoints: what is stored counts, in every quantisation."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from prism_plan.errors import InputError
from prism_plan.sizes.load import load_model_spec
from prism_plan.sizes.model_facts import read_facts
from prism_plan.sizes.safetensors_headers import read_header
from prism_plan.sizes.stored_tensors import StoredTensor, spec_from_tensors
from tests.sizes.layouts import CONFIG, EXPERTS, ONE_BY_ONE, STACKED, made, num_bytes, save


@pytest.mark.parametrize("layout", [*ONE_BY_ONE, *STACKED])
def test_every_layout_counts_what_is_stored(layout: str, tmp_path: Path) -> None:
    """Expert and dense bytes are the sums over the file's own tensors, with no extra library.

    The notes of bitsandbytes on a tensor, of another length for each, are no part of an expert.
    """
    dense, experts, config = made(layout)
    folder = save(tmp_path / "tiny", dense | experts, config)
    notes = num_bytes(experts, "quant_state.")
    spec = load_model_spec(folder)
    assert spec.expert_bytes == (num_bytes(experts) - notes) // (2 * EXPERTS)
    assert spec.dense_bytes == num_bytes(dense) + notes
    assert (spec.moe_layers, spec.num_experts, spec.top_k) == ((1, 2), EXPERTS, 2)
    assert (spec.num_decoder_layers, spec.kv_bytes_per_token) == (3, 3 * 2 * 2 * 32 * 2)
    assert spec.attention_flops == 2 * 4 * (32 + 32)
    assert load_model_spec(folder / "config.json") == spec


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    """Shards are read by their index; without it where all numbers are there, else refused."""
    from safetensors.torch import save_file

    dense, experts, config = made("AWQ")
    whole = load_model_spec(save(tmp_path / "one" / "tiny", dense | experts, config))
    folder = save(tmp_path / "tiny", {}, config)
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, tensors in zip(shards, (dense, experts), strict=True):
        save_file(tensors, folder / shard)
    assert load_model_spec(folder) == whole
    index = dict.fromkeys(dense, shards[0]) | dict.fromkeys(experts, shards[1])
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert load_model_spec(folder) == whole
    path.write_text(json.dumps({"weight_map": index | {"model.norm.weight": shards[1]}}))
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight is missing"):
        load_model_spec(folder)
    path.unlink()
    (folder / shards[1]).unlink()
    with pytest.raises(InputError, match="shards 2 of 2 are missing too"):
        load_model_spec(folder)


def spec(tensors: dict[str, tuple[tuple[int, ...], int]], **config: Any) -> Any:
    """Sizes of a list of (shape, bytes) by name."""
    facts = read_facts(CONFIG | config, source="config.json")
    stored = [StoredTensor(name, "U8", *one) for name, one in tensors.items()]
    return spec_from_tensors(stored, facts, name="x", source="file")


#: Four experts of 10 bytes in layers 1 and 2, 100 bytes of attention in each of three layers.
SMALL: dict[str, tuple[tuple[int, ...], int]] = {
    **{
        f"model.layers.{n}.mlp.experts.{e}.up.weight": ((10,), 10) for n in (1, 2) for e in range(4)
    },
    **{f"model.layers.{n}.self_attn.k_proj.weight": ((100,), 100) for n in range(3)},
    "model.embed_tokens.weight": ((7,), 7),
    "lm_head.weight": ((7,), 7),
}


def test_what_is_left_out() -> None:
    """Layers of multi-token prediction, images and sound, and the second copy of a tied head."""
    assert spec(SMALL).dense_bytes == 314
    more = {
        "model.layers.3.mlp.experts.0.up.weight": ((10,), 10),
        "model.layers.3.eh_proj.weight": ((10,), 10),
        "mtp.layers.0.mlp.experts.0.up.weight": ((10,), 10),
        "mtp.fc.weight": ((10,), 10),
        "visual.blocks.0.attn.weight": ((10,), 10),
        "model.vision_tower.layers.0.attn.weight": ((10,), 10),
        "audio_tower.layers.0.k_proj.weight": ((10,), 10),
    }
    assert spec(SMALL | more) == spec(SMALL)
    assert spec(SMALL, tie_word_embeddings=True).dense_bytes == 307
    shared = {"model.layers.1.mlp.shared_experts.up.weight": ((5,), 5)}
    assert spec(SMALL | shared).dense_bytes == 319


@pytest.mark.parametrize(
    "prefix", ["model.language_model", "language_model.model", "thinker.model"]
)
def test_the_language_model_of_a_multimodal_checkpoint(prefix: str) -> None:
    """What stands beside the layers with experts counts, and the output head."""
    whole = {name.replace("model.", f"{prefix}."): one for name, one in SMALL.items()}
    more = {"projector.weight": ((9,), 9), "model.connector.weight": ((9,), 9)}
    facts = read_facts({"model_type": "x", "text_config": CONFIG})
    stored = [StoredTensor(name, "U8", *one) for name, one in (whole | more).items()]
    found = spec_from_tensors(stored, facts, name="x", source="file")
    assert found == spec(SMALL)


def test_layers_may_differ_in_size() -> None:
    """Mixed quantisation gives a size a layer."""
    larger = {name: ((20,), 20) for name in SMALL if "layers.2.mlp.experts" in name}
    assert spec(SMALL | larger).expert_bytes == (10, 20)


def test_layers_with_a_state_cache_no_keys() -> None:
    """A layer of linear attention, Mamba or a short convolution adds nothing a token."""
    whole = spec(SMALL)
    for name in ("linear_attn.A_log", "mamba.in_proj.weight", "conv.conv.weight"):
        states = {f"model.layers.{n}.{name}": ((1,), 1) for n in (0, 2)}
        found = spec(SMALL | states)
        assert 3 * found.kv_bytes_per_token == whole.kv_bytes_per_token
        assert found.attention_flops == round(whole.attention_flops / 3)


FIRST = "model.layers.1.mlp.experts.0.up.weight"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a larger expert": ({FIRST: ((20,), 20)}, "layer 1 differ in size: 1 has 10 bytes, 0 has 20"),
    "one tensor more": (
        {FIRST.replace("up", "down"): ((20,), 20)},
        r"tensor model\.layers\.1\.mlp\.experts\.1\.down\.weight is missing",
    ),
    "a fifth expert": ({FIRST.replace(".0.", ".4."): ((10,), 10)}, "4 and 5 experts in a layer"),
    "a stack of others": (
        {"model.layers.0.mlp.experts.up": ((5, 2, 2), 20)},
        "4 and 5 experts in a layer",
    ),
    "no whole experts": (
        {"model.layers.1.mlp.experts.up": ((4, 2, 2), 21)},
        "21 bytes; expected a multiple of the 4 experts",
    ),
    "attention of experts": (
        {"model.layers.1.self_attention.experts.up": ((4, 2, 2), 20)},
        "attention is routed to experts too",
    ),
    "a router without experts": (
        {"model.layers.0.mlp.gate.weight": ((4, 2), 8)},
        "layer 0 has a router and no experts",
    ),
    "one layer with a projection more": (
        {f"model.layers.2.mlp.experts.{e}.down.weight": ((10,), 10) for e in range(4)},
        "the experts of layer 1 have no down; expected the same projections in all layers",
    ),
    "two language models": (
        {"draft.layers.1.mlp.experts.up": ((4, 2, 2), 20)},
        "expected one language model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_make_no_model_are_refused(case: str) -> None:
    """Sizes are refused with the tensor or layer and the reason, never averaged."""
    more, words = BROKEN[case]
    with pytest.raises(InputError, match=words):
        spec(SMALL | more)


def test_what_is_missing_is_named() -> None:
    """A layer without tensors, an expert that one layer lacks, a tensor that is duplicated."""
    with pytest.raises(InputError, match="layer 3 has no tensors; expected the 4 decoder layers"):
        spec(SMALL, num_hidden_layers=4)
    for gone in ("model.layers.2.mlp.experts.3", "model.layers.1.mlp.experts.0"):
        layer, expert = gone.split(".")[2], gone.split(".")[5]
        with pytest.raises(InputError, match=f"expert {expert} of layer {layer} is missing"):
            spec({name: one for name, one in SMALL.items() if not name.startswith(gone)})
    facts = read_facts(CONFIG, source="config.json")
    stored = [StoredTensor(name, "U8", *one) for name, one in SMALL.items()]
    with pytest.raises(InputError, match=r"lm_head\.weight: is duplicated"):
        spec_from_tensors([*stored, stored[-1]], facts, name="x", source="file")


def test_tensors_that_an_index_leaves_out_count(tmp_path: Path) -> None:
    """What lies in a shard is loaded, whether or not the index names it."""
    dense, experts, config = made("AWQ")
    whole = load_model_spec(save(tmp_path / "one" / "tiny", dense | experts, config))
    folder = save(tmp_path / "tiny", dense | experts, config)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"weight_map": dict.fromkeys(sorted(dense | experts)[1:], shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model_spec(folder) == whole


def test_other_numbers_than_the_configuration_says() -> None:
    """Experts that the configuration does not know, top-k of more than there are, none at all."""
    with pytest.raises(InputError, match="tensors of 4 experts in a layer; expected 8"):
        spec(SMALL, num_experts=8)
    with pytest.raises(InputError, match="num_experts_per_tok: 5; expected at most the 4 experts"):
        spec(SMALL, num_experts_per_tok=5)
    with pytest.raises(InputError, match="x has no MoE layers"):
        spec({name: one for name, one in SMALL.items() if "experts" not in name})


# ---------------------------------------------------------------------------------- broken headers


def header(values: Any, data: int = 0) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
HEADERS: dict[str, bytes] = {
    "empty": b"",
    "a length beyond the file": struct.pack("<Q", 2**60) + b"{}",
    "a length beyond the limit": struct.pack("<Q", 2**27) + bytes(64),
    "no JSON": header([])[:-1] + b"{",
    "a list": header([]),
    "no object": header({"a": 7}),
    "data that is not there": header({"a": ENTRY}),
    "data beyond": header({"a": ENTRY}, 9),
    "overlapping tensors": header({"a": ENTRY, "b": ENTRY, "c": ENTRY}, 4),
    "a huge shape": header({"a": ENTRY | {"shape": [2**62] * 16}}, 4),
    "many dimensions": header({"a": ENTRY | {"shape": [1] * 100_000}}, 4),
    "a negative size": header({"a": ENTRY | {"data_offsets": [4, 0]}}, 4),
    "another size": header({"a": ENTRY | {"dtype": "F64"}}, 4),
    "a dtype that is none": header({"a": ENTRY | {"dtype": 3}}, 4),
    "deep": header({"a": ENTRY})[:8] + b"[" * 4000,
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_headers_are_refused(case: str, tmp_path: Path) -> None:
    """Damaged and hostile headers end in one line that names the file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[case])
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_kind_of_numbers_that_is_not_known_is_counted(tmp_path: Path) -> None:
    """Positions tell the size of numbers of a kind that came later."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(header({"a": ENTRY | {"dtype": "F3_E1M1"}}, 4))
    assert read_header(path)["a"].num_bytes == 4
