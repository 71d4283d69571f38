"""The header of a GGUF file: its tensors, and what its keys tell of the model.

Block sizes of the quantised types are those of the ``gguf`` package. Its own reader is not used: it
makes arrays of every entry of a vocabulary, some hundreds of MB, and believes the lengths and
counts that a file declares.
"""

from __future__ import annotations

import functools
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prism_plan.errors import InputError
from prism_plan.limits import MAX_LAYERS, MIB, require_at_most
from prism_plan.model import ModelSpec
from prism_plan.sizes.config import Facts
from prism_plan.sizes.config_keys import MAX_SIZE
from prism_plan.sizes.stored import BY_HAND, StoredTensor, spec_from_tensors
from prism_plan.text import shown

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
#: Characters of a key, of a tensor's name, and of a text that is kept.
_MAX_TEXT = 65_536
#: Keys of a file, texts of one array (the largest vocabularies have 260,000), and tensors.
_MAX_KEYS, _MAX_TEXTS, _MAX_TENSORS = 65_536, 2**21, 2**18
#: Bytes of a header; those of large vocabularies take some 15 MB.
_MAX_HEADER = 64 * MIB
#: Values of an array of numbers that is kept: one a layer. Longer ones are skipped.
_MAX_KEPT = MAX_LAYERS
#: ``struct`` formats of the value types that are numbers.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
#: Bytes of a number of the cache, which llama.cpp keeps in half precision.
_CACHE_BYTES = 2


