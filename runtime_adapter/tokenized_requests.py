"""Requests as the model takes them: token ids, from a file or as they come on standard input."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.io.serve_requests import MAX_REQUESTS, Request, request_from_line
from runtime_adapter.request_journal import RequestJournal
from runtime_adapter.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Bytes of one line of requests that come on standard input.
MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenizedRequest:
    """Token ids of a prompt, and how many to add at most.

    ``number`` is unique over all servers. A request that cannot be served has the reason as
    ``error`` instead. ``key`` is what a journal calls it, the line's number if empty.
    """

    request: Request
    number: int
    ids: list[int]
    new_tokens: int
    error: str | None = None
    key: str = ""

    def line(self) -> dict[str, Any]:
        """The request as a line of a file of requests, without what is not given."""
        values = {name: getattr(self.request, name) for name in ("prompt", "task", "id")}
        values["max_new_tokens"] = self.new_tokens or None
        return {name: value for name, value in values.items() if value not in (None, "")}


class RequestTokenizer:
    """Tokenizes the requests of one server, named ``server`` by its index.

    ``max_new_tokens`` is for requests that do not give theirs.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, server: int,
        max_new_tokens: int,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens(checkpoint)
        self._server = server
        self._max_new_tokens = max_new_tokens

    def tokenize(self, requests: Sequence[Request], source: object) -> list[TokenizedRequest]:
        """All requests of a file.

        Raises
        ------
        InputError
            A prompt has no tokens, or is longer than the model's context; names the line.
        """
        return [self._tokenize(request, i, source) for i, request in enumerate(requests)]

    def _tokenize(self, request: Request, index: int, source: object) -> TokenizedRequest:
        longest = self._context_tokens
        ids = self._tokenizer(request.prompt)["input_ids"]
        new = request.max_new_tokens or self._max_new_tokens
        if not ids or (longest is not None and len(ids) + new - 1 > longest):
            raise InputError(
                f"{len(ids):,} tokens and {new:,} new ones",
                source=source,
                place=f"line {request.line}",
                expected=f"1 to {longest:,}, the model's context" if longest else "a token or more",
                remedy="shorten the prompt or lower ``max_new_tokens``" if ids else "",
            )
        return TokenizedRequest(request, self._number(index), ids, new)

    def _number(self, index: int) -> int:
        return self._server * MAX_REQUESTS + index

    def tokenize_journalled(
        self, journal: RequestJournal, begin_s: float
    ) -> Iterator[TokenizedRequest]:
        """Requests that came on the standard input of an earlier process, and were not finished.

        They arrive now; ``begin_s`` is when time zero is.
        """
        for place, begun in enumerate(journal.unfinished):
            now_s = max(time.monotonic() - begin_s, 0.0)
            request = Request(0, "", at_s=now_s)
            try:
                request = request_from_line(json.dumps(begun.line), journal.path, 0)
                tokenized = self._tokenize(
                    replace(request, at_s=now_s), MAX_REQUESTS - 1 - place, journal.path
                )
            except InputError as error:
                tokenized = TokenizedRequest(
                    request, self._number(MAX_REQUESTS - 1 - place), [], 0, str(error)
                )
            yield replace(tokenized, key=begun.key)

    def tokenize_stream(
        self, stream: IO[bytes], begin_s: float, first_key: int = 1
    ) -> Iterator[TokenizedRequest]:
        """Requests as they come, line by line; each arrives when it is read.

        ``begin_s`` is when time zero is; a journal calls them by numbers from ``first_key`` on. A
        line that cannot be served becomes a request with an ``error``, so that one wrong line does
        not end the run for all. A line without an ``id`` is called by its number.
        """
        source = "standard input"
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            now_s = max(time.monotonic() - begin_s, 0.0)
            index = (number - 1) % MAX_REQUESTS
            if not line.strip():
                continue
            request = Request(number, "", at_s=now_s)
            try:
                if len(line) > MAX_LINE_BYTES:
                    while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
                        pass  # the rest of the line is not a request
                    raise InputError(
                        f"more than {MAX_LINE_BYTES:,} bytes", source=source, place=f"line {number}"
                    )
                request = request_from_line(line.decode("utf-8", "replace"), source, number)
                request = replace(request, at_s=max(request.at_s, now_s))
                tokenized = self._tokenize(request, index, source)
            except InputError as error:
                tokenized = TokenizedRequest(request, self._number(index), [], 0, str(error))
            yield replace(tokenized, key=str(first_key - 1 + number))


def context_tokens(checkpoint: Checkpoint) -> int | None:
    """The most tokens of a request, prompt and answer together, if the model has a bound."""
    tokens: int | None = checkpoint.config.get("max_position_embeddings")
    return tokens


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, from its folder alone.

    Raises
    ------
    InputError
        There is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers fails in many ways
        raise InputError(
            f"has no usable tokenizer: {error!s:.120}",
            source=checkpoint.folder,
            expected="the files of a tokenizer, as save_pretrained writes them",
        ) from error
    return tokenizer
