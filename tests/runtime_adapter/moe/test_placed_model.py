"""Loading a server's part: dense weights to the bit, no other experts, clear errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from prism_plan.errors import InputError, WrongModel  # noqa: E402
from prism_plan.placement import Placement, SolveReport  # noqa: E402
from runtime_adapter.moe.placed_model import load_placed_model  # noqa: E402
from runtime_adapter.weights.checkpoint import Checkpoint  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from runtime_adapter.weights.server_experts import (  # noqa: E402
    load_server_experts,
    require_placed_model,
    server_devices,
)
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.checkpoints import (  # noqa: E402
    CPU,
    TINY,
    TRACES,
    committed,
    filled,
    free_slots,
    held_slots,
    saved,
)
from tests.runtime_adapter.moe.local_backend import LocalBackend  # noqa: E402

SINGLE = "model.safetensors"


class Nowhere:
    """A backend that is never called."""

    def run(self, *args: Any) -> Any:
        """Fail."""
        raise AssertionError


def pretrained(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def differences(mine: Any, theirs: Any) -> list[str]:
    """What differs: parameters, buffers, types, modes; the experts modules are left out."""
    found = []
    for kind in ("named_parameters", "named_buffers", "state_dict"):
        ours, others = (
            dict(getattr(model, kind)().items() if kind == "state_dict" else getattr(model, kind)())
            for model in (mine, theirs)
        )
        others = {name: t for name, t in others.items() if ".mlp.experts." not in name}
        found += [f"{kind}: {name}" for name in ours.keys() ^ others.keys()]
        found += [
            f"{kind}: {name}"
            for name in ours.keys() & others.keys()
            if ours[name].dtype != others[name].dtype or not torch.equal(ours[name], others[name])
        ]
    if mine.generation_config.to_dict() != theirs.generation_config.to_dict():
        found.append("generation config")
    if mine.config.to_dict() != theirs.config.to_dict():
        found.append("config")
    if any(module.training for module in mine.modules()):
        found.append("modes")
    tied = [one.lm_head.weight is one.model.embed_tokens.weight for one in (mine, theirs)]
    if tied[0] != tied[1]:
        found.append("ties")
    return found


def test_differences_are_found() -> None:
    """A changed weight, type, mode or setting is a difference; a model has none to itself."""
    mine, theirs = (load_placed_model(committed("mixtral"), Nowhere()) for _ in range(2))
    assert differences(mine, theirs) == []
    with torch.no_grad():
        mine.lm_head.weight[0, 0] += 1
    mine.model.norm.train()
    mine.generation_config.eos_token_id = 1
    wrong = ["named_parameters: lm_head.weight", "state_dict: lm_head.weight"]
    assert differences(mine, theirs) == [*wrong, "generation config", "modes"]
    mine.model.norm.to(torch.float64)
    assert "named_parameters: model.norm.weight" in differences(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_part_is_from_pretraineds(family: str, dtype: Any, tmp_path: Path) -> None:
    """In every family and type, everything but the experts is to the bit what transformers loads.

    The checkpoint is of float32, so that reading in another type rounds; gates that transformers
    keeps in float32 are not rounded.
    """
    folder = saved(family, tmp_path)
    mine = load_placed_model(Checkpoint(folder), Nowhere(), dtype)
    assert differences(mine, pretrained(folder, dtype)) == []


@pytest.mark.parametrize("model", TINY)
def test_committed_checkpoints(model: str) -> None:
    """The type is the checkpoint's if none is asked for; generation settings are its file's."""
    mine = load_placed_model(committed(model), Nowhere())
    assert mine.dtype == torch.bfloat16
    assert differences(mine, pretrained(TRACES / f"tiny-{model}", "auto")) == []
    assert mine.generation_config.eos_token_id == 2


def tie(folder: Path, stored: str) -> None:
    """Tie the output head to the embeddings; ``stored``: which of the two the file holds."""
    tensors = load_file(folder / SINGLE)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if stored not in (name, "both"):
            del tensors[name]
    save_file(tensors, folder / SINGLE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_weights(stored: str, tmp_path: Path) -> None:
    """Tied weights are one tensor, whichever was stored; two different ones are not tied."""
    folder = saved("qwen3_moe", tmp_path)
    tie(folder, stored)
    mine = load_placed_model(Checkpoint(folder), Nowhere(), torch.bfloat16)
    assert differences(mine, pretrained(folder, torch.bfloat16)) == []


def test_without_a_generation_config(tmp_path: Path) -> None:
    """A checkpoint without the file gets the settings that transformers derives."""
    folder = saved("mixtral", tmp_path)
    (folder / "generation_config.json").unlink()
    mine = load_placed_model(Checkpoint(folder), Nowhere(), torch.float32)
    assert differences(mine, pretrained(folder, torch.float32)) == []


def test_sharded_and_stacked_checkpoints_run(tmp_path: Path) -> None:
    """However the experts are stored, the model computes the same."""
    logits = []
    for layout in ("single", "sharded", "stacked"):
        checkpoint = Checkpoint(saved("deepseek_v2", tmp_path / layout, layout))
        model = load_placed_model(checkpoint, LocalBackend(filled(checkpoint, torch.float32)))
        with torch.no_grad():
            logits.append(model(torch.arange(3, 40)[None]).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# ------------------------------------------------------------------------------------------ memory

#: Loads a server's part of a checkpoint and prints, in bytes: memory before, the peak, the dense
#: part, the slots, and the largest of an expert and a dense tensor.
MEASURE = """
import sys, torch
torch.set_num_threads(1)
from prism_plan.io.placement import read_placement
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.moe.placed_model import load_placed_model
from runtime_adapter.weights.server_experts import load_server_experts
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.moe.local_backend import LocalBackend

