"""Export sidecars: the JSON beside what ``prism-plan export`` writes for an engine, version 1."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from prism_plan.io.json import parse_json
from prism_plan.io.pydantic_base import (
    Amount,
    Count,
    FormatModel,
    ListOf,
    NonEmpty,
    Positive,
    Share,
    Version1,
    validate,
    validation_error,
)
from prism_plan.io.text_files import read_text
from prism_plan.printable_text import printable_json

LayerEngine = Literal["llamacpp", "vllm-pp", "sglang-pp", "trtllm-pp"]
MapEngine = Literal["sglang", "vllm-ascend", "trtllm"]
Engine = LayerEngine | MapEngine
#: After the name of an engine's file, that of the sidecar.
SIDECAR = ".export.json"


class StagePart(FormatModel):
    """Decoder layers that one GPU executes, in the order of execution."""

    server: NonEmpty
    gpu: Count
    first: Annotated[Count, Field(description="Decoder layer index.")]
    last: Count

    @property
    def num_layers(self) -> int:
        """How many decoder layers."""
        return self.last - self.first + 1


class HeldPart(FormatModel):
    """A layer whose experts are not at the head."""

    layer: Annotated[Count, Field(description="Decoder layer index.")]
    server: NonEmpty
    gpu: Count


class SecondsPart(FormatModel):
    """Expected seconds of a mean request, by the formula of solver latency.

    Of the head's requests; of expert maps those of all servers, whose calls go to the replicas that
    the engine calls.
    """

    plan: Annotated[Amount | None, Field(description="Of the plan that was given.")]
    export: Amount
    engine_default: Annotated[
        Amount | None, Field(description="Of what the engine would have done by itself.")
    ]


class SharesPart(FormatModel):
    """Remote share of expert calls; of maps each number has one more restriction than the last."""

    plan: Annotated[Share, Field(description="Of the plan that was given.")]
    equal_memory: Annotated[
        Share | None, Field(description="Every GPU with the memory of the smallest.")
    ] = None
    equal_slots: Annotated[Share | None, Field(description="And as many slots in every layer.")] = (
        None
    )
    export: Annotated[Share, Field(description="Of maps: and the engine's choice of replicas.")]
    bound: Annotated[Share | None, Field(description="No map of this shape is below it.")] = None
    engine_default: Annotated[
        Share | None, Field(description="What the engine makes by itself.")
    ] = None


class ExportFile(FormatModel):
    """What an export holds, what was lost on the way, and what the engine would do by itself."""

    format: Literal["prism-plan/export"]
    version: Version1
    engine: Engine
    checked_with: Annotated[NonEmpty, Field(description="Version of the engine.")]
    file: NonEmpty
    file_sha256: Annotated[str, Field(description="Of the engine's file as it was written.")]
    plan: NonEmpty
    plan_sha256: str
    home: Annotated[
        NonEmpty | None,
        Field(description="The head: whose requests are served. null: those of all servers."),
    ]
    num_hidden_layers: Positive
    stages: Annotated[ListOf[StagePart], Field(description="Empty: layers execute at the head.")]
    held: Annotated[ListOf[HeldPart], Field(description="Layers whose experts are elsewhere.")]
    replanned: Annotated[
        str | None, Field(description="Why the layers were planned again; null: they were not.")
    ]
    engine_default: Annotated[
        ListOf[Count] | None, Field(description="Layers of each rank or device by itself.")
    ]
    expected_latency_s: SecondsPart | None = Field(description="null: without trace and cluster.")
    ranks: ListOf[NonEmpty] = Field(
        default=[], description="The server of each rank, of engines with expert maps."
    )
    slots: Positive | None = Field(default=None, description="Of each rank in each MoE layer.")
    remote_share: SharesPart | None = Field(
        default=None, description="null: without trace and cluster."
    )
    launch: ListOf[NonEmpty]
    warnings: ListOf[NonEmpty]

    @model_validator(mode="after")
    def _of_one_kind(self) -> ExportFile:
        kinds = {"stages": self.stages, "held": self.held, "ranks": self.ranks}
        if (self.engine in get_args(MapEngine)) != bool(self.ranks):
            raise validation_error(
                f"{len(self.ranks)} ranks of {self.engine}",
                "ranks of engines with expert maps, and of no others",
                "ranks",
            )
        given = [name for name, parts in kinds.items() if parts]
        if len(given) > 1:
            raise validation_error(f"{' and '.join(given)}", "one of them", given[1])
        at = 0
        for number, stage in enumerate(self.stages):
            if stage.first != at or not at <= stage.last < self.num_hidden_layers:
                raise validation_error(
                    f"layers {stage.first} to {stage.last}",
                    f"layers from {at} on, of {self.num_hidden_layers}",
                    "stages",
                    number,
                )
            at = stage.last + 1
        if self.stages and at != self.num_hidden_layers:
            raise validation_error(
                f"layers up to {at - 1}", f"all {self.num_hidden_layers}", "stages"
            )
        layers = [held.layer for held in self.held]
        if layers != sorted(set(layers)) or (layers and layers[-1] >= self.num_hidden_layers):
            raise validation_error(
                f"layers {layers}"[:60],
                f"each once, ascending, of {self.num_hidden_layers}",
                "held",
            )
        return self


def read_export(path: str | os.PathLike[str]) -> ExportFile:
    """Read and check a sidecar.

    Raises
    ------
    InputError
        Names the file, the place in it, the value and what was expected.
    """
    return export_from_json(parse_json(read_text(path), path), path)


def export_from_json(values: Any, source: object = "") -> ExportFile:
    """A sidecar from its JSON values; see :func:`read_export`."""
    return validate(ExportFile, values, source=source)


def dump_export(values: ExportFile) -> bytes:
    """The text of a sidecar."""
    text = json.dumps(values.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)
    return (printable_json(text) + "\n").encode()
