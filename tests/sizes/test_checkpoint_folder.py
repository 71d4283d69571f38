"""What a checkpoint's folder tells: the model's name, and that its weights are quantised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from prism_plan.sizes.checkpoint_name import checkpoint_name, model_name
from prism_plan.sizes.load import load_model_spec
from prism_plan.sizes.meta_device import spec_from_config

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}
#: Sizes of CONFIG in bfloat16, which no quantised checkpoint may be given.
EXPERT_BYTES = 3 * 64 * 128 * 2
COUNTS = "layer,expert,count\n" + "".join(f"{n // 4},{n % 4},5\n" for n in range(8))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BY_HAND = "write the sizes by hand as a model spec"

Run = Callable[..., CompletedProcess[str]]


def checkpoint(folder: Path, **more: Any) -> Path:
    """A folder with a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    return folder


def cached(hub: Path, repository: str = "models--acme--moe-a") -> Path:
    """The folder of a snapshot in a hub cache, where files are links into ``blobs``."""
    blobs, snapshot = hub / repository / "blobs", hub / repository / "snapshots" / COMMIT
    checkpoint(blobs)
    snapshot.mkdir(parents=True)
    (blobs / "config.json").rename(blobs / "aaaa")
    (snapshot / "config.json").symlink_to("../../blobs/aaaa")
    return snapshot


def refusal(reference: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model_spec(str(reference))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ------------------------------------------------------------------------------ quantised weights

MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.33.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    },
}
#: Files beside config.json: name, content, what the message names.
BESIDE: dict[str, tuple[str, Any, str]] = {
    "ModelOpt": ("hf_quant_config.json", MODELOPT, "quantization.quant_algo: 'NVFP4'"),
    "ModelOpt, flat": ("hf_quant_config.json", {"quant_algo": "FP8"}, "quant_algo: 'FP8'"),
    "ModelOpt, mixed": (
        "hf_quant_config.json",
        {"quantization": {"quant_algo": None, "quantized_layers": {"lm_head": {"w": "FP8"}}}},
        "is there",
    ),
    "ModelOpt, no algorithm": ("hf_quant_config.json", {"quantization": {}}, "is there"),
    "GPTQ": ("quantize_config.json", {"bits": 4, "group_size": 128}, "bits: 4"),
    "AWQ": ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "w_bit: 4"),
    "ExLlama": ("quantization_config.json", {"quant_method": "exl3"}, "quant_method: 'exl3'"),
    "a list": ("quant_config.json", [], "is there"),
    "Infinity": ("quantize_config.json", {"bits": 4, "damp": float("inf")}, "bits: 4"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_file_beside_the_config_says_quantised(case: str, tmp_path: Path) -> None:
    """Such a checkpoint is refused by file, key, algorithm and remedy, given either way."""
    name, content, words = BESIDE[case]
    folder = checkpoint(tmp_path / "model")
    (folder / name).write_text(json.dumps(content))
    for reference in (folder, folder / "config.json"):
        message = refusal(reference)
        assert message.startswith(f"{folder / name}: {words}")
        assert "the weights are quantised" in message
        assert BY_HAND in message


def test_the_message_is_whole_for_paths_of_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cut out of the line for a snapshot in a cache of the usual place."""
    monkeypatch.chdir(tmp_path)
    hub = "home/some-user-name/.cache/huggingface/hub/models--nvidia--DeepSeek-R1-0528-NVFP4"
    folder = checkpoint(Path(hub) / "snapshots" / COMMIT)
    (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    message = refusal(folder)
    assert "'NVFP4': the weights are quantised, by ModelOpt; give the checkpoint (its" in message
    assert "…" not in message


def test_the_remedy_works_beside_the_file(tmp_path: Path) -> None:
    """Sizes by hand are read, also where they lie in the quantised checkpoint's folder."""
    folder = checkpoint(tmp_path / "model")
    (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    sizes = spec_from_config(CONFIG, name="m").to_json() | {"expert_bytes": 13824}
    (folder / "spec.json").write_text(json.dumps(sizes))
    assert load_model_spec(str(folder / "spec.json")).expert_bytes == 13824


def test_a_modelopt_file_without_weight_quantisation(tmp_path: Path) -> None:
    """A null algorithm says that the weights are as config.json has them."""
    folder = checkpoint(tmp_path / "model")
    stated = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    assert load_model_spec(str(folder)).expert_bytes == EXPERT_BYTES


@pytest.mark.parametrize(("content", "words"), [("{", "not JSON"), (None, "no such file")])
def test_a_file_beside_that_cannot_be_read(tmp_path: Path, content: str | None, words: str) -> None:
    """A damaged file, or a link into a cache that lost it, is an error and not an absent file."""
    folder = checkpoint(tmp_path / "model")
    path = folder / "hf_quant_config.json"
    if content is None:
        path.symlink_to("../blobs/bbbb")
    else:
        path.write_text(content)
    message = refusal(folder)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_a_link_to_the_config_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    """Files beside what a link leads to count, whatever the link is called."""
    folder = checkpoint(tmp_path / "model")
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    (tmp_path / "mine.json").symlink_to(folder / "config.json")
    assert "bits: 4" in refusal(tmp_path / "mine.json")


def test_weights_beside_the_config_are_read(tmp_path: Path) -> None:
    """config.json stands for its folder where weights lie there, which must be whole."""
    folder = checkpoint(tmp_path / "model")
    (folder / "moe-Q4_K_M.gguf").touch()
    for reference in (folder, folder / "config.json"):
        assert refusal(reference).startswith(f"{folder}/moe-Q4_K_M.gguf: ")
    (folder / "model.safetensors").touch()
    for reference in (folder, folder / "config.json"):
        assert refusal(reference).startswith(
            f"{folder}/model.safetensors: no header in its 0 bytes"
        )


#: Keys of config.json, and words of the message.
KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "MLX": (
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantization: {'group_size': 64, 'bits': 4}: the weights are quantised, as MLX",
    ),
    "MLX, with its copy": (
        {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}},
        "quantization_config: {'bits': 4}: the weights are quantised",
    ),
    "a text": ({"quantization": "q4f16_1"}, "quantization: 'q4f16_1'"),
    "empty": ({"quantization": {}}, "quantization: {}"),
    "compressed-tensors": (
        {"compression_config": {"format": "pack-quantized"}},
        "compression_config: {'format': 'pack-quantized'}: the weights are quantised",
    ),
    "no method": (
        {"quantization_config": {"load_in_8bit": True}},
        "quantization_config: {'load_in_8bit': True}: the weights are quantised",
    ),
    "an empty method": ({"quantization_config": {}}, "quantization_config: {}: the weights are"),
    "false": ({"quantization_config": False}, "quantization_config: false"),
    "fp8": ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn'"),
    "int8": ({"dtype": "int8"}, "dtype: 'int8'"),
}


