"""The base of all format models, and pydantic's errors as :class:`InputError` of one line.

Models are strict (``"1"`` and ``true`` are no numbers), know all their keys, are immutable, and
take finite numbers and whole numbers below 2**63 alone, which every reader of JSON keeps exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import MAX_COLUMNS, MAX_NAME_LENGTH
from prism_plan.io.json import parse_json
from prism_plan.printable_text import shown as spelled

K = TypeVar("K")
T = TypeVar("T")


class FormatModel(BaseModel):
    """The base of all parts of files: strict types, immutable, unknown keys refused."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True
    )

    #: What an object of the file is called in messages.
    WORD: ClassVar[str] = "an object"

    @model_validator(mode="before")
    @classmethod
    def _bound_keys(cls, values: Any) -> Any:
        """Bound the number of keys, for each unknown key would be an error in memory."""
        if isinstance(values, dict) and len(values) > MAX_COLUMNS:
            raise validation_error(f"{len(values):,} keys", f"at most {MAX_COLUMNS:,}")
        return values


class ExtensibleModel(FormatModel):
    """A part of a file that may have further keys, which are ignored."""

    model_config = ConfigDict(extra="ignore")


class TomlTable(FormatModel):
    """A table of a TOML file."""

    WORD: ClassVar[str] = "a table"


M = TypeVar("M", bound=FormatModel)

# ----------------------------------------------------------------------------------------- values

#: The value of a key that was left out, where it may be left out and may not be null.
ABSENT: Any = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """Replaces pydantic's message about a type by this expectation."""

    text: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="expected", custom_error_message=self.text
        )


def _keep_unconverted(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    handler(value)
    return value


@dataclasses.dataclass(frozen=True)
class FailFast:
    """Validation of a list or dict ends at its first wrong entry (pydantic's has no hash)."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "fail_fast": True}


ListOf = Annotated[list[T], FailFast()]
DictOf = Annotated[dict[K, T], FailFast()]
#: A list whose entries are checked, and kept as they stand in the file: models take more memory.
CheckedList = Annotated[list[Annotated[T, WrapValidator(_keep_unconverted)]], FailFast()]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Version1 = Annotated[int, Field(ge=1, le=1)]


def validation_error(found: str, expected: str, *at: str | int) -> PydanticCustomError:
    """The error that a validator raises; ``at`` is the place below the validated part."""
    context: dict[str, Any] = {f"at{number}": part for number, part in enumerate(at)}
    return PydanticCustomError("refused", "", context | {"found": found, "expected": expected})


def _not_blank(text: str) -> str:
    if not text.strip():
        raise validation_error(short_repr(text), "a non-empty text")
    return text


NotBlank = Annotated[str, Field(min_length=1), AfterValidator(_not_blank)]
Name = Annotated[NotBlank, Field(max_length=MAX_NAME_LENGTH)]

# ---------------------------------------------------------------------------------------- checking


def validate(
    kind: type[M], values: Any, *, source: object = "", part: str = "", remedy: str = ""
) -> M:
    """Validate the values of a file as its model.

    ``part`` names the line or row of the file that they stand in. ``remedy`` says how to make such
    files, where a file is of another format.

    Raises
    ------
    InputError
        Names the place and the value of the first error in the file.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
    raise _input_error(kind, values, found, source, part, remedy)


def validate_line(kind: type[M], text: str, number: int, source: object, example: str) -> M:
    """Validate one line of a file of JSON Lines as its model; ``example`` is such a line.

    Raises
    ------
    InputError
        No JSON, or as :func:`validate`; names the line.
    """
    try:
        values = parse_json(text, "")
    except InputError as error:
        raise InputError(
            f"{error.found}: {text.strip():.40}",
            source=source,
            place=f"line {number}",
            expected=example,
        ) from error
    return validate(kind, values, source=source, part=f"line {number}")


#: What was expected, by the type of pydantic's error.
_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "a non-empty text",
    "string_type": "a text",
    "string_unicode": "text that UTF-8 can hold",
    "too_long": "at most {max_length}",
    "too_short": "at least {min_length}",
    "tuple_type": "a list",
}
#: So many errors of pydantic are sorted by their place in the file, to report the first.
_MAX_ERRORS = 1_000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
_SHORT.maxdict = _SHORT.maxlist = 3


