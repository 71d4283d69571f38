"""``prism-plan profile``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from prism_plan.cli.command_options import CommandOptions, options_as
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.model import ModelSpec
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
    """What ``prism-plan profile`` is given."""

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
@click.option("--resume", is_flag=True, help="hf: go on with a partial trace at the output.")
@click.option("--trust-remote-code", is_flag=True, help="hf: run code that the checkpoint brings.")
@click.option("-o", "--output", required=True, metavar="T.parquet", help="Trace to write.")
@options_as(ProfileOptions)
def command(given: ProfileOptions) -> None:
    """Run a checkpoint, or read recordings of a model's routing, into a trace.

    SOURCE is a checkpoint folder or hub id (hf), or a file or folder; TASK=SOURCE labels a
    recording with its task. Several recordings make one trace; those of one label are parts of
    one task.
    """
    import dataclasses

    from prism_plan.cli.console import note
    from prism_plan.cli.inputs import load_spec, writable
    from prism_plan.io.trace_writer import write_trace
    from prism_plan.profiling.sources import parse_source
    from prism_plan.provenance import stamped
    from prism_plan.text import quantity

    if given.form == "hf":
        _run_checkpoint(given)
        return
    reference = given.model or DEFAULT_MODEL[given.form]
    if reference is None:
        raise InputError(
            "not given",
            parameter="model",
            expected=f"the model that was recorded, for {given.form}",
        )
    spec = load_spec(reference)
    sources = [parse_source(source) for source in given.sources]
    writable(given.output, given.model, *(str(source.path) for source in sources))
    trace = _read(sources, spec, given)
    write_trace(given.output, dataclasses.replace(trace, provenance=stamped(trace.provenance)))
    requests = (
        "" if trace.requests is None else f"{quantity(int(trace.requests.sum()), 'request')}, "
    )
    note(
        f"{given.output}: {trace.kind} of {spec.name}, {quantity(len(trace.tasks), 'task')}, "
        f"{requests}{quantity(int(trace.tokens.sum()), 'token')}"
    )


def _read(sources: list[Source], spec: ModelSpec, given: ProfileOptions) -> Trace:
    from prism_plan.cli.console import note, progress

    skip_bad = given.skip_bad
    if given.form == "counts":
        from prism_plan.profiling.counts_csv import read_counts

        tokens = _numbers(given.tokens)
        return read_counts(sources, spec, tokens=tokens, skip_bad=skip_bad, notify=note)
    if given.form == "sglang":
        from prism_plan.profiling.sglang.reader import read_sglang

        return read_sglang(sources, spec, skip_bad=skip_bad, notify=note)
    if given.form == "selections":
        from prism_plan.profiling.selections.reader import read_selections

        return read_selections(sources, spec, skip_bad=skip_bad, notify=note)
    if given.form == "vllm":
        from prism_plan.profiling.vllm.reader import read_vllm

        return read_vllm(sources, spec, skip_bad=skip_bad, notify=note)
    if given.form in ("trtllm", "imatrix") and skip_bad:
        from prism_plan.io.bad_rows import no_rows

        raise no_rows(sources[0].path)
    if given.form == "imatrix":
        from prism_plan.profiling.imatrix import read_imatrix

        return read_imatrix(sources, spec, notify=note)
    if given.form == "trtllm":
        from prism_plan.profiling.trtllm import read_trtllm

        return read_trtllm(sources, spec, notify=note)
    from prism_plan.profiling.esft import read_esft

    weights = given.weights is not False
    with progress(len(sources) * spec.num_layers, "files") as update:
        return read_esft(
            sources, spec, weights=weights, skip_bad=skip_bad, progress=update, notify=note
        )


def _run_checkpoint(given: ProfileOptions) -> None:
    import time

    from prism_plan.cli.console import note, progress
    from prism_plan.cli.inputs import load_spec, writable
    from prism_plan.profiling.recording.checkpoint_run import profile_checkpoint
    from prism_plan.profiling.recording.hf_options import HfOptions

    options = HfOptions(
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size,
        dtype=given.dtype,
        device=given.device,
        weights=bool(given.weights),
        trust_remote_code=given.trust_remote_code,
    )
    (checkpoint,) = given.sources
    assert given.prompts is not None
    writable(given.output, given.prompts, checkpoint, given.model)
    spec = None if given.model is None else load_spec(given.model)
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
            given.prompts,
            given.output,
            options,
            spec=spec,
            resume=given.resume,
            progress=tell,
            notify=note,
        )
    rate = recorded / (time.perf_counter() - begin)
    note(f"{given.output}: {recorded:,} tokens recorded, {rate:,.0f} tokens/s with loading")


def _numbers(texts: tuple[str, ...]) -> dict[str, int]:
    numbers = {}
    for text in texts:
        task, _, value = text.rpartition("=")
        digits = value.isascii() and value.isdigit() and len(value) < 16
        if not task or not digits or not int(value):
            raise InputError(f"{text!r:.60}", parameter="tokens", expected="TASK=N, N at least 1")
        numbers[task] = int(value)
    return numbers