@pytest.mark.parametrize("wrapper", ["", "text_config", "language_config", "llm_config"])
@pytest.mark.parametrize("case", KEYS)
def test_a_key_says_quantised(case: str, wrapper: str, tmp_path: Path) -> None:
    """Such a config is refused by its key, also that of a multimodal model's language model."""
    keys, words = KEYS[case]
    config = CONFIG | keys
    if wrapper:
        config = {"model_type": "some_vl", wrapper: config}
        words = f"{wrapper}.{words}"
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path / "config.json")
    assert words in message
    assert BY_HAND in message or "expected one of bfloat16, float16, float32" in message


@pytest.mark.parametrize("key", ["quantization", "quantization_config", "compression_config"])
def test_a_key_of_the_wrapper_says_quantised(key: str, tmp_path: Path) -> None:
    """What a multimodal model says of all its weights holds for its language model."""
    config = {"model_type": "some_vl", "language_config": CONFIG, key: {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f": {key}: {{'bits': 4}}: the weights are quantised" in refusal(tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization": None},
        {"quantization_config": None},
        {"compression_config": None},
        {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}},
    ],
)
def test_a_key_says_unquantised(keys: dict[str, Any]) -> None:
    """A null, or ModelOpt's null algorithm, leaves the sizes as they are."""
    assert spec_from_config(CONFIG | keys).expert_bytes == EXPERT_BYTES


