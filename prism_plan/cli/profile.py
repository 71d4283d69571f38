"""``prism-plan profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.model import ModelSpec
    from prism_plan.profiling.sources import Source
    from prism_plan.trace import Trace

#: Formats, and the model that a recording of each is of unless --model says otherwise.
DEFAULT_MODEL = {"esft": "deepseek-v2-lite", "counts": None}


@click.command("profile")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(DEFAULT_MODEL)),
    required=True,
    help="esft: folders of expert_weights_LAYER.txt, token by token. "
    "counts: CSV of task, layer, expert, count.",
)
@click.option(
    "--model",
    metavar="PRESET|config.json",
    help="Model that was recorded: a preset (mixtral-8x7b, deepseek-v2-lite), or a Hugging Face "
    "config.json. Default for esft: deepseek-v2-lite.",
)
@click.option(
    "--weights/--no-weights", default=True, help="Keep gate weights (esft).  [default: keep]"
)
@click.option(
    "--tokens",
    multiple=True,
    metavar="TASK=N",
    help="True number of tokens of a task (counts); default: calls of a layer / top-k.",
)
@click.option("-o", "--output", required=True, metavar="T.parquet", help="Trace to write.")
def command(
    sources: tuple[str, ...],
    form: str,
    model: str | None,
    weights: bool,
    tokens: tuple[str, ...],
    output: str,
) -> None:
    """Turn recordings of a model's routing into a trace.

    SOURCE is a file or folder; TASK=SOURCE labels one with the task that it records. Several
    sources make one trace.
    """
    import dataclasses

    from prism_plan.cli.console import note
    from prism_plan.cli.inputs import writable
    from prism_plan.model import load_model
    from prism_plan.profiling.sources import parse_source
    from prism_plan.provenance import stamped
    from prism_plan.trace_file import write_trace

    reference = model or DEFAULT_MODEL[form]
    if reference is None:
        raise InputError(
            "not given", source="--model", expected=f"the model that was recorded, for {form}"
        )
    if output == "-":
        raise InputError("-", source="--output", expected="a file, for a trace is Parquet")
    spec = load_model(reference)
    parsed = [parse_source(source) for source in sources]
    writable(output, model, *(str(source.path) for source in parsed))
    trace = _read(form, parsed, spec, weights=weights, tokens=_numbers(tokens))
    write_trace(output, dataclasses.replace(trace, provenance=stamped(trace.provenance)))
    requests = "" if trace.requests is None else f"{int(trace.requests.sum()):,} requests, "
    note(
        f"{output}: {trace.kind} of {spec.name}, {len(trace.tasks)} tasks, {requests}"
        f"{int(trace.tokens.sum()):,} tokens"
    )


def _read(
    form: str,
    sources: list[Source],
    spec: ModelSpec,
    *,
    weights: bool,
    tokens: dict[str, int],
) -> Trace:
    from prism_plan.cli.console import note, progress

    if form == "counts":
        from prism_plan.profiling.counts import read_counts

        return read_counts(sources, spec, tokens=tokens, notify=note)
    from prism_plan.profiling.esft import read_esft

    if tokens:
        raise InputError("given", source="--tokens", expected="only with --format counts")
    with progress(len(sources) * spec.num_layers, "files") as update:
        return read_esft(sources, spec, weights=weights, progress=update)


def _numbers(texts: tuple[str, ...]) -> dict[str, int]:
    numbers = {}
    for text in texts:
        task, _, value = text.rpartition("=")
        digits = value.isascii() and value.isdigit() and len(value) < 16
        if not task or not digits or not int(value):
            raise InputError(f"{text!r:.60}", source="--tokens", expected="TASK=N, N at least 1")
        numbers[task] = int(value)
    return numbers
