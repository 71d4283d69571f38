"""One checkpoint given in every way: one name and one spec, or the same refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.recording.load_checkpoint import load_checkpoint_spec
from prism_plan.sizes.load import load_model_spec
from prism_plan.sizes.loaded_model import spec_from_loaded_model
from runtime_adapter.weights.checkpoint import Checkpoint
from tests.runtime_adapter.checkpoints import TRACES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "acme/moe-a"


def recorded(folder: str) -> ModelSpec:
    """The spec of a model that was loaded from a folder, as the recorder takes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    return spec_from_loaded_model(AutoModelForCausalLM.from_config(config))


WAYS: dict[str, Callable[[str], ModelSpec]] = {
    "a folder": load_model_spec,
    "a folder, with a slash": lambda folder: load_model_spec(f"{folder}/"),
    "config.json": lambda folder: load_model_spec(f"{folder}/config.json"),
    "--format hf": lambda folder: load_checkpoint_spec(folder),
    "--format hf, with a slash": lambda folder: load_checkpoint_spec(f"{folder}/"),
    "record": recorded,
    "the runtime": lambda folder: Checkpoint(folder).spec,
}


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed checkpoint's snapshot in a hub cache, which transformers uses, offline."""
    from huggingface_hub import constants

    repository = tmp_path / "models--acme--moe-a"
    folder = repository / "snapshots" / COMMIT
    for made in (folder, repository / "blobs", repository / "refs"):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted((TRACES / "tiny-mixtral").iterdir())):
        (repository / "blobs" / f"{number:040x}").symlink_to(path)
        (folder / path.name).symlink_to(f"../../blobs/{number:040x}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def add(folder: Path, name: str, values: Any) -> None:
    """Put a JSON file into a snapshot, in place of the one that may be there."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps(values))


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


@pytest.mark.parametrize("way", WAYS)
def test_a_snapshot_has_one_name(way: str, snapshot: Path, tmp_path: Path) -> None:
    """The repository's name, whether the snapshot or a link to it is given; sizes are equal."""
    (tmp_path / "link").symlink_to(snapshot)
    whole = load_model_spec(str(snapshot))
    assert whole.name == "moe-a"
    for folder in (snapshot, tmp_path / "link"):
        assert WAYS[way](str(folder)) == whole


def test_a_hub_id_has_the_name_of_its_snapshot(snapshot: Path) -> None:
    """The checkpoint that transformers finds in the cache by its id is called as its folder."""
    assert load_checkpoint_spec(HUB_ID) == load_model_spec(str(snapshot))


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_has_one_name(
    way: str, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own, also as a dot, through a link, and where its config names another model."""
    folder = snapshot.rename(tmp_path / "moe-b")
    for path in folder.iterdir():
        target = Path(os.readlink(path)).name
        path.unlink()
        path.symlink_to(tmp_path / "models--acme--moe-a" / "blobs" / target)
    add(folder, "config.json", config_of(folder) | {"_name_or_path": "acme/base"})
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for given in (folder, ".", "../link"):
        assert WAYS[way](str(given)).name == "moe-b"


#: Files of a quantised checkpoint, and what the message names.
QUANTISED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ModelOpt": (
        "hf_quant_config.json",
        {"quantization": {"quant_algo": "NVFP4"}},
        "hf_quant_config.json: quantization.quant_algo: 'NVFP4': the weights are quantised",
    ),
    "GPTQ": ("quantize_config.json", {"bits": 4}, "quantize_config.json: bits: 4: the weights"),
    "AWQ": ("quant_config.json", {"w_bit": 4}, "quant_config.json: w_bit: 4: the weights"),
    "MLX": (
        "config.json",
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantization: {'group_size': 64, 'bits': 4}: the weights are quantised",
    ),
    "compressed-tensors": (
        "config.json",
        {"compression_config": {"format": "pack-quantized"}},
        "compression_config: {'format': 'pack-quantized'}: the weights are quantised",
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_stored_counts(kind: str, snapshot: Path) -> None:
    """Notes that weights are quantised change no sizes, which the weights tell in every way.

    The runtime does not run such weights: it names file, key and algorithm.
    """
    name, values, words = QUANTISED[kind]
    whole = load_model_spec(str(snapshot))
    add(snapshot, name, config_of(snapshot) | values if name == "config.json" else values)
    for way, read in WAYS.items():
        if way not in ("the runtime", "record"):  # transformers refuses what it cannot run
            assert read(str(snapshot)) == whole, way
    assert load_checkpoint_spec(HUB_ID) == whole
    with pytest.raises(InputError) as caught:
        Checkpoint(snapshot)
    error = caught.value
    assert words in f"{error.source}: {error.place}: {error.found}"
    assert error.remedy
    assert "by hand" not in error.remedy


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_that_are_not_there(kind: str, snapshot: Path) -> None:
    """Without the weights file, key and algorithm are named, and both remedies."""
    name, values, words = QUANTISED[kind]
    add(snapshot, name, config_of(snapshot) | values if name == "config.json" else values)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        load_model_spec(str(snapshot))
    error = caught.value
    assert words in f"{error.source}: {error.place}: {error.found}"
    assert "give the checkpoint" in error.remedy
    assert "as a model spec" in error.remedy


def test_values_that_are_no_numbers_stop_no_way(snapshot: Path) -> None:
    """Infinity under a key that no size depends on is read by all."""
    add(snapshot, "config.json", config_of(snapshot) | {"time_step_limit": [0.0, float("inf")]})
    whole = load_model_spec(str(snapshot))
    assert all(read(str(snapshot)) == whole for read in WAYS.values())
