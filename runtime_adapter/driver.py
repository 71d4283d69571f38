"""The driver of a server: serves its requests with the placed model, one request a lane."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prism_plan.errors import InputError, PrismError
from runtime_adapter.moe.remote_dispatcher import RemoteDispatcher
from runtime_adapter.moe.thread_local_dispatcher import ThreadLocalDispatcher
from runtime_adapter.request_lanes import run_in_lanes
from runtime_adapter.server import LocalServer
from runtime_adapter.tokenized_requests import TokenizedRequest
from runtime_adapter.transport.wire_format import require_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def __init__(self, result: RequestResult, begin_s: float) -> None:
        self.result = result
        self.begin_s = begin_s
        self._prompt = True

    def put(self, ids: torch.Tensor) -> None:
        """Called with the prompt, and then with each token."""
        if self._prompt:
            self._prompt = False
            return
        if self.result.first_token_s is None:
            self.result.first_token_s = time.monotonic() - self.begin_s
        self.result.tokens += ids.reshape(-1).tolist()

    def end(self) -> None:
        """Called after the last token."""


def serve(
    server: LocalServer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    backend: ThreadLocalDispatcher,
    requests: Iterable[TokenizedRequest],
    begin_s: float,
    on_result: Callable[[RequestResult], None] = lambda result: None,
) -> list[RequestResult]:
    """Serve requests at their times, one a lane of the server at once, by greedy decoding.

    ``backend`` is the model's; ``begin_s`` is when time zero is; ``on_result`` gets each result
    once it is complete. Requests may come one by one; their end ends the run. A request that fails
    has an error and the tokens until then; the others continue.
    """
    config = greedy_config(model)
    results: list[RequestResult] = []
    result_lock = threading.Lock()

    def arrivals() -> Iterator[tuple[float, tuple[TokenizedRequest, RequestResult]]]:
        for tokenized in requests:
            request = tokenized.request
            result = RequestResult(
                request.line if request.id is None else request.id, server.name, request.task,
                len(tokenized.ids), request.at_s,
            )  # fmt: skip
            results.append(result)
            yield begin_s + request.at_s, (tokenized, result)

    def serve_one(lane: RemoteDispatcher, item: tuple[TokenizedRequest, RequestResult]) -> None:
        request, result = item
        result.start_s = time.monotonic() - begin_s
        try:
            if request.error is not None:
                raise InputError(request.error)
            require_tokens(repr(result.id), len(request.ids), lane.max_tokens)
            with backend.using(lane, request.number):
                _generate(model, request, result, config, begin_s)
        except PrismError as error:
            result.error = str(error)
        except Exception as error:  # a request that fails does not end others
            result.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        result.done_s = time.monotonic() - begin_s
        result.text = tokenizer.decode(result.tokens, skip_special_tokens=True)
        with result_lock:
            on_result(result)

    run_in_lanes(server.lanes, arrivals(), serve_one)
    return results


def _generate(
    model: PreTrainedModel, request: TokenizedRequest, result: RequestResult, config: Any,
    begin_s: float,
) -> None:  # fmt: skip
    ids = torch.tensor([request.ids], device=model.device)
    config = copy.copy(config)
    config.max_new_tokens = request.new_tokens
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=_TokenStreamer(result, begin_s),
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
