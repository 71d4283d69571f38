"""Routed experts that vLLM returns with its responses (read in the source of vLLM 0.33.0).

Start the server with ``--enable-return-routed-experts`` and write each response as one line of a
JSONL file, all of them as a JSON array, or streams as they came
(:mod:`prism_plan.profiling.responses`). ``choices[].routed_experts`` is the base64 text of .npy
bytes [tokens - 1, decoder layers, K] (``vllm/entrypoints/openai/chat_completion/protocol.py``,
``vllm/utils/serial_utils.py``), uint8 up to 256 experts, else uint16 (``vllm/model_executor/
layers/fused_moe/routed_experts_capturer.py``; older versions: int32); ids are logical, columns of
dense layers stay zeros. The last token is never fed, so it has no row. Versions that split the
response are read as :mod:`prism_plan.profiling.vllm_split` says.

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
from prism_plan.io.text_files import read_bytes
from prism_plan.model import ModelSpec
from prism_plan.profiling.requests import Requests
from prism_plan.profiling.responses import responses
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import (
    Notify,
    decode_base64,
    default_task,
    files_of_tasks,
    json_object,
    parse_npy,
    task_of_line,
    whole_number,
)
from prism_plan.profiling.unread import unread_routing
from prism_plan.profiling.vllm_split import join
from prism_plan.text import shown
from prism_plan.trace import Trace, trace_from_batches

ROWS, PROMPT_ROWS = "routed_experts", "prompt_routed_experts"


def read_vllm(
    sources: Sequence[Source],
    model: ModelSpec,
    *,
    skip_bad: bool = False,
    notify: Notify = lambda message: None,
) -> Trace:
    """One token-level trace from files of responses, or from .npy files.

    ``usage.prompt_tokens`` tells prefill from decode. At least 512 equal rows at the start of an
    array are start-up profiling where the request cannot have made them: they are dropped, and
    ``notify`` is told, as of all else that is left out or looks wrong: with ``skip_bad`` responses
    that cannot be read, or are of another model, as long as others of their file can.

    Raises
    ------
    InputError
        No responses or .npy, cut short, no routed experts in it, or of another model.
    """
    files_of_tasks(sources)  # refuses two unlabelled files of one name
    requests = Requests(model)
    bad = BadRows(skip_bad)
    for source in sources:
        if source.path.is_dir():
            raise InputError(
                "is a folder", source=source.path, expected="a file of responses, or .npy"
            )
        if source.path.suffix == ".npy":
            array = _npy_file(source.path, source.path, "")
            task = source.task or default_task(source.path)
            requests.add(task, array, None, None, source.path, "", response=False)
        else:
            _add_responses(source, requests, bad)
    bad.require_good()
    requests.tell(sources[0].path, notify)
    bad.tell(notify)
    return trace_from_batches(
        model,
        requests.tasks,
        requests.batches,
        provenance={
            "source": "vllm",
            "files": [source.path.name for source in sources],
            "profiling_rows_dropped": requests.profiling_rows,
            **requests.provenance(),
            **bad.provenance(),
        },
        name="vllm",
    )


def _add_responses(source: Source, requests: Requests, bad: BadRows) -> None:
    path = source.path
    for place, value in responses(path, bad):
        try:
            line = json_object(value, path, place)
            task = task_of_line(line, source.task, path, place)
            recordings = list(_recordings(line, path, place))
            read = {key for recording in recordings for key in recording.read}
            unread = unread_routing(line, read or {f"choices[].{ROWS}"}, path, place)
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
                bad.keep(path)


@dataclass(frozen=True)
class _Recording:
    """A request as a line holds it: values under the two keys, and its numbers of tokens.

    ``read`` has the paths of these keys; ``response`` tells a response of the server from a plain
    object.
    """

    place: str
    rows: Any
    prompt_rows: Any
    prompt: int | None
    generated: int | None
    read: frozenset[str]
    response: bool


def _add(requests: Requests, task: str, recording: _Recording, path: Path) -> None:
    """Add one request."""
    place = recording.place
    prompt, generated = recording.prompt, recording.generated
    joined = None
    if recording.rows is None and recording.prompt_rows is None:
        requests.missing += 1
        return
    if recording.prompt_rows is None:
        array = _array(recording.rows, path, place, ROWS)
    else:
        before = _array(recording.prompt_rows, path, place, PROMPT_ROWS)
        rows = None
        if recording.rows is not None and recording.rows != []:
            rows = _array(recording.rows, path, place, ROWS)
        joined = join(before, rows, prompt, generated, path, place)
        array, prompt, generated = joined.rows, joined.prompt, joined.generated
    requests.add(task, array, prompt, generated, path, place, response=recording.response)
    if joined is not None:
        requests.prompts_twice += joined.twice
        requests.without_generated += joined.cut


def _recordings(line: Mapping[str, Any], path: Path, place: str) -> Iterator[_Recording]:
    """Each request of a line."""
    choices = line.get("choices")
    if isinstance(choices, list) and line.get(ROWS) is None:
        yield from _choices(line, choices, path, place)
        return
    if ROWS not in line and PROMPT_ROWS not in line:
        sglang = "meta_info" in line or "sglext" in line
        raise InputError(
            "neither 'choices' nor 'routed_experts' in it",
            source=path,
            place=place,
            expected="a response with choices[].routed_experts",
            remedy="SGLang's responses are a format of their own, sglang" if sglang else "",
        )
    yield _Recording(
        place,
        line.get(ROWS),
        _some(line.get(PROMPT_ROWS)),
        whole_number(line, "prompt_tokens", path, place),
        whole_number(line, "completion_tokens", path, place),
        frozenset([ROWS, PROMPT_ROWS]),
        response=False,
    )


def _choices(
    line: Mapping[str, Any], choices: Sequence[Any], path: Path, place: str
) -> Iterator[_Recording]:
    """Each choice of a response, a request of its own: its prompt's rows belong to each."""
    usage = json_object(line.get("usage") or {}, path, f"{place} 'usage'")
    prompt = whole_number(usage, "prompt_tokens", path, place)
    for index, value in enumerate(choices):
        where = f"{place} choice {index}"
        choice = json_object(value, path, where)
        shared, own = _some(line.get(PROMPT_ROWS)), _some(choice.get(PROMPT_ROWS))
        if shared is not None and own is not None and shared != own:
            raise InputError(
                f"other {PROMPT_ROWS!r} than those of the response",
                source=path,
                place=where,
                expected="the prompt's rows once",
                remedy="remove one of the two",
            )
        prompt_rows = shared if own is None else own
        if ROWS not in choice and prompt_rows is None:
            raise InputError(
                "no 'routed_experts' in it",
                source=path,
                place=where,
                expected="a response with choices[].routed_experts",
                remedy="start vLLM with --enable-return-routed-experts, and ask without streaming",
            )
        # usage counts the generated tokens of all choices together
        generated = whole_number(usage, "completion_tokens", path, place)
        if len(choices) > 1:
            ids = choice.get("token_ids")
            generated = len(ids) if isinstance(ids, list) else None
        at = f"choices[{index}]"
        yield _Recording(
            where,
            choice.get(ROWS),
            prompt_rows,
            prompt,
            generated,
            frozenset([PROMPT_ROWS, f"{at}.{ROWS}", f"{at}.{PROMPT_ROWS}"]),
            response=True,
        )


