"""Check the array of routed experts that an engine returned with a response.

Two engines do, as an array [tokens, decoder layers, K] of logical ids in which a dense layer is a
column of zeros: vLLM (``routed_experts``, .npy) and SGLang (``meta_info.routed_experts``, raw
int32). Rows of -1 in every layer were not routed (padding).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.extra_layers import split_mtp_layers
from prism_plan.profiling.common.messages import CHECK_MODEL
from prism_plan.profiling.common.repeated_rows import runs_of_equal_rows
from prism_plan.trace import first_invalid_selection

#: What engines write where nothing was routed.
_NOT_ROUTED = -1
#: With K = 1 an id 0 is a selection like any other; this many in a row, over rows and layers, are
#: not.
_MIN_ZEROS = 64

Array = npt.NDArray[Any]


def parse_routed_experts(
    array: Array, model: ModelSpec, at: Location
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_], list[int]]:
    """Selections uint16 [R, L, K] of a request's array [T, decoder layers, K].

    Also which rows were routed, bool [T], of which R are true: a row of -1 in every layer was
    not. And the MTP layers that were left out. Columns of dense layers must be zeros or -1 and are
    dropped. An array of exactly the MoE layers is taken as one without dense layers.

    Raises
    ------
    InputError
        Shape, a dense column, an id or a layer that was not recorded contradicts ``model``.
    """
    array, extra = _moe_columns(array, model, at)
    routed = ~_padding_rows(array)
    token = np.arange(len(array))
    if not routed.all():
        array, token = array[routed], token[routed]
    if array.size and (array.min() < 0 or array.max() >= model.num_experts):
        bad = (array < 0) | (array >= model.num_experts)
        first = np.unravel_index(int(np.argmax(bad)), array.shape)
        raise at.within(f"token {token[first[0]]} layer {model.moe_layers[first[1]]}").error(
            f"expert {array[first]}",
            f"ids 0..{model.num_experts - 1} of {model.name}, or -1 in every layer of a row that "
            "was not routed",
            CHECK_MODEL,
        )
    experts = np.ascontiguousarray(array, np.uint16)
    twice = first_invalid_selection(experts, model.num_experts)
    if twice is not None:
        row, layer = twice
        ids = experts[row, layer].tolist()
        where = at.within(f"token {token[row]} layer {model.moe_layers[layer]}")
        if not any(ids):
            raise _not_recorded(model, where)
        found = f"experts {ids} name one expert twice"
        raise where.error(found, f"{model.top_k} different experts", CHECK_MODEL)
    if model.top_k == 1 and model.num_experts > 1:
        starts, lengths = runs_of_equal_rows(experts)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if length * model.num_layers >= _MIN_ZEROS and not experts[start].any():
                raise _not_recorded(model, at.within(f"token {token[start]}"))
    return experts, routed, extra


def _not_recorded(model: ModelSpec, at: Location) -> InputError:
    return at.error(
        "nothing was recorded (all ids are 0)",
        f"{model.top_k} different experts in each MoE layer, {model.layers_text()}",
        "the engine's capture did not run: record the request again, or remove it",
    )


def _moe_columns(array: Array, model: ModelSpec, at: Location) -> tuple[Array, list[int]]:
    """Check an array [T, decoder layers or more, K]; gives the columns of MoE layers, [T, L, K].

    Also gives the decoder indices of the MTP layers in which experts were recorded (not only 0 or
    -1); they are left out. An array of exactly the L MoE layers is returned as it is.

    Raises
    ------
    InputError
        Type, shape or top-k is wrong, or experts were recorded in a dense layer or in a layer
        that is neither the model's nor an MTP layer.
    """
    decoder_layers = model.num_decoder_layers
    expected = f"[tokens, {decoder_layers} or more layers, {model.top_k}] for {model.name}"
    if array.ndim != 3 or array.dtype.kind not in "iu":
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise at.error(found, f"whole numbers {expected}", CHECK_MODEL)
    layers = array.shape[1]
    if array.shape[2] != model.top_k:
        expected = f"{model.top_k}, top-k of {model.name}"
        raise at.error(f"{array.shape[2]} experts a token", expected, CHECK_MODEL)
    if layers < decoder_layers:
        if layers != model.num_layers:
            raise at.error(f"{layers} layers", expected, CHECK_MODEL)
        return array, []
    used = _used_rows(array, np.setdiff1d(np.arange(layers), model.moe_layers))
    extra, stray = split_mtp_layers(used, model)
    for layer in sorted(used):
        if layer < decoder_layers or layer == stray:
            token = used[layer]
            raise at.within(f"token {token} layer {layer}").error(
                f"experts {array[token, layer].tolist()}",
                f"zeros, for {model.name} has its MoE layers at {model.layers_text()}",
                CHECK_MODEL,
            )
    return array[:, list(model.moe_layers)], extra


def _used_rows(array: Array, layers: npt.NDArray[np.int64]) -> dict[int, int]:
    """{layer: first row} of the ``layers`` that have any experts in [T, decoder layers, K]."""
    used = {}
    for layer in layers.tolist():
        column = array[:, layer]
        stray = column.any(axis=1)
        if array.dtype.kind == "i":
            stray &= (column != _NOT_ROUTED).any(axis=1)
        if stray.any():
            used[layer] = int(np.argmax(stray))
    return used


def _padding_rows(array: Array) -> npt.NDArray[np.bool_]:
    """Which rows of [T, L, K] say in every layer that nothing was routed, bool [T]."""
    if array.dtype.kind == "u" or not array.size:
        return np.zeros(len(array), bool)
    mask: npt.NDArray[np.bool_] = (array == _NOT_ROUTED).all(axis=(1, 2))
    return mask
