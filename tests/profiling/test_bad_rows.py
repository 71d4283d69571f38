"""Bad rows that are left out one by one: what is kept, what is told, and what stays an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_plan as pp
from prism_plan.errors import InputError
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.sources import Source
from prism_plan.profiling.vllm.importer import read_vllm
from prism_plan.trace import Trace
from tests.profiling.recordings import TINY, all_rows, routing, sglang_response, vllm_response

Run = Callable[..., CompletedProcess[str]]
FOREIGN = routing(9, 3) + 8
#: Lines that are no response to be read, for each engine.
BAD: dict[str, list[str]] = {
    "vllm": [
        '{"choices": [{"rout',
        "[1]",
        json.dumps(vllm_response(FOREIGN, 5)),
        json.dumps({"choices": [{"text": "x"}]}),
        json.dumps(vllm_response(routing(9)[:, :1], 5)),
    ],
    "sglang": [
        '{"meta_info": {"rou',
        "7",
        json.dumps(sglang_response(FOREIGN, 5)),
        json.dumps({"text": "x"}),
        json.dumps(sglang_response(routing(9), 5, generated=1)),
    ],
}
READERS: dict[str, tuple[Callable[..., Trace], Callable[..., Any]]] = {
    "vllm": (read_vllm, vllm_response),
    "sglang": (read_sglang, sglang_response),
}
engines = pytest.mark.parametrize("engine", READERS)


def skipping(reader: Callable[..., Trace], *paths: Path) -> tuple[Trace, Sequence[Any], list[str]]:
    """A trace without the bad rows, its batches, and what was told."""
    told: list[str] = []
    sources = [Source(path, "law") for path in paths]
    trace = reader(sources, TINY, skip_bad=True, notify=told.append)
    return trace, [] if trace.batches is None else list(trace.batches()), told


@engines
@given(order=st.permutations(range(8)))
@settings(max_examples=15)
def test_what_is_kept(
    tmp_path_factory: pytest.TempPathFactory, engine: str, order: list[int]
) -> None:
    """Good responses are read as if the bad ones were not there, wherever these stand."""
    reader, response = READERS[engine]
    good = {5 + i: routing(9 + i, i) for i in range(3)}
    path = tmp_path_factory.mktemp("b") / "r.jsonl"
    texts = [BAD[engine][i] if i < 5 else json.dumps(response(good[i], 5)) for i in order]
    path.write_text("\n".join(texts) + "\n")
    trace, batches, told = skipping(reader, path)
    assert all_rows(batches) == [good[i].tolist() for i in order if i >= 5]
    assert trace.provenance["bad_rows_left_out"] == 5
    assert len(told) == 1
    assert told[0].startswith(f"{path}: left out bad rows: 5 of 8 (line ")
    places = [f"line {at}" for at, i in enumerate(order, 1) if i < 5]
    assert [place in told[0] for place in places] == [True, True, True, False, False]
    assert told[0].endswith("; and 2 more)")
    with pytest.raises(InputError, match=places[0]):
        reader([Source(path, "law")], TINY)


@engines
def test_all_rows_bad(tmp_path: Path, engine: str) -> None:
    """A file of which no row is good is refused, also beside a good one; nothing is told."""
    reader, response = READERS[engine]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps(response(routing(9), 5)))
    bad.write_text("\n".join(BAD[engine][2:]))
    with pytest.raises(InputError) as caught:
        skipping(reader, good, bad)
    assert "bad.jsonl: line 1" in str(caught.value)
    assert "no row is good (3 bad), the first one: expert 8" in str(caught.value)
    assert "is the model that was recorded" in str(caught.value)


@engines
def test_nothing_bad(tmp_path: Path, engine: str) -> None:
    """Without bad rows nothing is told and the trace is the same."""
    reader, response = READERS[engine]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(response(routing(9), 5)))
    trace, batches, told = skipping(reader, path)
    plain = reader([Source(path, "law")], TINY)
    assert (told, dict(trace.provenance)) == ([], dict(plain.provenance))
    assert plain.batches is not None
    assert all_rows(batches) == all_rows(list(plain.batches()))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A line that is not UTF-8 is a bad row as others."""
    path = tmp_path / "r.jsonl"
    line = json.dumps(vllm_response(routing(9), 5)).encode()
    path.write_bytes(b"\xe9\n" + line + b"\n\xff\xff\n" + line)
    trace, batches, told = skipping(read_vllm, path)
    assert len(batches) == 2
    assert trace.provenance["bad_rows_left_out"] == 2
    assert "line 1: byte 0 is not UTF-8; line 3: byte 0" in told[0]


