"""Checkpoint folders: experts told from the dense part, read by range, refused where wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from prism_plan.errors import InputError  # noqa: E402
from runtime_adapter.weights.checkpoint import Checkpoint  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from runtime_adapter.weights.tensor_file import TensorFile  # noqa: E402
from tests.profiling.recording.families import tiny_model  # noqa: E402
from tests.runtime_adapter.checkpoints import TINY, TRACES, committed, experts_in_memory, saved  # noqa: E402

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("model", TINY)
def test_every_tensor_is_dense_or_of_an_expert(model: str) -> None:
    """The dense part and the experts together are the file, each number once."""
    checkpoint = committed(model)
    stored = load_file(TRACES / f"tiny-{model}" / SINGLE)
    dense = sum(checkpoint.read(name).nbytes for name in checkpoint.dense_names())
    experts = sum(
        sum(part.nbytes for part in checkpoint.expert(at, e).values())
        for at in range(checkpoint.spec.num_layers)
        for e in range(checkpoint.spec.num_experts)
    )
    assert dense + experts == sum(tensor.nbytes for tensor in stored.values())
    assert dense == checkpoint.spec.dense_bytes
    assert experts == checkpoint.spec.num_pairs * checkpoint.spec.expert_bytes


@pytest.mark.parametrize("model", TINY)
def test_parts_of_an_expert(model: str) -> None:
    """An expert's parts are the stored tensors of its names, in bfloat16 as they are stored."""
    checkpoint = committed(model)
    stored = load_file(TRACES / f"tiny-{model}" / SINGLE)
    layer = checkpoint.spec.moe_layers[2]
    module, names = {
        "mixtral": (f"model.layers.{layer}.block_sparse_moe.experts.5", ("w1", "w3", "w2")),
        "deepseek-v2": (
            f"model.layers.{layer}.mlp.experts.5",
            ("gate_proj", "up_proj", "down_proj"),
        ),
    }[model]
    found = checkpoint.expert(2, 5)
    assert sorted(found) == ["down", "gate", "up"]
    for part, name in zip(("gate", "up", "down"), names, strict=True):
        assert found[part].dtype == torch.bfloat16
        assert torch.equal(found[part], stored[f"{module}.{name}.weight"])


