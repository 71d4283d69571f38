"""JSON Lines of one request, token and layer each."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.profiling.selections import importer as reader
from prism_plan.profiling.selections.importer import read_selections
from prism_plan.profiling.selections.line_parser import NAMES
from prism_plan.profiling.sources import Source
from prism_plan.profiling.vllm.importer import read_vllm
from tests.profiling.recordings import (
    TINY,
    all_rows,
    lines,
    read,
    refusal,
    routing,
    tiny,
    vllm_response,
)

ROWS = {"r1": routing(9, 1), 7: routing(5, 2), "r1 ": routing(12, 3)}
Line = dict[str, Any]


def of_request(request: Any, rows: Any, first: int = 0, layers: Any = (0, 1)) -> list[Line]:
    """The lines of a request, token by token."""
    return [
        {"req_id": request, "token_idx": first + t, "layer": layer, "topk_ids": ids.tolist()}
        for t, row in enumerate(rows)
        for layer, ids in zip(layers, row, strict=True)
    ]


ALL = [line for request, rows in ROWS.items() for line in of_request(request, rows)]


@given(seed=st.integers(0, 2**32), packed=st.booleans())
@settings(max_examples=15)
def test_any_order(tmp_path_factory: pytest.TempPathFactory, seed: int, packed: bool) -> None:
    """In any order, packed or not, the lines give the requests' rows by position."""
    shuffled = random.Random(seed).sample(ALL, len(ALL))
    path = lines(tmp_path_factory.mktemp("s") / "s.jsonl", *shuffled)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    trace, batches, told = read(read_selections, path)
    found = {json.dumps(rows) for rows in all_rows(batches)}
    assert found == {json.dumps(rows.tolist()) for rows in ROWS.values()}
    assert all(batch.position.tolist() == list(range(len(batch))) for batch in batches)
    assert trace.tokens.tolist() == [26]
    assert trace.requests is not None
    assert trace.requests.tolist() == [3]
    assert told == []


def test_equals_responses(tmp_path: Path) -> None:
    """The same routing as responses of vLLM gives the same counts and the same rows."""
    _, wanted, _ = read(
        read_vllm, lines(tmp_path / "r.jsonl", *(vllm_response(r, 5) for r in ROWS.values()))
    )
    _, batches, _ = read(read_selections, lines(tmp_path / "s.jsonl", *ALL))
    assert all_rows(batches) == all_rows(wanted)


@pytest.mark.parametrize("names", list(itertools.zip_longest(*NAMES.values())))
def test_names(tmp_path: Path, names: tuple[str | None, ...]) -> None:
    """Each name of each thing is read, beside other keys; two names at once are refused."""
    chosen = [name or all_names[0] for name, all_names in zip(names, NAMES.values(), strict=True)]
    renamed = [
        dict(zip(chosen, line.values(), strict=True)) | {"topk_weights": [0.5, 0.5], "ts": 1.5}
        for line in ALL
    ]
    path = lines(tmp_path / "s.jsonl", {"type": "meta", "top_k": 2}, *renamed)
    assert read(read_selections, path)[0].tokens.tolist() == [26]
    for what, (first, second, *_) in NAMES.items():
        path = lines(tmp_path / "t.jsonl", ALL[0] | {first: 0, second: 0})
        assert f"expected the {what} under one of {first}, {second}" in refusal(
            read_selections, path
        )


def test_phases_and_tasks(tmp_path: Path) -> None:
    """Phases are kept; tasks come from the label, else from the line, else from the file's name."""
    marked = [
        line | {"phase": "prefill" if line["token_idx"] < 3 else "decode", "task": task}
        for task, line in zip(itertools.cycle(["law"]), ALL, strict=False)
    ]
    path = lines(tmp_path / "chat.jsonl", *marked)
    trace = read_selections([Source(path)], TINY)
    assert trace.tasks == ("law",)
    assert trace.batches is not None
    for batch in trace.batches():
        assert batch.phase.tolist() == [0] * 3 + [1] * (len(batch) - 3)
    assert read_selections([Source(path, "a")], TINY).tasks == ("a",)
    assert read_selections([Source(lines(path, *ALL))], TINY).tasks == ("chat",)


