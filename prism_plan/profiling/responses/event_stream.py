"""Merge streamed responses: Server-Sent Events, ``data: {...}`` a chunk, ``data: [DONE]`` last.

Which chunk has the rows of routing, according to the source of both engines:

SGLang, ``/generate``
    every chunk repeats ``meta_info`` with the numbers of tokens so far; the last one of a request
    has ``meta_info.routed_experts``.
SGLang, OpenAI interface
    a chunk of its own after the last text, with ``choices: []`` and ``sglext.routed_experts``; the
    chunk with ``usage`` follows if it was asked for.
vLLM
    ``/inference/v1/generate`` has ``choices[].routed_experts`` in the chunk with which a choice
    ends. The OpenAI interface of vLLM 0.33 streams no rows; where later versions do, they are in
    the same place.

Chunks of one response have one id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.json_lines import parse_line, text_lines
from prism_plan.io.location import Location
from prism_plan.io.open_file import OpenFile
from prism_plan.profiling.common.json_fields import decode_base64, json_object
from prism_plan.profiling.responses.unread_keys import ROWS, find_unread_routing

PROMPT_ROWS = "prompt_routed_experts"
_FIELD = re.compile(r"(data|event|id|retry)?:")
_DONE = "[DONE]"
#: Where a chunk may hold rows; of choices see :func:`_choice_paths`.
_PATHS = (f"meta_info.{ROWS}", f"sglext.{ROWS}", PROMPT_ROWS)


def is_event(line: str) -> bool:
    """Whether a line is one of an event stream."""
    return _FIELD.match(line) is not None


def merge_streams(file: OpenFile, bad: BadRows) -> Iterator[tuple[Location, Any]]:
    """Each response in a file of events, and where its first chunk stands.

    Raises
    ------
    InputError
        A line is not an event, a chunk is not of a response, or rows contradict each other, and bad
        rows are not to be left out.
    """
    path = Path(file.path)
    open_responses: dict[str, tuple[Location, dict[str, Any]]] = {}
    ended: set[str] = set()
    damaged: set[str] = set()
    for number, line in text_lines(file, lambda error: bad.skip_or_raise(path, error)):
        at = Location(path, f"line {number}")
        key = ""
        try:
            name = _field(line, at)
            text = line.partition(":")[2].strip()
            if name != "data":
                continue
            if text == _DONE:
                ended.update(filter(None, open_responses))
                yield from open_responses.values()
                open_responses.clear()
                damaged.clear()
                continue
            chunk = json_object(parse_line(text, path, at.place), at)
            key = _response_id(chunk, at)
            if key in damaged:
                continue
            if key in ended:
                raise at.error(
                    f"response {key!r:.60} continues after a [DONE]",
                    "the streams one after the other",
                    "write each stream to a file of its own",
                )
            _, response = open_responses.setdefault(key, (at, {}))
            _merge(response, chunk, at)
        except InputError as error:
            bad.skip_or_raise(path, error)
            if open_responses.pop(key, None):
                damaged.add(key)
    yield from open_responses.values()


def _field(line: str, at: Location) -> str:
    found = _FIELD.match(line)
    if found is None:
        raise at.error(f"{line!r:.60}", "an event, data: {...}, as in the first line")
    return found[1] or ""


def _response_id(chunk: Mapping[str, Any], at: Location) -> str:
    """The id of the response that a chunk is of."""
    if "error" in chunk and "choices" not in chunk and "meta_info" not in chunk:
        raise at.error(
            f"an error of the server: {chunk['error']!r:.80}",
            "a chunk of a response",
            "ask again, and leave this response out",
        )
    meta = chunk.get("meta_info")
    ids = (chunk.get("id"), chunk.get("request_id"), isinstance(meta, dict) and meta.get("id"))
    return str(next((one for one in ids if one), ""))


def _merge(response: dict[str, Any], chunk: Mapping[str, Any], at: Location) -> None:
    """Merge a chunk into its response."""
    choices = chunk.get("choices") or []
    if not isinstance(choices, list):
        raise at.within("'choices'").error(f"{choices!r:.60}", "a list of choices")
    choices = [json_object(choice, at) for choice in choices]
    read = {*_PATHS, *(p for i in range(len(choices)) for p in _choice_paths(i))}
    find_unread_routing(chunk, read, at)
    for key, value in chunk.items():
        if key == "meta_info":
            _merge_meta_info(response, json_object(value, at), at)
        elif key == "sglext":
            extension = response.setdefault(key, {})
            for name, part in json_object(value or {}, at).items():
                _set(extension, name, part, at)
        elif key != "choices":
            _set(response, key, value, at)
    if "choices" in chunk:
        _merge_choices(response.setdefault("choices", []), choices, at)


def _choice_paths(index: int) -> tuple[str, str]:
    return f"choices[{index}].{ROWS}", f"choices[{index}].{PROMPT_ROWS}"


def _merge_choices(
    merged: list[dict[str, Any]], choices: list[Mapping[str, Any]], at: Location
) -> None:
    for number, choice in enumerate(choices):
        index = choice.get("index", number)
        if not isinstance(index, int) or not 0 <= index <= len(merged) + len(choices):
            raise at.within("'index'").error(f"{index!r:.60}", "a choice's number")
        while len(merged) <= index:
            merged.append({})
        for key, value in choice.items():
            known = merged[index].get(key)
            if key == "token_ids" and isinstance(known, list) and isinstance(value, list):
                merged[index][key] = [*known, *value]
            else:
                _set(merged[index], key, value, at)


def _merge_meta_info(response: dict[str, Any], meta: Mapping[str, Any], at: Location) -> None:
    """Keep the ``meta_info`` with the rows, whose token counts are theirs, else the last one."""
    known = response.get("meta_info", {}).get(ROWS)
    rows = meta.get(ROWS)
    if known is not None and rows is None:
        return
    if isinstance(known, str) and isinstance(rows, str):
        # the second are all rows, which begin with the first; parts are not understood
        before, after = (decode_base64(text, at) for text in (known, rows))
        if not after.startswith(before):
            raise _other_rows(ROWS, at)
    response["meta_info"] = dict(meta)


def _set(values: dict[str, Any], key: str, value: Any, at: Location) -> None:
    """Set a key; a later chunk overwrites an earlier one, but not by other rows."""
    if value is None:
        values.setdefault(key, None)
        return
    if ROWS in key and values.get(key) is not None and values[key] != value:
        raise _other_rows(key, at)
    values[key] = value


def _other_rows(key: str, at: Location) -> InputError:
    return at.error(
        f"other rows of {key!r} than in an earlier chunk",
        "the rows of a response in one chunk",
        "record responses that are not streamed",
    )