def spec_from_gguf(path: str | os.PathLike[str]) -> ModelSpec:
    """Read the sizes of a GGUF file, or of all files of a split one of which one is given.

    Raises
    ------
    InputError
        The package ``gguf`` is not installed; a file cannot be read, is cut short, or is no GGUF
        file; a part is missing; it has no MoE layers.
    """
    path = Path(path)
    tensors: list[StoredTensor] = []
    keys: dict[str, Any] = {}
    for number, part in enumerate(_parts(path)):
        own, found = _read(part)
        keys = own | keys if number else own
        tensors += found
        require_at_most(len(tensors), _MAX_TENSORS, "tensors", source=part)
    match = _PART.fullmatch(path.name)
    name = match["stem"] if match else path.stem
    return spec_from_tensors(tensors, _facts(keys, tensors, path), name=name, source=path)


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    require_at_most(count, 10_000, "parts", source=path)
    parts = [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise InputError(
            f"no such file, {len(missing)} of {count} parts are missing",
            source=missing[0],
            expected=f"all parts of {match['stem']}",
            remedy="copy or download the checkpoint again",
        )
    return parts


# ------------------------------------------------------------------------------------- one file


class _Cut(Exception):
    """The file ends within its header."""


def _read(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError("is no regular file", source=path, remedy="give a GGUF file")
            return _header(file, path)
    except _Cut as error:
        raise InputError(
            str(error) or "the file ends within its header",
            source=path,
            expected="a whole GGUF file",
            remedy="copy or download the file again",
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=path, remedy="give a readable file") from error


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    size = os.fstat(file.fileno()).st_size
    magic, version = file.read(4), _number(file, "I")
    if magic != b"GGUF" or version not in (2, 3):
        raise _Cut(f"begins with {magic!r}, version {version}")
    count, num_keys = _number(file, "Q"), _number(file, "Q")
    require_at_most(count, min(_MAX_TENSORS, size), "tensors", source=path)
    require_at_most(num_keys, _MAX_KEYS, "keys", source=path)
    keys = {}
    for _ in range(num_keys):
        name = _text(file)
        keys[name] = _value(file, _number(file, "I"), size)
        require_at_most(file.tell(), _MAX_HEADER, "bytes of header", source=path)
    infos = []
    for _ in range(count):
        name = _text(file)
        dims = _number(file, "I")
        if dims > 16:
            raise _Cut(f"tensor {name!r:.60} has {dims:,} dimensions")
        shape = tuple(_number(file, "Q") for _ in range(dims))[::-1]
        infos.append((name, shape, _number(file, "I"), _number(file, "Q")))
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_SIZE:
        raise _Cut(f"general.alignment is {shown(alignment)}")
    start = -(-file.tell() // alignment) * alignment
    tensors = [_tensor(*info, start, path) for info in infos]
    end = max((tensor.begin + tensor.num_bytes for tensor in tensors), default=0)
    if end > size or sum(tensor.num_bytes for tensor in tensors) > size:
        raise _Cut(f"holds {size:,} bytes, and its tensors end at {end:,}")
    return keys, tensors


def _tensor(
    name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, path: Path
) -> StoredTensor:
    sizes = block_sizes()
    if kind not in sizes:
        raise InputError(
            f"numbers of type {kind}",
            source=path,
            place=name,
            expected="a type that the installed gguf package knows",
            remedy=f"pip install -U gguf, or {BY_HAND}",
        )
    label, block, block_bytes = sizes[kind]
    numbers = math.prod(shape)
    if not shape or shape[-1] % block:
        raise _Cut(f"tensor {name!r:.60} of shape {list(shape)} has no whole blocks of {block}")
    return StoredTensor(name, label, shape, numbers // block * block_bytes, start + offset)


@functools.cache
def block_sizes() -> Mapping[int, tuple[str, int, int]]:
    """Name, numbers a block and bytes a block, by the type's number."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise InputError(
            "gguf is not installed",
            source="a .gguf file",
            remedy="pip install 'prism-plan[gguf]'",
        ) from error
    return {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _number(file: BinaryIO, form: str) -> Any:
    size = struct.calcsize(f"<{form}")
    data = file.read(size)
    if len(data) < size:
        raise _Cut
    return struct.unpack(f"<{form}", data)[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _MAX_TEXT:
        raise _Cut(f"a name of {length:,} characters")
    data = file.read(length)
    if len(data) < length:
        raise _Cut
    return data.decode("utf-8", "replace")


def _skip(file: BinaryIO, length: int, size: int) -> None:
    if length > size - file.tell():
        raise _Cut
    file.seek(length, os.SEEK_CUR)


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    """Read a value; long texts and long arrays are skipped and give nothing."""
    if kind in _SCALARS:
        return _number(file, _SCALARS[kind])
    if kind == _TEXT:
        return _kept_text(file, size)
    if kind != _ARRAY:
        raise _Cut(f"a value of type {kind}")
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in _SCALARS:
        width = struct.calcsize(f"<{_SCALARS[inner]}")
        if count > _MAX_KEPT:
            _skip(file, count * width, size)
            return None
        return [_number(file, _SCALARS[inner]) for _ in range(count)]
    if inner != _TEXT or count > _MAX_TEXTS:
        raise _Cut(f"an array of {count:,} values of type {inner}")
    for _ in range(count):
        _skip(file, _number(file, "Q"), size)
    return None


def _kept_text(file: BinaryIO, size: int) -> str | None:
    length = _number(file, "Q")
    if length > _MAX_TEXT:
        _skip(file, length, size)
        return None
    data = file.read(length)
    if len(data) < length:
        raise _Cut
    return data.decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------- facts


def _facts(keys: Mapping[str, Any], tensors: list[StoredTensor], path: Path) -> Facts:
    """Read what GGUF's keys tell; their names begin with that of the architecture."""
    architecture = keys.get("general.architecture")

    def found(key: str) -> Any:
        return keys.get(f"{architecture}.{key}")

    def whole(key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        value = found(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(
                shown(value),
                source=path,
                place=f"{architecture}.{key}",
                expected=f"a whole number from {least} to {most}",
            )
        return value

    def by_layer(key: str, default: int | None = None) -> list[int]:
        """Read a number, or one a layer (0 where a layer has no attention)."""
        value = found(key)
        if not isinstance(value, list):
            return [whole(key, default)] * blocks
        if len(value) < blocks or not all(
            isinstance(one, int) and 0 <= one <= MAX_SIZE for one in value
        ):
            raise InputError(
                shown(value), source=path, place=f"{architecture}.{key}", expected="one a layer"
            )
        return value[:blocks]

    if not found("expert_count"):
        raise InputError(
            f"the architecture {architecture!r} has no MoE layers",
            source=path,
            remedy="give a Mixture-of-Experts model",
        )
    blocks = whole("block_count", most=MAX_LAYERS)
    layers = blocks - whole("nextn_predict_layers", 0, least=0, most=blocks - 1)
    hidden = whole("embedding_length")
    heads = by_layer("attention.head_count")
    mean_width = max(hidden // max(*heads, 1), 1)
    rank = whole("attention.kv_lora_rank", 0, least=0)
    key_width = whole("attention.key_length", mean_width)
    value_width = whole("attention.value_length", mean_width)
    latent = any(re.search(r"\.attn_kv_a", tensor.name) for tensor in tensors)
    if rank and latent:
        numbers = [rank + whole("rope.dimension_count")] * blocks
        key_width = whole("attention.key_length_mla", key_width)
        value_width = whole("attention.value_length_mla", value_width)
    else:
        kv_heads = by_layer("attention.head_count_kv", max(heads))
        numbers = [count * (key_width + value_width) for count in kv_heads]
    return Facts(
        num_decoder_layers=layers,
        num_experts=(whole("expert_count"),),
        top_k=whole("expert_used_count"),
        hidden_size=hidden,
        dtype_bytes=_CACHE_BYTES,
        kv_numbers=tuple(numbers[:layers]),
        attention_flops_by_layer=tuple(2 * n * (key_width + value_width) for n in heads[:layers]),
        source=path,
        top_k_place=f"{architecture}.expert_used_count",
    )
