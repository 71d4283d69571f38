"""Read the routed experts that vLLM returns with its responses (as in the source of vLLM 0.33.0).

Start the server with ``--enable-return-routed-experts`` and write each response as one line of a
JSONL file, all of them as a JSON array, or streams as they came (files are read by
:mod:`prism_plan.profiling.responses.response_files`). ``choices[].routed_experts`` is the base64
text of .npy bytes [tokens - 1, decoder layers, K] (``vllm/entrypoints/openai/chat_completion/
protocol.py``, ``vllm/utils/serial_utils.py``), uint8 up to 256 experts, else uint16
(``vllm/model_executor/layers/fused_moe/routed_experts_capturer.py``; older versions: int32); ids
are logical, columns of dense layers stay zeros. The last token is never fed, so it has no row.
Versions that split the response are read as :mod:`.split_responses` says.

A line may also be a plain object, for people who use vLLM from Python::

    {"routed_experts": base64 | nested list | "file.npy", "task": "...", "prompt_tokens": 12,
     "completion_tokens": 30, "prompt_routed_experts": the prompt's rows, where they are apart}

A single ``.npy`` file is one request of unknown phases. Each choice of a response is a request of
its own, its prompt included. The task is the source's label, else the line's ``task``, else the
file's stem; files of one task are put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.location import Location
from prism_plan.io.text_files import read_bytes
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import shown
from prism_plan.profiling.common.json_fields import (
    decode_base64,
    json_object,
    optional_count,
    task_of,
)
from prism_plan.profiling.common.messages import Notify
from prism_plan.profiling.common.npy import parse_npy
from prism_plan.profiling.responses.request_collector import RequestCollector, TokenCounts
from prism_plan.profiling.responses.response_files import read_responses
from prism_plan.profiling.responses.unread_keys import find_unread_routing
from prism_plan.profiling.sources import Source, default_task, paths_by_task
from prism_plan.profiling.vllm.split_responses import join_rows
from prism_plan.trace import Trace

ROWS, PROMPT_ROWS = "routed_experts", "prompt_routed_experts"


def read_vllm(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    skip_bad: bool = False,
    notify: Notify = lambda message: None,
) -> Trace:
    """One token-level trace from files of responses, or from .npy files.

    ``usage.prompt_tokens`` separates prefill from decode. At least 512 equal rows at the start of
    an array are start-up profiling where the request cannot have made them, and are dropped. With
    ``skip_bad`` responses that cannot be read, or are of another model, are left out, as long as
    others of their file are good. ``notify`` is called with what was left out or looks wrong.

    Raises
    ------
    InputError
        No responses or .npy, truncated, no routed experts in it, or of another model.
    """
    paths_by_task(sources)  # refuses two unlabelled files of one name
    requests = RequestCollector(model)
    bad = BadRows(skip_bad)
    for source in sources:
        at = Location(source.path)
        if source.path.is_dir():
            raise at.error("is a folder", "a file of responses, or .npy")
        if source.path.suffix == ".npy":
            array = _npy_file(source.path, at)
            task = source.task or default_task(source.path)
            requests.add(task, array, TokenCounts(), at, response=False)
        else:
            _add_responses(source, requests, bad)
    provenance = {
        "files": [source.path.name for source in sources],
        "profiling_rows_dropped": requests.profiling_rows,
    }
    return requests.trace("vllm", sources, provenance, bad, notify)


def _add_responses(source: Source, requests: RequestCollector, bad: BadRows) -> None:
    path = source.path
    for at, value in read_responses(path, bad):
        try:
            line = json_object(value, at)
            task = task_of(line, source.task, path, at)
            recordings = list(_recordings(line, at))
            read = {key for recording in recordings for key in recording.read}
            unread = find_unread_routing(line, read or {f"choices[].{ROWS}"}, at)
        except InputError as error:
            bad.skip_or_raise(path, error)
            continue
        requests.unread |= unread
        for recording in recordings:
            try:
                _add(requests, task, recording, path)
            except InputError as error:
                bad.skip_or_raise(path, error)
            else:
                bad.count_good(path)


@dataclass(frozen=True)
class _Recording:
    """A request as a line holds it: the values under the two keys, and its numbers of tokens.

    ``read`` has the paths of these keys; ``response`` is False for a plain object.
    """

    at: Location
    rows: Any
    prompt_rows: Any
    counts: TokenCounts
    read: frozenset[str]
    response: bool


def _add(requests: RequestCollector, task: str, recording: _Recording, path: Path) -> None:
    """Add one request."""
    at, response = recording.at, recording.response
    if recording.prompt_rows is None:
        if recording.rows is None:
            requests.without_routing += 1
            return
        array = _array(recording.rows, path, at, ROWS)
        requests.add(task, array, recording.counts, at, response=response)
        return
    before = _array(recording.prompt_rows, path, at, PROMPT_ROWS)
    rows = None
    if recording.rows is not None and recording.rows != []:
        rows = _array(recording.rows, path, at, ROWS)
    joined = join_rows(before, rows, recording.counts, at)
    requests.add(task, joined.rows, joined.counts, at, response=response)
    requests.duplicate_prompts += joined.duplicate_prompt
    requests.without_generated += joined.without_generated


def _recordings(line: Mapping[str, Any], at: Location) -> Iterator[_Recording]:
    """Each request of a line."""
    choices = line.get("choices")
    if isinstance(choices, list) and line.get(ROWS) is None:
        yield from _choices(line, choices, at)
        return
    if ROWS not in line and PROMPT_ROWS not in line:
        sglang = "meta_info" in line or "sglext" in line
        raise at.error(
            "neither 'choices' nor 'routed_experts' in it",
            "a response with choices[].routed_experts",
            "SGLang's responses are a format of their own, sglang" if sglang else "",
        )
    yield _Recording(
        at,
        line.get(ROWS),
        _none_if_empty(line.get(PROMPT_ROWS)),
        TokenCounts(
            optional_count(line, "prompt_tokens", at),
            optional_count(line, "completion_tokens", at),
        ),
        frozenset([ROWS, PROMPT_ROWS]),
        response=False,
    )


def _choices(line: Mapping[str, Any], choices: Sequence[Any], at: Location) -> Iterator[_Recording]:
    """Each choice of a response as a request of its own, with the rows of the common prompt."""
    usage = json_object(line.get("usage") or {}, at.within("'usage'"))
    prompt = optional_count(usage, "prompt_tokens", at)
    for index, value in enumerate(choices):
        where = at.within(f"choice {index}")
        choice = json_object(value, where)
        shared, own = (_none_if_empty(part.get(PROMPT_ROWS)) for part in (line, choice))
        if shared is not None and own is not None and shared != own:
            raise where.error(
                f"other {PROMPT_ROWS!r} than those of the response",
                "the prompt's rows once",
                "remove one of the two",
            )
        prompt_rows = shared if own is None else own
        if ROWS not in choice and prompt_rows is None:
            raise where.error(
                "no 'routed_experts' in it",
                "a response with choices[].routed_experts",
                "start vLLM with --enable-return-routed-experts, and ask without streaming",
            )
        generated = optional_count(usage, "completion_tokens", at)
        if len(choices) > 1:  # usage counts the generated tokens of all choices together
            ids = choice.get("token_ids")
            generated = len(ids) if isinstance(ids, list) else None
        key = f"choices[{index}]"
        yield _Recording(
            where,
            choice.get(ROWS),
            prompt_rows,
            TokenCounts(prompt, generated),
            frozenset([PROMPT_ROWS, f"{key}.{ROWS}", f"{key}.{PROMPT_ROWS}"]),
            response=True,
        )


def _none_if_empty(rows: Any) -> Any:
    return None if rows == [] else rows


def _array(recorded: Any, path: Path, at: Location, key: str) -> npt.NDArray[Any]:
    if isinstance(recorded, str):
        if recorded.endswith(".npy"):  # no base64 text ends so
            return _npy_file(path.parent / recorded, at)
        return parse_npy(decode_base64(recorded, at), at)
    if isinstance(recorded, list):
        try:
            array = np.array(recorded)
        except (ValueError, OverflowError):
            array = np.array("ragged")
        if array.dtype.kind in "iu" and array.ndim == 3:
            return array
        where = at if key == ROWS else at.within(repr(key))
        expected = "[tokens][decoder layers][top-k] expert ids"
        raise where.error("the lists are no array of whole numbers", expected)
    raise at.within(repr(key)).error(
        shown(recorded), "base64 of .npy bytes, nested lists, or the name of a .npy file"
    )


def _npy_file(file: Path, at: Location) -> npt.NDArray[Any]:
    try:
        data = read_bytes(file)
    except InputError as error:
        raise at.error(f"{file.name}: {error.found}", error.expected, error.remedy) from error
    return parse_npy(data, at if file == at.source else at.within(file.name))
