"""What a dump of SGLang's recorder holds, checked; see :mod:`.reader`."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.open_file import OpenFile
from prism_plan.limits import MIB
from prism_plan.model import ModelSpec
from prism_plan.profiling.common.extra_layers import mtp_layers
from prism_plan.profiling.common.json_fields import CHECK_MODEL, CUT_SHORT, whole_number

#: What is read with --format sglang, for messages.
KINDS = (
    "a recorder's dump (.pt), 'logical_count' in a JSON or .npz file, or responses (JSON Lines, a "
    "JSON array or an event stream)"
)


def load(path: Path) -> Mapping[str, Any]:
    """The dictionary in a .pt file, of which nothing but plain data is ever built.

    Raises
    ------
    InputError
        It cannot be read, holds code or is something else.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "PyTorch is not installed, and the file is its format",
            source=path,
            remedy="pip install 'prism-plan[hf]'",
        ) from error
    try:
        with (
            warnings.catch_warnings(),
            OpenFile(path) as file,
            io.BufferedReader(file.stream(), MIB) as stream,
        ):
            warnings.simplefilter("ignore")
            _refuse_compressed(stream, path)
            dump = torch.load(stream, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # hostile bytes make PyTorch's reader raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"not opened: it holds code or objects ({code.group(1):.60})",
                source=path,
                expected="tensors and plain values only",
                remedy="use files that the recorder itself wrote",
            ) from error
        raise InputError(
            f"not a readable PyTorch file ({type(error).__name__})",
            source=path,
            expected=KINDS,
            remedy=CUT_SHORT,
        ) from error
    if not isinstance(dump, dict):
        raise InputError(
            f"{type(dump).__name__}",
            source=path,
            expected="a dump of SGLang's expert distribution recorder",
        )
    return dump


def _refuse_compressed(stream: IO[bytes], path: Path) -> None:
    """Refuse an archive whose entries inflate: PyTorch stores them as they are."""
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise InputError(
                        f"entry {entry.filename!r:.60} is compressed",
                        source=path,
                        expected="a file as PyTorch writes it",
                        remedy="use files that the recorder itself wrote",
                    )
    stream.seek(0)


def mode_of(dump: Mapping[str, Any], path: Path) -> str:
    """Mode in which a dump was recorded: ``stat``, ``per_pass`` or ``per_token``.

    Raises
    ------
    InputError
        It is none of them, or is empty.
    """
    if "logical_count" in dump:
        return "stat"
    records = dump.get("records")
    if not isinstance(records, list):
        raise InputError(
            f"keys {', '.join(map(str, dump))!s:.80}",
            source=path,
            expected="'logical_count' (stat), or 'records' (per_pass, per_token)",
        )
    if not records:
        raise InputError("no records in it", source=path, remedy="record while requests run")
    if not all(isinstance(record, dict) for record in records):
        raise InputError("a record is no dictionary", source=path, place="records")
    tokens = ["topk_ids_of_layer" in record for record in records]
    if any(tokens) and not all(tokens):
        raise InputError(
            "'topk_ids_of_layer' is missing",
            source=path,
            place=f"record {tokens.index(False)}",
            expected="it in all records, or in none",
        )
    return "per_token" if all(tokens) else "per_pass"


def array_of(
    values: Mapping[str, Any], key: str, dims: str, path: Path, place: str = ""
) -> npt.NDArray[Any]:
    """The whole numbers of a tensor or array; ``dims`` names its dimensions for the message.

    Where there are two forms of it, ``or`` stands between them.

    Raises
    ------
    InputError
        It is missing, of another kind or of another rank.
    """
    tensor = values.get(key)
    place = f"{place} {key!r}".strip()
    forms = dims.split(" or ")
    wanted = " or ".join(f"[{form}]" for form in forms)
    ranks = [form.count(",") + 1 for form in forms]
    try:
        if isinstance(tensor, np.ndarray) or tensor is None:
            array = tensor
        elif tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError  # a view that repeats few numbers as often as it likes
        else:
            array = tensor.numpy()
        kind = str(tensor.dtype).removeprefix("torch.") if tensor is not None else "nothing"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{tensor!r:.60}", source=path, place=place, expected=f"a tensor {wanted}"
        ) from error
    if array is None or array.dtype.kind not in "iu" or array.ndim not in ranks:
        found = kind if array is None else f"{kind} {list(array.shape)}"
        raise InputError(
            found, source=path, place=place, expected=f"whole numbers {wanted}", remedy=CUT_SHORT
        )
    return np.asarray(array)


def number_of(values: Mapping[str, Any], key: str, path: Path, place: str) -> int:
    """A whole number that has to be there."""
    number = whole_number(values, key, path, place)
    if number is None:
        raise InputError(f"{key!r} is missing", source=path, place=place)
    return number


def require_decoder_layers(found: int, model: ModelSpec, path: Path, place: str) -> None:
    """Refuse a recording of fewer decoder layers than the model's last MoE layer needs."""
    if found <= model.moe_layers[-1]:
        raise InputError(
            f"{found} layers",
            source=path,
            place=place,
            expected=f"{model.moe_layers[-1] + 1} or more, all decoder layers of {model.name}",
            remedy=CHECK_MODEL,
        )


def require_only_moe(
    used: npt.NDArray[np.bool_], model: ModelSpec, what: str, path: Path, place: str
) -> list[int]:
    """Refuse a recording in which a layer that is dense in the model is ``used`` [L, ...].

    Returns the layers used after the model's, which are of multi-token prediction.
    """
    others = np.setdiff1d(np.arange(len(used)), model.moe_layers)
    layers = [layer for layer in others.tolist() if used[layer].any()]
    extra, _ = mtp_layers(layers, model)
    for layer in layers:
        if layer not in extra:
            raise InputError(
                f"{what} in layer {layer}",
                source=path,
                place=place,
                expected=f"none, for {model.name} has its MoE layers at {model.layers_text()}",
                remedy=CHECK_MODEL,
            )
    return extra


def logical_map(dump: Mapping[str, Any], model: ModelSpec, path: Path) -> npt.NDArray[np.int64]:
    """``last_physical_to_logical_map`` of the MoE layers, int64 [MoE layers, P]."""
    key = "last_physical_to_logical_map"
    table = array_of(dump, key, "L, P", path)
    require_decoder_layers(len(table), model, path, repr(key))
    table = table[list(model.moe_layers)].astype(np.int64)
    for layer, row in zip(model.moe_layers, table, strict=True):
        if not np.array_equal(np.unique(row), np.arange(model.num_experts)):
            low, high = (int(row.min()), int(row.max())) if row.size else (0, -1)
            raise InputError(
                f"{len(np.unique(row))} experts, {low}..{high}",
                source=path,
                place=f"{key!r} layer {layer}",
                expected=f"each of 0..{model.num_experts - 1} of {model.name}",
                remedy=CHECK_MODEL,
            )
    return table
