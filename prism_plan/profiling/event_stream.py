"""Streamed responses, as Server-Sent Events: ``data: {...}`` a chunk, ``data: [DONE]`` at the end.

Which chunk has the rows of routing, read in the source of both engines:

SGLang, ``/generate``
    every chunk repeats ``meta_info`` with the numbers of tokens so far; the last one of a request
    has ``meta_info.routed_experts``.
SGLang, OpenAI interface
    a chunk of its own after the last text, with ``choices: []`` and ``sglext.routed_experts``; the
    chunk with ``usage`` follows if it was asked for.
vLLM
    ``/inference/v1/generate`` has ``choices[].routed_experts`` in the chunk with which a choice
    ends. The OpenAI interface of vLLM 0.33 streams no rows; where later versions do, they stand in
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
from prism_plan.io.open_file import OpenFile
from prism_plan.profiling.tensors import decode_base64, json_object
from prism_plan.profiling.unread import ROWS, unread_routing

PROMPT_ROWS = "prompt_routed_experts"
_FIELD = re.compile(r"(data|event|id|retry)?:")
_DONE = "[DONE]"
#: Where a chunk may hold rows; of choices see :func:`_choice_paths`.
_PATHS = (f"meta_info.{ROWS}", f"sglext.{ROWS}", PROMPT_ROWS)


def is_event(line: str) -> bool:
    """Whether a line is one of an event stream."""
    return _FIELD.match(line) is not None


def streamed(file: OpenFile, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """(place of its first chunk, response) of each response in a file of events.

    Raises
    ------
    InputError
        A line is no event, a chunk is none of a response, or rows contradict each other, and bad
        rows are not to be left out.
    """
    path = Path(file.path)
    open_responses: dict[str, tuple[str, dict[str, Any]]] = {}
    ended: set[str] = set()
    spoilt: set[str] = set()
    for number, line in text_lines(file, lambda error: bad.skip_or_raise(path, error)):
        place = f"line {number}"
        key = ""
        try:
            name = _field(line, path, place)
            text = line.partition(":")[2].strip()
            if name != "data":
                continue
            if text == _DONE:
                ended.update(filter(None, open_responses))
                yield from open_responses.values()
                open_responses.clear()
                spoilt.clear()
                continue
            chunk = json_object(parse_line(text, path, place), path, place)
            key = _identity(chunk, path, place)
            if key in spoilt:
                continue
            if key in ended:
                raise InputError(
                    f"response {key!r:.60} goes on after a [DONE]",
                    source=path,
                    place=place,
                    expected="the streams one after the other",
                    remedy="write each stream to a file of its own",
                )
            _, whole = open_responses.setdefault(key, (place, {}))
            _merge(whole, chunk, path, place)
        except InputError as error:
            bad.skip_or_raise(path, error)
            if open_responses.pop(key, None):
                spoilt.add(key)
    yield from open_responses.values()


def _field(line: str, path: Path, place: str) -> str:
    found = _FIELD.match(line)
    if found is None:
        raise InputError(
            f"{line!r:.60}",
            source=path,
            place=place,
            expected="an event, data: {...}, as in the first line",
        )
    return found[1] or ""


def _identity(chunk: Mapping[str, Any], path: Path, place: str) -> str:
    """The id of the response that a chunk is of."""
    if "error" in chunk and "choices" not in chunk and "meta_info" not in chunk:
        raise InputError(
            f"an error of the server: {chunk['error']!r:.80}",
            source=path,
            place=place,
            expected="a chunk of a response",
            remedy="ask again, and leave this response out",
        )
    meta = chunk.get("meta_info")
    ids = (chunk.get("id"), chunk.get("request_id"), isinstance(meta, dict) and meta.get("id"))
    return str(next((one for one in ids if one), ""))


def _merge(whole: dict[str, Any], chunk: Mapping[str, Any], path: Path, place: str) -> None:
    """Put a chunk to what its response has so far."""
    choices = chunk.get("choices") or []
    if not isinstance(choices, list):
        raise InputError(
            f"{choices!r:.60}",
            source=path,
            place=f"{place} 'choices'",
            expected="a list of choices",
        )
    choices = [json_object(choice, path, place) for choice in choices]
    read = {*_PATHS, *(p for i in range(len(choices)) for p in _choice_paths(i))}
    unread_routing(chunk, read, path, place)
    for key, value in chunk.items():
        if key == "meta_info":
            _merge_meta_info(whole, json_object(value, path, place), path, place)
        elif key == "sglext":
            extension = whole.setdefault(key, {})
            for name, part in json_object(value or {}, path, place).items():
                _set(extension, name, part, path, place)
        elif key != "choices":
            _set(whole, key, value, path, place)
    if "choices" in chunk:
        _merge_choices(whole.setdefault("choices", []), choices, path, place)


def _choice_paths(index: int) -> tuple[str, str]:
    return f"choices[{index}].{ROWS}", f"choices[{index}].{PROMPT_ROWS}"


def _merge_choices(
    whole: list[dict[str, Any]], choices: list[Mapping[str, Any]], path: Path, place: str
) -> None:
    for at, choice in enumerate(choices):
        index = choice.get("index", at)
        if not isinstance(index, int) or not 0 <= index <= len(whole) + len(choices):
            raise InputError(
                f"{index!r:.60}",
                source=path,
                place=f"{place} 'index'",
                expected="a choice's number",
            )
        while len(whole) <= index:
            whole.append({})
        for key, value in choice.items():
            known = whole[index].get(key)
            if key == "token_ids" and isinstance(known, list) and isinstance(value, list):
                whole[index][key] = [*known, *value]
            else:
                _set(whole[index], key, value, path, place)


def _merge_meta_info(
    whole: dict[str, Any], meta: Mapping[str, Any], path: Path, place: str
) -> None:
    """Keep the chunk with the rows, whose numbers of tokens belong to them, or the last one."""
    known = whole.get("meta_info", {}).get(ROWS)
    rows = meta.get(ROWS)
    if known is not None and rows is None:
        return
    if isinstance(known, str) and isinstance(rows, str):
        # rows so far and then all rows; others would be parts, of which nothing is known
        before, after = (decode_base64(text, path, place) for text in (known, rows))
        if not after.startswith(before):
            raise _other_rows(ROWS, path, place)
    whole["meta_info"] = dict(meta)


def _set(values: dict[str, Any], key: str, value: Any, path: Path, place: str) -> None:
    """Set a key; what a later chunk says holds, but rows are not to be replaced by others."""
    if value is None:
        values.setdefault(key, None)
        return
    if ROWS in key and values.get(key) is not None and values[key] != value:
        raise _other_rows(key, path, place)
    values[key] = value


def _other_rows(key: str, path: Path, place: str) -> InputError:
    return InputError(
        f"other rows of {key!r} than in an earlier chunk",
        source=path,
        place=place,
        expected="the rows of a response in one chunk",
        remedy="record responses that are not streamed",
    )
