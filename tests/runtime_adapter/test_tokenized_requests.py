"""Requests that come on standard input: one bad line is one failed answer, whatever it holds."""

from __future__ import annotations

import io
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.io.serve_requests import MAX_REQUESTS
from runtime_adapter.tokenized_requests import (
    MAX_LINE_BYTES,
    RequestTokenizer,
    TokenizedRequest,
    load_tokenizer,
)
from runtime_adapter.weights.checkpoint import Checkpoint
from tests.runtime_adapter.checkpoints import TRACES


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A committed checkpoint with its tokenizer."""
    return Checkpoint(TRACES / "tiny-deepseek-v2")


def streamed(checkpoint: Checkpoint, data: bytes) -> list[TokenizedRequest]:
    """Requests on standard input, of the third server."""
    tokenizing = RequestTokenizer(load_tokenizer(checkpoint), checkpoint, 2, 8)
    return list(tokenizing.tokenize_stream(io.BytesIO(data), time.monotonic() - 5.0))


def test_lines_become_requests_in_their_order(checkpoint: Checkpoint) -> None:
    """A request arrives when it is read, or at the later time that it asks for."""
    data = b'{"prompt": "ab", "id": "x"}\n\n{"prompt": "c", "at_s": 900, "max_new_tokens": 3}'
    first, second = streamed(checkpoint, data)
    assert (first.request.id, first.error, first.new_tokens) == ("x", None, 8)
    assert first.request.at_s >= 5.0
    assert (second.request.line, second.request.at_s, second.new_tokens) == (3, 900, 3)
    assert (first.number, second.number) == (2 * MAX_REQUESTS, 2 * MAX_REQUESTS + 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "standard input: line 1"),
        (b"\xff\xfe", "standard input: line 1"),
        (b'{"prompt": "a", "at_s": 1e999}', "line 1"),
        (b'{"prompt": "a", "at_s": 1e9}', "at_s: 1000000000.0; expected"),
        (b'{"task": "t"}', "key 'prompt' is missing"),
        (b'{"prompt": "' + b"a " * 2000 + b'"}', "the model's context"),
        (b'{"prompt": "' + b"a" * (MAX_LINE_BYTES + 10) + b'"}', "more than 16,777,216 bytes"),
    ],
    ids=[
        "no JSON",
        "no UTF-8",
        "infinite time",
        "far time",
        "no prompt",
        "long prompt",
        "long line",
    ],
)
def test_a_bad_line_fails_alone(checkpoint: Checkpoint, line: bytes, words: str) -> None:
    """It becomes one request with a message of one line that names it; the next line is served."""
    bad, good = streamed(checkpoint, line + b'\n{"prompt": "fine"}\n')
    assert bad.error is not None
    assert words in bad.error
    assert "\n" not in bad.error
    assert bad.ids == []
    assert good.error is None
    assert good.ids