def test_the_command_refuses_quantised_checkpoints(prism_plan: Run, tmp_path: Path) -> None:
    """`profile` ends with 2 and one line, and writes no trace."""
    (tmp_path / "c.csv").write_text(COUNTS)
    checkpoint(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    command = ("profile", "--format", "counts", "--model", ".", "law=c.csv", "-o", "t.parquet")
    result = prism_plan(*command, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("prism-plan: hf_quant_config.json: quantization.quant_algo: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "t.parquet").exists()


# ------------------------------------------------------------------------------------------ names


def test_a_cached_model_is_called_after_its_repository(tmp_path: Path) -> None:
    """Snapshot, config.json, blob and links to them give the repository's name."""
    snapshot = cached(tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    for reference in (
        snapshot,
        f"{snapshot}/",
        snapshot / "config.json",
        tmp_path / "link",
        tmp_path / "link" / "config.json",
        tmp_path / "models--acme--moe-a" / "blobs" / "aaaa",
        tmp_path / "models--acme--moe-a" / "snapshots" / ".." / "snapshots" / COMMIT,
    ):
        assert load_model_spec(str(reference)).name == "moe-a", reference


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("models--acme--moe-a", "moe-a"),
        ("models--moe-a", "moe-a"),
        ("models--acme--Moe_1.5-a", "Moe_1.5-a"),
        ("moe-a", "moe-a"),
    ],
)
def test_repositories_and_the_names_of_their_models(
    repository: str, name: str, tmp_path: Path
) -> None:
    """With an organisation, without one, and in a snapshot that was copied out of the cache."""
    assert load_model_spec(str(cached(tmp_path, repository))).name == name


def test_a_cache_that_is_kept_elsewhere(tmp_path: Path) -> None:
    """A repository's folder that is a link to another disk keeps its name."""
    snapshot = cached(tmp_path / "disk", "x1")
    (tmp_path / "models--acme--moe-a").symlink_to(snapshot.parent.parent)
    assert load_model_spec(str(tmp_path / "models--acme--moe-a/snapshots" / COMMIT)).name == "moe-a"


def test_a_folder_has_one_name_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a slash at the end, a dot, a relative path and a link: the name of the folder itself."""
    folder = checkpoint(tmp_path / "olmoe-7b")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    references = (folder, f"{folder}/", ".", "./", "config.json", "../olmoe-7b", "../link/.")
    for reference in (*references, tmp_path / "link", tmp_path / "link/config.json"):
        assert load_model_spec(str(reference)).name == "olmoe-7b", reference
    assert model_name(".") == checkpoint_name("../link/") == "olmoe-7b"


def test_a_folder_of_links_is_called_after_itself(tmp_path: Path) -> None:
    """A folder whose files are links has its own name, not that of where they lead."""
    store = checkpoint(tmp_path / "store")
    folder = tmp_path / "moe-b"
    folder.mkdir()
    (folder / "config.json").symlink_to(store / "config.json")
    assert (
        load_model_spec(str(folder)).name
        == load_model_spec(str(folder / "config.json")).name
        == "moe-b"
    )


def test_the_folder_names_a_model_before_its_config(tmp_path: Path) -> None:
    """A fine-tuned model, whose config names its base, has the name with which it is run."""
    folder = checkpoint(tmp_path / "tuned", _name_or_path="mistralai/base")
    assert load_model_spec(str(folder)).name == "tuned"
    os.rename(folder / "config.json", folder / "other.json")
    assert load_model_spec(str(folder / "other.json")).name == "base"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("run/snapshots/step-100", "step-100"),
        ("run/snapshots", "snapshots"),
        ("run/blobs", "blobs"),
        ("models--acme--moe-a/refs/main", "main"),
        ("datasets--acme--moe-a/snapshots/x", "x"),
    ],
)
def test_folders_that_are_none_of_a_cache(path: str, name: str, tmp_path: Path) -> None:
    """Folders with words of the cache in their paths keep their own names."""
    assert load_model_spec(str(checkpoint(tmp_path / path))).name == name


@pytest.mark.parametrize(
    ("checkpoint_id", "name"),
    [
        ("acme/moe-a", "moe-a"),
        ("moe-a", "moe-a"),
        (f"/gone/models--acme--moe-a/snapshots/{COMMIT}", "moe-a"),
        ("/gone/moe-b/", "moe-b"),
    ],
)
def test_names_of_hub_ids(checkpoint_id: str, name: str) -> None:
    """A hub id gives its last part, as the cache that it is kept in does."""
    assert checkpoint_name(checkpoint_id) == name


def test_the_command_names_a_cached_model(prism_plan: Run, tmp_path: Path) -> None:
    """A trace made with a snapshot's folder is of the repository's model."""
    (tmp_path / "c.csv").write_text(COUNTS)
    snapshot = cached(tmp_path / "hub")
    result = prism_plan(
        *("profile", "--format", "counts", "--model", snapshot, "law=c.csv", "-o", "t.parquet"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert read_trace(tmp_path / "t.parquet").model.name == "moe-a"
