"""Recordings of SGLang, read in the source of SGLang 0.5.23.

*Expert distribution recorder* (``sglang/srt/eplb/expert_distribution.py``), ``.pt`` files or
folders of them; shapes: L decoder layers (dense ones included), P physical experts:

``stat``, ``stat_approx``
    ``{rank, logical_count int32 [S, L, E], average_utilization_rate_over_window}``, one row a
    forward pass, zeros where the buffer was not used. The counts are summed over ranks before
    they are written, so that of files of different ranks one is read. Files of one rank are
    successive dumps (a dump empties the buffer) and are added. ``logical_count`` may also be
    [L, E], and the file JSON, as ``--init-expert-location`` loads it, or .npz.
``per_pass``
    ``{records: [{forward_pass_id, rank, gatherer_key, global_physical_count [L, P]}],
    last_physical_to_logical_map [L, P]}``. Ranks are added, as the engine's own reader does
    (``eplb_simulator/reader.py``), but for ranks that recorded exactly the same.
``per_token``
    the same with ``topk_ids_of_layer`` int32 [L, T, 8] of *physical* ids (-1: nothing),
    ``input_ids``, ``positions``, ``extend_seq_lens`` and ``forward_mode`` in each record. Gives a
    token-level trace. Ranks of equal tokens and selections are read once.

Without data-parallel attention every rank selects for all tokens: ``stat`` then counts each call
once a rank, and the tokens of the trace are as many times too many; calls per token stay right.
The map is that of the time of the dump: recordings during which experts moved are wrong unless
the moves show as an expert named twice.

*Requests of per_token.* The recorder keeps no request ids. They are told apart by position, rank
by rank, in the order in which the scheduler keeps them: a piece of an extend pass goes on with a
request of the pass before it (chunked prefill), a one-token piece with any running request, if
the positions meet, and else starts a request; a row of a decode pass goes on with the next request
in batch order whose positions meet. Two requests of one length can be taken for each other when
one of them ends; the provenance counts them. ``forward_mode`` (``model_executor/
forward_batch_info.py``): 1 extend and the long pieces of 3 mixed are prefill; 2 decode and
one-token pieces that go on with a request are decode; 4 idle has no tokens; others are refused.

*Responses* (``sglang/srt/state_capturer/routed_experts.py``) in a file as
:mod:`prism_plan.profiling.responses` says: of ``/generate`` with ``meta_info.routed_experts``,
base64 of raw int32 [tokens - 1 - start, L, K] of logical ids, and ``meta_info.prompt_tokens``,
``completion_tokens``; or of the OpenAI interface with ``sglext.routed_experts`` and ``usage``.
Rows of -1 in every layer are padding.

What a file is is told by its content, see :mod:`prism_plan.profiling.sglang_file`. Layers right
behind the model's last one are multi-token-prediction layers and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import rows_cannot_be_skipped
from prism_plan.model import ModelSpec
from prism_plan.profiling.layers import mtp_notice
from prism_plan.profiling.rows import RepeatedRows
from prism_plan.profiling.sglang_dump import mode_of
from prism_plan.profiling.sglang_file import holds_responses, read_dump
from prism_plan.profiling.sglang_requests import Follower
from prism_plan.profiling.sglang_responses import read_responses
from prism_plan.profiling.sglang_run import Run
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import Notify, counts_trace, files_of_tasks
from prism_plan.trace import TokenBatch, Trace, trace_from_batches


def read_sglang(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    skip_bad: bool = False,
    notify: Notify = lambda message: None,
) -> Trace:
    """One trace: token-level from per_token and responses, counts-only from stat and per_pass.

    A source is a dump, a folder of those of one run, or a file of responses. Files of one label
    are read as parts of one run. ``notify`` is told what was left out or looks wrong: with
    ``skip_bad`` responses that cannot be read, or are of another model, as long as others of their
    file can.

    Raises
    ------
    InputError
        A file is cut short, holds code, mixes modes or is of another model.
    """
    files = files_of_tasks(sources)
    responses = [s for s in sources if s.path.is_file() and holds_responses(s.path)]
    if responses:
        for source in sources:
            if source not in responses:
                raise _mixed(source.path, "a recorder's dump", responses[0].path, "responses")
        return read_responses(sources, model, notify, skip_bad=skip_bad)
    if skip_bad:
        raise rows_cannot_be_skipped(sources[0].path)
    runs = {task: Run(task, model, notify) for task in files}
    first: tuple[Path, str] | None = None
    for task, paths in files.items():
        for path in paths:
            for file in _dumps(path):
                dump = read_dump(file)
                mode = mode_of(dump, file)
                if first is not None and mode != first[1]:
                    raise _mixed(file, mode, *first)
                first = first or (file, mode)
                runs[task].add(file, mode, dump)
                del dump
    assert first is not None
    left_out = mtp_notice({n for run in runs.values() for n in run.left_out_layers}, model)
    if left_out:
        notify(left_out)
    names = {task: [path.name for path in paths] for task, paths in files.items()}
    provenance: dict[str, Any] = {"mode": first[1], "files": names}
    if first[1] == "per_token":
        return _tokens(runs, model, provenance, notify)
    counts = {task: run.counts(first[1]) for task, run in runs.items()}
    return counts_trace("sglang", model, counts, provenance, notify)


def _mixed(path: Path, found: str, other: Path, expected: str) -> InputError:
    return InputError(
        found,
        source=path,
        expected=f"{expected}, as in {other}",
        remedy="make a trace of each kind of recording",
    )


def _dumps(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for kinds in (["*.pt"], ["*.json", "*.json.gz", "*.npz"]):
        found = sorted(file for kind in kinds for file in path.glob(kind))
        if found:
            return found
    raise InputError(
        "no .pt files in it, nor .json or .npz",
        source=path,
        expected="dumps of SGLang's recorder",
    )


def _tokens(
    runs: Mapping[str, Run], model: ModelSpec, provenance: Mapping[str, Any], notify: Notify
) -> Trace:
    batches = []
    count = swappable = padding = 0
    repeated = RepeatedRows(model)
    for code, run in enumerate(runs.values()):
        for rank in run.token_ranks():
            follower = Follower(count)
            parts: list[tuple[npt.NDArray[Any], ...]] = []
            for _, step in sorted(run.passes[rank].items()):
                request, phase = follower.follow(step)
                kept = step.kept
                parts.append((request[kept], step.positions[kept], phase[kept], step.experts))
            request, position, phase, experts = (
                np.concatenate(p) for p in zip(*parts, strict=True)
            )
            count = follower.count
            swappable += follower.swappable
            order = np.lexsort((position, request))
            number, place = request[order], position[order]
            begins = np.ones(len(order), bool)
            begins[1:] = (np.diff(number) != 0) | (np.diff(place) != 1)
            repeated.add(experts[order], f"{run.files[0].name} rank {rank}", begins=begins)
            batches.append(
                TokenBatch(
                    request=request[order],
                    position=position[order].astype(np.int32),
                    phase=phase[order],
                    task=np.full(len(order), code, np.int32),
                    experts=experts[order],
                )
            )
        padding += run.padding
        run.passes.clear()
    if padding:
        notify(f"left out {padding:,} rows of padding")
    if repeated.runs:
        notify(repeated.notice())
    notify(
        f"told {count:,} requests apart by their positions, for the recorder keeps no request ids; "
        f"{swappable:,} may be swapped with another of the same length"
    )
    return trace_from_batches(
        model,
        list(runs),
        batches,
        provenance={
            "source": "sglang",
            **provenance,
            "requests": "told apart by positions",
            "swappable_requests": swappable,
        },
        name="sglang",
    )
