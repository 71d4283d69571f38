"""Responses of SGLang that carry their routed experts; see :mod:`prism_plan.profiling.sglang`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.model import ModelSpec
from prism_plan.profiling.layers import MAX_MTP_LAYERS, decoder_end
from prism_plan.profiling.requests import Requests
from prism_plan.profiling.responses import responses
from prism_plan.profiling.sources import Source
from prism_plan.profiling.tensors import (
    CHECK_MODEL,
    CUT_SHORT,
    Notify,
    decode_base64,
    json_object,
    task_of_line,
    whole_number,
)
from prism_plan.profiling.unread import unread_routing
from prism_plan.text import shown
from prism_plan.trace import Trace, trace_from_batches


def read_responses(
    sources: Sequence[Source], model: ModelSpec, notify: Notify, *, skip_bad: bool = False
) -> Trace:
    """A token-level trace of responses; ``notify`` is told of those without experts.

    With ``skip_bad`` also of those that cannot be read, which are then left out.

    Raises
    ------
    InputError
        A line is no response, or of another model.
    """
    requests = Requests(model)
    bad = BadRows(skip_bad)
    for source in sources:
        path = source.path
        for place, value in responses(path, bad):
            try:
                line = json_object(value, path, place)
                task = task_of_line(line, source.task, path, place)
                text, prompt, generated, read = _routed(line, path, place)
                unread = unread_routing(line, {read}, path, place)
                if text is not None:
                    array = _raw_array(text, model, prompt, generated, path, place)
                    requests.add(task, array, prompt, generated, path, place)
            except InputError as error:
                bad.skip_or_raise(path, error)
                continue
            bad.keep(path)
            requests.unread |= unread
            requests.missing += text is None
    bad.require_good()
    requests.tell(sources[0].path, notify)
    bad.tell(notify)
    return trace_from_batches(
        model,
        requests.tasks,
        requests.batches,
        provenance={
            "source": "sglang",
            "mode": "responses",
            "files": [source.path.name for source in sources],
            **requests.provenance(),
            **bad.provenance(),
        },
        name="sglang",
    )


def _routed(
    line: Mapping[str, Any], path: Path, place: str
) -> tuple[str | None, int | None, int | None, str]:
    """(base64 text, prompt tokens, generated tokens, where the text stands) of a response."""
    if "meta_info" in line:
        read = "meta_info.routed_experts"
        holder = json_object(line["meta_info"], path, f"{place} 'meta_info'")
        usage = holder
    elif "sglext" in line:
        read = "sglext.routed_experts"
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
            shown(text), source=path, place=f"{place} 'routed_experts'", expected="base64 text"
        )
    prompt = whole_number(usage, "prompt_tokens", path, place)
    generated = whole_number(usage, "completion_tokens", path, place)
    choices = line.get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        generated = None  # of all choices together; the array is the first one's
    return text, prompt, generated, read


def _raw_array(
    text: str,
    model: ModelSpec,
    prompt: int | None,
    generated: int | None,
    path: Path,
    place: str,
) -> npt.NDArray[Any]:
    """Int32 [tokens, decoder layers, K] of base64 text, which does not tell its shape."""
    data = decode_base64(text, path, place)
    layers = decoder_end(model)
    column = model.top_k * 4
    if prompt is not None and generated is not None:
        layers += _extra_layers(len(data), column, layers, prompt + generated - 1)
    row = layers * column
    if len(data) % row:
        raise InputError(
            f"{len(data)} bytes",
            source=path,
            place=f"{place} 'routed_experts'",
            expected=f"a multiple of {row}: int32 of {layers} layers, top-{model.top_k}",
            remedy=f"{CHECK_MODEL}; {CUT_SHORT}",
        )
    return np.frombuffer(data, "<i4").reshape(-1, layers, model.top_k)


def _extra_layers(size: int, column: int, layers: int, tokens: int) -> int:
    """How many layers stand after the model's in ``size`` bytes, if all ``tokens`` are there.

    None if the bytes are rows of the model's layers, of so many tokens or fewer.
    """
    rows, rest = divmod(size, layers * column)
    if not rest and rows <= tokens + 1:
        return 0
    extra = range(1, MAX_MTP_LAYERS + 1)
    return next((n for n in extra if size == tokens * (layers + n) * column), 0)
