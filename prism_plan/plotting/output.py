"""Writing figures as PNG, SVG or PDF."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prism_plan.errors import InputError
from prism_plan.io.file_writing import atomic_path
from prism_plan.plotting.style import matplotlib_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Metadata of each kind of file: entries that hold the time are left out, so that bytes repeat.
METADATA: Mapping[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def check_extension(path: str | os.PathLike[str]) -> str:
    """The kind of figure that the extension of ``path`` asks for: "png", "svg" or "pdf".

    Raises
    ------
    InputError
        Another extension.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise InputError(
            f"extension {Path(path).suffix!r}",
            source=path,
            expected=".png, .svg or .pdf",
            remedy="give the file one of these extensions",
        )
    return kind


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, SVG or PDF, which the extension of ``path`` says.

    Raises
    ------
    InputError
        Another extension.
    OutputError
        The file cannot be written; an earlier one at ``path`` is left as it was.
    """
    kind = check_extension(path)
    with atomic_path(path) as temporary, matplotlib_settings():
        figure.savefig(temporary, format=kind, dpi="figure", metadata=dict(METADATA[kind]))
