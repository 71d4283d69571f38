"""The driver of a server: serves its requests with the placed model, one request a lane."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prism_plan.errors import InputError, PrismError
from runtime_adapter.log_output import log_warning
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
from runtime_adapter.request_journal import RequestJournal
from runtime_adapter.request_lanes import run_in_lanes
from runtime_adapter.tokenized_requests import TokenizedRequest
from runtime_adapter.transport.nccl_channel import DataChannelBroken
from runtime_adapter.transport.peer import ConnectionLost
from runtime_adapter.transport.rendezvous import RequestTimeout, RuntimeFailure
from runtime_adapter.transport.wire_format import StepTooLong, WireError, require_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runtime_adapter.server import LocalServer

#: A request is run again so often, and all requests of a home together so often within a minute.
MAX_REPEATS, MAX_REPEATS_PER_MINUTE = 2, 20


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


class RepeatBudget:
    """How often requests may be run again: a fault that stays must not double the load.

    ``now`` is a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._taken_s: deque[float] = deque(maxlen=MAX_REPEATS_PER_MINUTE)

    def take(self) -> bool:
        """Whether one more request may be run again now."""
        with self._lock:
            now = self._now()
            if len(self._taken_s) == self._taken_s.maxlen and now - self._taken_s[0] < 60.0:
                return False
            self._taken_s.append(now)
            return True


def may_pass(error: Exception) -> bool:
    """Whether a step that failed for this reason may go well when it is run again."""
    if isinstance(error, (RequestTimeout, StepTooLong)):
        return False
    return isinstance(error, (RuntimeFailure, WireError, ConnectionLost, DataChannelBroken))


class Driver:
    """Serves requests of one home by greedy decoding, one a lane of its server at once.

    ``backend`` is the model's; ``begin_s`` is when time zero is; ``on_result`` gets each result
    once it is complete. A step that fails for a reason that may pass is run again from the prompt
    and the tokens so far: :data:`MAX_REPEATS` times a request, while the :class:`RepeatBudget`
    lasts. With a ``journal`` the requests that it has finished are left out, and those that it has
    begun go on with the tokens that they had.
    """

    def __init__(
        self, server: LocalServer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        backend: ThreadLocalDispatcher, begin_s: float,
        on_result: Callable[[RequestResult], None] = lambda result: None, *,
        journal: RequestJournal | None = None,
    ) -> None:  # fmt: skip
        self._server = server
        self._model = model
        self._tokenizer = tokenizer
        self._backend = backend
        self._begin_s = begin_s
        self._on_result = on_result
        self._journal = journal
        self._config = greedy_config(model)
        self._result_lock = threading.Lock()
        self._budget = RepeatBudget()

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
                with self._backend.using(lane, job.request.number):
                    self._generate_all(lane, job)
            except PrismError as error:
                result.error = str(error)
            except Exception as error:  # a request that fails does not end others
                result.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            result.done_s = time.monotonic() - self._begin_s
            result.text = self._tokenizer.decode(result.tokens, skip_special_tokens=True)
            with self._result_lock:
                self._on_result(result)
            self._server.requests.ended(result.error, len(result.tokens))
        if self._journal is not None:
            self._journal.end(job.key)

    def _generate_all(self, lane: RemoteDispatcher, job: _Job) -> None:
        """Generate all tokens that a request does not have yet."""
        repeats = 0
        while not self._complete(job):
            tokens = len(job.request.ids) + len(job.result.tokens)
            require_tokens(repr(job.result.id), tokens, lane.max_tokens)
            try:
                self._generate(job)
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

    def _generate(self, job: _Job) -> None:
        def add(ids: list[int]) -> None:
            if job.result.first_token_s is None:
                job.result.first_token_s = time.monotonic() - self._begin_s
            job.result.tokens += ids
            if self._journal is not None:
                self._journal.tokens(job.key, ids)

        ids = torch.tensor([job.request.ids + job.result.tokens], device=self._model.device)
        config = copy.copy(self._config)
        config.max_new_tokens = job.request.new_tokens - len(job.result.tokens)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_TokenStreamer(add),
        )


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
