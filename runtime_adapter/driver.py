"""The driver of a server: serves its requests with the placed model, one request a lane."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prism_plan.errors import InputError, PrismError
from prism_plan.execution_table import Span
from runtime_adapter.log_output import log_warning
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
from runtime_adapter.request_journal import RequestJournal
from runtime_adapter.request_lanes import run_in_lanes
from runtime_adapter.request_repeats import MAX_REPEATS, RepeatBudget, may_pass
from runtime_adapter.spans.messages import RequestSetup
from runtime_adapter.spans.path_requests import PathRequests
from runtime_adapter.tokenized_requests import TokenizedRequest
from runtime_adapter.transport.wire_format import require_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runtime_adapter.server import LocalServer


@dataclass
class RequestResult:
    """The tokens and times of one request; times in seconds since the run began."""

    id: str | int
    server: str
    task: str
    prompt_tokens: int
    arrival_s: float
    start_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    error: str | None = None


class _TokenStreamer:
    """A streamer of ``generate`` that adds the tokens of a request to its result as they come."""

    def __init__(self, add: Callable[[list[int]], None]) -> None:
        self._add = add
        self._prompt = True

    def put(self, ids: torch.Tensor) -> None:
        """Called with the prompt, and then with each token."""
        if self._prompt:
            self._prompt = False
            return
        self._add(ids.reshape(-1).tolist())

    def end(self) -> None:
        """Called after the last token."""


@dataclass(eq=False)
class _Job:
    """A request in a lane, with what it has so far; ``key`` is its key in the journal."""

    request: TokenizedRequest
    result: RequestResult
    key: str


class Driver:
    """Serves requests of one home by greedy decoding, one a lane of its server at once.

    ``backend`` is the model's; ``begin_s`` is when time zero is; ``on_result`` gets each result
    once it is complete. Requests whose layers execute elsewhere run by ``paths``; without it all
    execute here, prompts of more than ``chunk_tokens`` in chunks (0: whole). A step that fails for
    a reason that may pass is run again from the prompt and the tokens so far:
    :data:`~.request_repeats.MAX_REPEATS` times a request, while the
    :class:`~.request_repeats.RepeatBudget` lasts. With a ``journal`` the requests that it has
    finished are left out, and those that it has begun go on with the tokens that they had.
    """

    def __init__(
        self, server: LocalServer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        backend: ThreadLocalDispatcher, begin_s: float,
        on_result: Callable[[RequestResult], None] = lambda result: None, *,
        journal: RequestJournal | None = None, paths: PathRequests | None = None,
        chunk_tokens: int = 0,
    ) -> None:  # fmt: skip
        self._server = server
        self._model = model
        self._tokenizer = tokenizer
        self._backend = backend
        self._begin_s = begin_s
        self._on_result = on_result
        self._journal = journal
        self._paths = paths
        self._chunk_tokens = chunk_tokens
        self._config = greedy_config(model)
        self._result_lock = threading.Lock()
        self._budget = RepeatBudget(len(server.lanes))

    def serve(self, requests: Iterable[TokenizedRequest]) -> None:
        """Serve requests at their times, until all have ended.

        Requests may come one by one; their end ends the run. A request that fails has an error and
        the tokens until then; the others continue. Nothing is kept of a request that has ended.
        """

        def arrivals() -> Iterator[tuple[float, _Job]]:
            for job in self._jobs(requests):
                yield self._begin_s + job.request.request.at_s, job

        run_in_lanes(self._server.lanes, arrivals(), self._serve_one)

    def _jobs(self, requests: Iterable[TokenizedRequest]) -> Iterator[_Job]:
        """Requests to serve; what the journal has of them is not done again."""
        journal = self._journal
        begun = {job.key: job for job in journal.unfinished} if journal is not None else {}
        for tokenized in requests:
            request = tokenized.request
            key = tokenized.key or str(request.line)
            if journal is not None:
                if key in journal.finished:
                    continue
                if key not in begun:
                    journal.accept(key, tokenized.line())
            result = RequestResult(
                request.line if request.id is None else request.id, self._server.name,
                request.task, len(tokenized.ids), request.at_s,
            )  # fmt: skip
            if key in begun:
                result.tokens += begun[key].tokens[: tokenized.new_tokens]
            yield _Job(tokenized, result, key)

    def _serve_one(self, lane: RemoteDispatcher, job: _Job) -> None:
        result = job.result
        result.start_s = time.monotonic() - self._begin_s
        with self._server.requests.running_one():
            try:
                if job.request.error is not None:
                    raise InputError(job.request.error)
                with self._room(lane, job):
                    self._generate_all(lane, job)
                result.text = self._decoded(result.tokens)
            except PrismError as error:
                result.error = str(error)
            except Exception as error:  # a request that fails does not end others
                result.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if result.error:
                with contextlib.suppress(Exception):  # of a token that is none
                    result.text = self._decoded(result.tokens)
            result.done_s = time.monotonic() - self._begin_s
            with self._result_lock:
                self._on_result(result)
            self._server.requests.ended(result.error, len(result.tokens))
        if self._journal is not None:
            self._journal.end(job.key)

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _room(self, lane: RemoteDispatcher, job: _Job) -> contextlib.AbstractContextManager[None]:
        """Room in the home's KV caches, wherever they are."""
        if self._paths is None:
            return contextlib.nullcontext()
        tokens = len(job.request.ids) + job.request.new_tokens
        return self._paths.room(self._server.lanes.index(lane), tokens)

    def _generate_all(self, lane: RemoteDispatcher, job: _Job) -> None:
        """Generate all tokens that a request does not have yet."""
        repeats = 0
        while not self._complete(job):
            path = () if self._paths is None else self._paths.path()
            try:
                if self._paths is None or self._paths.is_home(path):
                    self._generate(lane, job)
                else:
                    self._run_path(lane, job, path)
                return
            except Exception as error:
                repeats += 1
                if not may_pass(error) or repeats > MAX_REPEATS or not self._budget.take():
                    raise
                log_warning(
                    f"request {job.result.id!r}: {error}; it is run again from its prompt and "
                    f"{len(job.result.tokens)} tokens"
                )

    def _complete(self, job: _Job) -> bool:
        tokens = job.result.tokens
        end = self._config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        return len(tokens) >= job.request.new_tokens or (bool(tokens) and tokens[-1] in ends)

    def _add(self, job: _Job, ids: list[int]) -> None:
        """Add tokens to a request's answer."""
        if job.result.first_token_s is None:
            job.result.first_token_s = time.monotonic() - self._begin_s
        job.result.tokens += ids
        if self._journal is not None:
            self._journal.tokens(job.key, ids)

    def _generate(self, lane: RemoteDispatcher, job: _Job) -> None:
        """Generate the tokens that are left, with all layers here."""
        so_far = job.request.ids + job.result.tokens
        require_tokens(repr(job.result.id), len(so_far), lane.max_tokens)
        ids = torch.tensor([so_far], device=self._model.device)
        config = copy.copy(self._config)
        config.max_new_tokens = job.request.new_tokens - len(job.result.tokens)
        config.prefill_chunk_size = self._chunk_tokens or None
        with self._backend.using(lane, job.request.number):
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_TokenStreamer(lambda new: self._add(job, new)),
            )

    def _run_path(self, lane: RemoteDispatcher, job: _Job, path: tuple[Span, ...]) -> None:
        """Have the tokens that are left made along a path of several servers."""
        assert self._paths is not None
        so_far = job.request.ids + job.result.tokens
        left = job.request.new_tokens - len(job.result.tokens)
        setup = RequestSetup(job.request.number, path, left, len(so_far) + left)
        number = self._server.lanes.index(lane)
        self._paths.run(number, setup, so_far, lambda token: self._add(job, [token]))


def greedy_config(model: PreTrainedModel) -> Any:
    """The model's generation settings, with greedy decoding."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    config.num_beams = 1
    config.max_length = None
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        setattr(config, name, None)
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    return config
