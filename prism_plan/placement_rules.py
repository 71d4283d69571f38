"""Pins and forbidden experts of a cluster, as indices into the layers and experts of a model."""

from __future__ import annotations

from typing import Literal

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.model_spec import ModelShape


def rule_triples(
    cluster: Cluster, model: ModelShape, key: Literal["pin", "forbid"]
) -> list[tuple[int, int, int]]:
    """All pins, or all forbidden experts, of a cluster as (server, layer position, expert) triples.

    Raises
    ------
    InputError
        One names a layer or expert that the model does not have.
    """
    triples = []
    position = {layer: index for index, layer in enumerate(model.moe_layers)}
    for n, server in enumerate(cluster.servers):
        for layer, expert in getattr(server, key):
            place = f"server[{n}].{key}"
            if layer not in position:
                raise InputError(
                    f"layer {layer}",
                    place=place,
                    expected=f"a MoE layer of {model.name}, {model.layers_text()}",
                )
            if expert >= model.num_experts:
                raise InputError(
                    f"expert {expert}",
                    place=place,
                    expected=f"ids 0..{model.num_experts - 1} of {model.name}",
                )
            triples.append((n, position[layer], expert))
    return triples
