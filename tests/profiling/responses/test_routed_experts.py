"""Rows that no router chose: zeros, padding of -1, and rows repeated by a stale buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.model_spec import PRESETS
from prism_plan.profiling.common.repeated_rows import (
    RepeatedRows,
    min_suspect_run,
    runs_of_equal_rows,
)
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.vllm.importer import read_vllm
from tests.profiling.recordings import (
    DECODE,
    PREFILL,
    TINY,
    lines,
    npy_text,
    read,
    refusal,
    routing,
    sglang_response,
    tiny,
    vllm_response,
)

FORMS = [(read_vllm, vllm_response), (read_sglang, sglang_response)]


def zeros(tokens: int) -> Any:
    return np.zeros((tokens, 2, 2), int)


# ------------------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize(("reader", "response"), FORMS)
@pytest.mark.parametrize("tokens", [1, 12, 511, 512, 600, 3000])
def test_zeros_are_refused_at_any_length(
    tmp_path: Path, reader: Any, response: Any, tokens: int
) -> None:
    """A request whose ids are all 0 was not recorded, in a file of others or alone."""
    for others in ([], [response(routing(10), 7)]):
        path = lines(tmp_path / "r.jsonl", *others, response(zeros(tokens), 1))
        message = refusal(reader, path)
        assert f"line {len(others) + 1}" in message
        assert "token 0 layer 0: nothing was recorded (all ids are 0)" in message
        assert "--enable-return-routed-experts" not in message


@pytest.mark.parametrize(("reader", "response"), FORMS)
@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize("number", [1, 600])
def test_zeros_in_a_part_are_refused(
    tmp_path: Path, reader: Any, response: Any, at: int, number: int
) -> None:
    """So was a part of a request, at its start or later."""
    rows = np.insert(routing(10), at, zeros(number), axis=0)
    message = refusal(reader, lines(tmp_path / "r.jsonl", response(rows, 7)))
    assert f"token {at} layer 0: nothing was recorded" in message


def test_zeros_of_a_plain_array(tmp_path: Path) -> None:
    """An array without numbers of tokens is no start-up profiling if it has zeros alone."""
    path = lines(tmp_path / "r.jsonl", {"routed_experts": npy_text(zeros(600))})
    assert "nothing was recorded" in refusal(read_vllm, path)
    counted = {
        "routed_experts": npy_text(zeros(600)),
        "prompt_tokens": 590,
        "completion_tokens": 11,
    }
    assert "nothing was recorded" in refusal(read_vllm, lines(path, counted))


@pytest.mark.parametrize(("tokens", "refused"), [(31, False), (32, True)])
def test_zeros_of_top_1(tmp_path: Path, tokens: int, refused: bool) -> None:
    """With K = 1 id 0 is a selection; 64 of them in a row, over tokens and layers, are not."""
    model = tiny(top_k=1)
    rows = np.concatenate([routing(5, model=model) * 0 + 3, np.zeros((tokens, 2, 1), int)])
    path = lines(tmp_path / "r.jsonl", vllm_response(rows, 7))
    if refused:
        assert "token 5: nothing was recorded" in refusal(read_vllm, path, model=model)
    else:
        trace, *_ = read(read_vllm, path, model=model)
        assert trace.tokens.tolist() == [36]


@pytest.mark.parametrize(("reader", "response"), FORMS)
def test_equal_rows_of_a_response_are_its_own(tmp_path: Path, reader: Any, response: Any) -> None:
    """Rows that the tokens of a request account for are kept, and told as repeated."""
    rows = np.concatenate([np.repeat(routing(1), 600, axis=0), routing(10, 1)])
    trace, _, told = read(reader, lines(tmp_path / "r.jsonl", response(rows, 600)))
    assert trace.tokens.tolist() == [610]
    assert len(told) == 1
    assert told[0].startswith("599 rows in 1 runs repeat the row before them in every layer")


# ----------------------------------------------------------------------------------------- padding


def padded(rows: Any, *at: int) -> Any:
    """The rows with padding at some places."""
    rows = rows.copy()
    rows[list(at)] = -1
    return rows


def vllm_signed(rows: Any, prompt: int) -> Any:
    """A response of vLLM in a type that can hold -1."""
    return vllm_response(rows, prompt) | {"choices": [{"routed_experts": npy_text(rows, "<i4")}]}


def vllm_lists(rows: Any, prompt: int) -> Any:
    """A response of vLLM as nested lists."""
    return vllm_response(rows, prompt) | {"choices": [{"routed_experts": rows.tolist()}]}


@pytest.mark.parametrize(
    ("reader", "response"),
    [(read_sglang, sglang_response), (read_vllm, vllm_signed), (read_vllm, vllm_lists)],
)
def test_padding_is_left_out(tmp_path: Path, reader: Any, response: Any) -> None:
    """Rows of -1 in every layer are left out; the others keep their positions and phases."""
    rows = routing(12)
    path = lines(tmp_path / "r.jsonl", response(rows, 8), response(padded(rows, 0, 5, 9), 8))
    trace, (_, batch), told = read(reader, path)
    assert trace.tokens.tolist() == [21]
    kept = [1, 2, 3, 4, 6, 7, 8, 10, 11]
    assert batch.position.tolist() == kept
    assert batch.experts.tolist() == rows[kept].tolist()
    assert batch.phase.tolist() == [PREFILL] * 6 + [DECODE] * 3
    assert told == ["left out 3 rows of padding (-1 in every layer)"]
    assert trace.provenance["padding_rows_left_out"] == 3


@pytest.mark.parametrize(("before", "after"), [(0, 4), (4, 0), (1, 7)])
def test_padding_beyond_the_request(tmp_path: Path, before: int, after: int) -> None:
    """Padding that makes more rows than there are tokens stands for none."""
    rows = routing(12)
    wide = np.pad(rows, ((before, after), (0, 0), (0, 0)), constant_values=-1)
    path = lines(tmp_path / "r.jsonl", sglang_response(wide, 8, generated=5))
    _, (batch,), told = read(read_sglang, path)
    assert batch.position.tolist() == list(range(12))
    assert batch.experts.tolist() == rows.tolist()
    assert told == [f"left out {before + after} rows of padding (-1 in every layer)"]


def test_dense_layers_of_padding(tmp_path: Path) -> None:
    """A dense layer's column may be 0 or -1, in rows of padding and others."""
    model = tiny(moe_layers=(1, 2))
    rows = routing(6, model=model)
    for dense in (0, -1):
        wide = np.insert(padded(rows, 2), 0, dense, axis=1)
        path = lines(tmp_path / "r.jsonl", sglang_response(wide, 4))
        _, (batch,), _ = read(read_sglang, path, model=model)
        assert batch.experts.tolist() == np.delete(rows, 2, axis=0).tolist()


