"""Parses JSON that other processes of a run have written."""

from __future__ import annotations

from typing import Any

from prism_plan.errors import InputError
from prism_plan.io.json import parse_json


def parse_value(raw: bytes, key: str) -> Any:
    """Parse the JSON that the store holds under a key.

    Raises
    ------
    InputError
        It is not JSON.
    """
    source = f"the run's store: {key}"
    try:
        return parse_json(raw.decode(), source)
    except UnicodeDecodeError as error:
        raise InputError("not JSON: bytes that are no UTF-8", source=source) from error
    except InputError as error:  # its remedy is one for files
        raise InputError(error.found, source=source, place=error.place) from error
