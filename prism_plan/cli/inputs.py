"""Reading a cluster, and errors about it that name its file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prism_plan.errors import InputError
from prism_plan.files import sha256

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.placement import InputFile
    from prism_plan.trace import Trace


def load_cluster(path: str) -> Cluster:
    """Read a cluster file."""
    from prism_plan.cluster_file import read_cluster

    return read_cluster(path)


@contextlib.contextmanager
def blaming(path: str) -> Iterator[None]:
    """Errors in the block that name no file come from ``path``."""
    try:
        yield
    except InputError as error:
        raise error.within(path) from error


def input_files(trace: Trace, cluster_path: str) -> dict[str, InputFile]:
    """Names and digests of what a placement is planned from."""
    from prism_plan.placement import InputFile

    return {
        "trace": InputFile(trace.name, trace.sha256),
        "cluster": InputFile(Path(cluster_path).name, sha256(cluster_path)),
    }
