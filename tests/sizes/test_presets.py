"""Presets: made again from what their files say, and against counts that others publish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prism_plan.errors import InputError
from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.sizes.load import load_model_spec

#: Parameters in billions, as the model cards give them (bfloat16 presets).
BILLIONS = {
    **{"mixtral-8x7b": 46.7, "mixtral-8x22b": 141, "deepseek-v2-lite": 15.7, "deepseek-v2": 236},
    **{"deepseek-v3": 671, "qwen1.5-moe-a2.7b": 14.3, "qwen3-30b-a3b": 30.5},
    **{"qwen3-235b-a22b": 235, "qwen3-next-80b-a3b": 80, "glm-4.5": 355, "glm-4.5-air": 106},
    **{"olmoe-1b-7b": 6.9, "minimax-m2": 230, "phi-3.5-moe": 41.9, "qwen3.5-35b-a3b": 35},
}


def total(spec: ModelSpec) -> int:
    return sum(spec.expert_bytes_by_layer) * spec.num_experts + spec.dense_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_again(name: str) -> None:
    """The configuration in its file gives its sizes; the file keeps the command and the source."""
    pytest.importorskip("transformers")
    from tools.make_preset import FOLDER, make_spec

    values = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert values["command"] == f"python -m tools.make_preset {name}"
    assert values["made_from"]
    assert make_spec(name, values["config"]) == PRESETS[name] == load_model_spec(name)


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_have_the_published_parameters(name: str) -> None:
    """Within 1.5 %: cards round, and count multi-token prediction or leave it out."""
    assert total(PRESETS[name]) / 2e9 == pytest.approx(BILLIONS[name], rel=0.015)


def test_gpt_oss_20b_equals_the_published_tensor_counts() -> None:
    """It has the bytes of the Hub's count: 1,804,459,584 BF16 and the MXFP4 weights.

    19,110,297,600 weights at 4 bits, with one byte of scale for each 32; the two files are
    13,761,316,904 bytes long, headers of some 50 kB included.
    """
    found = total(PRESETS["gpt-oss-20b"])
    assert found == 2 * 1_804_459_584 + 19_110_297_600 // 2 + 19_110_297_600 // 32
    assert 0 < 13_761_316_904 - found < 100_000


def test_deepseek_v3_fp8_equals_the_published_tensor_counts() -> None:
    """With its prediction layer, DeepSeek-V3 has the bytes that the Hub counts in its files.

    The Hub's count: 3,918,786,560 numbers of BF16, 680,571,043,840 of F8_E4M3 and 41,555,600 of
    F32. They include layer 61, a decoder layer with its own copies of embeddings and head.
    """
    pytest.importorskip("transformers")
    from tools.make_preset import FOLDER, make_spec

    config = json.loads((FOLDER / "deepseek-v3-fp8.json").read_text(encoding="utf-8"))["config"]
    one_layer_more = make_spec("x", config | {"num_hidden_layers": 62})
    copies = 2 * 2 * 129280 * 7168
    joined = 2 * 7168 * (2 * 7168)  # eh_proj, bf16
    norms = 3 * 2 * 7168  # enorm, hnorm, shared_head.norm
    published = 2 * 3_918_786_560 + 680_571_043_840 + 4 * 41_555_600
    assert total(one_layer_more) + copies + joined + norms == published


def test_presets_are_a_mapping() -> None:
    """Names in order, unknown names refused; each is called as it is named."""
    assert len(PRESETS) == len(list(PRESETS)) >= 20
    assert all(PRESETS[name].name == name for name in PRESETS)
    with pytest.raises(KeyError):
        PRESETS["../presets/mixtral-8x7b"]
    with pytest.raises(InputError, match="did you mean 'mixtral-8x7b'"):
        load_model_spec("mixtral-8x7")


def test_a_preset_needs_no_large_library(tmp_path: Path) -> None:
    """Presets, and headers of a checkpoint, are read without PyTorch and transformers."""
    traces = Path(__file__).parents[2] / "traces" / "tiny-mixtral"
    program = (
        "import sys; from prism_plan.sizes.load import load_model_spec as load; load('glm-4.5'); "
        f"load({str(traces)!r}); "
        "assert not {'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