def short_repr(value: object) -> str:
    """A value for a message, shortened."""
    return spelled(value) if value is None or isinstance(value, bool) else _SHORT.repr(value)


def _input_error(
    kind: type[FormatModel],
    values: Any,
    errors: Sequence[Mapping[str, Any]],
    source: object,
    prefix: str,
    remedy: str,
) -> InputError:
    """The error to report: a wrong format or version, else the first one in the file."""
    ranks: dict[int, dict[Any, int]] = {}
    error = min(
        itertools.islice(errors, _MAX_ERRORS),
        key=lambda e: (
            e["loc"] not in (("format",), ("version",)),
            _position_in_file(values, e["loc"], ranks),
        ),
    )
    context = {
        key: f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else value
        for key, value in error.get("ctx", {}).items()
    }
    at = tuple(part for part in error["loc"] if part != "[key]")
    found, what = short_repr(error["input"]), error["type"]
    expected = _EXPECTED[what].format_map(context) if what in _EXPECTED else error["msg"]
    if what == "refused":
        at += tuple(error["ctx"][f"at{number}"] for number in range(len(context) - 2))
        found, expected = context["found"], context["expected"]
    elif what == "missing" and isinstance(at[-1], int):
        at, expected = at[:-1], f"at least {at[-1] + 1}"
        found = f"{len(error['input'])} entries"
    elif what == "missing":
        at = at[:-1]
        names = [
            short_repr(e["loc"][-1]) for e in errors if (e["type"], e["loc"][:-1]) == (what, at)
        ]
        one = len(names) == 1
        found = f"key {names[0]} is missing" if one else f"keys {', '.join(names)} are missing"
        expected = ""
    elif what == "extra_forbidden":
        at = at[:-1]
        known = _keys(_part_at(kind, at))
        name = str(error["loc"][-1])
        found = f"unknown key {short_repr(name)}{did_you_mean(name, known)}"
        expected = f"one of {', '.join(known)}"
    elif what in ("too_long", "too_short"):
        found = f"{len(error['input']):,} entries"
    elif what == "string_too_long":
        found = f"a text of {len(error['input']):,} characters"
    elif what in ("model_type", "dict_type"):
        expected = kind.WORD
    elif what == "list_type" and issubclass(_part_at(kind, at) or FormatModel, TomlTable):
        expected = f"tables, each written as [[{_place(at)}]]"
    if at == ("version",):
        newest = error.get("ctx", {}).get("le", 1)
        expected = "1" if newest == 1 else f"at most {newest}"
        remedy = "a newer file needs a newer prism-plan"
    elif at != ("format",) and not (at == () and what in ("missing", "model_type")):
        remedy = ""
    place = ": ".join(part for part in (prefix, _place(at)) if part)
    return InputError(found, source=source, place=place, expected=expected, remedy=remedy)


def _position_in_file(
    values: Any, location: Sequence[Any], ranks: dict[int, dict[Any, int]]
) -> list[int]:
    """Sort key of a place: the index of the key or entry on each level; missing keys last."""
    found = []
    for part in location:
        if isinstance(values, Mapping):
            if id(values) not in ranks:
                ranks[id(values)] = {key: number for number, key in enumerate(values)}
            found.append(ranks[id(values)].get(part, len(values)))
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int):
            found.append(part)
            values = values[part] if part < len(values) else None
    return found


def _place(location: Sequence[str | int]) -> str:
    """A place as text, such as ``server[1].gpu[0].memory_gb``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _keys(part: type[FormatModel] | None) -> list[str]:
    fields = part.model_fields if part else {}
    return [field.alias or name for name, field in fields.items()]


def _part_at(kind: type[FormatModel], location: Sequence[str | int]) -> type[FormatModel] | None:
    """The model of the part of a file at a place; of a list, that of its entries."""
    part: type[FormatModel] | None = kind
    for key in location:
        if part and key in (keys := _keys(part)):
            field = list(part.model_fields.values())[keys.index(str(key))]
            part = next(_parts(field.annotation), None)
    return part


def _parts(annotation: Any) -> Iterator[type[FormatModel]]:
    if isinstance(annotation, type) and issubclass(annotation, FormatModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
