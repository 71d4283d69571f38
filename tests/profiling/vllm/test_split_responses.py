"""Responses of vLLM that keep the prompt's rows apart, and rows under keys that are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.vllm.importer import read_vllm
from tests.profiling.recordings import (
    DECODE,
    PREFILL,
    all_rows,
    lines,
    npy_text,
    read,
    refusal,
    routing,
    sglang_response,
    vllm_response,
)

ROWS = routing(10)
PHASES = [PREFILL] * 7 + [DECODE] * 3


def split(prompt: Any, *choices: Any, generated: int | None = 4, **more: Any) -> dict[str, Any]:
    """A response with 7 prompt tokens and rows in both places."""
    line: dict[str, Any] = {
        "prompt_routed_experts": prompt,
        "choices": [{"index": i, "routed_experts": rows} for i, rows in enumerate(choices)],
        **more,
    }
    if generated is not None:
        line["usage"] = {"prompt_tokens": 7, "completion_tokens": generated}
    return line


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("form", [np.ndarray.tolist, npy_text, lambda rows: npy_text(rows, "<u2")])
def test_the_prompt_is_read_with_its_choice(tmp_path: Path, form: Any, usage: bool) -> None:
    """Nested lists and .npy bytes: 7 prompt rows are prefill 0..6, 3 of the choice decode 7..9."""
    line = split(form(ROWS[:7]), form(ROWS[7:]), generated=4 if usage else None)
    trace, (batch,), told = read(read_vllm, lines(tmp_path / "r.jsonl", line))
    assert trace.tokens.tolist() == [10]
    assert batch.experts.tolist() == ROWS.tolist()
    assert batch.position.tolist() == list(range(10))
    assert batch.phase.tolist() == PHASES
    assert told == []


def test_both_forms_give_the_same_trace(tmp_path: Path) -> None:
    """A response, whether split or whole, in a choice or a plain object, is the same request."""
    plain = {"prompt_tokens": 7, "completion_tokens": 4}
    forms = [
        vllm_response(ROWS, 7),
        vllm_response(ROWS, 7, prompt_routed_experts=None),
        split(ROWS[:7].tolist(), ROWS[7:].tolist()),
        {
            **split(None, ROWS[7:].tolist()),
            "choices": [
                {
                    "routed_experts": ROWS[7:].tolist(),
                    "prompt_routed_experts": ROWS[:7].tolist(),
                }
            ],
        },
        {"prompt_routed_experts": npy_text(ROWS[:7]), "routed_experts": npy_text(ROWS[7:]),
         **plain},
        {"routed_experts": None, **vllm_response(ROWS, 7)},
    ]  # fmt: skip
    _, batches, told = read(read_vllm, lines(tmp_path / "r.jsonl", *forms))
    assert all_rows(batches) == [ROWS.tolist()] * len(forms)
    assert [batch.phase.tolist() for batch in batches] == [PHASES] * len(forms)
    assert told == []


def test_each_choice_has_the_prompt_it_shares(tmp_path: Path) -> None:
    """As in whole responses, each choice is a request of its own with its prompt."""
    other = routing(5, seed=1)
    line = split(ROWS[:7].tolist(), ROWS[7:].tolist(), other.tolist(), generated=10)
    _, batches, told = read(read_vllm, lines(tmp_path / "r.jsonl", line))
    assert all_rows(batches) == [ROWS.tolist(), np.concatenate([ROWS[:7], other]).tolist()]
    assert [batch.phase.tolist().count(PREFILL) for batch in batches] == [7, 7]
    assert told == []


@pytest.mark.parametrize("generated", [4, None])
@pytest.mark.parametrize("held", [7, 5])
def test_a_prompt_held_twice_is_read_once(tmp_path: Path, generated: int | None, held: int) -> None:
    """Where the choice has the prompt's rows too they are read once, and that is told."""
    line = split(ROWS[7 - held : 7].tolist(), ROWS.tolist(), generated=generated)
    if held == 5 and generated is None:
        line["choices"][0]["routed_experts"] = ROWS[2:].tolist()
        line["usage"] = {"prompt_tokens": 7}
    _, (batch,), told = read(read_vllm, lines(tmp_path / "r.jsonl", line))
    start = 2 if held == 5 and generated is None else 0
    assert batch.experts.tolist() == ROWS[start:].tolist()
    assert batch.position.tolist() == list(range(start, 10))
    assert batch.phase.tolist() == PHASES[start:]
    assert told[-1] == (
        "1 choices hold the rows of prompt_routed_experts too, which were read once"
    )


@pytest.mark.parametrize(("extra", "tokens"), [(0, 10), (2, 10), (7, 10)])
def test_a_choice_that_holds_the_prompts_end(tmp_path: Path, extra: int, tokens: int) -> None:
    """Rows of the prompt's end in the choice are not counted twice, however many."""
    line = split(ROWS[:7].tolist(), ROWS[7 - extra :].tolist())
    trace, (batch,), _ = read(read_vllm, lines(tmp_path / "r.jsonl", line))
    assert trace.tokens.tolist() == [tokens]
    assert batch.experts.tolist() == ROWS.tolist()


