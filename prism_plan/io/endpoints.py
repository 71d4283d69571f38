"""Endpoint files: where the machines of a cluster are reached, for exports to other engines."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, field_validator

from prism_plan.errors import InputError
from prism_plan.io.pydantic_base import (
    ListOf,
    Name,
    NonEmpty,
    TomlTable,
    validate,
    validation_error,
)
from prism_plan.io.text_files import read_text
from prism_plan.io.toml import parse_toml

Device = Annotated[str, Field(pattern=r"^[A-Za-z]+[0-9]+$", max_length=20)]
Port = Annotated[int, Field(ge=1, le=65535)]
#: What llama.cpp's server for other machines listens on by default.
RPC_PORT = 50052


class EndpointTable(TomlTable):
    """How one server is reached."""

    name: Name
    host: Annotated[NonEmpty, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=253)]
    port: Port = Field(default=RPC_PORT, description="Of its first GPU; the next ones follow.")
    devices: ListOf[Device] | None = Field(
        default=None,
        description="Of llama.cpp, by GPU, such as CUDA0: for the head, whose own GPUs need no "
        "network.",
    )

    @field_validator("devices")
    @classmethod
    def _different(cls, devices: list[str] | None) -> list[str] | None:
        for at, device in enumerate(devices or []):
            if device.upper().startswith("RPC") or device in (devices or [])[:at]:
                raise validation_error(repr(device), "names of own GPUs, each once", at)
        return devices


class EndpointsFile(TomlTable):
    """Hosts and ports of servers, by name."""

    server: Annotated[ListOf[EndpointTable], Field(min_length=1)]


def read_endpoints(path: str | os.PathLike[str]) -> dict[str, EndpointTable]:
    """The endpoints of a TOML file by server.

    Raises
    ------
    InputError
        The file is none, or names a server twice.
    """
    found = validate(EndpointsFile, parse_toml(read_text(path), path), source=path)
    by_name = {table.name: table for table in found.server}
    for n, table in enumerate(found.server):
        if by_name[table.name] is not table:
            raise InputError(
                f"{table.name!r} again", source=path, place=f"server[{n}].name",
                expected="each server once",
            )  # fmt: skip
    return by_name
