"""A restarted home finds in its journal exactly what the one before it had written."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.errors import InputError, OutputError
from runtime_adapter.request_journal import JournalledRequest, RequestJournal

IDENTITY = {"placement": "a", "checkpoint": "b", "requests": None}


def test_a_new_journal_is_empty(tmp_path: Path) -> None:
    """A file that does not exist is made, and has no requests."""
    with RequestJournal(tmp_path / "j", IDENTITY) as journal:
        assert not journal.continues
    assert os.stat(tmp_path / "j").st_mode & 0o077 == 0  # prompts are nobody else's


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    """Both would write over each other; when the first one has ended the second may."""
    with (
        RequestJournal(tmp_path / "j", IDENTITY),
        pytest.raises(InputError, match="another process writes to it"),
    ):
        RequestJournal(tmp_path / "j", IDENTITY)
    RequestJournal(tmp_path / "j", IDENTITY).__exit__()


def test_a_line_that_did_not_fit_leaves_nothing(tmp_path: Path) -> None:
    """After a disk was full a journal reads as before that, and goes on when there is room."""
    with RequestJournal(tmp_path / "j", IDENTITY) as journal:
        journal.accept("1", {"prompt": "x"})
        size = os.stat(tmp_path / "j").st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
        try:
            with pytest.raises(OutputError, match="cannot be written"):
                journal.tokens("1", [5])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.stat(tmp_path / "j").st_size == size
        journal.tokens("1", [6])
    with RequestJournal(tmp_path / "j", IDENTITY) as journal:
        assert journal.unfinished == [JournalledRequest("1", {"prompt": "x"}, [6])]


def test_unfinished_requests_come_back_with_their_tokens(tmp_path: Path) -> None:
    """Requests without an end are given back in their order, finished ones by their keys."""
    with RequestJournal(tmp_path / "j", IDENTITY) as journal:
        journal.accept("1", {"prompt": "x"})
        journal.accept("2", {"prompt": "y"})
        journal.tokens("2", [5])
        journal.tokens("1", [7, 8])
        journal.tokens("2", [6])
        journal.end("1")
        journal.accept("3", {})
    with RequestJournal(tmp_path / "j", IDENTITY) as journal:
        assert journal.finished == {"1"}
        assert journal.unfinished == [
            JournalledRequest("2", {"prompt": "y"}, [5, 6]),
            JournalledRequest("3", {}, []),
        ]
        journal.end("2")
    with RequestJournal(tmp_path / "j", IDENTITY) as journal:
        assert journal.finished == {"1", "2"}


@given(cut=st.integers(0, 400))
def test_a_journal_that_is_cut_anywhere_is_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """Whatever was written before a cut is read; what is written after it is read as well."""
    path = tmp_path_factory.mktemp("journal") / "j"
    with RequestJournal(path, IDENTITY) as journal:
        journal.accept("1", {"prompt": "x"})
        for token in range(8):
            journal.tokens("1", [token])
    raw = path.read_bytes()
    path.write_bytes(raw[:cut])
    with RequestJournal(path, IDENTITY) as journal:
        tokens = [token for request in journal.unfinished for token in request.tokens]
        assert tokens == list(range(len(tokens)))
        assert len(tokens) >= max(raw[:cut].count(b"\n") - 2, 0)
        journal.accept("2", {})
    with RequestJournal(path, IDENTITY) as journal:
        assert journal.unfinished[-1].key == "2"
        assert [t for request in journal.unfinished for t in request.tokens] == tokens


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}\n", "line 1"),
        ("not json\n", "line 1"),
        ('{"format": "prism-plan/request-journal", "version": 2, "of": {}}\n', "version 1"),
        (json.dumps({"format": "prism-plan/request-journal", "version": 1, "of": {}}) + "\n",
         "another placement, checkpoint"),
    ],
)  # fmt: skip
def test_other_files_are_refused_and_kept(tmp_path: Path, text: str, says: str) -> None:
    """A file that is no journal of this run is refused with its line, and not written to."""
    (tmp_path / "j").write_text(text)
    with pytest.raises(InputError, match=says):
        RequestJournal(tmp_path / "j", IDENTITY)
    assert (tmp_path / "j").read_text() == text


@pytest.mark.parametrize(
    "line",
    ['{"tokens": "1", "ids": [-1]}', '{"tokens": "1", "ids": [true]}', '{"accept": 1}', "[]"],
)
def test_lines_that_no_journal_has_are_refused(tmp_path: Path, line: str) -> None:
    """Wrong values in the middle of a journal are named with their line."""
    RequestJournal(tmp_path / "j", IDENTITY).__exit__()
    with open(tmp_path / "j", "a") as stream:
        stream.write(line + '\n{"end": "1"}\n')
    with pytest.raises(InputError, match="line 2"):
        RequestJournal(tmp_path / "j", IDENTITY)


def test_answers_that_are_gone_are_missed(tmp_path: Path) -> None:
    """A journal says that a request is answered: then the file with the answer has to be there."""
    with RequestJournal(tmp_path / "journal", IDENTITY) as journal:
        journal.require_answers(str(tmp_path / "answers"))
        journal.accept("1", {"prompt": "a"})
        journal.end("1")
    with RequestJournal(tmp_path / "journal", IDENTITY) as journal:
        with pytest.raises(InputError, match="1 requests are answered") as error:
            journal.require_answers(str(tmp_path / "answers"))
        assert "bring that file back" in str(error.value)
        (tmp_path / "answers").touch()
        journal.require_answers(str(tmp_path / "answers"))
