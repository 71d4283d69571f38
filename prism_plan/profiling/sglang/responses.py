"""Read responses of SGLang that carry their routed experts; see :mod:`.reader`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prism_plan.errors import InputError
from prism_plan.io.bad_rows import BadRows
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.printable_text import shown
from prism_plan.profiling.common.extra_layers import MAX_MTP_LAYERS
from prism_plan.profiling.common.json_fields import (
    decode_base64,
    json_object,
    optional_count,
    task_of,
)
from prism_plan.profiling.common.messages import CHECK_MODEL, TRUNCATED, Notify
from prism_plan.profiling.responses.request_collector import RequestCollector, TokenCounts
from prism_plan.profiling.responses.response_files import read_responses
from prism_plan.profiling.responses.routed_experts import Array
from prism_plan.profiling.responses.unread_keys import find_unread_routing
from prism_plan.profiling.sources import Source
from prism_plan.trace import Trace


def read_sglang_responses(
    sources: Sequence[Source], model: ModelSpec, notify: Notify, *, skip_bad: bool = False
) -> Trace:
    """Read files of responses into one token-level trace.

    ``notify`` is called with what was left out or looks wrong. With ``skip_bad`` responses that
    cannot be read, or are of another model, are left out as long as others of their file are good.

    Raises
    ------
    InputError
        A file or response cannot be read or is of another model, or none has routed experts.
    """
    requests = RequestCollector(model)
    bad = BadRows(skip_bad)
    for source in sources:
        path = source.path
        for at, value in read_responses(path, bad):
            try:
                line = json_object(value, at)
                task = task_of(line, source.task, path, at)
                text, counts, read = _parse_response(line, at)
                unread = find_unread_routing(line, {read}, at)
                if text is not None:
                    requests.add(task, _parse_rows(text, model, counts, at), counts, at)
            except InputError as error:
                bad.skip_or_raise(path, error)
                continue
            bad.count_good(path)
            requests.unread |= unread
            requests.without_routing += text is None
    provenance = {"mode": "responses", "files": [source.path.name for source in sources]}
    return requests.trace("sglang", sources, provenance, bad, notify)


def _parse_response(line: Mapping[str, Any], at: Location) -> tuple[str | None, TokenCounts, str]:
    """Base64 text of the rows, numbers of tokens, and path of the text, of a response."""
    if "meta_info" in line:
        read = "meta_info.routed_experts"
        holder = json_object(line["meta_info"], at.within("'meta_info'"))
        usage = holder
    elif "sglext" in line:
        read = "sglext.routed_experts"
        holder = json_object(line["sglext"], at.within("'sglext'"))
        usage = json_object(line.get("usage") or {}, at.within("'usage'"))
    else:
        raise at.error(
            "neither 'meta_info' nor 'sglext' in it",
            "a response with meta_info.routed_experts or sglext.routed_experts",
            "start SGLang with --enable-return-routed-experts and ask for return_routed_experts",
        )
    text = holder.get("routed_experts")
    if text is not None and not isinstance(text, str):
        raise at.within("'routed_experts'").error(shown(text), "base64 text")
    prompt = optional_count(usage, "prompt_tokens", at)
    generated = optional_count(usage, "completion_tokens", at)
    choices = line.get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        generated = None  # of all choices together; the array is the first one's
    return text, TokenCounts(prompt, generated), read


def _parse_rows(text: str, model: ModelSpec, counts: TokenCounts, at: Location) -> Array:
    """Int32 [tokens, decoder layers, K] of base64 text, which does not give its shape."""
    data = decode_base64(text, at)
    layers = model.num_decoder_layers
    column = model.top_k * 4
    if counts.total is not None:
        layers += _num_mtp_layers(len(data), column, layers, counts.total - 1)
    row = layers * column
    if len(data) % row:
        raise at.within("'routed_experts'").error(
            f"{len(data)} bytes",
            f"a multiple of {row}: int32 of {layers} layers, top-{model.top_k}",
            f"{CHECK_MODEL}; {TRUNCATED}",
        )
    return np.frombuffer(data, "<i4").reshape(-1, layers, model.top_k)


def _num_mtp_layers(size: int, column: int, layers: int, tokens: int) -> int:
    """How many MTP layers the rows in ``size`` bytes have, if all ``tokens`` are there.

    0 if the bytes can be rows of the model's layers, of so many tokens or fewer.
    """
    rows, rest = divmod(size, layers * column)
    if not rest and rows <= tokens + 1:
        return 0
    extra = range(1, MAX_MTP_LAYERS + 1)
    return next((n for n in extra if size == tokens * (layers + n) * column), 0)
