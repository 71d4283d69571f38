"""What the readers and writers of our JSON files share: shipped schemas, checks, spelling."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from prism_plan.errors import InputError
from prism_plan.limits import MAX_CHECKED_VALUES, require_at_most, require_name


def shipped_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) ``schemas/<name>.json`` of the package."""
    text = (files("prism_plan") / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


#: Numbers beyond it are no counts, and other readers of JSON would change them.
_MOST_COUNT = 2**63
#: What a schema calls a type, for a reader.
_TYPES = {"integer": "a whole number", "number": "a finite number", "boolean": "true or false"}


def check_format(values: Any, form: str, version: int, *, source: object, remedy: str) -> None:
    """Refuse what is not a file of this format and version.

    Raises
    ------
    InputError
        No object, another format (``remedy`` says how such files are made), a newer version.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{values!r:.60}", source=source, expected="an object")
    if values.get("format") != form:
        raise InputError(
            f"{values.get('format')!r:.60}",
            source=source,
            place="format",
            expected=repr(form),
            remedy=remedy,
        )
    found = values.get("version")
    if found != version or isinstance(found, bool):
        raise InputError(
            f"{found!r:.60}",
            source=source,
            place="version",
            expected=str(version),
            remedy="a newer file needs a newer prism-plan",
        )


def check_schema(
    values: Any, schema: Mapping[str, Any], *, source: object, place: str = ""
) -> None:
    """Refuse values that the schema does not allow; ``place`` is where they stand in the file.

    Raises
    ------
    InputError
        Names the place and the value of the first error.
    """
    import jsonschema

    require_few_values(values, source, place)
    validator = jsonschema.Draft202012Validator(schema)
    errors = itertools.islice(validator.iter_errors(values), _MAX_ERRORS)
    error = min(errors, key=lambda e: list(map(str, e.path)), default=None)
    if error is not None:
        for part in error.absolute_path:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        raise InputError(_plain(error), source=source, place=place)


def check_strictly(values: Any, schema: Mapping[str, Any], *, source: object) -> None:
    """Refuse what the schema does not allow, 2.0 as an integer and 1e999 as a number too.

    Raises
    ------
    InputError
        Names the place and the value of the first error.
    """
    import jsonschema

    require_few_values(values, source)
    base = jsonschema.Draft202012Validator
    types = base.TYPE_CHECKER.redefine_many(
        {"integer": lambda _, value: _is_count(value), "number": lambda _, value: _is_number(value)}
    )
    extend = jsonschema.validators.extend
    validator = extend(base, type_checker=types)(schema)  # type: ignore[no-untyped-call]
    error = next(iter(validator.iter_errors(values)), None)
    if error is not None:
        place = ""
        for part in error.absolute_path:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        raise InputError(_plain_strict(error), source=source, place=place)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_COUNT


def _is_number(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, float) and math.isfinite(value))


def _plain_strict(error: Any) -> str:
    """An error of :func:`check_strictly` in one short line."""
    if error.validator in ("required", "additionalProperties"):
        return str(error.message)
    value = repr(error.instance)
    value = f"{value[:50]}…" if len(value) > 60 else value
    wanted = error.validator_value
    if error.validator == "type":
        kinds = wanted if isinstance(wanted, list) else [wanted]
        return f"{value}; expected {' or '.join(_TYPES.get(kind, str(kind)) for kind in kinds)}"
    if error.validator == "enum":
        return f"{value}; expected {' or '.join(map(repr, wanted))}"
    if error.validator == "oneOf":  # only the quantiles of simulations have a choice
        return f"{len(error.instance)} numbers; expected 101, or none"
    words = {
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMinimum": "more than",
        "exclusiveMaximum": "less than",
    }
    return f"{value}; expected {words.get(str(error.validator), error.validator)} {wanted!r}"


#: Of more errors than this the first in the file may not be the one that is told.
_MAX_ERRORS = 1_000


def require_few_values(values: Any, source: object, place: str = "") -> None:
    """Refuse more values than a schema is checked with in some seconds."""
    number = 0
    level = [values]
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, list | dict):
                number += len(value)
                inner.extend(
                    one
                    for one in (value.values() if isinstance(value, dict) else value)
                    if isinstance(one, list | dict)
                )
        require_at_most(number, MAX_CHECKED_VALUES, "values", source=source, place=place)
        level = inner


def different_names(names: Sequence[str], source: object) -> None:
    """Refuse servers of one name, and names that are too long.

    Raises
    ------
    InputError
        Names the server.
    """
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        require_name(name, source=source, place=f"servers[{index}].name")
        if first.setdefault(name, index) != index:
            raise InputError(
                f"name {name!r} is taken by servers[{first[name]}]",
                source=source,
                place=f"servers[{index}].name",
                expected="different names",
            )


def _plain(error: Any) -> str:
    """A schema error in one short line."""
    value = repr(error.instance)
    if len(value) > 60:
        value = f"{value[:50]}…"
    if error.validator == "type":
        kinds = error.validator_value
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return f"{value}; expected {' or '.join(kinds)}"
    if error.validator in ("required", "additionalProperties", "propertyNames"):
        return str(error.message)
    if error.validator == "oneOf" and "gpus" in list(error.absolute_path):
        return "expected either 'slots' or 'bytes'"
    if error.validator == "oneOf":
        return f"{value}; expected a whole number of at least 1, or a list of them"
    return f"{value}; expected {error.validator} {error.validator_value!r}"


def check_numbers(
    values: Any, *, source: object, fraction: Callable[[str], bool], place: str = ""
) -> None:
    """JSON can spell 1e999, and 2.0 where a schema says integer.

    ``fraction`` tells of a place whether a number with a point may stand there.

    Raises
    ------
    InputError
        Names the place and the number.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            inner = f"{place}.{key}" if place else str(key)
            check_numbers(value, source=source, fraction=fraction, place=inner)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            inner = f"{place}[{index}]"
            check_numbers(value, source=source, fraction=fraction, place=inner)
    elif isinstance(values, float) and not math.isfinite(values):
        raise InputError(f"{values}", source=source, place=place, expected="a finite number")
    elif isinstance(values, float) and not fraction(place):
        raise InputError(f"{values}", source=source, place=place, expected="a whole number")
    elif isinstance(values, int) and not isinstance(values, bool) and abs(values) >= 2**63:
        raise InputError(f"{values}", source=source, place=place, expected="below 2**63")


_NUMBERS = re.compile(r"\[\s+(\d+(?:,\s+\d+)*)\s+\]")


def indented(values: Any) -> str:
    """JSON text, indented by one, each list of whole numbers on one line."""
    text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: "[" + re.sub(r"\s+", "", found.group(1)) + "]", text)
