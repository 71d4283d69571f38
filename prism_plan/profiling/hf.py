"""Profiling a real checkpoint: prompts in, a token-level trace out.

Needs the extra ``hf`` (transformers 5 and PyTorch). The model runs its own ``generate``; recording
is by the hooks of :mod:`prism_plan.profiling.recorder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError, LimitReached, PrismError
from prism_plan.io.open_file import OpenFile
from prism_plan.io.prompts import Prompt, read_prompts
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import TraceWriter
from prism_plan.limits import require_integer
from prism_plan.model import ModelSpec
from prism_plan.profiling.transformers_release import require_transformers
from prism_plan.provenance import stamped
from prism_plan.trace import TokenBatch, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: New tokens, and prompts of a batch: PyTorch counts both in 32 bits.
MAX_NUMBER = 2**31 - 1
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Interrupted(PrismError):
    """A run was stopped; what it had recorded is kept as a partial trace."""

    exit_code = 130


@dataclass(frozen=True)
class HfOptions:
    """How to run the model.

    ``max_new_tokens`` of 0 records the prompts alone. ``device`` is ``"auto"`` (accelerators with
    ``device_map="auto"`` where there are any, else the CPU) or a PyTorch device.

    Raises
    ------
    InputError
        A number is out of range.
    """

    max_new_tokens: int = 32
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    weights: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_integer(self.max_new_tokens, 0, MAX_NUMBER, "max_new_tokens")
        require_integer(self.batch_size, 1, MAX_NUMBER, "batch_size")
        if self.dtype not in DTYPES:
            raise InputError(f"{self.dtype!r}", parameter="dtype", expected=", ".join(DTYPES))


def profile_checkpoint(
    checkpoint: str,
    prompts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: HfOptions | None = None,
    *,
    spec: ModelSpec | None = None,
    resume: bool = False,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Run a file of prompts through a checkpoint and write the trace of its routing.

    Prompts are taken in order, ``batch_size`` at a time, left-padded; decoding is greedy. Request
    i of the trace is the i-th prompt. Rows are written as they come, so that memory does not grow
    with the number of prompts. Stopped by Ctrl-C the run leaves a valid trace of the batches that
    were done, whose provenance says ``partial``; with ``resume`` it goes on from there.
    ``progress`` is told (prompts done, prompts, tokens recorded). ``spec`` gives the sizes where
    they cannot be read from the checkpoint; its layers, experts and top-k must be the model's.

    Raises
    ------
    InputError
        The checkpoint is missing or gated, has no MoE layers, cannot be recorded, or is not the
        spec's; a line of the prompts is wrong, or longer than the model's context; the trace to go
        on with is of another run.
    OutputError
        The trace cannot be written.
    Interrupted
        Stopped by Ctrl-C; tells what was kept.
    """
    with OpenFile(prompts) as file:
        _profile(checkpoint, file, output, options or HfOptions(), spec, resume, progress, notify)


