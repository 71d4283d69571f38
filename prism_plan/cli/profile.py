"""``prism-plan profile``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from prism_plan.cli.options_dataclass import CommandOptions, options_as
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.model_spec import ModelSpec
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
    "imatrix": None,
    "selections": None,
}
#: Options that one format alone has, or two.
_RUN = ("prompts", "max_new_tokens", "batch_size", "dtype", "device", "resume", "trust_remote_code")
OPTIONS_OF = dict.fromkeys(_RUN, ("hf",)) | {"weights": ("hf", "esft"), "tokens": ("counts",)}


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(CommandOptions):
    """The options and arguments of ``prism-plan profile``."""

    sources: tuple[str, ...]
    form: str
    model: str | None
    weights: bool | None
    tokens: tuple[str, ...]
    skip_bad: bool
    prompts: str | None
    max_new_tokens: int
    batch_size: int
    dtype: str
    device: str
    resume: bool
    trust_remote_code: bool
    output: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output == "-":
            raise InputError("-", parameter="output", expected="a file, for a trace is Parquet")
        for name, formats in OPTIONS_OF.items():
            if self.form not in formats:
                self.refuse(name, found=f"has no effect with ``form`` {self.form}")
        if self.form != "hf":
            return
        if self.skip_bad:
            self.refuse("skip_bad", found="a checkpoint has no rows", remedy=_SAY_FORMAT)
        if len(self.sources) != 1:
            raise InputError(
                f"{len(self.sources)} sources", expected="one checkpoint", remedy=_SAY_FORMAT
            )
        if self.prompts is None:
            raise InputError(
                "not given", parameter="prompts", expected="a file of prompts", remedy=_SAY_FORMAT
            )


_SAY_FORMAT = "for a recording say what it is with ``form``"


@click.command("profile")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(DEFAULT_MODEL)),
    default="hf",
    show_default=True,
    help="hf: run a checkpoint on --prompts. esft: folders of expert_weights_LAYER.txt. counts: "
    "CSV of task, layer, expert, count. sglang, vllm, trtllm: what these engines record. imatrix: "
    "GGUF files of llama-imatrix. selections: JSON Lines of one request, token and layer each. "
    "Text may be compressed with gzip.",
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
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave bad rows of a recording out, with a notice of how many and where, in place of "
    "refusing it. A recording whose rows are all bad is refused.",
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
@click.option("--resume", is_flag=True, help="hf: continue with a partial trace at the output.")
@click.option("--trust-remote-code", is_flag=True, help="hf: run code that the checkpoint brings.")
@click.option("-o", "--output", required=True, metavar="T.parquet", help="Trace to write.")
@options_as(ProfileOptions)
def command(args: ProfileOptions) -> None:
    """Run a checkpoint, or read recordings of a model's routing, into a trace.

    SOURCE is a checkpoint folder or hub id (hf), or a file or folder; TASK=SOURCE labels a
    recording with its task. Several recordings make one trace; those of one label are parts of
    one task.
    """
    import dataclasses

    from prism_plan.cli.console import log_info
    from prism_plan.cli.inputs import read_model_spec, require_writable_output
    from prism_plan.io.trace_writer import write_trace
    from prism_plan.printable_text import quantity
    from prism_plan.profiling.sources import parse_source
    from prism_plan.provenance import stamped

    if args.form == "hf":
        _record_checkpoint(args)
        return
    reference = args.model or DEFAULT_MODEL[args.form]
    if reference is None:
        raise InputError(
            "not given",
            parameter="model",
            expected=f"the model that was recorded, for {args.form}",
        )
    spec = read_model_spec(reference)
    sources = [parse_source(source) for source in args.sources]
    require_writable_output(args.output, args.model, *(str(source.path) for source in sources))
    trace = _import_recordings(sources, spec, args)
    write_trace(args.output, dataclasses.replace(trace, provenance=stamped(trace.provenance)))
    requests = (
        "" if trace.requests is None else f"{quantity(int(trace.requests.sum()), 'request')}, "
    )
    log_info(
        f"{args.output}: {trace.kind} of {spec.name}, {quantity(len(trace.tasks), 'task')}, "
        f"{requests}{quantity(int(trace.tokens.sum()), 'token')}"
    )


def _import_recordings(sources: list[Source], spec: ModelSpec, args: ProfileOptions) -> Trace:
    from prism_plan.cli.console import log_info, progress

    skip_bad = args.skip_bad
    if args.form == "counts":
        from prism_plan.profiling.counts_csv import read_counts

        tokens = _parse_token_counts(args.tokens)
        return read_counts(sources, spec, tokens=tokens, skip_bad=skip_bad, notify=log_info)
    if args.form == "sglang":
        from prism_plan.profiling.sglang.importer import read_sglang

        return read_sglang(sources, spec, skip_bad=skip_bad, notify=log_info)
    if args.form == "selections":
        from prism_plan.profiling.selections.importer import read_selections

        return read_selections(sources, spec, skip_bad=skip_bad, notify=log_info)
    if args.form == "vllm":
        from prism_plan.profiling.vllm.importer import read_vllm

        return read_vllm(sources, spec, skip_bad=skip_bad, notify=log_info)
    if args.form in ("trtllm", "imatrix") and skip_bad:
        from prism_plan.io.bad_rows import rows_cannot_be_skipped

        raise rows_cannot_be_skipped(sources[0].path)
    if args.form == "imatrix":
        from prism_plan.profiling.imatrix import read_imatrix

        return read_imatrix(sources, spec, notify=log_info)
    if args.form == "trtllm":
        from prism_plan.profiling.trtllm import read_trtllm

        return read_trtllm(sources, spec, notify=log_info)
    from prism_plan.profiling.esft import read_esft

    weights = args.weights is not False
    with progress(len(sources) * spec.num_layers, "files") as update:
        return read_esft(
            sources, spec, weights=weights, skip_bad=skip_bad, progress=update, notify=log_info
        )


def _record_checkpoint(args: ProfileOptions) -> None:
    import time

    from prism_plan.cli.console import log_info, progress
    from prism_plan.cli.inputs import read_model_spec, require_writable_output
    from prism_plan.profiling.recording.checkpoint_run import profile_checkpoint
    from prism_plan.profiling.recording.hf_options import HfOptions

    options = HfOptions(
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        weights=bool(args.weights),
        trust_remote_code=args.trust_remote_code,
    )
    (checkpoint,) = args.sources
    assert args.prompts is not None
    require_writable_output(args.output, args.prompts, checkpoint, args.model)
    spec = None if args.model is None else read_model_spec(args.model)
    begin = time.perf_counter()
    recorded = 0
    with progress(1, "prompts") as update:

        def report_progress(done: int, total: int, tokens: int) -> None:
            nonlocal recorded
            recorded = tokens
            rate = tokens / max(time.perf_counter() - begin, 1e-9)
            update(f"profiling, {rate:,.0f} tokens/s", done, total)

        profile_checkpoint(
            checkpoint,
            args.prompts,
            args.output,
            options,
            spec=spec,
            resume=args.resume,
            progress=report_progress,
            notify=log_info,
        )
    rate = recorded / (time.perf_counter() - begin)
    log_info(f"{args.output}: {recorded:,} tokens recorded, {rate:,.0f} tokens/s with loading")


def _parse_token_counts(texts: tuple[str, ...]) -> dict[str, int]:
    numbers = {}
    for text in texts:
        task, _, value = text.rpartition("=")
        digits = value.isascii() and value.isdigit() and len(value) < 16
        if not task or not digits or not int(value):
            raise InputError(f"{text!r:.60}", parameter="tokens", expected="TASK=N, N at least 1")
        numbers[task] = int(value)
    return numbers
