"""Responses of SGLang that carry their routed experts; see :mod:`prism_plan.profiling.sglang`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import (
    CHECK_MODEL,
    CUT_SHORT,
    Notify,
    Requests,
    decode_base64,
    json_lines,
    json_object,
    task_of_line,
    whole_number,
)
from prism_plan.trace import Trace, trace_from_batches


def read_responses(sources: Sequence[Source], model: ModelSpec, notify: Notify) -> Trace:
    """A token-level trace of responses; ``notify`` is told of those without experts.

    Raises
    ------
    InputError
        A line is no response, or of another model.
    """
    requests = Requests(model)
    for source in sources:
        path = source.path
        for place, value in json_lines(path):
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                where = f"{place} item {index}" if isinstance(value, list) else place
                line = json_object(item, path, where)
                task = task_of_line(line, source.task, path, where)
                for text, prompt, generated in _routed(line, path, where):
                    if text is None:
                        requests.missing += 1
                        continue
                    array = _raw_array(text, model, path, where)
                    requests.add(task, array, prompt, generated, path, where)
    requests.tell(sources[0].path, notify)
    return trace_from_batches(
        model,
        requests.tasks,
        requests.batches,
        provenance={
            "source": "sglang",
            "mode": "responses",
            "files": [source.path.name for source in sources],
        },
        name="sglang",
    )


def _routed(
    line: Mapping[str, Any], path: Path, place: str
) -> Iterator[tuple[str | None, int | None, int | None]]:
    """(base64 text, prompt tokens, generated tokens) of a response."""
    if "meta_info" in line:
        holder = json_object(line["meta_info"], path, f"{place} 'meta_info'")
        usage = holder
    elif "sglext" in line:
        holder = json_object(line["sglext"], path, f"{place} 'sglext'")
        usage = json_object(line.get("usage") or {}, path, f"{place} 'usage'")
    else:
        raise InputError(
            "neither 'meta_info' nor 'sglext' in it",
            source=path,
            place=place,
            expected="a response with meta_info.routed_experts or sglext.routed_experts",
            remedy="start SGLang with --enable-return-routed-experts and ask for "
            "return_routed_experts",
        )
    text = holder.get("routed_experts")
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"{text!r:.60}", source=path, place=f"{place} 'routed_experts'", expected="base64 text"
        )
    prompt = whole_number(usage, "prompt_tokens", path, place)
    generated = whole_number(usage, "completion_tokens", path, place)
    choices = line.get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        generated = None  # of all choices together; the array is the first one's
    yield text, prompt, generated


def _raw_array(text: str, model: ModelSpec, path: Path, place: str) -> npt.NDArray[Any]:
    data = decode_base64(text, path, place)
    layers = model.moe_layers[-1] + 1
    row = layers * model.top_k * 4
    if len(data) % row:
        raise InputError(
            f"{len(data)} bytes",
            source=path,
            place=f"{place} 'routed_experts'",
            expected=f"a multiple of {row}: int32 of {layers} layers, top-{model.top_k}",
            remedy=f"{CHECK_MODEL}; {CUT_SHORT}",
        )
    return np.frombuffer(data, "<i4").reshape(-1, layers, model.top_k)