def _some(rows: Any) -> Any:
    """``rows`` unless there are none."""
    return None if rows == [] else rows


def _array(recorded: Any, path: Path, place: str, key: str) -> npt.NDArray[Any]:
    if isinstance(recorded, str):
        if recorded.endswith(".npy"):  # no base64 text ends so
            return _npy_file(path.parent / recorded, path, place)
        return parse_npy(decode_base64(recorded, path, place), path, place)
    if isinstance(recorded, list):
        try:
            array = np.array(recorded)
        except (ValueError, OverflowError):
            array = np.array("ragged")
        if array.dtype.kind in "iu" and array.ndim == 3:
            return array
        raise InputError(
            "the lists are no array of whole numbers",
            source=path,
            place=place if key == ROWS else f"{place} {key!r}",
            expected="[tokens][decoder layers][top-k] expert ids",
        )
    raise InputError(
        shown(recorded),
        source=path,
        place=f"{place} {key!r}",
        expected="base64 of .npy bytes, nested lists, or the name of a .npy file",
    )


def _npy_file(file: Path, source: Path, place: str) -> npt.NDArray[Any]:
    try:
        data = read_bytes(file)
    except InputError as error:
        raise InputError(
            f"{file.name}: {error.found}",
            source=source,
            place=place,
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    return parse_npy(data, source, place if file == source else f"{place} {file.name}")