def test_a_request_of_padding_alone(tmp_path: Path) -> None:
    """Such a request is left out with a notice; a file of nothing else is refused."""
    alone = sglang_response(padded(routing(4), 0, 1, 2, 3), 3)
    path = lines(tmp_path / "r.jsonl", alone, sglang_response(routing(9), 5))
    trace, _, told = read(read_sglang, path)
    assert trace.requests is not None
    assert (trace.requests.tolist(), trace.tokens.tolist()) == ([1], [9])
    assert told == [
        "left out 4 rows of padding (-1 in every layer)",
        "left out 1 requests that are padding alone",
    ]
    message = refusal(read_sglang, lines(path, alone, alone))
    assert "no token has routed experts: left out 8 rows of padding" in message
    assert "--enable-return-routed-experts" not in message


@pytest.mark.parametrize("place", [(3, 1), (3, 0), (3, 1, 1)])
def test_padding_of_some_layers_is_refused(tmp_path: Path, place: tuple[int, ...]) -> None:
    """A row with -1 in some layers, or for some experts, is a broken one and is named."""
    rows = routing(6)
    rows[place] = -1
    message = refusal(read_sglang, lines(tmp_path / "r.jsonl", sglang_response(rows, 4)))
    words = f"token 3 layer {place[1]}: expert -1; expected ids 0..7 of tiny, or -1 in every"
    assert words in message


# -------------------------------------------------------------------------------------- stale rows


@pytest.mark.parametrize(("reader", "response"), FORMS)
def test_repeated_rows_are_counted(tmp_path: Path, reader: Any, response: Any) -> None:
    """Long runs of rows that are equal in every layer are kept, counted, and their place told."""
    rows = np.repeat(routing(30), [1] * 4 + [68] + [1] * 15 + [41] + [1] * 9, axis=0)
    path = lines(tmp_path / "r.jsonl", response(rows, 100), response(routing(30, 1), 20))
    trace, _, told = read(reader, path)
    assert trace.tokens.tolist() == [len(rows) + 30]
    assert len(told) == 1
    assert told[0].startswith("107 rows in 2 runs repeat the row before them in every layer, ")
    assert "the longest 67 rows at" in told[0]
    assert "r.jsonl line 1" in told[0]
    assert "after token 4:" in told[0]
    assert trace.provenance["repeated_rows"] == 107


def test_rows_equal_in_one_layer_are_no_matter(tmp_path: Path) -> None:
    """A token that repeats may choose alike in one layer; without all layers nothing is told."""
    for layer in (0, 1):
        rows = routing(80)
        rows[:, layer] = rows[0, layer]
        *_, told = read(read_vllm, lines(tmp_path / "r.jsonl", vllm_response(rows, 70)))
        assert told == []


@pytest.mark.parametrize(
    ("model", "shortest"),
    [
        (TINY, 26),
        (tiny(moe_layers=(3,)), 51),
        (tiny(num_experts=2, top_k=1, moe_layers=(3,)), 101),
        (PRESETS["mixtral-8x7b"], 16),
        (PRESETS["deepseek-v2-lite"], 16),
    ],
)
def test_the_length_that_is_told(model: Any, shortest: int) -> None:
    """50 bits at a bit a layer at most, and never fewer than 16 rows."""
    assert min_suspect_run(model) == shortest
    for length in (shortest - 1, shortest):
        repeated = RepeatedRows(model)
        repeated.add(np.repeat(routing(1, model=model), length, axis=0).astype(np.uint16), "r")
        assert (repeated.rows, repeated.runs) == ((length - 1, 1) if length == shortest else (0, 0))
        assert bool(repeated.notice()) == (length == shortest)


def test_nothing_is_told_where_there_is_no_choice() -> None:
    """With K = E all rows are equal as sets, and may be in order."""
    model = tiny(num_experts=2, top_k=2)
    assert min_suspect_run(model) is None
    repeated = RepeatedRows(model)
    repeated.add(np.repeat(routing(1, model=model), 999, axis=0).astype(np.uint16), "r")
    assert repeated.notice() == ""


def test_runs_end_where_something_begins() -> None:
    """Equal rows of two requests are no run."""
    rows = np.repeat(routing(3), [4, 1, 6], axis=0).astype(np.uint16)
    starts, lengths = runs_of_equal_rows(rows)
    assert (starts.tolist(), lengths.tolist()) == ([0, 5], [4, 6])
    begins = np.zeros(11, bool)
    begins[[0, 7]] = True
    starts, lengths = runs_of_equal_rows(rows, begins)
    assert (starts.tolist(), lengths.tolist()) == ([0, 5, 7], [4, 2, 4])
    for short in (0, 1):
        assert len(runs_of_equal_rows(rows[:short])[0]) == 0
