"""Refuse releases of transformers that recording does not support."""

from __future__ import annotations

from prism_plan.io.location import Location

EXTRA = "pip install 'prism-plan[hf]'"
#: In 4 experts modules are not called with ids; 6 was not examined.
MAJOR = 5


def require_transformers() -> None:
    """Refuse a missing transformers, and releases that are not supported.

    Raises
    ------
    InputError
        Names what is installed and what is expected.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Location("transformers").error(
            f"{error.name or error} is not installed", remedy=EXTRA
        ) from error
    version = transformers.__version__
    if int(version.split(".")[0]) != MAJOR:
        raise Location("transformers").error(version, f"a release {MAJOR}.x", EXTRA)
    del torch