def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])

def load(folder, placement, dtype):
    checkpoint = Checkpoint(folder)
    cpus = [torch.device("cpu")] * 2
    store = load_server_experts(checkpoint, read_placement(placement), 0, cpus, dtype)
    return checkpoint, store, load_placed_model(checkpoint, LocalBackend(store), dtype)

warm, folder, placement, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(warm)  # imports everything
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
checkpoint, store, model = load(folder, placement, dtype)
peak = memory("VmHWM")
dense = sum(t.nbytes for t in {id(t): t for t in model.parameters()}.values())
slots = sum(pool.nbytes for pool in store.pools)
largest = max(t.nbytes for t in model.parameters())
expert = sum(part.nbytes for part in checkpoint.expert(0, 0).values())
print(before, peak, dense, slots, max(largest, expert))
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 201 MB of experts and 10 MB of the rest, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("larger")
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="50MB")
    return folder


def placed(checkpoint: Checkpoint, slots: list[int], held: int) -> Placement:
    """Two servers; the first with so many slots, half of ``held`` experts on each GPU."""
    spec = checkpoint.spec
    on_gpu = np.zeros((3, spec.num_layers * spec.num_experts), bool)
    on_gpu[0, : held // 2] = on_gpu[1, held // 2 : held] = True
    on_gpu[2, held:] = True
    return Placement(
        model=spec.shape(),
        servers=("edge-0", "edge-1"),
        gpu_capacity=(tuple(slots), (spec.num_pairs,)),
        on_gpu=on_gpu.reshape(3, spec.num_layers, spec.num_experts),
        plan=SolveReport("by hand"),
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_server(dtype: str, larger: Path, tmp_path: Path) -> None:
    """The peak of loading is dense part + slots + one tensor or expert, not the other experts."""
    from prism_plan.io.placement import write_placement

    checkpoint = Checkpoint(larger)
    everything = checkpoint.spec.num_pairs * checkpoint.spec.expert_bytes
    assert everything > 200_000_000
    path = tmp_path / "placement.json"
    write_placement(path, placed(checkpoint, [10, 6], 12))
    warm = TRACES / "tiny-mixtral"
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(warm), str(larger), str(path), dtype],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    before, peak, dense, slots, buffer = map(int, result.stdout.split()[-5:])
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert slots == 16 * checkpoint.spec.expert_bytes // 4 * size
    assert dense == checkpoint.spec.dense_bytes // 4 * size
    slack = 12_000_000  # what Python and the allocator take beside
    assert dense + slots < peak - before + slack
    assert peak - before < dense + slots + 2 * buffer + slack
    assert dense + slots + 2 * buffer + slack < everything * size // 4


# ------------------------------------------------------------------------------------------ errors


def edited(tmp_path: Path, edit: Any) -> Checkpoint:
    folder = shutil.copytree(TRACES / "tiny-mixtral", tmp_path / "edited")
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)
    return Checkpoint(folder)


