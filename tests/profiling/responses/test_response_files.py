"""Files of responses: arrays, indented documents, streams, and all of them compressed."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.sources import Source
from prism_plan.profiling.vllm.importer import read_vllm
from tests.profiling.recordings import (
    TINY,
    Reader,
    all_rows,
    lines,
    npy_text,
    read,
    refusal,
    routing,
    sglang_response,
    vllm_response,
)

ROWS = [routing(tokens, seed) for seed, tokens in enumerate((9, 12, 7))]
RESPONSES: dict[str, tuple[Reader, list[dict[str, Any]]]] = {
    "vllm": (read_vllm, [vllm_response(rows, 5) for rows in ROWS]),
    "sglang": (read_sglang, [sglang_response(rows, 5) for rows in ROWS]),
}
engines = pytest.mark.parametrize("engine", RESPONSES)


def packed(path: Path) -> Path:
    """The file compressed, under a name that does not tell so."""
    other = path.with_name(f"packed-{path.name}")
    other.write_bytes(gzip.compress(path.read_bytes()))
    return other


def as_lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


LAYOUTS: dict[str, Callable[[Sequence[Any]], str]] = {
    "array": json.dumps,
    "indented array": lambda values: json.dumps(values, indent=2),
    "one a line in brackets": lambda values: "[\n" + ",\n".join(map(json.dumps, values)) + "\n]\n",
    "arrays as lines": lambda values: as_lines([values[:2], values[2:]]),
    "events of whole responses": lambda values: (
        "".join(f"data: {json.dumps(value | {'id': str(i)})}\n\n" for i, value in enumerate(values))
        + "data: [DONE]\n"
    ),
}


@engines
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.log"])
def test_layouts(tmp_path: Path, engine: str, layout: str, name: str) -> None:
    """Each layout, packed or not, under any name, reads as the same responses as JSON Lines."""
    reader, responses = RESPONSES[engine]
    wanted, batches, told = read(reader, lines(tmp_path / "lines.jsonl", *responses))
    assert all_rows(batches) == [rows.tolist() for rows in ROWS]
    path = tmp_path / name
    path.write_text(LAYOUTS[layout](responses))
    for file in (path, packed(path)):
        trace, found, notices = read(reader, file)
        assert all_rows(found) == all_rows(batches)
        assert [b.phase.tolist() for b in found] == [b.phase.tolist() for b in batches]
        assert trace.tokens.tolist() == wanted.tokens.tolist()
        assert notices == told


@engines
def test_one_indented_response(tmp_path: Path, engine: str) -> None:
    """A single response as a server's client prints it is a file of one."""
    reader, responses = RESPONSES[engine]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(responses[0], indent=4))
    assert all_rows(read(reader, path)[1]) == [ROWS[0].tolist()]


@engines
def test_places_in_an_array(tmp_path: Path, engine: str) -> None:
    """An error names the item of an array, or the line and the item."""
    reader, responses = RESPONSES[engine]
    path = tmp_path / "r.json"
    for indent, place in ((None, "line 1 item 1"), (2, "item 1")):
        path.write_text(json.dumps([responses[0], 5], indent=indent))
        assert f"r.json: {place}: 5; expected a JSON object" in refusal(reader, path)


def test_responses_from_a_pipe(tmp_path: Path) -> None:
    """A stream, which can be read once only, is read as a file in every layout."""
    for text in (as_lines, *LAYOUTS.values()):
        data = text(RESPONSES["vllm"][1]).encode()
        for held in (data, gzip.compress(data)):
            reading, writing = os.pipe()
            with os.fdopen(writing, "wb") as stream:
                stream.write(held)
            _, batches, _ = read(read_vllm, Path(f"/dev/fd/{reading}"))
            os.close(reading)
            assert all_rows(batches) == [rows.tolist() for rows in ROWS]


def test_stems_of_packed_files(tmp_path: Path) -> None:
    """The task of an unlabelled file is its name without .jsonl.gz."""
    path = tmp_path / "law.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(RESPONSES["vllm"][1]).encode()))
    assert read_vllm([Source(path)], TINY).tasks == ("law",)


# --------------------------------------------------------------------------------- streams


def events(*chunks: Any) -> str:
    """A stream as a client writes it down, with a comment and an event's name."""
    text = ": ping\n\n"
    for chunk in chunks:
        text += f"event: message\ndata: {chunk if chunk == '[DONE]' else json.dumps(chunk)}\n\n"
    return text


def generate(number: int, rows: Any) -> list[Any]:
    """SGLang's /generate: text and numbers so far in each chunk, rows in the last one."""
    whole = sglang_response(rows, 5)["meta_info"]
    chunks = []
    for done in range(1, whole["completion_tokens"] + 1):
        meta = {"id": f"r{number}", "prompt_tokens": 5, "completion_tokens": done}
        last = done == whole["completion_tokens"]
        chunks.append({"text": "x" * done, "meta_info": whole | meta if last else meta})
    return chunks


def openai(number: int, rows: Any, usage: bool = True) -> list[Any]:
    """SGLang's OpenAI interface: rows in a chunk of their own, then the numbers of tokens."""
    head = {"id": f"c{number}", "object": "chat.completion.chunk"}
    text = {"index": 0, "delta": {"content": "x"}, "finish_reason": None}
    whole = sglang_response(rows, 5)["meta_info"]
    numbers = {"prompt_tokens": 5, "completion_tokens": whole["completion_tokens"]}
    chunks: list[Any] = [{**head, "choices": [text], "usage": None, "sglext": None}] * 2
    chunks.append({**head, "choices": [], "sglext": {"routed_experts": whole["routed_experts"]}})
    return [*chunks, {**head, "choices": [], "usage": numbers}] if usage else chunks