def test_requests_of_several_files(tmp_path: Path) -> None:
    """Equal ids in two files of one label are two requests."""
    paths = [lines(tmp_path / f"{n}.jsonl", *of_request("r", routing(4, n))) for n in (0, 1)]
    trace, batches, _ = read(read_selections, *paths)
    assert all_rows(batches) == [routing(4, n).tolist() for n in (0, 1)]
    assert trace.tasks == ("law",)


def test_without_the_start(tmp_path: Path) -> None:
    """Tokens from a cache may be missing at the start; positions stay, and it is told."""
    path = lines(tmp_path / "s.jsonl", *of_request("r", routing(4), first=16))
    _, (batch,), told = read(read_selections, path)
    assert batch.position.tolist() == [16, 17, 18, 19]
    assert told == ["1 requests were recorded without the start of the prompt"]


def test_other_layers(tmp_path: Path) -> None:
    """Layers are decoder indices; those of multi-token prediction are left out with a notice."""
    model = tiny(moe_layers=(1, 3))
    rows = routing(4, model=tiny(moe_layers=(1, 3, 4)))
    path = lines(tmp_path / "s.jsonl", *of_request("r", rows, layers=(1, 3, 4)))
    _, batches, told = read(read_selections, path, model=model)
    assert all_rows(batches) == [rows[:, :2].tolist()]
    assert told[0].startswith("left out layers 4: ")
    path = lines(path, *of_request("r", rows, layers=(1, 3, 6)))
    assert "line 3: layer 6; expected a MoE layer of tiny, 1, 3" in refusal(
        read_selections, path, model=model
    )
    path = lines(path, *of_request("r", rows, layers=(1, 2, 3)))
    assert "line 2: layer 2; expected a MoE layer" in refusal(read_selections, path, model=model)


def test_repeated_rows_are_told(tmp_path: Path) -> None:
    """Rows that repeat in every layer are kept and told, as in other recordings."""
    rows = routing(80)
    rows[5:75] = rows[5]
    trace, _, told = read(read_selections, lines(tmp_path / "s.jsonl", *of_request("r", rows)))
    assert trace.tokens.tolist() == [80]
    assert trace.provenance["repeated_rows"] == 69
    assert "repeat the row before them in every layer" in told[0]


