"""Read and check the values in a dump of SGLang's recorder; see :mod:`.reader`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.extra_layers import split_mtp_layers
from prism_plan.profiling.common.json_fields import optional_count
from prism_plan.profiling.common.messages import CHECK_MODEL, TRUNCATED


def recorder_mode(dump: Mapping[str, Any], path: Path) -> str:
    """The recorder's mode of a dump: ``stat``, ``per_pass`` or ``per_token``.

    Raises
    ------
    InputError
        It is none of them, or is empty.
    """
    if "logical_count" in dump:
        return "stat"
    records = dump.get("records")
    at = Location(path)
    if not isinstance(records, list):
        expected = "'logical_count' (stat), or 'records' (per_pass, per_token)"
        raise at.error(f"keys {', '.join(map(str, dump))!s:.80}", expected)
    if not records:
        raise at.error("no records in it", remedy="record while requests run")
    if not all(isinstance(record, dict) for record in records):
        raise at.within("records").error("a record is no dictionary")
    has_ids = ["topk_ids_of_layer" in record for record in records]
    if any(has_ids) and not all(has_ids):
        raise at.within(f"record {has_ids.index(False)}").error(
            "'topk_ids_of_layer' is missing", "it in all records, or in none"
        )
    return "per_token" if all(has_ids) else "per_pass"


def array_of(values: Mapping[str, Any], key: str, dims: str, at: Location) -> npt.NDArray[Any]:
    """The integers of a tensor or array; ``dims`` are its dimensions, ``"L, P"`` or alternatives.

    Raises
    ------
    InputError
        It is missing, of another kind or of another rank.
    """
    tensor = values.get(key)
    at = at.within(repr(key))
    forms = dims.split(" or ")
    expected = " or ".join(f"[{form}]" for form in forms)
    ranks = [form.count(",") + 1 for form in forms]
    try:
        if isinstance(tensor, np.ndarray) or tensor is None:
            array = tensor
        elif tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError  # a view that repeats few numbers very often
        else:
            array = tensor.numpy()
        kind = str(tensor.dtype).removeprefix("torch.") if tensor is not None else "nothing"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise at.error(f"{tensor!r:.60}", f"a tensor {expected}") from error
    if array is None or array.dtype.kind not in "iu" or array.ndim not in ranks:
        found = kind if array is None else f"{kind} {list(array.shape)}"
        raise at.error(found, f"whole numbers {expected}", TRUNCATED)
    return np.asarray(array)


def required_count(values: Mapping[str, Any], key: str, at: Location) -> int:
    """A whole number of at least 0 that must be there."""
    number = optional_count(values, key, at)
    if number is None:
        raise at.error(f"{key!r} is missing")
    return number


def require_decoder_layers(found: int, model: ModelSpec, at: Location) -> None:
    """Refuse a recording of fewer decoder layers than the model's last MoE layer needs."""
    if found <= model.moe_layers[-1]:
        raise at.error(
            f"{found} layers",
            f"{model.moe_layers[-1] + 1} or more, all decoder layers of {model.name}",
            CHECK_MODEL,
        )


def require_only_moe(
    used: npt.NDArray[np.bool_], model: ModelSpec, what: str, at: Location
) -> list[int]:
    """Refuse a recording in which a layer that is dense in the model is ``used`` [L, ...].

    Returns the multi-token-prediction layers that are used.
    """
    others = np.setdiff1d(np.arange(len(used)), model.moe_layers)
    layers = [layer for layer in others.tolist() if used[layer].any()]
    extra, _ = split_mtp_layers(layers, model)
    for layer in layers:
        if layer not in extra:
            raise at.error(
                f"{what} in layer {layer}",
                f"none, for {model.name} has its MoE layers at {model.layers_text()}",
                CHECK_MODEL,
            )
    return extra


def logical_map(dump: Mapping[str, Any], model: ModelSpec, path: Path) -> npt.NDArray[np.int64]:
    """``last_physical_to_logical_map`` of the MoE layers, int64 [MoE layers, P]."""
    key = "last_physical_to_logical_map"
    at = Location(path, repr(key))
    table = array_of(dump, key, "L, P", Location(path))
    require_decoder_layers(len(table), model, at)
    table = table[list(model.moe_layers)].astype(np.int64)
    for layer, row in zip(model.moe_layers, table, strict=True):
        if not np.array_equal(np.unique(row), np.arange(model.num_experts)):
            low, high = (int(row.min()), int(row.max())) if row.size else (0, -1)
            raise at.within(f"layer {layer}").error(
                f"{len(np.unique(row))} experts, {low}..{high}",
                f"each of 0..{model.num_experts - 1} of {model.name}",
                CHECK_MODEL,
            )
    return table
