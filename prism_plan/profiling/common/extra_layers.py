"""Layers of a recording that are not MoE layers of the model spec.

Multi-token-prediction (MTP) layers are numbered from the number of decoder layers on. Model sizes
leave them out (:mod:`prism_plan.sizes.stored_tensors`), and so do traces. Others are refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.messages import CHECK_MODEL

#: More layers after the last one than this are another model, not multi-token prediction.
MAX_MTP_LAYERS = 8


def foreign_layer(layer: int, model: ModelSpec, at: Location) -> InputError:
    """The error for a layer that is no MoE layer of the model."""
    expected = f"a MoE layer of {model.name}, {model.layers_text()}"
    return at.error(f"layer {layer}", expected, CHECK_MODEL)


def split_mtp_layers(used: Iterable[int], model: ModelSpec) -> tuple[list[int], int | None]:
    """The MTP layers among the layers ``used``, and the first later layer that cannot be one.

    MTP layers follow the model's last layer without a gap.
    """
    end = model.num_decoder_layers
    extra = sorted({layer for layer in used if layer >= end})
    for number, layer in enumerate(extra):
        if layer != end + number or number >= MAX_MTP_LAYERS:
            return extra[:number], layer
    return extra, None


def mtp_notice(layers: Iterable[int], model: ModelSpec) -> str:
    """The notice of MTP layers that were left out, or an empty text."""
    named = sorted(set(layers))
    if not named:
        return ""
    return (
        f"left out layers {', '.join(map(str, named))}: they stand after the layers of "
        f"{model.name} ({model.layers_text()}), as multi-token-prediction layers do"
    )