def _profile(
    checkpoint: str,
    prompts: OpenFile,
    output: str | os.PathLike[str],
    options: HfOptions,
    spec: ModelSpec | None,
    resume: bool,
    progress: Callable[[int, int, int], None],
    notify: Callable[[str], None],
) -> None:
    """:func:`profile_checkpoint` of a file of prompts that is open."""
    require_transformers()
    run = _Run(checkpoint, prompts, options)
    total = sum(1 for _ in read_prompts(prompts))
    earlier = _earlier(output, run) if resume else None
    done = 0 if earlier is None else int(earlier.provenance["prompts_done"])
    spec = checkpoint_spec(checkpoint, options) if spec is None else spec
    tokenizer = load_tokenizer(checkpoint, options)
    model = load_model(checkpoint, options)
    with _quiet():
        _check_lengths(prompts, tokenizer, model, options)
    import torch

    from prism_plan.profiling.recorder import Recorder

    provenance = run.provenance()
    stopped: BaseException | None = None
    with TraceWriter(output, spec, weights=options.weights, provenance=provenance) as writer:
        if earlier is not None:
            _copy(earlier, writer, spec)
            notify(f"going on after {done} of {total} prompts")
        # rows of a batch are written when it is done, or they would be in the trace twice
        # after an interruption and with ``resume``
        pending: list[tuple[TokenBatch, tuple[str, ...]]] = []

        def hold(rows: TokenBatch, tasks: Sequence[str]) -> None:
            pending.append((rows, tuple(tasks)))

        recorder = Recorder(model, spec, hold, weights=options.weights, first_request=done)
        progress(done, total, 0)
        with recorder.attached():
            try:
                for batch in _batches(itertools.islice(read_prompts(prompts), done, None), options):
                    recorder.label([prompt.task for prompt in batch])
                    _generate(model, tokenizer, [prompt.prompt for prompt in batch], options)
                    recorder.flush()
                    for rows, tasks in pending:
                        writer.write(rows, tasks)
                    pending.clear()
                    done += len(batch)
                    progress(done, total, recorder.tokens)
            except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError) as error:
                stopped = error
                if not done and isinstance(error, KeyboardInterrupt):
                    raise
                if not done:
                    raise LimitReached("out of memory; lower ``batch_size``") from error
                writer.provenance |= {"partial": True, "prompts_done": done}
    if stopped is not None:
        kept = f"{output} holds the first {done} of {total} prompts; go on with ``resume``"
        if isinstance(stopped, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {kept}")
        raise LimitReached(f"out of memory; {kept} and a lower ``batch_size``") from stopped


@dataclass(frozen=True)
class _Run:
    """What makes two runs the same, so that one can go on with the other's trace."""

    checkpoint: str
    prompts: OpenFile
    options: HfOptions

    def identity(self) -> dict[str, Any]:
        return {
            "source": "hf",
            "checkpoint": Path(self.checkpoint).name or self.checkpoint,
            "fingerprint": fingerprint(self.checkpoint),
            "prompts": os.path.basename(self.prompts.path),
            "prompts_sha256": self.prompts.sha256(),
            "max_new_tokens": self.options.max_new_tokens,
            "dtype": self.options.dtype,
            "weights": self.options.weights,
        }

    def provenance(self) -> dict[str, Any]:
        import torch
        import transformers

        return stamped(
            {
                **self.identity(),
                "batch_size": self.options.batch_size,
                "transformers": transformers.__version__,
                "torch": torch.__version__.split("+")[0],
            }
        )


#: Of a weight file larger than this many pieces only the pieces are read, evenly spread.
PIECE_BYTES, PIECES = 65_536, 64


def fingerprint(checkpoint: str) -> str:
    """Identity of a checkpoint folder: configuration, and size and samples of each weight file.

    Of a file beyond 4 MiB 64 pieces of 64 KiB are read, so that large models take no minutes. A
    hub id has no fingerprint here and gives an empty text.
    """
    if not os.path.isdir(checkpoint):
        return ""
    found = hashlib.sha256()
    names = [n for n in sorted(os.listdir(checkpoint)) if n.endswith((".safetensors", ".bin"))]
    for name in ("config.json", *names):
        path = os.path.join(checkpoint, name)
        if not os.path.isfile(path):
            continue
        size = os.path.getsize(path)
        found.update(f"{name} {size}\n".encode())
        with open(path, "rb") as stream:
            if size <= PIECE_BYTES * PIECES:
                found.update(stream.read())
                continue
            for piece in range(PIECES):
                stream.seek((size - PIECE_BYTES) * piece // (PIECES - 1))
                found.update(stream.read(PIECE_BYTES))
    return found.hexdigest()


def _earlier(output: str | os.PathLike[str], run: _Run) -> Trace | None:
    """The partial trace of an earlier run at ``output``; none if there is no file."""
    if not os.path.exists(output):
        return None
    trace = read_trace(output)
    for key, value in run.identity().items():
        if trace.provenance.get(key) != value:
            raise InputError(
                f"{key} is {trace.provenance.get(key)!r:.80}",
                source=output,
                place="provenance",
                expected=f"{value!r:.80}, as in this run",
                remedy="``resume`` goes on with the same checkpoint, prompts and options",
            )
    if not trace.provenance.get("partial"):
        raise InputError("is complete", source=output, expected="a partial trace")
    return trace


def _copy(earlier: Trace, writer: TraceWriter, spec: ModelSpec) -> None:
    from prism_plan.model import require_same_model

    require_same_model(earlier.model, spec, source=earlier.name, other="the checkpoint")
    assert earlier.batches is not None
    for batch in earlier.batches():
        writer.write(batch, earlier.tasks)


def _batches(prompts: Iterator[Prompt], options: HfOptions) -> Iterator[list[Prompt]]:
    while batch := list(itertools.islice(prompts, options.batch_size)):
        yield batch


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    options: HfOptions,
) -> None:
    """Run prompts, left-padded, and decode greedily; only what the hooks see is kept."""
    import torch

    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    # the last new token is never fed, so one new token is the prompt alone
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=max(options.max_new_tokens, 1),
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )


