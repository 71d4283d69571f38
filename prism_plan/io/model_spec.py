"""Model specs as JSON: a file of its own, and the part ``model`` of other files."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field

from prism_plan.errors import InputError
from prism_plan.input_limits import MAX_EXPERTS
from prism_plan.io.pydantic_base import (
    ABSENT,
    Count,
    Expected,
    ExtensibleModel,
    FormatModel,
    ListOf,
    NonEmpty,
    Positive,
    validate,
)
from prism_plan.model_spec import ModelShape, ModelSpec

S = TypeVar("S", bound=ModelShape)


class ShapePart(FormatModel):
    """The experts of a model; see :class:`prism_plan.model_spec.ModelShape`."""

    name: NonEmpty
    moe_layers: Annotated[
        ListOf[Count],
        Field(min_length=1, description="Decoder indices of the MoE layers, ascending."),
    ]
    num_experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    top_k: Positive
    expert_bytes: Annotated[
        Positive | Annotated[ListOf[Positive], Field(min_length=1)],
        Expected("a whole number of at least 1, or a list of them"),
        Field(description="Bytes of an expert, or one number for each MoE layer."),
    ]


class SpecPart(ShapePart):
    """The sizes of a model; see :class:`prism_plan.model_spec.ModelSpec`."""

    hidden_size: Positive
    dtype_bytes: Positive
    dense_bytes: Count
    kv_bytes_per_token: Count
    num_decoder_layers: Positive = ABSENT
    attention_flops: Count = ABSENT
    state_bytes_per_request: Count = ABSENT


class _Part(ExtensibleModel):
    """An object of which one key holds a spec."""

    model: SpecPart


def spec_from_json(values: Any, source: object = "", *, place: str = "") -> ModelSpec:
    """A model spec from parsed JSON, as :meth:`prism_plan.model_spec.ModelShape.to_json` writes it.

    ``place`` is ``"model"`` where the spec stands under that key of a file, or empty.

    Raises
    ------
    InputError
        Keys are missing (all are named), one is unknown, or a value makes no sense.
    """
    if place:
        return spec_from_part(
            ModelSpec, validate(_Part, {"model": values}, source=source).model, source
        )
    return spec_from_part(ModelSpec, validate(SpecPart, values, source=source), source, place="")


def spec_from_part(kind: type[S], part: ShapePart, source: object, *, place: str = "model") -> S:
    """The spec or shape that a part of a file declares.

    Raises
    ------
    InputError
        Its values do not go together.
    """
    given = {key: getattr(part, key) for key in part.model_fields_set}
    values: dict[str, Any] = {
        key: tuple(one) if isinstance(one, list) else one for key, one in given.items()
    }
    try:
        return kind(**values)
    except InputError as error:
        where = ".".join(filter(None, (place, error.place)))
        raise InputError(
            error.found, source=source, place=where, expected=error.expected
        ) from error
