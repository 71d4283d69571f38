"""Importance matrices of llama.cpp, written as imatrix.cpp does."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_plan.errors import InputError
from prism_plan.input_limits import MIB
from prism_plan.profiling.imatrix import read_imatrix
from prism_plan.profiling.sources import Source
from tests.profiling.recordings import TINY, read, refusal, routing, tiny

gguf = pytest.importorskip("gguf")

MODEL = tiny(moe_layers=(1, 2))
Counts = dict[str, Any]


def counts_of(rows: Any, layers: tuple[int, ...] = (1, 2)) -> Counts:
    """What imatrix.cpp counts for selections [T, L, K]: each expert's rows, tokens elsewhere."""
    counts: Counts = {f"blk.{n}.attn_q.weight": [len(rows)] for n in range(3)}
    counts["blk.0.ffn_down.weight"] = [len(rows)]
    for at, layer in enumerate(layers):
        calls = np.bincount(rows[:, at].ravel(), minlength=8)
        for part in ("gate", "up", "down"):
            counts[f"blk.{layer}.ffn_{part}_exps.weight"] = calls
    return counts


def write(path: Path, counts: Counts, kind: Any = np.float32, **keys: Any) -> Path:
    """A GGUF file with sums and counts of each tensor, keys as imatrix.cpp writes them."""
    writer = gguf.GGUFWriter(path, arch="", endianess=gguf.GGUFEndian.LITTLE)
    writer.kv_data[0].clear()  # the writer's general.architecture, which imatrix files lack
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt", "code.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, of_tensor in sorted(counts.items()):
        column = np.array(of_tensor, kind).reshape(-1, 1)  # ggml's [1, E]
        writer.add_tensor(f"{name}.in_sum2", np.ones((len(column), 4), np.float32))
        writer.add_tensor(f"{name}.counts", column)
        writer.add_tensor(f"{name}.in_sum", np.ones((len(column), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_counts(tmp_path: Path) -> None:
    """Calls of each expert are the counts of its layer, tokens are calls / K."""
    rows = routing(50, model=MODEL)
    trace, _, told = read(read_imatrix, write(tmp_path / "i.gguf", counts_of(rows)), model=MODEL)
    assert trace.kind == "counts"
    for at in (0, 1):
        assert (
            trace.counts[0, at].tolist() == np.bincount(rows[:, at].ravel(), minlength=8).tolist()
        )
    assert trace.tokens.tolist() == [50]
    assert told == []
    assert trace.provenance["chunks"] == {"i.gguf": 7}


@pytest.mark.parametrize("parts", [("gate_up", "down"), ("up", "down"), ("gate",)])
def test_other_projections(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Gate and up may be fused, a model may have no gate; one of them is enough."""
    rows = routing(50, model=MODEL)
    counts = {name: c for name, c in counts_of(rows).items() if "_exps" not in name}
    for at, layer in enumerate(MODEL.moe_layers):
        for part in parts:
            calls = np.bincount(rows[:, at].ravel(), minlength=8)
            counts[f"blk.{layer}.ffn_{part}_exps.weight"] = calls
    path = write(tmp_path / "i.gguf", counts)
    assert read(read_imatrix, path, model=MODEL)[0].tokens.tolist() == [50]


def test_files_of_one_label(tmp_path: Path) -> None:
    """Files of one label are added up; without labels each is a task called after its file."""
    rows = [routing(50, seed, MODEL) for seed in (0, 1)]
    paths = [write(tmp_path / f"i{n}.gguf", counts_of(r)) for n, r in enumerate(rows)]
    together, _, _ = read(read_imatrix, *paths, model=MODEL)
    apart = read_imatrix([Source(path) for path in paths], MODEL)
    assert apart.tasks == ("i0", "i1")
    assert together.counts[0].tolist() == apart.counts.sum(axis=0).tolist()
    assert together.tokens.tolist() == [100]


def test_layers_after_the_last(tmp_path: Path) -> None:
    """Layers of multi-token prediction are left out with a notice."""
    counts = counts_of(routing(50, model=tiny(moe_layers=(1, 2, 3))), layers=(1, 2, 3))
    trace, _, told = read(read_imatrix, write(tmp_path / "i.gguf", counts), model=MODEL)
    assert trace.counts.shape == (1, 2, 8)
    assert told[0].startswith("left out layers 3: ")


def test_large_counts_are_rounded(tmp_path: Path) -> None:
    """Counts that a float32 rounds pass the check against the tokens, which it rounds too."""
    rows = routing(50, model=MODEL)
    counts = {name: np.array(c) * (2**24 + 1) for name, c in counts_of(rows).items()}
    trace, _, _ = read(read_imatrix, write(tmp_path / "i.gguf", counts), model=MODEL)
    assert abs(int(trace.tokens[0]) / (50 * (2**24 + 1)) - 1) < 1e-6


GATE = "blk.1.ffn_gate_exps.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({GATE: [1] * 8}, ", as in blk.1.ffn_down_exps.weight.counts"),
        ({GATE: [100]}, "one count for all experts; expected 8 counts; the older format"),
        ({GATE: [1] * 16}, "blk.1.ffn_gate_exps.weight.counts: 16 experts; expected 8 of tiny"),
        ({GATE: [-1.0] * 8}, "expert 0: -1 calls; expected a whole number"),
        ({GATE: [0.5] * 8}, "0.5 calls"),
        ({GATE: [np.nan] * 8}, "nan calls"),
        ({GATE: [np.inf] * 8}, "inf calls"),
        ({GATE: [1e30] * 8}, "1e+30 calls"),
        ({"blk.0.ffn_up_exps.weight": [1] * 8}, "layer 0; expected a MoE layer of tiny, 1..2"),
        ({"blk.9.ffn_up_exps.weight": [1] * 8}, "layer 9; expected a MoE layer of tiny, 1..2"),
        ({f"blk.{n}.attn_q.weight": [10] for n in range(3)} | {"blk.0.ffn_down.weight": [10]},
         "100 calls of 10 tokens; expected 2 a token"),
    ],
)  # fmt: skip
def test_counts_that_cannot_be(tmp_path: Path, change: Counts, words: str) -> None:
    """Counts of another form or model, or that contradict each other, name the tensor."""
    counts = counts_of(routing(50, model=MODEL)) | change
    assert words in refusal(read_imatrix, write(tmp_path / "i.gguf", counts), model=MODEL)


def test_a_layer_is_missing(tmp_path: Path) -> None:
    """A file without a layer of the model is of another model or truncated."""
    counts = counts_of(routing(50, model=MODEL)[:, :1], layers=(1,))
    message = refusal(read_imatrix, write(tmp_path / "i.gguf", counts), model=MODEL)
    assert "task 'law' has no calls in layer 2" in message


def test_other_kinds_of_numbers(tmp_path: Path) -> None:
    """Counts are float32 and nothing else."""
    path = write(tmp_path / "i.gguf", counts_of(routing(50, model=MODEL)), np.int32)
    assert "int32 of shape [8, 1]; expected float32 [8]" in refusal(read_imatrix, path, model=MODEL)


def test_a_continued_matrix_of_the_older_format(tmp_path: Path) -> None:
    """Counts to which the older format's one count was added for each expert are refused."""
    counts = counts_of(routing(50, model=MODEL))
    for name in counts:
        counts[name] = np.array(counts[name]) + 512
    message = refusal(read_imatrix, write(tmp_path / "i.gguf", counts), model=MODEL)
    assert "4,196 calls of 562 tokens" in message
    assert "the older format, run llama-imatrix again" in message


def test_the_older_format(tmp_path: Path) -> None:
    """A .dat file is told as such with the remedy; other files are no GGUF files."""
    path = tmp_path / "imatrix.dat"
    name = b"blk.0.ffn_gate_exps.weight"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 0.5))
    message = refusal(read_imatrix, path)
    assert "an importance matrix of the older format (.dat)" in message
    assert "run llama-imatrix again with -o imatrix.gguf" in message
    path.write_bytes(b"{}")
    assert "no GGUF file; expected a GGUF file of llama-imatrix" in refusal(read_imatrix, path)


def test_a_model_is_no_imatrix(tmp_path: Path) -> None:
    """A GGUF file without counts, such as the model's own, is refused by that."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((8, 4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "no counts of experts in it" in refusal(read_imatrix, path)


def test_cut_files(tmp_path: Path) -> None:
    """A file that ends early is refused wherever it ends."""
    path = write(tmp_path / "i.gguf", counts_of(routing(50, model=MODEL)))
    whole = path.read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(whole) - 64, 97)]:
        path.write_bytes(whole[:length])
        assert "i.gguf" in refusal(read_imatrix, path, model=MODEL)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (struct.pack("<QQ", 2**60, 0), "tensors; expected at most 65,536"),
        (struct.pack("<QQ", 0, 2**60), "keys; expected at most 1,024"),
        (struct.pack("<QQQ", 0, 1, 2**62), "the file ends within its header"),
        (struct.pack("<QQQ", 0, 1, 2**64 - 1), "the file ends within its header"),
        (struct.pack("<QQQcIIQ", 0, 1, 1, b"a", 9, 0, 2**60), "values in an array"),
        (struct.pack("<QQQcIIQ", 0, 1, 1, b"a", 9, 9, 1), "a value of type 9"),
        (struct.pack("<QQQcIIQ", 0, 1, 1, b"a", 9, 8, 60_000), "the file ends within its header"),
    ],
)
def test_headers_that_declare_too_much(tmp_path: Path, header: bytes, words: str) -> None:
    """Sizes that a header declares are refused before the package's reader believes them."""
    path = tmp_path / "i.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + header)
    assert words in refusal(read_imatrix, path)


def test_sums_are_not_read(tmp_path: Path) -> None:
    """Only the counts come into memory: a file of any size is read where the model has them."""
    import tracemalloc

    path = write(tmp_path / "i.gguf", counts_of(routing(50, model=MODEL)))
    with open(path, "r+b") as file:
        file.truncate(200 * MIB)  # what follows the tensors is no matter
    tracemalloc.start()
    assert read(read_imatrix, path, model=MODEL)[0].tokens.tolist() == [50]
    assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    tracemalloc.stop()


def test_a_stream_cannot_be_mapped(tmp_path: Path) -> None:
    """A pipe is refused with what is expected: the package maps files."""
    path = write(tmp_path / "i.gguf", counts_of(routing(50, model=MODEL)))
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:
        stream.write(path.read_bytes())
    message = refusal(read_imatrix, Path(f"/dev/fd/{reading}"), model=MODEL)
    os.close(reading)
    assert "is a stream; expected a regular file" in message


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gguf the remedy names the extra."""
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        InputError, match=r"gguf is not installed; pip install 'prism-plan\[gguf\]'"
    ):
        read_imatrix([Source(tmp_path / "i.gguf", "law")], TINY)
