"""Layers that a recording has and the model spec has not.

Multi-token-prediction layers are numbered from the number of decoder layers on. Model sizes leave
them out (:mod:`prism_plan.sizes.stored_tensors`), and so do traces.
"""

from __future__ import annotations

from collections.abc import Iterable

from prism_plan.model import ModelSpec

#: More layers after the last one than this are another model, not multi-token prediction.
MAX_MTP_LAYERS = 8


def decoder_end(model: ModelSpec) -> int:
    """The first decoder index after the model's layers, as far as its spec tells."""
    return model.num_decoder_layers


def mtp_layers(used: Iterable[int], model: ModelSpec) -> tuple[list[int], int | None]:
    """Of the layers ``used``, those of multi-token prediction, and the first that cannot be one.

    They stand right behind the model's last layer, without a gap.
    """
    end = decoder_end(model)
    extra = sorted({layer for layer in used if layer >= end})
    for number, layer in enumerate(extra):
        if layer != end + number or number >= MAX_MTP_LAYERS:
            return extra[:number], layer
    return extra, None


def mtp_notice(layers: Iterable[int], model: ModelSpec) -> str:
    """What is to be said of layers that were left out, or nothing."""
    named = sorted(set(layers))
    if not named:
        return ""
    return (
        f"left out layers {', '.join(map(str, named))}: they stand after the layers of "
        f"{model.name} ({model.layers_text()}), as multi-token-prediction layers do"
    )
