"""The name of the model that a checkpoint folder or hub id holds."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: A commit of a repository, by which the hub's cache names the folder of a snapshot.
_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_name(folder: str | os.PathLike[str]) -> str:
    """The name of the model whose checkpoint lies in ``folder``.

    In the hub's cache (``models--ORG--NAME/snapshots/COMMIT``) it is the repository's NAME, so
    that a model has one name however it is given. A snapshot outside of such a cache is named
    after the folder that holds ``snapshots``, any other checkpoint after its own folder (links and
    relative paths are resolved). Empty for a root folder.
    """
    absolute, resolved = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))
    repository = cached_repository(absolute) or cached_repository(resolved)
    if repository:
        return repository
    if resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name):
        return resolved.parent.parent.name or resolved.name
    return resolved.name


def checkpoint_name(checkpoint: str) -> str:
    """The name of the model of a checkpoint, given as a folder or a hub id ``ORG/NAME``."""
    if os.path.isdir(checkpoint):
        return model_name(checkpoint)
    return cached_repository(Path(os.path.abspath(checkpoint))) or Path(checkpoint).name


def cached_repository(folder: Path) -> str:
    """The NAME of ``models--ORG--NAME`` for one of its folders; empty for other folders.

    ``folder`` is an absolute path: the folder of a snapshot, or that of all blobs.
    """
    owner = folder.parent if folder.name == "blobs" else folder.parent.parent
    if folder.name != "blobs" and folder.parent.name != "snapshots":
        return ""
    kind, _, repository = owner.name.partition("--")
    # Names of organisations and repositories hold no double hyphen.
    return repository.rpartition("--")[2] if kind == "models" else ""
