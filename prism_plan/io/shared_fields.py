"""Parts that several JSON formats share, and the JSON Schemas that the package ships."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any, Protocol

from pydantic import Field

from prism_plan.input_limits import MAX_NAME_LENGTH
from prism_plan.io.pydantic_base import (
    FormatModel,
    short_repr,
    validation_error,
)


class FileIdentity(FormatModel):
    """A file that another one was made from."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def require_distinct_names(servers: Sequence[_Named]) -> Any:
    """A validator that refuses servers of one name, and names that are too long."""
    first: dict[str, int] = {}
    for index, server in enumerate(servers):
        if len(server.name) > MAX_NAME_LENGTH:
            found = f"a name of {len(server.name):,} characters"
            raise validation_error(found, f"at most {MAX_NAME_LENGTH:,}", index, "name")
        if first.setdefault(server.name, index) != index:
            found = f"name {short_repr(server.name)} is taken by servers[{first[server.name]}]"
            raise validation_error(found, "different names", index, "name")
    return servers


def shipped_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) ``schemas/<name>.json`` of the package."""
    text = (files("prism_plan") / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


_NUMBERS = re.compile(r"\[\s+(\d+(?:,\s+\d+)*)\s+\]")


def indented_json(values: Any) -> str:
    """JSON text, indented by one, each list of whole numbers on one line."""
    text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: "[" + re.sub(r"\s+", "", found.group(1)) + "]", text)
