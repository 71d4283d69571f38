"""Read recordings of SGLang, as its source of version 0.5.23 writes them.

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

*Requests of per_token.* The recorder keeps no request ids. Requests are told apart by position,
rank by rank, in the order in which the scheduler keeps them: a sequence of an extend pass continues
a request of the pass before it (chunked prefill), a sequence of one token any running request, if
its position is the next one, and else starts a request; a row of a decode pass continues the next
request in batch order whose next position it is. Two requests of one length can be taken for each
other when one of them ends; the provenance counts them. ``forward_mode`` (``model_executor/
forward_batch_info.py``): 1 extend and the longer sequences of 3 mixed are prefill; 2 decode and
sequences of one token that continue a request are decode; 4 idle has no tokens; others are refused.

*Responses* (``sglang/srt/state_capturer/routed_experts.py``) in a file that
:mod:`prism_plan.profiling.responses.response_files` reads: of ``/generate`` with
``meta_info.routed_experts``, base64 of raw int32 [tokens - 1 - start, L, K] of logical ids, and
``meta_info.prompt_tokens``, ``completion_tokens``; or of the OpenAI interface with
``sglext.routed_experts`` and ``usage``.
Rows of -1 in every layer are padding.

The kind of a file is detected by its content, see :mod:`.file_kind`. Layers right behind the
model's last one are multi-token-prediction layers and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import rows_cannot_be_skipped
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.call_counts import trace_from_counts
from prism_plan.profiling.common.extra_layers import mtp_notice
from prism_plan.profiling.common.messages import Notify
from prism_plan.profiling.common.repeated_rows import RepeatedRows
from prism_plan.profiling.sglang.dump_fields import recorder_mode
from prism_plan.profiling.sglang.dump_reader import load_dump
from prism_plan.profiling.sglang.file_kind import file_kind
from prism_plan.profiling.sglang.request_tracker import RequestTracker
from prism_plan.profiling.sglang.responses import read_sglang_responses
from prism_plan.profiling.sglang.task_dumps import TaskDumps
from prism_plan.profiling.sources import Source, paths_by_task
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
    are parts of one run. With ``skip_bad`` responses that cannot be read, or are of another model,
    are left out, as long as others of their file are good. ``notify`` is called with what was left
    out or looks wrong.

    Raises
    ------
    InputError
        A file is truncated, holds code, mixes modes or is of another model.
    """
    paths = paths_by_task(sources)
    responses = [s for s in sources if s.path.is_file() and file_kind(s.path) == "responses"]
    if responses:
        for source in sources:
            if source not in responses:
                raise _mixed(source.path, "a recorder's dump", responses[0].path, "responses")
        return read_sglang_responses(sources, model, notify, skip_bad=skip_bad)
    if skip_bad:
        raise rows_cannot_be_skipped(sources[0].path)
    tasks = {task: TaskDumps(task, model, notify) for task in paths}
    first: tuple[Path, str] | None = None
    for task, parts in paths.items():
        for path in (file for part in parts for file in _dump_files(part)):
            dump = load_dump(path)
            mode = recorder_mode(dump, path)
            if first is not None and mode != first[1]:
                raise _mixed(path, mode, *first)
            first = first or (path, mode)
            tasks[task].add(path, mode, dump)
            del dump
    assert first is not None
    left_out = mtp_notice({layer for dumps in tasks.values() for layer in dumps.mtp_layers}, model)
    if left_out:
        notify(left_out)
    names = {task: [path.name for path in parts] for task, parts in paths.items()}
    provenance: dict[str, Any] = {"mode": first[1], "files": names}
    if first[1] == "per_token":
        return _token_trace(tasks, model, provenance, notify)
    counts = {task: dumps.counts(first[1]) for task, dumps in tasks.items()}
    return trace_from_counts("sglang", model, counts, provenance, notify)


def _mixed(path: Path, found: str, other: Path, expected: str) -> InputError:
    return Location(path).error(
        found, f"{expected}, as in {other}", "make a trace of each kind of recording"
    )


def _dump_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for kinds in (["*.pt"], ["*.json", "*.json.gz", "*.npz"]):
        found = sorted(file for kind in kinds for file in path.glob(kind))
        if found:
            return found
    raise Location(path).error(
        "no .pt files in it, nor .json or .npz", "dumps of SGLang's recorder"
    )


def _token_trace(
    tasks: Mapping[str, TaskDumps], model: ModelSpec, provenance: Mapping[str, Any], notify: Notify
) -> Trace:
    batches = []
    num_requests = swappable = padding = 0
    repeated = RepeatedRows(model)
    for code, dumps in enumerate(tasks.values()):
        for rank in dumps.token_ranks():
            tracker = RequestTracker(num_requests)
            parts: list[tuple[npt.NDArray[Any], ...]] = []
            for _, step in sorted(dumps.passes[rank].items()):
                request, phase = tracker.assign(step)
                rows = step.recorded
                parts.append((request[rows], step.positions[rows], phase[rows], step.experts))
            request, position, phase, experts = map(np.concatenate, zip(*parts, strict=True))
            num_requests = tracker.num_requests
            swappable += tracker.swappable
            order = np.lexsort((position, request))
            request, position, experts = request[order], position[order], experts[order]
            begins = np.ones(len(order), bool)
            begins[1:] = (np.diff(request) != 0) | (np.diff(position) != 1)
            repeated.add(experts, f"{dumps.files[0].name} rank {rank}", begins=begins)
            batches.append(
                TokenBatch(
                    request=request,
                    position=position.astype(np.int32),
                    phase=phase[order],
                    task=np.full(len(order), code, np.int32),
                    experts=experts,
                )
            )
        padding += dumps.padding
        dumps.passes.clear()
    if padding:
        notify(f"left out {padding:,} rows of padding")
    if repeated.runs:
        notify(repeated.notice())
    notify(
        f"told {num_requests:,} requests apart by their positions, for the recorder keeps no "
        f"request ids; {swappable:,} may be swapped with another of the same length"
    )
    return trace_from_batches(
        model,
        list(tasks),
        batches,
        provenance={
            "source": "sglang",
            **provenance,
            "requests": "told apart by positions",
            "swappable_requests": swappable,
        },
        name="sglang",
    )
