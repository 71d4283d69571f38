"""Text compressed with gzip: read as it was, bounded before memory is taken."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.input_limits import MIB
from prism_plan.io import gzip_text
from prism_plan.io.json_lines import text_lines
from prism_plan.io.prompts import read_prompts
from prism_plan.io.text_files import read_text
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.sources import Source
from tests.profiling.recordings import TINY, read, refusal


@given(texts=st.lists(st.text(alphabet="aé\n\r,1", max_size=20), min_size=1, max_size=3))
def test_reads_as_the_text_itself(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """Text and lines are those of the file unpacked, also where it has several members."""
    folder = tmp_path_factory.mktemp("g")
    plain, zipped = folder / "a", folder / "b"
    plain.write_bytes("".join(texts).encode())
    zipped.write_bytes(b"".join(gzip.compress(text.encode()) for text in texts))
    assert (
        gzip_text.read_maybe_gzipped_text(zipped)
        == read_text(plain)
        == gzip_text.read_maybe_gzipped_text(plain)
    )
    assert list(text_lines(zipped)) == list(text_lines(plain))


def test_every_text_format(tmp_path: Path) -> None:
    """Counts as JSON and as CSV, and prompts, are read packed under any name."""
    counts = tmp_path / "c.csv"
    counts.write_bytes(gzip.compress(b"layer_id,expert_id,count\n0,0,5\n0,1,5\n1,2,5\n1,3,5\n"))
    assert read(read_counts, counts)[0].tokens.tolist() == [5]
    table = tmp_path / "c.json.gz"
    table.write_bytes(gzip.compress(json.dumps({"logical_count": [[5] * 8] * 2}).encode()))
    assert read(read_sglang, table)[0].tokens.tolist() == [20]
    assert read_sglang([Source(table)], TINY).tasks == ("c",)
    assert read_sglang([Source(tmp_path, "law")], TINY).tokens.tolist() == [20]
    prompts = tmp_path / "p"
    prompts.write_bytes(gzip.compress(b'{"prompt": "a", "task": "b"}\n'))
    assert [prompt.task for prompt in read_prompts(prompts)] == ["b"]


def test_cut_and_damaged_files(tmp_path: Path) -> None:
    """A file that ends early or is damaged is refused at every place, by text and by lines."""
    path = tmp_path / "c.csv"
    whole = gzip.compress(b"layer,expert,count\n" + b"0,1,2\n" * 50)
    for data in [whole[:length] for length in range(2, len(whole), 5)] + [
        whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:],
        whole + b"x",
    ]:
        path.write_bytes(data)
        assert "not a whole gzip file" in refusal(read_counts, path)
        with pytest.raises(InputError, match="not a whole gzip file"):
            list(text_lines(path))


def test_a_bomb_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What unpacks to far more than its size is refused as soon as that shows, line or text."""
    monkeypatch.setattr(gzip_text, "MIN_UNPACKED_LIMIT_BYTES", MIB)
    bomb = tmp_path / "c.jsonl"
    bomb.write_bytes(gzip.compress(b'{"logical_count": [' + b"0, " * 20 * MIB, mtime=0))
    lines = tmp_path / "d.jsonl"
    lines.write_bytes(gzip.compress((b'{"a": "' + b"x" * 10_000 + b'"}\n') * 5_000, mtime=0))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"unpacks to more than 7,\d{3},\d{3} bytes"):
        gzip_text.read_maybe_gzipped_text(bomb)
    with pytest.raises(InputError, match=r"unpacks to more than \d+,\d{3},\d{3} bytes"):
        for _ in text_lines(lines):
            pass
    assert tracemalloc.get_traced_memory()[1] < 40 * MIB
    tracemalloc.stop()


def test_text_is_bounded_as_without_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However well a text is compressed, it may have no more bytes than one that is not."""
    monkeypatch.setattr(gzip_text, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "c.csv"
    for length in (1000, 1001):
        path.write_bytes(gzip.compress(b"x" * length))
        if length == 1000:
            assert gzip_text.read_maybe_gzipped_text(path) == "x" * 1000
    with pytest.raises(InputError, match="unpacks to more than 1,000 bytes"):
        gzip_text.read_maybe_gzipped_text(path)


def test_packed_files_that_are_no_text(tmp_path: Path) -> None:
    """A packed dump of PyTorch is refused with the remedy to unpack it."""
    path = tmp_path / "d.pt.gz"
    path.write_bytes(gzip.compress(b"PK\x03\x04" + b"\0" * 50))
    assert "compressed with gzip, and no text" in refusal(read_sglang, path)
