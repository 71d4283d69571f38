"""The baseline `offload`: every server for itself, with the experts that it calls most."""

from __future__ import annotations

import numpy as np

from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.placement import OFFLOAD, Placement, SolveReport
from prism_plan.solvers.packing import pack_on_gpus


def offload_placement(instance: Instance) -> Placement:
    """The placement from which `offload` starts: each server holds the experts it calls most.

    They are packed on the server's GPUs by their load. No expert is sure to be held anywhere
    (docs/design.md, section 4, rule 8).

    Raises
    ------
    InputError
        Experts differ in size, so that slots have no meaning.
    """
    if not instance.in_slots:
        raise InputError(
            f"experts of {instance.model.name} differ in size",
            parameter="offload",
            expected="experts of one size, for one takes the slot of another",
        )
    servers = instance.num_servers
    local = np.zeros((servers, instance.model.num_pairs), bool)
    for n, slots in enumerate(instance.slots):
        favourites = np.argsort(-instance.activations[n], axis=None, kind="stable")
        local[n, favourites[:slots]] = True
    shaped = local.reshape(instance.activations.shape)
    return Placement(
        model=instance.model,
        servers=instance.servers,
        gpu_capacity=instance.gpu_capacity,
        on_gpu=pack_on_gpus(instance, shaped),
        plan=SolveReport(solver=OFFLOAD),
    )
