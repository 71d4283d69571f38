"""Layers of multi-token prediction, which engines record and model specs leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.profiling.common.extra_layers import MAX_MTP_LAYERS, split_mtp_layers
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.trtllm import read_trtllm
from prism_plan.profiling.vllm.importer import read_vllm
from tests.profiling.recordings import (
    TINY,
    lines,
    npy_text,
    read,
    refusal,
    routing,
    sglang_response,
    tiny,
    vllm_response,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy")

NOTICE = "left out layers {}: they stand after the layers of tiny (0..1), as"


def statistics(folder: Path, *ranks: dict[str, Any]) -> Path:
    """A folder of TensorRT-LLM's statistics."""
    folder.mkdir()
    meta = {"num_experts": 8, "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank, tensors in enumerate(ranks):
        safetensors_numpy.save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


def calls(layers: Any, number: int = 5) -> dict[str, Any]:
    """Statistics of one iteration."""
    return {f"100_{layer}": np.full(8, number, np.int64) for layer in layers}


@pytest.mark.parametrize("layers", [(2,), (2, 3), range(2, 10)])
def test_statistics_of_layers_after_the_last(tmp_path: Path, layers: Any) -> None:
    """TensorRT-LLM numbers them from the number of decoder layers on: left out, and told."""
    ranks = [calls([0, 1, *layers]), calls([0, 1, 2])]
    trace, _, told = read(read_trtllm, statistics(tmp_path / "s", *ranks))
    assert trace.counts[0].tolist() == [[10] * 8] * 2
    assert trace.tokens.tolist() == [40]
    assert len(told) == 1
    assert told[0].startswith(NOTICE.format(", ".join(map(str, layers))))


@pytest.mark.parametrize(("layers", "stray"), [((0, 1, 3), 3), ((0, 1, 2, 4), 4), (range(11), 10)])
def test_statistics_of_another_model(tmp_path: Path, layers: Any, stray: int) -> None:
    """Layers with a gap before them, or too many, are those of another model."""
    message = refusal(read_trtllm, statistics(tmp_path / "s", calls(layers)))
    assert f"layer {stray}; expected a MoE layer of tiny, 0..1" in message


def test_statistics_of_a_dense_layer(tmp_path: Path) -> None:
    """A dense layer before the last MoE layer is no layer of multi-token prediction."""
    folder = statistics(tmp_path / "s", calls([0, 1, 2]))
    assert "layer 0; expected" in refusal(read_trtllm, folder, model=tiny(moe_layers=(1, 2)))


@pytest.mark.parametrize("form", ["vllm", "vllm lists", "sglang"])
def test_responses_with_more_layers(tmp_path: Path, form: str) -> None:
    """Columns after the model's layers are left out where the shape or the numbers show them."""
    wide = np.concatenate([routing(12), routing(12, 1)[:, :1]], axis=1)
    reader = read_vllm if form.startswith("vllm") else read_sglang
    line = (vllm_response if form.startswith("vllm") else sglang_response)(wide, 8)
    if form == "vllm lists":
        line["choices"][0]["routed_experts"] = wide.tolist()
    path = lines(tmp_path / "r.jsonl", line)
    trace, (batch,), told = read(reader, path)
    assert batch.experts.tolist() == routing(12).tolist()
    assert trace.tokens.tolist() == [12]
    assert [text for text in told if text.startswith(NOTICE.format("2"))] == told != []


def test_responses_of_another_model(tmp_path: Path) -> None:
    """More layers after the last than any model predicts with are those of another model."""
    wide = np.concatenate([routing(12, n) for n in range(6)], axis=1)
    path = lines(tmp_path / "r.jsonl", {"routed_experts": npy_text(wide)})
    assert f"layer {2 + MAX_MTP_LAYERS}: experts" in refusal(read_vllm, path)


@pytest.mark.parametrize("layers", [3, 4])
def test_counts_with_more_layers(tmp_path: Path, layers: int) -> None:
    """So are rows of SGLang's counts; unused ones are passed over."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"logical_count": [[5] * 8] * layers}))
    trace, _, told = read(read_sglang, path)
    assert trace.counts[0].tolist() == [[5] * 8] * 2
    assert told[0].startswith(NOTICE.format(", ".join(map(str, range(2, layers)))))
    path.write_text(json.dumps({"logical_count": [[5] * 8] * 2 + [[0] * 8]}))
    assert read(read_sglang, path)[2] == []


def test_passes_with_more_layers(tmp_path: Path) -> None:
    """And layers of per_pass and per_token dumps."""
    torch = pytest.importorskip("torch")
    ids = torch.full((3, 4, 8), -1, dtype=torch.int32)
    ids[:2, :, :2] = torch.from_numpy(routing(4).transpose(1, 0, 2).astype("i4"))
    ids[2, :, :2] = torch.tensor([3, 4], dtype=torch.int32)
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "input_ids": [1, 2, 3, 4],
        "positions": [0, 1, 2, 3],
        "extend_seq_lens": [4],
        "forward_mode": 1,
        "topk_ids_of_layer": ids,
        "global_physical_count": torch.full((3, 8), 5, dtype=torch.int32),
    }
    table = torch.arange(8).repeat(3, 1)
    path = tmp_path / "d.pt"
    torch.save({"records": [record], "last_physical_to_logical_map": table}, path)
    _, (batch,), told = read(read_sglang, path)
    assert batch.experts.tolist() == routing(4).tolist()
    assert told[0].startswith(NOTICE.format("2"))
    del record["topk_ids_of_layer"]
    torch.save({"records": [record], "last_physical_to_logical_map": table}, path)
    trace, _, told = read(read_sglang, path)
    assert trace.counts[0].tolist() == [[5] * 8] * 2
    assert told[0].startswith(NOTICE.format("2"))


def test_which_layers_are_of_multi_token_prediction() -> None:
    """Those right behind the last layer, without a gap, at most eight."""
    assert split_mtp_layers([0, 1], TINY) == ([], None)
    assert split_mtp_layers([3, 0, 2], TINY) == ([2, 3], None)
    assert split_mtp_layers([2, 4], TINY) == ([2], 4)
    assert split_mtp_layers(range(11), TINY) == (list(range(2, 10)), 10)
