"""Which files of a checkpoint folder hold the weights, or what is there instead of them."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from prism_plan.io.text_files import read_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"model-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
_PICKLED = (".bin", ".pt", ".pth")
#: Pickled files of a training run, which lie beside weights of any kind.
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state")
_SAVE = "save the model with save_pretrained of transformers 5"


def indexed_files(folder: Path) -> dict[str, str]:
    """Read the index of a checkpoint in shards: the file of each stored tensor.

    Raises
    ------
    InputError
        There is no index, it names files outside the folder, or shards that are not there.
    """
    index = folder / INDEX
    if not index.is_file():
        raise _no_index(folder)
    values = parse_json(read_text(index), index)
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60}", source=index, expected="a JSON object")
    files = values.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(
            f"{files!r:.60}", source=index, place="weight_map", expected="files by tensor"
        )
    for name, file in files.items():
        if not _is_plain(file):
            raise InputError(
                f"{file!r:.80}",
                source=index,
                place=name,
                expected="the name of a safetensors file in the folder",
            )
    shards = sorted(set(files.values()))
    missing = [file for file in shards if not (folder / file).exists()]
    if missing:
        raise InputError(
            f"no such file, {len(missing)} of {len(shards)} shards are missing",
            source=folder / missing[0],
            expected=f"the shards that {INDEX} names",
            remedy="copy or download the checkpoint again",
        )
    return files


def shards_without_index(folder: Path) -> list[str]:
    """Name the safetensors files of a folder without an index, where it is sure that they are all.

    These are numbered shards of which none is missing, or the only file, whatever its name.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    except OSError:
        return []
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return names if len(names) == 1 else []
    count = int(shards[0]["count"])
    complete = [int(match["number"]) for match in shards] == list(range(1, len(shards) + 1))
    same = {int(match["count"]) for match in shards} == {len(shards)}
    return [match[0] for match in shards] if complete and same and count == len(shards) else []


def _no_index(folder: Path) -> InputError:
    """Tell what a folder holds that has neither of the two files."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return InputError(reason, source=folder, remedy="give a readable folder")
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickled = [
        name for name in names if name.endswith(_PICKLED) and not name.startswith(_OF_TRAINING)
    ]
    expected = f"{SINGLE}, or shards and {INDEX}"
    if shards:
        count = int(shards[0]["count"])
        there = {int(match["number"]) for match in shards}
        missing = sorted(set(range(1, min(count, 10_000) + 1)) - there)
        of_them = f"; shards {', '.join(map(str, missing[:5]))} of {count} are missing too"
        found = f"{_and_others([match[0] for match in shards])}, but no {INDEX}"
        return InputError(
            found + (of_them if missing else ""),
            source=folder,
            expected=expected,
            remedy="copy or download the index from where the shards come from",
        )
    if tensors:
        found, remedy = f"{_and_others(tensors)}, but no {SINGLE} and no {INDEX}", _SAVE
    elif pickled:
        found = (
            f"{_and_others(pickled)}: the weights are pickled, and unpickling runs any code that "
            "is in them"
        )
        remedy = _SAVE
    else:
        found, remedy = "has no weights", "copy or download the checkpoint again"
    return InputError(found, source=folder, expected=expected, remedy=remedy)


def _and_others(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and others"


def _is_plain(file: object) -> bool:
    """Whether an index names a file of the folder itself, and one of safetensors."""
    return (
        isinstance(file, str)
        and "\\" not in file
        and "\0" not in file
        and file.endswith(".safetensors")
        and PurePosixPath(file).parts == (file,)
    )
