"""The journal of a home: its requests and their tokens, so that a restarted home goes on with them.

A file of JSON lines. The first one says what the journal is of::

    {"format": "prism-plan/request-journal", "version": 1, "of": {...}}
    {"accept": KEY, "line": {...}}        a request; ``line`` as in a file of requests
    {"tokens": KEY, "ids": [...]}         tokens that were added to its answer
    {"end": KEY}                          its answer has been written

Each line is written at once. What the operating system has accepted outlives the process; a line is
not forced to the disk, so a machine that loses power may lose the last ones, and with them tokens
that are then computed again. A last line that was cut is left out, and overwritten.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from prism_plan.errors import InputError, OutputError
from prism_plan.io.json import parse_json

FORMAT, VERSION = "prism-plan/request-journal", 1
#: Bytes of a line, and ids of tokens, are at most so many.
MAX_LINE_BYTES = 1 << 25
MAX_TOKEN = 1 << 31


@dataclass
class JournalledRequest:
    """A request that has no end in the journal, with the tokens that it had so far."""

    key: str
    line: dict[str, Any]
    tokens: list[int] = field(default_factory=list)


class RequestJournal:
    """A journal that is open for writing; a context.

    ``identity`` says what the tokens depend on (digests of placement, checkpoint and requests): a
    journal of another one is refused. ``unfinished`` are the requests to go on with, in the order
    in which they were accepted; ``finished`` are the keys of those that need nothing any more.

    Raises
    ------
    InputError
        The file is no journal, of another version, or of another run.
    OutputError
        It cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.unfinished: list[JournalledRequest] = []
        self.finished: set[str] = set()
        self._lock = threading.Lock()
        # identities are compared as JSON has them
        self._identity = json.loads(json.dumps(identity))
        try:
            # without waiting for the other end of a pipe
            flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
            self._stream: io.FileIO = io.FileIO(os.open(self.path, flags, 0o600), "r+")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
                raise InputError("no regular file", source=self.path, expected="a journal")
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    "another process writes to it", source=self.path,
                    expected="a journal of one home", remedy="end that process first",
                ) from error  # fmt: skip
            self._read()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    @property
    def continues(self) -> bool:
        """Whether the journal has requests of an earlier process."""
        return bool(self.finished or self.unfinished)

    def require_answers(self, path: str | None) -> None:
        """Refuse a journal that has answered requests without the file that has their answers.

        Raises
        ------
        InputError
            There is no such file.
        """
        if self.finished and path is not None and path != "-" and not os.path.exists(path):
            raise InputError(
                f"says that {len(self.finished)} requests are answered, and their file {path} is "
                "not there",
                source=self.path,
                expected="the file of answers that was written with it",
                remedy="bring that file back, or give another journal to answer all again",
            )

    @property
    def next_key(self) -> int:
        """The number after all keys that are numbers; for requests that come one by one."""
        keys = [*self.finished, *(request.key for request in self.unfinished)]
        return 1 + max((int(key) for key in keys if key.isascii() and key.isdigit()), default=0)

    def accept(self, key: str, line: dict[str, Any]) -> None:
        """Note a request, before it is served; ``line`` as in a file of requests."""
        self._write({"accept": key, "line": line})

    def tokens(self, key: str, ids: list[int]) -> None:
        """Note tokens that were added to a request's answer."""
        self._write({"tokens": key, "ids": ids})

    def end(self, key: str) -> None:
        """Note that a request's answer has been written."""
        self._write({"end": key})

    # ------------------------------------------------------------------------------------- reading

    def _read(self) -> None:
        requests: dict[str, JournalledRequest] = {}
        begin = 0  # of the line
        with open(self.path, "rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                if not line.endswith(b"\n"):
                    if len(line) > MAX_LINE_BYTES:
                        raise self._wrong(number + 1, f"more than {MAX_LINE_BYTES:,} bytes")
                    break  # the process ended while it wrote
                number += 1
                values = self._parse(line, number)
                if number == 1:
                    self._check_first(values)
                else:
                    self._apply(values, number, requests)
                begin += len(line)
        self._stream.truncate(begin)
        self._stream.seek(begin)
        if not begin:
            self._write({"format": FORMAT, "version": VERSION, "of": self._identity})
        self.unfinished = list(requests.values())

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            values = parse_json(line.decode(), self.path)
        except (UnicodeDecodeError, InputError) as error:
            raise self._wrong(number, "no JSON") from error
        if not isinstance(values, dict):
            raise self._wrong(number, f"{values!r:.60}")
        return values

    def _check_first(self, values: dict[str, Any]) -> None:
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise self._wrong(1, f"{values.get('format')!r:.60} {values.get('version')!r:.20}")
        written = values.get("of")
        if written == self._identity:
            return
        found = written if isinstance(written, dict) else {}
        differing = [key for key in self._identity if found.get(key) != self._identity[key]]
        raise InputError(
            f"is of another {', '.join(differing) or 'run'}",
            source=self.path,
            expected="the journal of this placement, checkpoint and file of requests",
            remedy="give another file as ``journal``, or delete this one if its requests are not "
            "needed any more",
        )

    def _apply(
        self, values: dict[str, Any], number: int, requests: dict[str, JournalledRequest]
    ) -> None:
        match values:
            case {"accept": str(key), "line": dict(line)}:
                if key not in requests and key not in self.finished:
                    requests[key] = JournalledRequest(key, line)
            case {"tokens": str(key), "ids": list(ids)} if all(
                type(token) is int and 0 <= token < MAX_TOKEN for token in ids
            ):
                if key in requests:
                    requests[key].tokens += ids
            case {"end": str(key)}:
                requests.pop(key, None)
                self.finished.add(key)
            case _:
                raise self._wrong(number, f"{values!r:.60}")

    def _wrong(self, number: int, found: str) -> InputError:
        return InputError(
            found,
            source=self.path,
            place=f"line {number}",
            expected=f"a journal of requests of version {VERSION}",
            remedy="give another file as ``journal``",
        )

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with self._lock:
            begin = self._stream.tell()
            try:
                written = self._stream.write(line)
                while written is not None and written < len(line):
                    line = line[written:]
                    written = self._stream.write(line)
            except OSError as error:
                with contextlib.suppress(OSError):  # half a line would be none for who reads it
                    self._stream.truncate(begin)
                    self._stream.seek(begin)
                raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
