"""SGLang's counts in the other files that it loads or that people make of them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.profiling.sglang.importer import read_sglang
from tests.profiling.recordings import lines, read, refusal, routing, sglang_response, tiny

torch = pytest.importorskip("torch")

COUNTS = np.arange(16).reshape(2, 8) + 5
PASSES = np.stack([COUNTS, COUNTS * 0, COUNTS[:, ::-1]])


def save(path: Path, counts: Any, **more: Any) -> Path:
    """The counts in the format of the file's suffix."""
    if path.suffix == ".pt":
        torch.save({"logical_count": torch.from_numpy(counts.copy()), **more}, path)
    elif path.suffix == ".npz":
        np.savez_compressed(path, logical_count=counts, **more)
    else:
        path.write_text(json.dumps({"logical_count": counts.tolist(), **more}))
    return path


@pytest.mark.parametrize("suffix", [".json", ".npz", ".pt", ".jsonl", ".txt"])
@pytest.mark.parametrize("counts", [COUNTS, COUNTS[None], PASSES])
def test_counts_of_every_form(tmp_path: Path, suffix: str, counts: Any) -> None:
    """[L, E] and [S, L, E] in each format, told by content, give the sums."""
    path = save(tmp_path / f"c{suffix}", counts)
    trace, _, _ = read(read_sglang, path)
    wanted = counts if counts.ndim == 2 else counts.sum(axis=0)
    assert trace.kind == "counts"
    assert trace.counts[0].tolist() == wanted.tolist()
    assert trace.provenance["mode"] == "stat"


def test_a_json_document_over_several_lines(tmp_path: Path) -> None:
    """Indented JSON, with other keys first, is read as the compact one."""
    path = tmp_path / "c.json"
    values = {"note": "x" * 5000, "rank": 0, "logical_count": COUNTS.tolist()}
    for indent in (None, 1):
        path.write_text(json.dumps(values, indent=indent))
        assert read(read_sglang, path)[0].counts[0].tolist() == COUNTS.tolist()


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_folders_and_ranks(tmp_path: Path, suffix: str) -> None:
    """Files of other formats in a folder are read where there is no .pt; one rank of several."""
    folder = tmp_path / "chat"
    folder.mkdir()
    for rank in (0, 1):
        save(folder / f"r{rank}{suffix}", COUNTS, rank=rank)
    trace, _, told = read(read_sglang, folder)
    assert trace.counts[0].tolist() == COUNTS.tolist()
    assert told[0].startswith("task 'law': read rank 0 of 2")


def test_responses_in_a_file_of_another_name(tmp_path: Path) -> None:
    """Responses are told by their content too, also those that speak of counts."""
    line = sglang_response(routing(9), 5) | {"text": 'what is "logical_count": 3?'}
    for name in ("r.json", "r.jsonl", "r.log"):
        trace, _, _ = read(read_sglang, lines(tmp_path / name, line, line))
        assert trace.tokens.tolist() == [18]


def test_dense_rows_must_be_empty(tmp_path: Path) -> None:
    """As in a dump, a dense layer has a row of zeros; calls there are of another model."""
    model = tiny(moe_layers=(1,))
    dense = COUNTS * np.array([[0], [1]])
    path = save(tmp_path / "c.json", dense)
    assert read(read_sglang, path, model=model)[0].counts[0].tolist() == COUNTS[1:].tolist()
    assert "calls in layer 0" in refusal(read_sglang, save(path, COUNTS), model=model)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[5] * 8], "'logical_count': 1 layers; expected 2 or more"),
        ([[5] * 7] * 2, "'logical_count': 7 experts; expected 8 of tiny"),
        ([[-5] * 8] * 2, "-5; expected counts of at least 0"),
        ([[5.5] * 8] * 2, "no array of whole numbers (float64 [2, 8])"),
        ([[5] * 8, [5] * 7], "no array of whole numbers"),
        ([[True] * 8] * 2, "no array of whole numbers"),
        ([[5] * 7 + [True]] * 2, "no array of whole numbers"),
        ([[10**30] * 8] * 2, "no array of whole numbers"),
        ([[2**63] * 8] * 2, "a sum too large to count"),
        ([5] * 8, "int64 [8]; expected whole numbers [S, L, E] or [L, E]"),
        (None, "no array of whole numbers"),
    ],
)
def test_counts_that_cannot_be(tmp_path: Path, value: Any, words: str) -> None:
    """Shapes and values are checked as in a dump."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"logical_count": value}))
    assert words in refusal(read_sglang, path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"physical_to_logical_map": [[0, 1]]}\n{', "not JSON"),
        (b'{"physical_to_logical_map": [[0, 1]]}', "where experts are to be placed"),
        (b'{"x": 1}', "JSON without 'logical_count' (keys x); expected a recorder's dump (.pt)"),
        (b'{\n"physical_to_logical_map": [[0, 1]]}', "where experts are to be placed"),
        (b'{"logical_count": [[1, 2', "not JSON"),
        (b'{"logical_count": [[NaN]]}', "NaN is not JSON"),
        (b"layer,expert,count\n0,0,5\n", "expected a recorder's dump (.pt), 'logical_count' in a"),
        (b"", "not a readable PyTorch file"),
    ],
)
def test_other_files_are_told_what_is_read(tmp_path: Path, data: bytes, words: str) -> None:
    """A file of another kind is refused with what is wrong or what is read."""
    path = tmp_path / "c.json"
    path.write_bytes(data)
    assert words in refusal(read_sglang, path)


def test_damaged_npz(tmp_path: Path) -> None:
    """Objects, a rank of many numbers and cut files are refused; nothing is unpickled."""
    path = tmp_path / "c.npz"
    np.savez(path, logical_count=np.array([object()]), allow_pickle=True)
    assert "an array of type |O" in refusal(read_sglang, path)
    np.savez(path, logical_count=COUNTS, rank=np.arange(2))
    assert "'rank': shape [2]; expected one number" in refusal(read_sglang, path)
    whole = save(path, PASSES).read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        refusal(read_sglang, path)
    at = whole.index(b"NUMPY") if b"NUMPY" in whole else len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    assert "not a readable .npz file" in refusal(read_sglang, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logical_count.npy", b"x")
    assert "not a .npy array" in refusal(read_sglang, path)
