"""Text files as other programs write them: byte-order marks, UTF-16, blank lines, line ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_plan.errors import InputError
from prism_plan.io.arrivals import read_arrivals
from prism_plan.io.prompts import read_prompts
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.sources import Source
from prism_plan.profiling.vllm.importer import read_vllm
from tests.profiling.recordings import TINY, routing, sglang_response, vllm_response

MARK = b"\xef\xbb\xbf"


def tokens(reader: Callable[..., Any]) -> Callable[[Path], Any]:
    """Reads a recording and gives its numbers of tokens."""
    return lambda path: reader([Source(path, "law")], TINY).tokens.tolist()


COUNTS = "layer,expert,count\n" + "".join(f"{n},{e},5\n" for n in (0, 1) for e in range(8))
#: Name, text, reader and what is read of each kind of file.
FILES: dict[str, tuple[str, str, Callable[[Path], Any], Any]] = {
    "vllm": ("r.jsonl", json.dumps(vllm_response(routing(10), 7)), tokens(read_vllm), [10]),
    "sglang": ("r.jsonl", json.dumps(sglang_response(routing(9), 7)), tokens(read_sglang), [9]),
    "logical_count": (
        "c.json",
        '{"logical_count":\n' + json.dumps([[5] * 8] * 2) + "}",
        tokens(read_sglang),
        [20],
    ),
    "counts": ("c.csv", COUNTS, tokens(read_counts), [20]),
    "prompts": (
        "p.jsonl",
        '{"prompt": "a", "task": "x"}\n{"prompt": "b", "task": "x"}',
        lambda path: [prompt.prompt for prompt in read_prompts(path)],
        ["a", "b"],
    ),
    "arrivals": (
        "a.jsonl",
        '{"server": "edge-0", "at_s": 1.5}\n{"server": "edge-1", "at_s": 2}',
        lambda path: [one.at_s for one in read_arrivals(path).arrivals],
        [1.5, 2.0],
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("change", ["mark", "crlf", "blank", "all"])
def test_text_of_other_programs(tmp_path: Path, kind: str, change: str) -> None:
    """A mark at the start, CRLF and blank lines change nothing of what is read."""
    name, text, read, wanted = FILES[kind]
    data = text.encode()
    if change in ("blank", "all"):
        data = b"\n  \n" + data + b"\n\n"
    if change in ("crlf", "all"):
        data = data.replace(b"\n", b"\r\n")
    if change in ("mark", "all"):
        data = MARK + data
    path = tmp_path / name
    path.write_bytes(data)
    assert read(path) == wanted


@pytest.mark.parametrize("kind", ["vllm", "prompts"])
def test_marks_of_files_put_together(tmp_path: Path, kind: str) -> None:
    """Files with a mark that were put together are read as their lines."""
    name, text, read, wanted = FILES[kind]
    path = tmp_path / name
    path.write_bytes((MARK + text.encode() + b"\n") * 2)
    assert read(path) == ([20] if kind == "vllm" else wanted * 2)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named(tmp_path: Path, kind: str, encoding: str) -> None:
    """UTF-16 and UTF-32 with a mark are refused by name, with the way out."""
    name, text, read, _ = FILES[kind]
    path = tmp_path / name
    path.write_bytes(("\ufeff" + text).encode(encoding))
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{name}: text in {encoding.upper()[:6]}; expected UTF-8" in str(caught.value)
