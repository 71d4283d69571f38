"""``prism-plan profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.model import ModelSpec
    from prism_plan.profiling.hf import HfOptions
    from prism_plan.profiling.sources import Source
    from prism_plan.trace import Trace

#: Formats, and the model that a recording of each is of unless --model says otherwise.
DEFAULT_MODEL = {
    "hf": None,
    "esft": "deepseek-v2-lite",
    "counts": None,
    "sglang": None,
    "vllm": None,
    "trtllm": None,
}


@click.command("profile")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(DEFAULT_MODEL)),
    default="hf",
    show_default=True,
    help="hf: run a checkpoint on --prompts. esft: folders of expert_weights_LAYER.txt. counts: "
    "CSV of task, layer, expert, count. sglang, vllm, trtllm: what these engines record.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="Model that was recorded: a preset (mixtral-8x7b, deepseek-v3, qwen3-30b-a3b, ...), a "
    "checkpoint folder or hub id, a .gguf file, a config.json or a spec file. Default for esft: "
    "deepseek-v2-lite; for hf: the checkpoint's own.",
)
@click.option(
    "--weights/--no-weights",
    default=None,
    help="Keep gate weights (hf, esft).  [default: esft keeps them]",
)
@click.option(
    "--tokens",
    multiple=True,
    metavar="TASK=N",
    help="True number of tokens of a task (counts); default: calls of a layer / top-k.",
)
@click.option("--prompts", metavar="FILE.jsonl", help='hf: lines {"prompt": ..., "task": ...}.')
@click.option("--max-new-tokens", default=32, show_default=True, help="hf: 0 for prompts alone.")
@click.option("--batch-size", default=8, show_default=True, help="hf: prompts run together.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="hf: of the weights; auto is the checkpoint's own.",
)
@click.option("--device", default="auto", show_default=True, help="hf: auto, cpu, cuda:0, ...")
@click.option("--resume", is_flag=True, help="hf: go on with a partial trace at the output.")
@click.option("--trust-remote-code", is_flag=True, help="hf: run code that the checkpoint brings.")
@click.option("-o", "--output", required=True, metavar="T.parquet", help="Trace to write.")
def command(
    sources: tuple[str, ...],
    form: str,
    model: str | None,
    weights: bool | None,
    tokens: tuple[str, ...],
    prompts: str | None,
    max_new_tokens: int,
    batch_size: int,
    dtype: str,
    device: str,
    resume: bool,
    trust_remote_code: bool,
    output: str,
) -> None:
    """Run a checkpoint, or read recordings of a model's routing, into a trace.

    SOURCE is a checkpoint folder or hub id (hf), or a file or folder; TASK=SOURCE labels a
    recording with its task. Several recordings make one trace.
    """
    import dataclasses

    from prism_plan.cli.console import note
    from prism_plan.cli.inputs import writable
    from prism_plan.io.trace_writer import write_trace
    from prism_plan.model import load_model
    from prism_plan.profiling.sources import parse_source
    from prism_plan.provenance import stamped

    if output == "-":
        raise InputError("-", source="--output", expected="a file, for a trace is Parquet")
    if form == "hf":
        from prism_plan.profiling.hf import HfOptions

        options = HfOptions(
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            weights=bool(weights),
            trust_remote_code=trust_remote_code,
        )
        if len(sources) != 1 or tokens or prompts is None:
            raise InputError(
                "profile --format hf",
                expected="one checkpoint, and --prompts FILE.jsonl; no --tokens",
                remedy="for a recording say what it is with --format",
            )
        _run_checkpoint(sources[0], prompts, output, options, model, resume)
        return
    if prompts is not None or resume or trust_remote_code:
        raise InputError(
            f"given with --format {form}",
            source="--prompts, --resume or --trust-remote-code",
            expected="only with --format hf",
        )
    reference = model or DEFAULT_MODEL[form]
    if reference is None:
        raise InputError(
            "not given", source="--model", expected=f"the model that was recorded, for {form}"
        )
    spec = load_model(reference)
    parsed = [parse_source(source) for source in sources]
    writable(output, model, *(str(source.path) for source in parsed))
    kept = True if weights is None else weights
    trace = _read(form, parsed, spec, weights=kept, tokens=_numbers(tokens))
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
    if tokens:
        raise InputError("given", source="--tokens", expected="only with --format counts")
    if form == "sglang":
        from prism_plan.profiling.sglang import read_sglang

        return read_sglang(sources, spec, notify=note)
    if form == "vllm":
        from prism_plan.profiling.vllm import read_vllm

        return read_vllm(sources, spec, notify=note)
    if form == "trtllm":
        from prism_plan.profiling.trtllm import read_trtllm

        return read_trtllm(sources, spec, notify=note)
    from prism_plan.profiling.esft import read_esft

    with progress(len(sources) * spec.num_layers, "files") as update:
        return read_esft(sources, spec, weights=weights, progress=update)


def _run_checkpoint(
    checkpoint: str,
    prompts: str,
    output: str,
    options: HfOptions,
    model: str | None,
    resume: bool,
) -> None:
    import time

    from prism_plan.cli.console import note, progress
    from prism_plan.cli.inputs import writable
    from prism_plan.model import load_model
    from prism_plan.profiling.hf import profile_checkpoint

    writable(output, prompts, checkpoint, model)
    spec = None if model is None else load_model(model)
    begin = time.perf_counter()
    recorded = 0
    with progress(1, "prompts") as update:

        def tell(done: int, total: int, tokens: int) -> None:
            nonlocal recorded
            recorded = tokens
            rate = tokens / max(time.perf_counter() - begin, 1e-9)
            update(f"profiling, {rate:,.0f} tokens/s", done, total)

        profile_checkpoint(
            checkpoint,
            prompts,
            output,
            options,
            spec=spec,
            resume=resume,
            progress=tell,
            notify=note,
        )
    rate = recorded / (time.perf_counter() - begin)
    note(f"{output}: {recorded:,} tokens recorded, {rate:,.0f} tokens/s with loading")


def _numbers(texts: tuple[str, ...]) -> dict[str, int]:
    numbers = {}
    for text in texts:
        task, _, value = text.rpartition("=")
        digits = value.isascii() and value.isdigit() and len(value) < 16
        if not task or not digits or not int(value):
            raise InputError(f"{text!r:.60}", source="--tokens", expected="TASK=N, N at least 1")
        numbers[task] = int(value)
    return numbers
