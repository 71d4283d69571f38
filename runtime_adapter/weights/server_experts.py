"""A server's share of a checkpoint's experts: its devices, and the filled store.

Slots and dense weights aside, loading needs memory for one expert at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import torch

from prism_plan.errors import InputError
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement
from runtime_adapter.weights.checkpoint import Checkpoint
from runtime_adapter.weights.expert_store import ExpertStore


def require_placed_model(
    placement: Placement, checkpoint: Checkpoint, *, source: object = "the placement"
) -> None:
    """Refuse a placement that was made for another model than the checkpoint's.

    MoE layers, number of experts, top-k and bytes per expert must agree; nothing else is compared.
    The name may differ: a checkpoint is called after its folder. ``source`` names the placement in
    the message.

    Raises
    ------
    WrongModel
        Names the first field that differs, with both values.
    """
    model = dataclasses.replace(placement.model, name=checkpoint.spec.name)
    require_same_model(model, checkpoint.spec, source=source, other=checkpoint.folder)


def require_covered(placement: Placement, *, source: object) -> None:
    """Refuse a placement in which no server holds some expert.

    Raises
    ------
    InputError
        Names the first such expert.
    """
    uncovered = np.argwhere(~placement.on_gpu.any(axis=0))
    if len(uncovered):
        pair = int(uncovered[0] @ (placement.model.num_experts, 1))
        raise InputError(
            f"{placement.model.pair_text(pair)} is on no server",
            source=source,
            expected="every expert somewhere",
            remedy="make placements with prism-plan solve",
        )


def server_devices(num_gpus: int, device: str = "auto") -> list[torch.device]:
    """The device of each GPU of a server: ``cuda:g`` each, one device for all, or the CPU.

    ``device`` is ``"auto"`` (CUDA where there is any, else the CPU), ``"cpu"``, ``"cuda"``, or one
    card such as ``"cuda:0"`` that all GPUs of the placement share.

    Raises
    ------
    InputError
        There are not so many CUDA devices.
    """
    num_cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if num_cards else "cpu"
    if device == "cpu":
        return [torch.device("cpu")] * num_gpus
    found = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", device)
    if found is None:
        raise InputError(
            f"{device!r:.60}", parameter="device", expected="auto, cpu, cuda, or a GPU like cuda:0"
        )
    cards = list(range(num_gpus)) if found[1] is None else [int(found[1])] * num_gpus
    if max(cards, default=-1) >= num_cards:
        raise InputError(
            f"{device} needs {max(cards) + 1} CUDA devices",
            parameter="device",
            expected=f"at most the {num_cards} that are here",
            remedy="cuda:0 lets the server's GPUs share one, cpu does without",
        )
    return [torch.device("cuda", card) for card in cards]


def create_server_store(
    checkpoint: Checkpoint,
    placement: Placement,
    server: int,
    devices: Sequence[torch.device],
    dtype: torch.dtype | None = None,
) -> ExpertStore:
    """Create the store of a server, without experts.

    ``devices`` are those of the server's GPUs; ``dtype`` is the checkpoint's if not given.

    Raises
    ------
    InputError
        Too little memory.
    """
    sizes = placement.model.expert_bytes_by_layer
    slots = list(placement.gpu_capacity[server])
    if not placement.model.equal_expert_bytes:  # then capacities are bytes
        slots = [capacity // max(sizes) for capacity in slots]
    dtype = checkpoint.dtype if dtype is None else dtype
    return ExpertStore.create(checkpoint.experts, slots, devices, dtype)


def fill_server_store(
    store: ExpertStore, checkpoint: Checkpoint, placement: Placement, server: int
) -> None:
    """Load the experts that a placement gives a server.

    Raises
    ------
    InputError
        More experts than slots, or a file that cannot be read.
    """
    experts = checkpoint.spec.num_experts
    for gpu, index in enumerate(placement.gpus_of(server)):
        for layer, expert in np.argwhere(placement.on_gpu[index]).tolist():
            store.put(layer * experts + expert, gpu, checkpoint.expert(layer, expert))


def load_server_experts(
    checkpoint: Checkpoint,
    placement: Placement,
    server: int,
    devices: Sequence[torch.device],
    dtype: torch.dtype | None = None,
) -> ExpertStore:
    """Create the store of a server and load the experts that the placement gives it.

    Arguments and errors are those of :func:`create_server_store` and :func:`fill_server_store`.
    """
    store = create_server_store(checkpoint, placement, server, devices, dtype)
    fill_server_store(store, checkpoint, placement, server)
    return store