def test_the_last_token_may_have_a_row(tmp_path: Path) -> None:
    """A row for the token that was not fed is kept as decode, as in whole responses."""
    rows = routing(11)
    line = split(rows[:7].tolist(), rows[7:].tolist())
    _, (batch,), _ = read(read_vllm, lines(tmp_path / "r.jsonl", line))
    assert batch.experts.tolist() == rows.tolist()
    assert batch.position.tolist() == list(range(11))


def test_prompts_alone(tmp_path: Path) -> None:
    """A prompt whose generated tokens have no rows is kept at its place, and told if some are."""
    one = split(ROWS[:7].tolist(), None, generated=1)
    empty = split(ROWS[:7].tolist(), [], generated=1)
    bare = {"prompt_routed_experts": ROWS[:7].tolist()}
    cut = split(ROWS[2:7].tolist(), None)
    _, batches, told = read(read_vllm, lines(tmp_path / "r.jsonl", one, empty, bare, cut))
    assert all_rows(batches) == [ROWS[:7].tolist()] * 3 + [ROWS[2:7].tolist()]
    assert batches[3].position.tolist() == [2, 3, 4, 5, 6]
    assert all(set(batch.phase.tolist()) == {PREFILL} for batch in batches)
    assert told == [
        "1 requests were recorded without the start of the prompt",
        "1 requests were recorded without their generated tokens",
    ]


def test_no_rows_at_all_are_an_aborted_response(tmp_path: Path) -> None:
    """Null in both places is no routing, and is counted."""
    whole = split(ROWS[:7].tolist(), ROWS[7:].tolist())
    _, batches, told = read(read_vllm, lines(tmp_path / "r.jsonl", whole, split(None, None)))
    assert len(batches) == 1
    assert told == ["left out 1 responses without routed experts (aborted?)"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (split(routing(8).tolist(), ROWS[7:].tolist()), "8 rows in 'prompt_routed_experts'"),
        (split(ROWS[:7].tolist(), ROWS[8:].tolist()), "2 rows of generated tokens; expected at"),
        (split(ROWS[:7].tolist(), routing(9, 5).tolist()), "'routed_experts' begins with 6 rows"),
        (split(ROWS[:7, :1].tolist(), ROWS[7:].tolist()), "of shape [7, 1, 2]; expected rows as"),
        (split(3, ROWS[7:].tolist()), "choice 0 'prompt_routed_experts': 3; expected base64"),
        (split([[1], [2, 3]], ROWS[7:].tolist()), "'prompt_routed_experts': the lists are no"),
        (split(ROWS[:7].tolist()), "key 'prompt_routed_experts' is not read"),
    ],
)
def test_parts_that_contradict_are_refused(tmp_path: Path, line: Any, words: str) -> None:
    """Rows that do not belong together, or would be lost, are named."""
    message = refusal(read_vllm, lines(tmp_path / "r.jsonl", line))
    assert words in message
    assert "line 1" in message


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (vllm_response(ROWS, 7) | {"completion_routed_experts": npy_text(ROWS)}, "completion_"),
        (vllm_response(ROWS, 7) | {"routed_experts": npy_text(ROWS)}, "choices[0].routed_experts"),
        (
            {"routed_experts": npy_text(ROWS), "outputs": [{"routed_experts": ROWS.tolist()}]},
            "outputs[0].routed_experts",
        ),
    ],
)
def test_rows_at_another_place_are_refused(tmp_path: Path, line: Any, key: str) -> None:
    """Rows that are in the line and would be dropped are refused with the key's path."""
    message = refusal(read_vllm, lines(tmp_path / "r.jsonl", line))
    assert f"key '{key}" in message
    assert "is not read" in message


def test_rows_at_another_place_of_sglang(tmp_path: Path) -> None:
    """SGLang's responses have rows in one place too."""
    line = sglang_response(ROWS, 7)
    line["choices"] = [{"sgl_ext": {"routed_experts": line["meta_info"]["routed_experts"]}}]
    message = refusal(read_sglang, lines(tmp_path / "r.jsonl", line))
    assert "key 'choices[0].sgl_ext.routed_experts' is not read" in message


def test_what_may_be_routing_is_told(tmp_path: Path) -> None:
    """A list under a key that speaks of experts is named once; numbers and words are settings."""
    more = {"expert_load": [1, 2, 3], "num_experts": 8, "expert_domain": "law"}
    for reader, line in (
        (read_vllm, vllm_response(ROWS, 7) | more),
        (read_sglang, sglang_response(ROWS, 7) | more),
    ):
        _, batches, told = read(reader, lines(tmp_path / "r.jsonl", line, line))
        assert len(batches) == 2
        assert told == ["did not read 'expert_load', which may be routing"]