def test_one_choice_of_several(tmp_path: Path) -> None:
    """Of a response with a bad choice the others are kept."""
    path = tmp_path / "r.jsonl"
    response = vllm_response(routing(9), 5)
    response["choices"] += vllm_response(FOREIGN, 5)["choices"]
    path.write_text(json.dumps(response))
    _, batches, told = skipping(read_vllm, path)
    assert all_rows(batches) == [routing(9).tolist()]
    assert "left out bad rows: 1 of 2 (line 1 choice 1 " in told[0]


def test_streams_with_bad_chunks(tmp_path: Path) -> None:
    """A response whose stream is broken is left out whole, the others are kept."""
    path = tmp_path / "s.txt"
    whole = [sglang_response(routing(9, i), 5) for i in range(3)]
    for number, response in enumerate(whole):
        response["meta_info"]["id"] = f"r{number}"
    other = {"meta_info": {"id": "r1", "routed_experts": "AAAA"}}
    chunks = [*whole, other, {"error": "gone"}]
    path.write_text("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: {\n")
    _, batches, told = skipping(read_sglang, path)
    assert all_rows(batches) == [routing(9, i).tolist() for i in (0, 2)]
    assert "left out bad rows: 3 of 5 (line 7: other rows" in told[0]


# --------------------------------------------------------------------------------- tables

TABLE = "layer,expert,count\n0,0,5\n0,1,5\n{}\n1,2,5\n1,3,5\n"


@pytest.mark.parametrize("line", ["0,8,5", "7,0,5", "0,0", "x,0,5", "0,1.5,5", "0,2,nan"])
def test_lines_of_tables(tmp_path: Path, line: str) -> None:
    """A line that does not parse or is of no layer or expert of the model is left out."""
    path = tmp_path / "c.csv"
    path.write_text(TABLE.format(line))
    with pytest.raises(InputError, match="line 4"):
        read_counts([Source(path, "law")], TINY)
    trace, _, told = skipping(read_counts, path)
    assert trace.counts[0].sum(axis=1).tolist() == [10, 10]
    assert trace.provenance["bad_rows_left_out"] == 1
    assert f"{path}: left out bad rows: 1 of 5 (line 4" in told[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0,1,5", "second row for layer, expert"),
        (f"0,2,{2**63}", "line 4 column 'count'"),
        (f"0,2,{2**53}", "line 4 column 'count'"),
    ],
)
def test_lines_without_which_sums_are_wrong(tmp_path: Path, line: str, words: str) -> None:
    """A count that is too large or is duplicated is not left out: the sum would be another."""
    path = tmp_path / "c.csv"
    path.write_text(TABLE.format(line))
    with pytest.raises(InputError) as caught:
        skipping(read_counts, path)
    assert words in str(caught.value)


def test_tables_of_another_model(tmp_path: Path) -> None:
    """A table without a row of the model is refused with the first row's error."""
    path = tmp_path / "c.csv"
    path.write_text("layer,expert,count\n5,0,1\n6,0,1\n")
    with pytest.raises(InputError) as caught:
        skipping(read_counts, path)
    assert "line 2 (task 'law'): no row is good (2 bad), the first one: layer 5" in str(
        caught.value
    )


# ------------------------------------------------------------------------- what has no rows


def test_dumps_have_no_rows(tmp_path: Path) -> None:
    """Sums cannot be read without some of their rows, and the option is refused for them."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"logical_count": [[5] * 8] * 2}))
    with pytest.raises(InputError, match="sums, which have no rows that could be left out"):
        skipping(read_sglang, path)


def test_command(tmp_path: Path, prism_plan: Run) -> None:
    """The option of the command: a notice on standard error, the number in the trace."""
    path, model, output = tmp_path / "r.jsonl", tmp_path / "m.json", tmp_path / "t.parquet"
    model.write_text(json.dumps(TINY.to_json()))
    path.write_text(BAD["vllm"][0] + "\n" + json.dumps(vllm_response(routing(9), 5)))
    words = ["profile", "--model", model, f"law={path}", "-o", output, "--format"]
    assert prism_plan(*words, "vllm").returncode == 2
    result = prism_plan(*words, "vllm", "--skip-bad")
    assert result.returncode == 0, result.stderr
    assert "left out bad rows: 1 of 2 (line 1 column" in " ".join(result.stderr.split())
    assert pp.read_trace(output).provenance["bad_rows_left_out"] == 1
    result = prism_plan(*words, "trtllm", "--skip-bad")
    assert result.returncode == 2
    assert "no rows that could be left out" in " ".join(result.stderr.split())