FIRST = ALL[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (5, "line 2: 5; expected a JSON object"),
        ({"a": 1}, "line 2: keys a; expected the request under one of request, request_id"),
        (FIRST | {"req_id": 1.5}, "line 2 request: 1.5; expected a text or a whole number"),
        (FIRST | {"req_id": True}, "line 2 request: True"),
        (FIRST | {"token_idx": -1}, "line 2 token: -1; expected a whole number of 0 to"),
        (FIRST | {"token_idx": 2**31}, "line 2 token: 2147483648"),
        (FIRST | {"token_idx": "3"}, "line 2 token: '3'"),
        (FIRST | {"layer": 0.0}, "line 2 layer: 0.0"),
        (FIRST | {"layer": 9}, "line 2: layer 9; expected a MoE layer of tiny, 0..1"),
        (FIRST | {"topk_ids": [1]}, "line 2 experts: [1]; expected 2 ids, top-k of tiny"),
        (FIRST | {"topk_ids": [1, 2.0]}, "line 2 experts: [1, 2.0]"),
        (FIRST | {"topk_ids": [1, True]}, "line 2 experts: [1, True]"),
        (FIRST | {"topk_ids": "1,2"}, "line 2 experts: '1,2'"),
        (FIRST | {"topk_ids": [1, 8]}, "line 2 layer 0: expert 8; expected ids 0..7 of tiny"),
        (FIRST | {"topk_ids": [-1, 2]}, "line 2 layer 0: expert -1"),
        (FIRST | {"topk_ids": [3, 3]}, "experts [3, 3] name one expert twice"),
        (FIRST | {"phase": "x"}, "line 2 phase: 'x'; expected prefill, decode, unknown"),
        ({"type": "meta", "top_k": 4}, "line 2: top_k 4; expected 2 of tiny"),
        (FIRST, "line 2: request 'r1' token 0 for the second time"),
        (ALL[1] | {"phase": "decode"}, "line 2: phase 'decode'; expected 'unknown'"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: Any, words: str) -> None:
    """A wrong line is told with its number, what was found, and what was expected."""
    path = lines(tmp_path / "s.jsonl", ALL[0], line, *ALL[1:])
    assert words in refusal(read_selections, path)


def test_duplicates_and_gaps(tmp_path: Path) -> None:
    """A token or layer twice, or missing, is refused with the line, early or late in the file."""
    path = tmp_path / "s.jsonl"
    for again in (ALL[:1], ALL[:2], ALL[1:2]):
        message = refusal(read_selections, lines(path, *ALL, *again))
        place = f"line {len(ALL) + len(again)}"
        assert f"{place}: request 'r1' token 0 for the second time" in message
    message = refusal(read_selections, lines(path, *ALL[:5], *ALL[6:]))
    assert "line 5: request 'r1' token 2 lacks layers 1; expected a line for each" in message
    message = refusal(read_selections, lines(path, *ALL[:4], *ALL[6:]))
    assert "line 6: request 'r1' continues with token 3; expected token 2 after token 1" in message


def test_one_layer_alone(tmp_path: Path) -> None:
    """A recording of one layer, as some hooks make it, says which layers it lacks."""
    path = lines(tmp_path / "s.jsonl", *ALL[::2])
    assert "line 1: request 'r1' token 0 lacks layers 1" in refusal(read_selections, path)


def test_open_tokens_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many tokens whose layers come late are refused with the remedy to sort."""
    late = [*ALL[::2], *ALL[1::2]]
    path = lines(tmp_path / "s.jsonl", *late)
    monkeypatch.setattr(reader, "MAX_INCOMPLETE_BYTES", 26 * 508)
    assert read(read_selections, path)[0].tokens.tolist() == [26]
    monkeypatch.setattr(reader, "MAX_INCOMPLETE_BYTES", 26 * 508 - 1)
    message = refusal(read_selections, path)
    assert "line 26: more than 25 tokens lack layers" in message
    assert "sort the file by request and token" in message


def test_nothing_in_it(tmp_path: Path) -> None:
    """A file without lines says what is read, with an example."""
    for text in ("", '{"type": "meta"}\n'):
        (tmp_path / "s.jsonl").write_text(text)
        message = refusal(read_selections, tmp_path / "s.jsonl")
        assert 'expected lines {"request": 0, "token": 0, "layer": 0, "experts": [0, 1]}' in message
    assert "is a folder; expected a file of lines" in refusal(read_selections, tmp_path)


def test_skipping_bad_lines(tmp_path: Path) -> None:
    """A bad line takes its token with it; others stay, and lines and gaps are told."""
    broken = [*ALL[:4], ALL[4] | {"topk_ids": [1, 9]}, *ALL[5:], "x", ALL[0]]
    path = lines(tmp_path / "s.jsonl", *broken)
    told: list[str] = []
    trace = read_selections([Source(path, "law")], TINY, skip_bad=True, notify=told.append)
    assert trace.tokens.tolist() == [25]
    assert trace.provenance["bad_rows_left_out"] == 4
    assert trace.batches is not None
    first = next(iter(trace.batches()))
    assert first.position.tolist() == [0, 1, *range(3, 9)]
    assert first.experts.tolist() == [*ROWS["r1"][:2].tolist(), *ROWS["r1"][3:].tolist()]
    assert f"{path}: left out bad rows: 4 of 54 (line 5 layer 0: expert 9; line 53: 'x'" in told[0]
    assert told[1] == "1 tokens are missing between others of their requests"
    path = lines(tmp_path / "t.jsonl", *(line | {"topk_ids": [8, 9]} for line in ALL))
    assert "line 1 layer 0: all" not in refusal(read_selections, path)
    with pytest.raises(Exception, match=r"no row is good \(52 bad\), the first one: expert 8"):
        read_selections([Source(path, "law")], TINY, skip_bad=True)


def test_a_recording_given_twice(tmp_path: Path) -> None:
    """Its requests would count twice, under whatever labels; a link is the same file."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    link = tmp_path / "b.jsonl"
    link.symlink_to(path)
    for read_file in (read_selections, read_vllm):
        for sources in ([Source(path, "a"), Source(path, "a")], [Source(path), Source(link, "b")]):
            with pytest.raises(InputError, match="given twice"):
                read_file(sources, TINY)
