"""Folders whose weights are not where they are looked for: the message tells what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError
from runtime_adapter.weights.checkpoint import Checkpoint
from tests.runtime_adapter.checkpoints import TRACES, saved

INDEX = "model.safetensors.index.json"
EXPECTED = f"expected model.safetensors, or shards and {INDEX}; "
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]

#: Files beside config.json, and the message after the folder's name.
FOLDERS: dict[str, tuple[list[str], str]] = {
    "all shards": (SHARDS, f"{SHARDS[0]} and others, but no {INDEX}; {EXPECTED}copy or download"),
    "some shards": (
        [SHARDS[1]],
        f"{SHARDS[1]}, but no {INDEX}; shards 1, 3 of 3 are missing too; {EXPECTED}copy",
    ),
    "shards of a training run": (
        [*SHARDS, "training_args.bin"],
        f"{SHARDS[0]} and others, but no {INDEX}; {EXPECTED}copy or download the index",
    ),
    "another name": (
        ["consolidated.safetensors"],
        f"consolidated.safetensors, but no model.safetensors and no {INDEX}; {EXPECTED}save",
    ),
    "a variant": (
        ["model.fp16.safetensors", "other.safetensors"],
        f"model.fp16.safetensors and others, but no model.safetensors and no {INDEX}; {EXPECTED}",
    ),
    "pickled": (
        ["pytorch_model.bin", "training_args.bin"],
        "pytorch_model.bin: the weights are pickled, and unpickling runs any code that is in them",
    ),
    "pickled shards": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        "pytorch_model-00001-of-00002.bin and others: the weights are pickled",
    ),
    "Mistral's own": (["consolidated.00.pth"], "consolidated.00.pth: the weights are pickled"),
    "GGUF": (["moe-Q4_K_M.gguf"], "the weights are in GGUF"),
    "GGUF and a training run": (["moe-Q4_K_M.gguf", "optimizer.pt"], "the weights are in GGUF"),
    "leftovers of training": (["training_args.bin", "optimizer.pt"], f"has no weights; {EXPECTED}"),
    "nothing": ([], f"has no weights; {EXPECTED}copy or download"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_there_is_told(case: str, tmp_path: Path) -> None:
    """One line says what the folder holds, what is expected and what to do."""
    files, words = FOLDERS[case]
    shutil.copy(TRACES / "tiny-mixtral" / "config.json", tmp_path)
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    source = tmp_path / files[0] if "GGUF" in words else tmp_path
    assert str(caught.value).startswith(f"{source}: {words}")
    assert len(str(caught.value).splitlines()) == 1


def test_shards_that_the_index_names_and_the_folder_lacks(tmp_path: Path) -> None:
    """Missing shards are told before any is opened, with their number; a dead link is missing."""
    folder = saved("mixtral", tmp_path / "model", "sharded")
    shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    for shard in shards[:2]:
        (folder / shard).unlink()
    (folder / shards[1]).symlink_to("../blobs/bbbb")
    with pytest.raises(InputError) as caught:
        Checkpoint(folder)
    told = f"{folder / shards[0]}: no such file, 2 of {len(shards)} shards are missing; expected "
    assert str(caught.value).startswith(f"{told}the shards that {INDEX} names")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", f"{INDEX}: []; expected a JSON object"),
        ('{"metadata": {}}', f"{INDEX}: weight_map: None; expected files by tensor"),
        ('{"weight_map": {"a": NaN}}', "NaN is not JSON, under key 'weight_map.a'"),
        ("{", f"{INDEX}: line 1 column 2: not JSON"),
    ],
)
def test_an_index_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    """A damaged index is named with what is wrong in it."""
    shutil.copy(TRACES / "tiny-mixtral" / "config.json", tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert words in str(caught.value)
