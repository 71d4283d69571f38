"""Profile a checkpoint: run a file of prompts through it and write a token-level trace.

Needs the extra ``hf`` (transformers 5 and PyTorch). The model runs its own ``generate``, and the
hooks of :mod:`.recorder` record it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_plan.errors import LimitReached, PrismError
from prism_plan.io.location import Location
from prism_plan.io.open_file import OpenFile
from prism_plan.io.prompts import read_prompts
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import TraceWriter
from prism_plan.model_spec import ModelSpec, require_same_model
from prism_plan.profiling.recording.fingerprint import fingerprint
from prism_plan.profiling.recording.hf_options import HfOptions
from prism_plan.profiling.recording.load_checkpoint import (
    load_checkpoint_spec,
    load_hf_model,
    load_tokenizer,
    no_progress_bars,
)
from prism_plan.profiling.recording.recorder import Recorder
from prism_plan.profiling.recording.transformers_release import require_transformers
from prism_plan.provenance import stamped
from prism_plan.trace import TokenBatch, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Interrupted(PrismError):
    """A run was stopped by Ctrl-C; what it had recorded is kept as a partial trace."""

    exit_code = 130


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
    were done, whose provenance says ``partial``; with ``resume`` it continues there. ``progress``
    is called with the prompts done, all prompts and the tokens recorded. ``spec`` gives the sizes
    where they cannot be read from the checkpoint; its layers, experts and top-k must be the
    model's.

    Raises
    ------
    InputError
        The checkpoint is missing or gated, has no MoE layers, cannot be recorded, or is not the
        spec's; a line of the prompts is wrong, or longer than the model's context; the trace to
        continue is of another run.
    OutputError
        The trace cannot be written.
    Interrupted
        Stopped by Ctrl-C; says what was kept.
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
    """:func:`profile_checkpoint` with an open file of prompts."""
    require_transformers()
    run = _Run(checkpoint, prompts, options)
    total = sum(1 for _ in read_prompts(prompts))
    earlier = _earlier(output, run) if resume else None
    done = 0 if earlier is None else int(earlier.provenance["prompts_done"])
    spec = load_checkpoint_spec(checkpoint) if spec is None else spec
    tokenizer = load_tokenizer(checkpoint, options)
    model = load_hf_model(checkpoint, options)
    with no_progress_bars():
        _check_lengths(prompts, tokenizer, model, options)
    import torch

    provenance = run.provenance()
    stopped: BaseException | None = None
    with TraceWriter(output, spec, weights=options.weights, provenance=provenance) as writer:
        if earlier is not None:
            require_same_model(earlier.model, spec, source=earlier.name, other="the checkpoint")
            assert earlier.batches is not None
            for rows in earlier.batches():
                writer.write(rows, earlier.tasks)
            notify(f"continuing after {done} of {total} prompts")
        # rows of a batch are written when it is complete, or they would be in the trace twice
        # after an interruption and a continuation
        pending: list[tuple[TokenBatch, tuple[str, ...]]] = []

        def collect(rows: TokenBatch, tasks: Sequence[str]) -> None:
            pending.append((rows, tuple(tasks)))

        recorder = Recorder(model, spec, collect, weights=options.weights, first_request=done)
        progress(done, total, 0)
        with recorder.attached():
            try:
                remaining = itertools.islice(read_prompts(prompts), done, None)
                while batch := list(itertools.islice(remaining, options.batch_size)):
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
        kept = f"{output} holds the first {done} of {total} prompts; continue with ``resume``"
        if isinstance(stopped, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {kept}")
        raise LimitReached(f"out of memory; {kept} and a lower ``batch_size``") from stopped


@dataclass(frozen=True)
class _Run:
    """A run; one with the same identity can continue its trace."""

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


def _earlier(output: str | os.PathLike[str], run: _Run) -> Trace | None:
    """The partial trace of an earlier run at ``output``; None if there is no file."""
    if not os.path.exists(output):
        return None
    trace = read_trace(output)
    for key, value in run.identity().items():
        if trace.provenance.get(key) != value:
            raise Location(output, "provenance").error(
                f"{key} is {trace.provenance.get(key)!r:.80}",
                f"{value!r:.80}, as in this run",
                "``resume`` continues with the same checkpoint, prompts and options",
            )
    if not trace.provenance.get("partial"):
        raise Location(output).error("is complete", "a partial trace")
    return trace


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    options: HfOptions,
) -> None:
    """Run prompts, left-padded, and decode greedily."""
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
    """Refuse prompts that do not fit the model's context, before anything is run."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    path = prompts.path
    for prompt in read_prompts(prompts):
        tokens = len(tokenizer(prompt.prompt)["input_ids"])
        place = f"line {prompt.line}"
        if tokens == 0:
            raise Location(path, place).error("the prompt has no tokens")
        fed = tokens + max(options.max_new_tokens - 1, 0)
        if longest is not None and fed > longest:
            raise Location(path, place).error(
                f"{tokens:,} tokens and {options.max_new_tokens} new ones",
                f"at most {longest:,}, the model's context",
                "shorten the prompt or lower ``max_new_tokens``",
            )