def vllm_stream(number: int, *rows: Any, usage: bool = True) -> list[Any]:
    """vLLM: rows of each choice in the chunk with which it ends; then the numbers of tokens."""
    head = {"request_id": f"v{number}"}
    chunks = []
    for index, of_choice in enumerate(rows):
        made = len(of_choice) + 1 - 5
        for token in range(made - 1):
            choice = {"index": index, "token_ids": [token], "routed_experts": None}
            chunks.append({**head, "choices": [choice]})
        last = {"index": index, "token_ids": [made], "finish_reason": "stop"}
        chunks.append({**head, "choices": [last | {"routed_experts": npy_text(of_choice)}]})
    made = sum(len(of_choice) + 1 - 5 for of_choice in rows)
    numbers = {"prompt_tokens": 5, "completion_tokens": made}
    return [*chunks, {**head, "choices": [], "usage": numbers}] if usage else chunks


STREAMS = {
    "generate": (read_sglang, generate),
    "openai": (read_sglang, openai),
    "vllm": (read_vllm, vllm_stream),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams(tmp_path: Path, kind: str) -> None:
    """Streams, one after the other or interleaved, read as the same responses unstreamed."""
    reader, chunks_of = STREAMS[kind]
    engine = "vllm" if kind == "vllm" else "sglang"
    _, wanted, _ = read(reader, lines(tmp_path / "l.jsonl", *RESPONSES[engine][1]))
    streams = [chunks_of(number, rows) for number, rows in enumerate(ROWS)]
    after = [chunk for stream in streams for chunk in [*stream, "[DONE]"]]
    mixed = [s[i] for i in range(max(map(len, streams))) for s in streams if i < len(s)]
    path = tmp_path / "s.txt"
    for chunks in (after, mixed, [*mixed, "[DONE]"]):
        path.write_text(events(*chunks))
        trace, batches, _ = read(reader, path)
        assert all_rows(batches) == all_rows(wanted)
        assert [b.phase.tolist() for b in batches] == [b.phase.tolist() for b in wanted]
        assert trace.tasks == ("law",)


def test_streamed_choices(tmp_path: Path) -> None:
    """Each choice of a streamed response is a request; its tokens are counted from its chunks."""
    path = tmp_path / "s.txt"
    path.write_text(events(*vllm_stream(0, *ROWS), "[DONE]"))
    _, batches, _ = read(read_vllm, path)
    assert all_rows(batches) == [rows.tolist() for rows in ROWS]
    assert [int((batch.phase == 0).sum()) for batch in batches] == [5, 5, 5]


def test_stream_without_usage(tmp_path: Path) -> None:
    """Without the numbers of tokens the phases are unknown."""
    path = tmp_path / "s.txt"
    for reader, chunks in ((read_sglang, openai), (read_vllm, vllm_stream)):
        path.write_text(events(*chunks(0, ROWS[0], usage=False)))
        _, (batch,), _ = read(reader, path)
        assert set(batch.phase.tolist()) == {2}


def test_rows_so_far(tmp_path: Path) -> None:
    """Rows of the part that is done are replaced by those of the whole, not by other rows."""
    chunks = generate(0, ROWS[0])
    path = tmp_path / "s.txt"
    part = sglang_response(ROWS[0][:7], 5)["meta_info"] | {"id": "r0"}
    path.write_text(events({"text": "", "meta_info": part}, *chunks))
    assert all_rows(read(read_sglang, path)[1]) == [ROWS[0].tolist()]
    part = sglang_response(ROWS[0][2:], 5)["meta_info"] | {"id": "r0"}
    path.write_text(events({"text": "", "meta_info": part}, *chunks))
    assert "other rows of 'routed_experts' than in an earlier chunk" in refusal(read_sglang, path)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([*generate(0, ROWS[0]), "[DONE]", *generate(0, ROWS[0])], "'r0' continues after a [DONE]"),
        ([{"error": {"message": "out of memory"}}], "an error of the server: {'message': 'out of"),
        ([5], "line 4: 5; expected a JSON object"),
        ([{"id": "a", "choices": 5}], "'choices': 5; expected a list of choices"),
        ([{"id": "a", "choices": [5]}], "line 4: 5; expected a JSON object"),
        ([{"id": "a", "choices": [{"index": 10**9}]}], "'index': 1000000000"),
        ([{"id": "a", "choices": [{"delta": {"routed_experts": "x" * 99}}]}], "is not read"),
        ([*openai(0, ROWS[0]), openai(0, ROWS[1])[2]], "other rows of 'routed_experts'"),
        (openai(0, ROWS[0])[:2], "no token has routed experts"),
    ],
)
def test_streams_that_are_refused(tmp_path: Path, chunks: list[Any], words: str) -> None:
    """A stream is refused where chunks do not belong together, and by the line."""
    path = tmp_path / "s.txt"
    path.write_text(events(*chunks))
    assert words in refusal(read_sglang, path)


def test_lines_between_events(tmp_path: Path) -> None:
    """What is no event is refused, not passed over."""
    path = tmp_path / "s.txt"
    path.write_text(events(*generate(0, ROWS[0])) + "HTTP/1.1 200 OK\n")
    assert "'HTTP/1.1 200 OK'; expected an event" in refusal(read_sglang, path)
