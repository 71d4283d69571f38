"""Opens a checkpoint folder: which tensors are dense, and which belong to which expert.

Reads what transformers saves for :mod:`runtime_adapter.weights.checkpoint_families`: safetensors,
in one file or in shards with an index, experts one by one or stacked by layer. Opening a checkpoint
reads only headers, and checks that every expert is there in its shape; weights are read on demand.
Pickled weights (``.bin``) are refused: unpickling runs any code in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json
from prism_plan.io.text_files import read_text
from prism_plan.model_spec import ModelSpec
from prism_plan.sizes.checkpoint_name import model_name
from prism_plan.sizes.model_facts import read_facts
from prism_plan.sizes.quantisation import Quantisation, quantisation_beside, quantisation_key
from prism_plan.sizes.stored_tensors import StoredTensor, spec_from_tensors
from prism_plan.sizes.weight_files import INDEX, SINGLE, indexed_files
from runtime_adapter.weights.checkpoint_families import (
    ALL_EXPERTS,
    ONE_EXPERT,
    PARTS,
    CheckpointFamily,
    family_of,
)
from runtime_adapter.weights.tensor_file import TensorFile

#: The parts in each expert's slice of a tensor of all experts, in their order there.
PACKED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True)
class ExpertShape:
    """The shape and activation of every routed expert of a model.

    ``activation`` is a name of transformers' ``ACT2FN``; E experts in each of L layers, hidden
    states of H numbers, experts of width W.
    """

    spec: ModelSpec
    hidden_size: int
    width: int
    activation: str

    def part(self, name: str) -> tuple[int, int]:
        """Shape of one of the parts gate, up and down."""
        inner = (self.width, self.hidden_size)
        return inner if name != "down" else inner[::-1]

    @property
    def numbers(self) -> int:
        """Numbers of one expert, 3·H·W."""
        return len(PARTS) * self.hidden_size * self.width


@dataclass(frozen=True)
class _StoredPart:
    """The place of a part of an expert: from number ``first`` of a stored tensor on."""

    file: str
    name: str
    first: int = 0


class Checkpoint:
    """A folder with ``config.json`` and safetensors files.

    Attributes
    ----------
    folder : Path
    spec : ModelSpec
        Called after the folder, or after the repository in the hub's cache
        (:func:`~prism_plan.sizes.checkpoint_name.model_name`); sizes are those of the stored
        weights.
    config : Mapping
        The values of ``config.json``.
    experts : ExpertShape
    dtype : torch.dtype
        The dtype of the weights, according to ``config.json``.

    Raises
    ------
    InputError
        No such folder; a family that cannot be run; quantised or pickled weights; a file that is
        missing, truncated or outside the folder; a tensor of an expert that is missing or has
        another shape.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "config.json"
        if not path.is_file():
            raise InputError(
                "has no config.json" if self.folder.is_dir() else "no such folder",
                source=folder,
                expected="a checkpoint folder with config.json and safetensors files",
            )
        self.config: Mapping[str, Any] = _read_config(path)
        self.family: CheckpointFamily = family_of(self.config.get("model_type"), path)
        self._refuse_quantisation(path)
        self._files: dict[str, TensorFile] = {}
        stored = list(self._stored())
        self.spec: ModelSpec = self._sizes(stored)
        self.dtype: torch.dtype = _dtype(self.config)
        width = self.config.get(self.family.width_key)
        if not isinstance(width, int):  # transformers has a default; checkpoints always say it
            raise InputError(
                f"{width!r:.40}",
                source=path,
                place=self.family.width_key,
                expected="the width of an expert",
            )
        self.experts = ExpertShape(
            spec=self.spec,
            hidden_size=self.spec.hidden_size,
            width=width,
            activation=str(self.config.get("hidden_act", "silu")),
        )
        self._dense: dict[str, tuple[str, str]] = {}  # name in memory -> file, stored name
        self._experts: dict[int, dict[str, _StoredPart]] = {}  # by pair, by part
        self._index(stored)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r})"

    # ----------------------------------------------------------------------------------- reading

    def dense_names(self) -> list[str]:
        """Every tensor that belongs to no routed expert, as transformers 5 names it in memory."""
        return sorted(self._dense)

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the dense part."""
        file, stored = self._dense[name]
        return self._files[file].entries[stored].shape

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor of the dense part, as stored.

        Raises
        ------
        InputError
            There is none of that name, or the file cannot be read.
        """
        if name not in self._dense:
            raise InputError(f"tensor {name} is missing", source=self.source)
        file, stored = self._dense[name]
        return self._files[file].read(stored)

    def expert(self, layer_position: int, expert: int) -> dict[str, torch.Tensor]:
        """Read the parts gate [W, H], up [W, H] and down [H, W] of one expert, as stored.

        Nothing else is read, even if the experts of a layer are stored as one tensor.

        Raises
        ------
        InputError
            The file cannot be read.
        """
        stored = self._experts[layer_position * self.spec.num_experts + expert]
        return {
            part: self._files[at.file].read(at.name, self.experts.part(part), at.first)
            for part, at in stored.items()
        }

    @property
    def source(self) -> Path:
        """The file that lists the tensors."""
        single = self.folder / SINGLE
        return single if single.is_file() else self.folder / INDEX

    def location(self, name: str) -> tuple[Path, str]:
        """File and stored name of a tensor of the dense part, for a message."""
        if name not in self._dense:
            return self.source, name
        file, stored = self._dense[name]
        return self.folder / file, stored

    # ----------------------------------------------------------------------------------- opening

    def _refuse_quantisation(self, path: Path) -> None:
        """Refuse quantised weights, whichever file of the checkpoint declares them."""
        key = quantisation_key(self.config)
        found = quantisation_beside(self.folder)
        if key:
            found = Quantisation(path, key, f"{self.config[key]!r:.60}: the weights are quantised")
        if found is not None:
            raise InputError(
                found.found,
                source=found.file,
                place=found.place,
                expected="weights in bfloat16, float16 or float32",
                remedy="give the checkpoint as it was before it was quantised",
            )

    def _stored(self) -> Iterator[tuple[str, str]]:
        """Every stored tensor with its file; opens the files."""
        if (self.folder / SINGLE).is_file():
            for name in self._open(SINGLE).entries:
                yield SINGLE, name
            return
        for name, file in indexed_files(self.folder).items():
            if name not in self._open(file).entries:
                raise InputError(
                    f"tensor {name} is missing",
                    source=self.folder / file,
                    expected=f"it there, as {INDEX} says",
                    remedy="copy or download the checkpoint again",
                )
            yield file, name

    def _sizes(self, stored: list[tuple[str, str]]) -> ModelSpec:
        tensors = (
            StoredTensor(name, "", entry.shape, entry.end - entry.begin)
            for file, name in stored
            for entry in [self._files[file].entries[name]]
        )
        facts = read_facts(self.config, source=self.folder / "config.json")
        name = model_name(self.folder)
        return spec_from_tensors(tensors, facts, name=name, source=self.source)

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.folder / file)
        return self._files[file]

    def _index(self, stored: list[tuple[str, str]]) -> None:
        """Index dense tensors and the parts of experts, and check that all experts are complete."""
        position = {layer: at for at, layer in enumerate(self.spec.moe_layers)}
        num_experts, size = self.spec.num_experts, self.experts.hidden_size * self.experts.width
        for file, name in stored:
            one = ONE_EXPERT.match(name)
            match = one or ALL_EXPERTS.match(name)
            if match is None or int(match["layer"]) not in position:
                # also experts of layers that the model does not run
                self._dense[self.family.name_in_memory(name)] = (file, name)
                continue
            first = position[int(match["layer"])] * num_experts
            if one is not None:
                part, expert = self.family.part_of(one["part"]), int(one["expert"])
                if not part or expert >= num_experts:
                    self._refuse(file, name, f"parts of experts 0..{num_experts - 1}")
                self._require_shape(file, name, self.experts.part(part))
                self._experts.setdefault(first + expert, {})[part] = _StoredPart(file, name)
                continue
            packed = PACKED.get(match["part"], ())
            if not packed:
                self._refuse(file, name, " and ".join(PACKED))
            rows, columns = self.experts.part(packed[0])
            self._require_shape(file, name, (num_experts, len(packed) * rows, columns))
            for expert in range(num_experts):
                parts = self._experts.setdefault(first + expert, {})
                for at, part in enumerate(packed):
                    parts[part] = _StoredPart(file, name, (expert * len(packed) + at) * size)
        for pair in range(self.spec.num_pairs):
            for part in PARTS:
                if part not in self._experts.get(pair, {}):
                    layer, expert = divmod(pair, num_experts)
                    names = self.family.expert_names(self.spec.moe_layers[layer], expert)
                    raise InputError(
                        f"tensor {names[part]} is missing",
                        source=self.source,
                        expected=f"shape {list(self.experts.part(part))}, "
                        f"{part} of {self.spec.pair_text(pair)}",
                        remedy="copy or download the checkpoint again",
                    )

    def _refuse(self, file: str, name: str, expected: str) -> None:
        raise InputError(
            "no tensor of an expert of this model",
            source=self.folder / file,
            place=name,
            expected=expected,
        )

    def _require_shape(self, file: str, name: str, expected: tuple[int, ...]) -> None:
        entry = self._files[file].entries[name]
        if entry.shape != expected or not entry.dtype.is_floating_point:
            raise InputError(
                f"shape {list(entry.shape)} of {str(entry.dtype).removeprefix('torch.')}",
                source=self.folder / file,
                place=name,
                expected=f"{list(expected)}, as config.json says",
            )


def _read_config(path: Path) -> dict[str, Any]:
    values = parse_json(read_text(path), path, non_finite=True)
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60}", source=path, expected="a JSON object")
    return values


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
    return dtype
