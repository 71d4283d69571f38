"""Statistics folders of TensorRT-LLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.sources import Source
from prism_plan.profiling.trtllm import read_trtllm

safetensors_numpy = pytest.importorskip("safetensors.numpy")

#: Layer 0 is dense.
MODEL = ModelSpec(
    name="toy",
    moe_layers=(1, 2, 4),
    num_experts=6,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=100,
    kv_bytes_per_token=4,
)
Ranks = list[dict[str, npt.NDArray[Any]]]


def calls_of(rng: np.random.Generator, tokens: int) -> npt.NDArray[np.int64]:
    """Calls [E] of so many tokens in a layer."""
    chosen = np.argsort(rng.random((tokens, MODEL.num_experts)), axis=1)[:, : MODEL.top_k]
    return np.bincount(chosen.ravel(), minlength=MODEL.num_experts)


def recording(ranks: int = 2, seed: int = 0) -> Ranks:
    """Keys ``<iteration>_<layer>`` for each rank; rank r has r + 3 tokens an iteration."""
    rng = np.random.default_rng(seed)
    return [
        {f"{i}_{layer}": calls_of(rng, r + 3) for i in (100, 101) for layer in MODEL.moe_layers}
        for r in range(ranks)
    ]


def write(folder: Path, ranks: Ranks, **meta: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"num_experts": MODEL.num_experts, "num_experts_per_token": MODEL.top_k, **meta}
    (folder / "meta_info.json").write_text(json.dumps(values))
    for rank, tensors in enumerate(ranks):
        safetensors_numpy.save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_trtllm([Source(folder)], MODEL)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_calls_are_summed_over_ranks_and_iterations(tmp_path: Path) -> None:
    """The trace has exactly the recorded calls, and 14 tokens: two ranks of 3 and 4, twice."""
    ranks = recording()
    trace = read_trtllm([Source(write(tmp_path / "chat", ranks))], MODEL)
    for at, layer in enumerate(MODEL.moe_layers):
        wanted = sum(part[f"{i}_{layer}"] for part in ranks for i in (100, 101))
        assert np.array_equal(trace.counts[0, at], wanted)
    assert trace.kind == "counts"
    assert trace.tasks == ("chat",)
    assert trace.tokens.tolist() == [14]


def test_the_trace_can_be_written_and_read(tmp_path: Path) -> None:
    """A written trace has the same counts, tokens and source as the one that was read."""
    trace = read_trtllm([Source(write(tmp_path / "chat", recording()))], MODEL)
    write_trace(tmp_path / "t.parquet", trace)
    again = read_trace(tmp_path / "t.parquet")
    assert np.array_equal(again.counts, trace.counts)
    assert again.tokens.tolist() == trace.tokens.tolist()
    assert again.provenance["source"] == "trtllm"


def test_folders_are_tasks(tmp_path: Path) -> None:
    """A label names a folder's task; folders of one label are added up, others are refused."""
    a, b = write(tmp_path / "a", recording(seed=1)), write(tmp_path / "b", recording(seed=2))
    apart = read_trtllm([Source(a, "law"), Source(b)], MODEL)
    assert apart.tasks == ("law", "b")
    together = read_trtllm([Source(a, "law"), Source(b, "law")], MODEL)
    assert together.tasks == ("law",)
    assert np.array_equal(together.counts[0], apart.counts.sum(axis=0))
    with pytest.raises(InputError, match="given twice"):
        read_trtllm([Source(a), Source(a)], MODEL)
    with pytest.raises(InputError, match="given twice"):
        read_trtllm([Source(a, "law"), Source(a, "law")], MODEL)


def test_more_keys_in_meta_info_are_no_matter(tmp_path: Path) -> None:
    """Newer versions write ep_size and experts_per_rank beside the two numbers."""
    folder = write(tmp_path / "chat", recording(), ep_size=2, experts_per_rank=3)
    assert read_trtllm([Source(folder)], MODEL).tokens.tolist() == [14]


def test_layers_that_disagree_are_told(tmp_path: Path) -> None:
    """Where an iteration lacks a layer, the fullest layer decides and the user hears of it."""
    ranks = recording(1)
    del ranks[0]["101_2"]
    told: list[str] = []
    trace = read_trtllm([Source(write(tmp_path / "chat", ranks))], MODEL, notify=told.append)
    assert trace.tokens.tolist() == [6]
    assert len(told) == 1
    assert "layers have 6 to 12 calls, not all 2 a token" in told[0]


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"num_experts": 8}, "num_experts: 8; expected 6 of toy"),
        ({"num_experts_per_token": 4}, "num_experts_per_token: 4; expected 2"),
        ({"num_experts": "6"}, "num_experts: '6'"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, meta: dict[str, Any], words: str) -> None:
    """meta_info.json must be of the model that --model names (slots of a balancer are not)."""
    message = refusal(write(tmp_path / "chat", recording(), **meta))
    assert words in message
    assert "meta_info.json" in message
    assert "without a load balancer" in message


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("100_0", np.ones(6, np.int64), "key '100_0': layer 0; expected a MoE layer of toy"),
        ("100_7", np.ones(6, np.int64), "key '100_7': layer 7"),
        ("100_None", np.ones(6, np.int64), "key '100_None'; expected <iteration>_<decoder layer>"),
        ("102_1", np.ones(8, np.int64), "key '102_1': I64 [8]; expected I64 [6]"),
        ("102_1", np.ones((6, 1), np.int64), "I64 [6, 1]"),
        ("102_1", np.full(6, np.nan), "F64 [6]; expected I64 [6]"),
        ("102_1", np.ones(6, np.int32), "I32 [6]; expected I64 [6]"),
        ("102_1", np.array([0, 0, -5, 0, 0, 0]), "key '102_1' expert 2: -5 calls"),
    ],
)
def test_bad_tensors_are_named(tmp_path: Path, key: str, values: Any, words: str) -> None:
    """A foreign layer, shape, dtype or negative count is refused with file and key."""
    ranks = recording()
    ranks[1][key] = values
    message = refusal(write(tmp_path / "chat", ranks))
    assert words in message
    assert "rank1.safetensors" in message


def test_missing_layers_are_named(tmp_path: Path) -> None:
    """A MoE layer of the model without a key is refused."""
    ranks = [{k: v for k, v in part.items() if not k.endswith("_4")} for part in recording()]
    assert "no calls in layer 4" in refusal(write(tmp_path / "chat", ranks))


def test_missing_files_are_named(tmp_path: Path) -> None:
    """No folder, no meta_info.json or no rank file: each has a message of its own."""
    folder = write(tmp_path / "chat", [])
    assert "no rank*.safetensors" in refusal(folder)
    (folder / "meta_info.json").unlink()
    assert "meta_info.json: no such file" in refusal(folder)
    (tmp_path / "file").touch()
    assert "not a folder" in refusal(tmp_path / "file")
    with pytest.raises(InputError, match="no sources"):
        read_trtllm([], MODEL)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"num_experts": 6}', "\x00", "NaN"])
def test_bad_meta_info_is_refused(tmp_path: Path, text: str) -> None:
    """meta_info.json that is truncated or of another form is one line of error."""
    folder = write(tmp_path / "chat", recording())
    (folder / "meta_info.json").write_text(text)
    assert "meta_info.json" in refusal(folder)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    """No length of a rank file but the full one is read, and none ends in a traceback."""
    folder = write(tmp_path / "chat", recording(1))
    path = folder / "rank0.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "rank0.safetensors: not a readable safetensors file" in refusal(folder)
