"""Small recordings of a model of two layers, top-2 of 8 experts, for tests of several readers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.sources import Source
from prism_plan.trace import TokenBatch, Trace

PREFILL, DECODE, UNKNOWN = 0, 1, 2
Rows = npt.NDArray[Any]


def tiny(num_experts: int = 8, top_k: int = 2, moe_layers: tuple[int, ...] = (0, 1)) -> ModelSpec:
    """The model of the recordings."""
    return ModelSpec(
        name="tiny",
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=64,
        dtype_bytes=2,
        expert_bytes=1000,
        dense_bytes=1000,
        kv_bytes_per_token=8,
    )


TINY = tiny()


def routing(tokens: int, seed: int = 0, model: ModelSpec = TINY) -> Rows:
    """Random selections int64 [T, L, K]."""
    noise = np.random.default_rng(seed).random((tokens, model.num_layers, model.num_experts))
    return np.argsort(noise, axis=2)[:, :, : model.top_k]


def npy_text(rows: Rows, dtype: str = "u1") -> str:
    """Base64 of .npy bytes, as vLLM returns rows."""
    stream = io.BytesIO()
    np.save(stream, rows.astype(dtype))
    return base64.b64encode(stream.getvalue()).decode()


def raw_text(rows: Rows) -> str:
    """Base64 of raw int32, as SGLang returns rows."""
    return base64.b64encode(rows.astype("<i4").tobytes()).decode()


def vllm_response(rows: Rows, prompt: int, **more: Any) -> dict[str, Any]:
    """A response of vLLM with all rows in its choice."""
    usage = {"prompt_tokens": prompt, "completion_tokens": len(rows) + 1 - prompt}
    return {"choices": [{"routed_experts": npy_text(rows)}], "usage": usage, **more}


def sglang_response(rows: Rows, prompt: int, generated: int | None = None) -> dict[str, Any]:
    """A response of SGLang's /generate."""
    meta = {
        "routed_experts": raw_text(rows),
        "prompt_tokens": prompt,
        "completion_tokens": len(rows) + 1 - prompt if generated is None else generated,
    }
    return {"text": "", "meta_info": meta}


def lines(path: Path, *values: Any) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


Reader = Callable[..., Trace]


def read(
    reader: Reader, *paths: Path, model: ModelSpec = TINY
) -> tuple[Trace, list[TokenBatch], list[str]]:
    """A trace, its batches, and what was told."""
    told: list[str] = []
    trace = reader([Source(path, "law") for path in paths], model, notify=told.append)
    return trace, [] if trace.batches is None else list(trace.batches()), told


def refusal(reader: Reader, *paths: Path, model: ModelSpec = TINY) -> str:
    """The one line with which a reader refuses files."""
    with pytest.raises(InputError) as caught:
        reader([Source(path, "law") for path in paths], model)
    message = str(caught.value)
    assert "\n" not in message
    assert paths[0].name in message
    return message


def all_rows(batches: Sequence[TokenBatch]) -> list[Any]:
    """The selections of each batch as lists."""
    return [batch.experts.tolist() for batch in batches]