def test_missing_dense_tensor(tmp_path: Path) -> None:
    """Names file, tensor and shape."""
    checkpoint = edited(tmp_path, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    message = r"model\.safetensors: tensor model\.layers\.1\.self_attn\.q_proj\.weight is missing; "
    with pytest.raises(InputError, match=message + r"expected shape \[64, 64\]"):
        load_placed_model(checkpoint, Nowhere())


def test_wrong_dense_shape(tmp_path: Path) -> None:
    """Names file, tensor as stored, its shape and the one expected."""
    name = "model.layers.1.block_sparse_moe.gate.weight"
    checkpoint = edited(tmp_path, lambda t: t.update({name: torch.zeros(7, 64)}))
    message = rf"model\.safetensors: {name}: shape \[7, 64\]; expected \[8, 64\]"
    with pytest.raises(InputError, match=message):
        load_placed_model(checkpoint, Nowhere())


def test_a_tensor_that_is_none_of_the_models(tmp_path: Path) -> None:
    """A stored tensor without a place in the model is refused; buffers of old releases are not."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_placed_model(edited(tmp_path / "a", lambda t: t.update({name: torch.ones(8)})), Nowhere())
    name = "model.layers.1.self_attn.q_proj.bias"
    checkpoint = edited(tmp_path / "b", lambda t: t.update({name: torch.ones(64)}))
    with pytest.raises(InputError, match=rf"{name}: no tensor of this model"):
        load_placed_model(checkpoint, Nowhere())


def test_configuration_that_transformers_refuses(tmp_path: Path) -> None:
    """Whatever transformers raises is one line that names the folder."""
    folder = shutil.copytree(TRACES / "tiny-mixtral", tmp_path / "edited")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": 7}))
    with pytest.raises(InputError, match="edited: cannot load the model: ") as error:
        load_placed_model(Checkpoint(folder), Nowhere())
    assert "\n" not in str(error.value)


def test_placement_of_another_model(tmp_path: Path) -> None:
    """Refused with the first field that differs; another name of the folder is the same model."""
    checkpoint = committed("mixtral")
    placement = placed(checkpoint, [5, 4], 9)
    require_placed_model(placement, checkpoint)
    renamed = shutil.copytree(TRACES / "tiny-mixtral", tmp_path / "snapshot")
    require_placed_model(placement, Checkpoint(renamed))
    message = r"P\.json: model: made for another model: moe_layers is .* as in .*tiny-deepseek-v2"
    with pytest.raises(WrongModel, match=message):
        require_placed_model(placement, committed("deepseek-v2"), source="P.json")


def test_experts_of_a_server() -> None:
    """Each GPU holds the experts that the placement gives it, and no others."""
    checkpoint = committed("mixtral")
    placement = placed(checkpoint, [5, 6], 9)
    store = load_server_experts(checkpoint, placement, 0, [CPU, CPU])
    assert [(c.pair, c.gpu) for c in held_slots(store)] == [(p, int(p > 3)) for p in range(9)]
    assert [free_slots(store, gpu) for gpu in (0, 1)] == [1, 1]
    assert store.dtype == torch.bfloat16
    with pytest.raises(InputError, match="no free slot"):
        load_server_experts(checkpoint, placed(checkpoint, [3, 6], 9), 0, [CPU, CPU])


def test_devices_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """One card a GPU, one for all, or the CPU; more cards than there are is refused."""
    for there, auto in ((0, [CPU, CPU]), (3, [torch.device("cuda", g) for g in (0, 1)])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert server_devices(2) == auto
        assert server_devices(2, "cpu") == [CPU, CPU]
    assert server_devices(4, "cuda:2") == [torch.device("cuda", 2)] * 4
    with pytest.raises(InputError, match="cuda needs 4 CUDA devices; expected at most the 3"):
        server_devices(4, "cuda")
    with pytest.raises(InputError, match="'gpu'; expected auto, cpu, cuda"):
        server_devices(1, "gpu")
