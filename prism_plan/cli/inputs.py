"""Reading a cluster, and errors about it that name its file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prism_plan.errors import Infeasible, InputError

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.model import ModelSpec
    from prism_plan.placement import InputFile, Placement
    from prism_plan.trace import Trace


def load_cluster(path: str) -> tuple[Cluster, InputFile]:
    """Read a cluster file once, and tell what was read."""
    from prism_plan.io.cluster import parse_cluster
    from prism_plan.io.files import printable, read_identified
    from prism_plan.placement import InputFile

    text, digest = read_identified(path)
    if text.lstrip().startswith("{"):
        raise InputError("is a JSON file", source=path, expected="a cluster, which is a TOML file")
    return parse_cluster(text, source=path), InputFile(printable(path), digest)


def load_spec(reference: str) -> ModelSpec:
    """The sizes of the model that ``--model`` names."""
    from prism_plan.sizes.load import load_model_spec

    with about("model"):
        return load_model_spec(reference)


@contextlib.contextmanager
def blaming(path: str) -> Iterator[None]:
    """Errors in the block that name no file and no parameter come from ``path``."""
    try:
        yield
    except (InputError, Infeasible) as error:
        raise error.within(path) from error


@contextlib.contextmanager
def about(parameter: str) -> Iterator[None]:
    """Errors in the block that name no file and no parameter are about this parameter."""
    try:
        yield
    except InputError as error:
        raise error.within(parameter=parameter) from error


def solver_names(text: str | None) -> list[str] | None:
    """The solvers of a list with commas, none for ``""``; ``None`` where there is no list.

    Raises
    ------
    InputError
        An unknown solver, or commas alone.
    """
    from prism_plan.solvers.registry import SOLVER_NAMES, get_solver

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text.strip() and not names:
        raise InputError(
            f"{text!r:.60} names no solver",
            parameter="solvers",
            expected=f"some of {', '.join(SOLVER_NAMES)}",
        )
    with about("solvers"):
        for name in names:
            get_solver(name)
    return names


def note_seen_requests(
    placements: Sequence[tuple[str, Placement]], trace: Trace, holdout: float | None
) -> None:
    """Say of placements that were planned on the whole trace that they know what is held out."""
    from prism_plan.cli.console import note

    if holdout is None:
        return
    seen = [
        name
        for name, placement in placements
        if trace.sha256 and getattr(placement.inputs.get("trace"), "sha256", "") == trace.sha256
    ]
    if seen:
        note(
            f"{', '.join(seen)}: planned on all of {trace.name}, so on the requests that --holdout "
            "holds out too; compare such figures with no others"
        )


def trace_file(trace: Trace) -> InputFile:
    """Name and digest of the trace that a placement is planned from."""
    from prism_plan.placement import InputFile

    return InputFile(trace.name, trace.sha256)


def writable(output: str | None, *inputs: str | None) -> None:
    """Fail before long work where the output cannot be written, or is one of the inputs."""
    from prism_plan.io.files import check_writable, not_over_an_input

    if output == "":
        raise InputError("empty", parameter="output", expected="the name of a file")
    if output is not None and output != "-":
        check_writable(output)
        not_over_an_input(output, [path for path in inputs if path is not None])


def note_assumed(path: str, cluster: Cluster, **uses: bool) -> None:
    """Name the figures that a command uses and the cluster file does not give.

    ``uses`` as in :func:`prism_plan.check.assumed_figures.assumed_figures`.
    """
    from prism_plan.check.assumed_figures import assumed_figures
    from prism_plan.cli.console import note

    text = assumed_figures(cluster, **uses)
    if text:
        note(f"{path}: {text}")