def _check_lengths(
    prompts: OpenFile,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    options: HfOptions,
) -> None:
    """Refuse a prompt that does not fit the model's context, before anything is run."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    path = prompts.path
    for prompt in read_prompts(prompts):
        tokens = len(tokenizer(prompt.prompt)["input_ids"])
        place = f"line {prompt.line}"
        if tokens == 0:
            raise InputError("the prompt has no tokens", source=path, place=place)
        fed = tokens + max(options.max_new_tokens - 1, 0)
        if longest is not None and fed > longest:
            raise InputError(
                f"{tokens:,} tokens and {options.max_new_tokens} new ones",
                source=path,
                place=place,
                expected=f"at most {longest:,}, the model's context",
                remedy="shorten the prompt or lower ``max_new_tokens``",
            )


@contextlib.contextmanager
def _loading(checkpoint: str, what: str) -> Iterator[None]:
    """Failures of loading, which come as many kinds of exception, as one line."""
    try:
        yield
    except PrismError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        gated = "gated" in words.lower() or "401" in words or "403" in words
        if os.path.isdir(checkpoint):
            reason, remedy = f"cannot load the {what}: {words[:120]}", "check the files in it"
        elif gated:
            reason = "the checkpoint is gated or private"
            remedy = "ask for access on its page and log in with: hf auth login"
        else:
            reason = "no such folder, and no checkpoint of that name can be had from the hub"
            remedy = "give a local folder, or a hub id and a network connection"
        raise InputError(reason, source=checkpoint, remedy=remedy) from error


def load_tokenizer(checkpoint: str, options: HfOptions) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, padding on the left.

    Raises
    ------
    InputError
        It cannot be loaded, or has neither a padding nor an end-of-sequence token.
    """
    require_transformers()
    from transformers import AutoTokenizer

    _folder_has_config(checkpoint)
    with _quiet(), _loading(checkpoint, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint, trust_remote_code=options.trust_remote_code
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has neither a padding nor an end-of-sequence token",
                source=checkpoint,
                remedy="set one in its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checkpoint_spec(checkpoint: str, options: HfOptions) -> ModelSpec:
    """The spec of a checkpoint as it is stored: ``dtype`` is how it is run here, not served.

    Raises
    ------
    InputError
        Missing, gated, damaged, or without MoE layers.
    """
    require_transformers()
    from prism_plan.sizes import spec_of_folder
    from prism_plan.sizes.hub import spec_from_hub

    _folder_has_config(checkpoint)
    return (
        spec_of_folder(Path(checkpoint))
        if os.path.exists(checkpoint)
        else spec_from_hub(checkpoint)
    )


def load_model(checkpoint: str, options: HfOptions) -> PreTrainedModel:
    """The checkpoint's model, ready to run.

    Raises
    ------
    InputError
        Missing, gated or damaged; the device cannot be used.
    """
    require_transformers()
    import torch
    from transformers import AutoConfig

    _folder_has_config(checkpoint)
    if options.device != "auto":
        try:
            if torch.empty(1, device=options.device).is_meta:
                raise RuntimeError("it computes nothing")
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"{options.device!r} cannot be used: {str(error).splitlines()[0]:.80}",
                parameter="device",
                expected="auto, cpu, or an accelerator of this machine such as cuda:0",
            ) from error
    with _quiet(), _loading(checkpoint, "model"):
        where: dict[str, Any] = {}
        if options.device == "auto" and torch.accelerator.is_available():
            where["device_map"] = "auto"  # over all accelerators, for models larger than one
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=options.trust_remote_code)
        model: PreTrainedModel = _auto_class(config).from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            **where,
        )
        if options.device != "auto":
            model = model.to(options.device)
    return model.eval()


def _auto_class(config: Any) -> Any:
    """Which of transformers' automatic classes makes a checkpoint's model.

    Most multimodal models are no ``AutoModelForCausalLM``; they generate from text alone too.
    """
    import transformers

    kind = type(config)
    if (
        kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _folder_has_config(checkpoint: str) -> None:
    if os.path.exists(checkpoint) and not os.path.isfile(os.path.join(checkpoint, "config.json")):
        raise InputError(
            "has no config.json", source=checkpoint, expected="a checkpoint folder or a hub id"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars of loading would mix with ours."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