@pytest.mark.parametrize("layout", ["single", "sharded", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_by_transformers(family: str, layout: str, tmp_path: Path) -> None:
    """In every family and layout, parts and dense tensors are those of the model in memory."""
    checkpoint = Checkpoint(saved(family, tmp_path, layout))
    model = tiny_model(family)
    width = checkpoint.experts.width
    for at, module in enumerate(experts_in_memory(model)):
        for expert in range(checkpoint.spec.num_experts):
            found = checkpoint.expert(at, expert)
            assert torch.equal(found["gate"], module.gate_up_proj[expert, :width])
            assert torch.equal(found["up"], module.gate_up_proj[expert, width:])
            assert torch.equal(found["down"], module.down_proj[expert])
    state = model.state_dict()
    assert checkpoint.dense_names() == sorted(n for n in state if ".mlp.experts." not in n)
    for name in checkpoint.dense_names():
        assert torch.equal(checkpoint.read(name), state[name])


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the reads of weights that are made from now on."""
    lengths: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        lengths.append(real(fd, buffers, offset))
        return lengths[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return lengths


@pytest.mark.parametrize("layout", ["single", "sharded", "stacked"])
def test_only_what_is_asked_for_is_read(layout: str, tmp_path: Path, bytes_read: list[int]) -> None:
    """Opening reads no weights; an expert costs its own bytes, also out of a stacked tensor."""
    checkpoint = Checkpoint(saved("deepseek_v2", tmp_path, layout))
    bytes_read.clear()
    again = Checkpoint(tmp_path)
    assert bytes_read == []
    again.expert(1, 3)
    assert sum(bytes_read) == checkpoint.spec.expert_bytes


# ------------------------------------------------------------------------------------- wrong files


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = folder / INDEX
    values = json.loads(path.read_text())
    edit(values["weight_map"])
    path.write_text(json.dumps(values))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


EXPERT = "model.layers.2.block_sparse_moe.experts.3.w2.weight"


def cut(folder: Path, keep: int) -> None:
    with open(folder / SINGLE, "r+b") as stream:
        stream.truncate(keep)


def pickle_it(folder: Path) -> None:
    os.rename(folder / SINGLE, folder / "pytorch_model.bin")


def flat(tensors: dict[str, Any]) -> None:
    tensors[EXPERT] = tensors[EXPERT].reshape(-1)


def whole(tensors: dict[str, Any]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.int32)


def strange(tensors: dict[str, Any]) -> None:
    tensors[EXPERT.replace("w2", "w4")] = torch.zeros(2)


def ninth(tensors: dict[str, Any]) -> None:
    tensors[EXPERT.replace("experts.3", "experts.8")] = tensors[EXPERT].clone()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(EXPERT)),
        rf"model\.safetensors: tensor {EXPERT} is missing; expected the same tensors of all",
    ),
    "another shape": (
        lambda f: edit_tensors(f, flat),
        rf"model\.safetensors: {EXPERT}: shape \[9216\] of bfloat16; expected \[64, 144\]",
    ),
    "whole numbers": (
        lambda f: edit_tensors(f, whole),
        "experts of layer 2 differ in size: 0 has 55,296 bytes, 3 has 73,728",
    ),
    "a strange part": (lambda f: edit_tensors(f, strange), r"tensor .*\.w4\.weight is missing"),
    "an expert too many": (lambda f: edit_tensors(f, ninth), "8 and 9 experts in a layer"),
    "cut within a tensor": (
        lambda f: cut(f, 1_500_000),
        r"model\.safetensors: holds 1,500,000 bytes; expected 1,954,128, as its header says",
    ),
    "cut within the header": (lambda f: cut(f, 700), "no header in its 700 bytes"),
    "an empty file": (lambda f: cut(f, 0), "no header in its 0 bytes"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has no weights"),
    "pickled weights": (pickle_it, "pickled, and unpickling runs any code"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "a list for a configuration": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json: \[\]; expected a JSON object",
    ),
    "an unknown family": (
        lambda f: edit_config(f, model_type="mixtrall"),
        r"config\.json: model_type: .*'mixtrall' cannot be run, did you mean 'mixtral'\?",
    ),
    "another family": (lambda f: edit_config(f, model_type="gpt_oss"), "'gpt_oss' cannot be run"),
    "quantised weights": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
        "the weights are quantised",
    ),
    "no width": (lambda f: edit_config(f, intermediate_size="144"), "intermediate_size"),
    "another width": (
        lambda f: edit_config(f, intermediate_size=128),
        r"shape \[144, 64\] of bfloat16; expected \[128, 64\], as config\.json says",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders(kind: str, tmp_path: Path) -> None:
    """One line that names file, tensor and what was expected; never a traceback of another kind."""
    folder = shutil.copytree(TRACES / "tiny-mixtral", tmp_path / "broken")
    breaks, message = BROKEN[kind]
    breaks(folder)
    with pytest.raises(InputError, match=message) as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file",
    [
        *("../model.safetensors", "/etc/model.safetensors", "a/b.safetensors"),
        *("..\\m.safetensors", "model.bin", "model.safetensors\0", "", 7, None),
    ],
)
def test_shards_outside_the_folder(file: Any, tmp_path: Path) -> None:
    """An index can name safetensors files of its own folder and nothing else."""
    folder = saved("mixtral", tmp_path, "sharded")
    edit_index(folder, lambda files: files.update({"lm_head.weight": file}))
    with pytest.raises(InputError, match=r"index\.json: lm_head\.weight: .* in the folder"):
        Checkpoint(folder)


def test_missing_shards(tmp_path: Path) -> None:
    """A shard that is not there, and a tensor that is not in its shard, are told by name."""
    folder = saved("mixtral", tmp_path, "sharded")
    shard = json.loads((folder / INDEX).read_text())["weight_map"]["lm_head.weight"]
    edit_index(folder, lambda files: files.update({"one_more.weight": shard}))
    with pytest.raises(InputError, match=rf"{shard}: tensor one_more\.weight is missing"):
        Checkpoint(folder)
    edit_index(folder, lambda files: files.pop("one_more.weight"))
    (folder / shard).unlink()
    with pytest.raises(InputError, match=rf"{shard}: no such file"):
        Checkpoint(folder)
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_file_that_is_cut_while_it_is_used(tmp_path: Path) -> None:
    """It ends in an error that names file and tensor, not in a signal or in wrong numbers."""
    folder = shutil.copytree(TRACES / "tiny-mixtral", tmp_path / "cut")
    checkpoint = Checkpoint(folder)
    cut(folder, 200_000)
    with pytest.raises(InputError, match=r"model\.safetensors: .*w.\.weight: the file ends within"):
        checkpoint.expert(3, 7)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / SINGLE
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64)}, path)
    return path


def test_tensor_files_read_by_range(small_file: Path) -> None:
    """A range is the numbers it names; one beyond the tensor is refused; empty tensors are read."""
    file = TensorFile(small_file)
    assert file.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.read("a", (2,), 3).tolist() == [3, 4]
    assert file.read("b", (0,), 4).tolist() == []
    with pytest.raises(ValueError, match="not in it"):
        file.read("a", (2,), 5)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_damaged_headers(small_file: Path, data: st.DataObject) -> None:
    """A file with damaged bytes is read within its bounds, or refused in one line."""
    content = bytearray(small_file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    damaged = small_file.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        file = TensorFile(damaged)
    except InputError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert str(damaged) in told
        return
    for name, entry in file.entries.items():
        assert file.read(name).shape == entry.shape
