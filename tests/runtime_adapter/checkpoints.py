"""Checkpoints for the tests of the runtime: the committed ones, and tiny ones saved on the spot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_adapter.weights.checkpoint import Checkpoint  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from runtime_adapter.weights.expert_store import Change, ExpertStore  # noqa: E402
from tests.profiling.recording.families import tiny_model  # noqa: E402

torch.set_num_threads(1)

TRACES = Path(__file__).resolve().parents[2] / "traces"
TINY = ("mixtral", "deepseek-v2")
CPU = torch.device("cpu")
#: One expert [W, H] of the families' tiny models is larger than this, so that shards are many.
SHARD = "40KB"


@functools.cache
def committed(model: str) -> Checkpoint:
    """A committed tiny checkpoint."""
    return Checkpoint(TRACES / f"tiny-{model}")


@functools.cache
def reference(model: str, dtype: Any) -> Any:
    """A committed checkpoint as transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(TRACES / f"tiny-{model}", dtype=dtype).eval()


def saved(family: str, folder: Path, layout: str = "single", **config: Any) -> Path:
    """A random model of a family, saved as one file, in shards, or with experts stacked."""
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.disable_progress_bar()
    assert family in FAMILIES
    model = tiny_model(family)
    for key, value in config.items():
        setattr(model.config, key, value)
    if layout == "sharded":
        model.save_pretrained(folder, max_shard_size=SHARD)
        assert (folder / "model.safetensors.index.json").is_file()
    else:
        model.save_pretrained(folder)
        if layout == "stacked":
            save_file(dict(model.state_dict()), folder / "model.safetensors")
    return folder


def filled(checkpoint: Checkpoint, dtype: Any) -> ExpertStore:
    """A store that holds every expert."""
    spec = checkpoint.spec
    store = ExpertStore.create(checkpoint.experts, [spec.num_pairs], [CPU], dtype)
    for pair in range(spec.num_pairs):
        store.put(pair, 0, checkpoint.expert(*divmod(pair, spec.num_experts)))
    return store


def held_slots(store: ExpertStore) -> list[Change]:
    """The table of a store as loads, in order of (pair, GPU)."""
    return [
        Change("load", pair, gpu, slot)
        for pair, held in sorted(store._table.items())
        for gpu, slot in held
    ]


def free_slots(store: ExpertStore, gpu: int) -> int:
    """Slots of a GPU that can be loaded into."""
    return len(store._free[gpu])


def experts_in_memory(model: Any) -> list[Any]:
    """The experts modules of a transformers model, by layer position."""
    return [m for name, m in model.named_modules() if name.endswith(".experts")]
