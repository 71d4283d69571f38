"""The requests of a simulation, and the prompts that they are copies of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.simulate.phase_schedule import PhaseStart


@dataclass(frozen=True, eq=False)
class Prompts:
    """The P prompts that requests are copies of; arrays are read-only.

    Attributes
    ----------
    tasks : tuple of str
        Names of the trace's tasks.
    task : int32 [P]
        Code of each prompt's task, an index into ``tasks``.
    trace_request : int32 [P]
        Id of the request in the trace, or the number of the drawn prompt within its task.
    first_row : int64 [P]
        A prompt's tokens are rows ``first_row`` to ``first_row + prefill_tokens + decode_tokens``.
    prefill_tokens, decode_tokens : int32 [P]
        Tokens processed at once in the first step, then steps of one token each; either may be 0.
    experts : uint16 [rows, L, K]
        The experts of each token, of prompts in order, prefill first.
    co_activation : bool
        False where tokens were drawn from counts: which experts a token calls *together* is then
        not that of the model.
    """

    tasks: tuple[str, ...]
    task: npt.NDArray[np.int32]
    trace_request: npt.NDArray[np.int32]
    first_row: npt.NDArray[np.int64]
    prefill_tokens: npt.NDArray[np.int32]
    decode_tokens: npt.NDArray[np.int32]
    experts: npt.NDArray[np.uint16]
    co_activation: bool = True

    def __post_init__(self) -> None:
        lengths = self.prefill_tokens.astype(np.int64) + self.decode_tokens
        if np.any(lengths < 1) or np.any(self.prefill_tokens < 0) or np.any(self.decode_tokens < 0):
            raise ValueError("a prompt needs at least one token")
        if np.any(self.first_row < 0) or np.any(self.first_row + lengths > len(self.experts)):
            raise ValueError(f"prompts reach beyond the {len(self.experts)} rows")
        _make_read_only(self)

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True, eq=False)
class Requests:
    """R requests in order of (arrival, home, number of the server's request); read-only arrays.

    Attributes
    ----------
    servers : tuple of str
        Names of the N servers.
    prompts : Prompts
        The pool.
    home : int32 [R]
        The server at which each request arrives.
    arrival_s : float64 [R]
        When, in seconds from the start; not falling.
    prompt : int32 [R]
        Which prompt it is, an index into ``prompts``.
    rate : float64 [N] or None
        Requests per second of each server where arrivals are stationary, else ``None``.
    phases : tuple of PhaseStart
        When the phases of a schedule began, in order; empty without a schedule.
    """

    servers: tuple[str, ...]
    prompts: Prompts
    home: npt.NDArray[np.int32]
    arrival_s: npt.NDArray[np.float64]
    prompt: npt.NDArray[np.int32]
    rate: npt.NDArray[np.float64] | None = None
    phases: tuple[PhaseStart, ...] = ()

    def __post_init__(self) -> None:
        if np.any(np.diff(self.arrival_s) < 0):
            raise ValueError("requests are not in order of arrival")
        _make_read_only(self)

    def __len__(self) -> int:
        return len(self.home)

    @property
    def later_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens that each request's answer has after the first, int64 [R].

        Each decode step makes one; without a prefill the first of them makes the first token.
        """
        prompts = self.prompts
        tokens = prompts.decode_tokens.astype(np.int64) - (prompts.prefill_tokens == 0)
        later: npt.NDArray[np.int64] = tokens[self.prompt]
        return later


def _make_read_only(record: Prompts | Requests) -> None:
    for value in vars(record).values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
