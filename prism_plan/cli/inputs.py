"""What several commands read and check first, with errors that name the file or option."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prism_plan.cli.console import log_info
from prism_plan.errors import Infeasible, InputError

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.evaluate.simulation_options import SimulationOptions
    from prism_plan.model_spec import ModelSpec
    from prism_plan.placement import InputFile, Placement
    from prism_plan.trace import Trace


#: Of exports, in the order of the documentation.
ENGINES = (
    "llamacpp", "vllm-pp", "sglang-pp", "trtllm-pp", "sglang", "vllm-ascend", "trtllm"
)  # fmt: skip


def load_cluster(path: str) -> tuple[Cluster, InputFile]:
    """Read a cluster file once; gives the cluster and the identity of the bytes that were read."""
    from prism_plan.io.cluster import parse_cluster
    from prism_plan.io.text_files import file_name_text, read_text_and_digest
    from prism_plan.placement import InputFile

    text, digest = read_text_and_digest(path)
    if text.lstrip().startswith("{"):
        raise InputError("is a JSON file", source=path, expected="a cluster, which is a TOML file")
    return parse_cluster(text, source=path), InputFile(file_name_text(path), digest)


def read_model_spec(reference: str) -> ModelSpec:
    """The sizes of the model that ``--model`` names."""
    from prism_plan.sizes.load import load_model_spec

    with error_parameter("model"):
        return load_model_spec(reference)


@contextlib.contextmanager
def error_source(path: str) -> Iterator[None]:
    """Errors in the block that name no file and no parameter come from ``path``."""
    try:
        yield
    except (InputError, Infeasible) as error:
        raise error.within(path) from error


@contextlib.contextmanager
def error_parameter(parameter: str) -> Iterator[None]:
    """Errors in the block that name no file and no parameter are about this parameter."""
    try:
        yield
    except InputError as error:
        raise error.within(parameter=parameter) from error


def parse_solver_names(text: str | None) -> list[str] | None:
    """The solvers of a list with commas, none for ``""``; ``None`` where there is no list.

    Raises
    ------
    InputError
        An unknown solver, or commas alone.
    """
    from prism_plan.solvers.registry import ALL_SOLVERS, get_solver

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text.strip() and not names:
        raise InputError(
            f"{text!r:.60} names no solver",
            parameter="solvers",
            expected=f"some of {', '.join(ALL_SOLVERS)}",
        )
    with error_parameter("solvers"):
        for name in names:
            get_solver(name)
    return names


def log_planned_on_scored_requests(
    placements: Sequence[tuple[str, Placement]], trace: Trace, holdout: float | None
) -> None:
    """Log which placements were planned on the whole trace, held-out requests included."""
    if holdout is None:
        return
    seen = [
        name
        for name, placement in placements
        if trace.sha256 and getattr(placement.inputs.get("trace"), "sha256", "") == trace.sha256
    ]
    if seen:
        log_info(
            f"{', '.join(seen)}: planned on all of {trace.name}, so on the requests that --holdout "
            "holds out too; compare such figures with no others"
        )


def trace_identity(trace: Trace) -> InputFile:
    """Name and digest of the trace that a placement is planned from."""
    from prism_plan.placement import InputFile

    return InputFile(trace.name, trace.sha256)


def require_writable_output(output: str | None, *inputs: str | None) -> None:
    """Fail before long work where the output cannot be written, or is one of the inputs."""
    from prism_plan.io.file_writing import require_not_an_input, require_writable

    if output == "":
        raise InputError("empty", parameter="output", expected="the name of a file")
    if output is not None and output != "-":
        require_writable(output)
        require_not_an_input(output, [path for path in inputs if path is not None])


def require_distinct_outputs(*outputs: str | None) -> None:
    """Refuse the same file, by whatever name, as two outputs of a command."""
    found: dict[str, str] = {}
    for output in outputs:
        if output is None or output == "-":
            continue
        if (before := found.setdefault(os.path.realpath(output), output)) is not output:
            raise InputError(
                f"{output!r:.200} is given for two outputs",
                source=before,
                expected="a file for each",
            )


def log_assumed_figures(
    path: str, cluster: Cluster, *, log: Callable[[str], None] = log_info, **uses: bool
) -> None:
    """Name the figures that a command uses and the cluster file does not give.

    ``uses`` as in :func:`prism_plan.assumed_figures.assumed_texts`.
    """
    from prism_plan.check.assumed_figures import assumed_figures

    if text := assumed_figures(cluster, **uses):
        log(f"{path}: {text}")


def log_few_requests(trace: Trace, cluster: Cluster, source: str) -> None:
    """Say where the trace has too few requests for what is said about mean times.

    ``trace`` is what times are planned or simulated with, of the file ``source``.
    """
    from prism_plan.evaluate.few_requests import few_requests

    if text := few_requests(trace, cluster):
        log_info(f"{source}: {text}")


def log_assumed_simulation_figures(
    path: str, cluster: Cluster, options: SimulationOptions, offload: Sequence[bool]
) -> None:
    """Name the figures that a simulation uses and neither cluster nor calibration gives.

    ``offload`` says of each placement whether it is the baseline, which uses no links.
    """
    calibration = options.calibration
    log_assumed_figures(
        path,
        cluster if calibration is None else calibration.with_links(cluster),
        compute=calibration is None,
        loads=any(offload) or options.migrate != "never",
        links=not all(offload),
    )
