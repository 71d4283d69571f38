"""The options that all runs of a sweep share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.input_limits import MAX_REPLICAS, require_integer
from prism_plan.simulate.poisson_arrivals import MAX_REQUESTS
from prism_plan.simulate.sampling import DECODE_TOKENS, MAX_PROMPT_TOKENS, PROMPT_TOKENS


@dataclass(frozen=True)
class SweepOptions:
    """The options that all runs of a sweep share: requests, hold-out, replicas, simulation.

    Raises
    ------
    InputError
        A value is out of range.
    """

    requests_per_server: int = 20
    burst: int = 1
    decode_tokens: int = DECODE_TOKENS
    prompt_tokens: int = PROMPT_TOKENS
    holdout: float | None = None
    min_replicas: int = 1
    simulation: SimulationOptions = dataclasses.field(default_factory=SimulationOptions)

    def __post_init__(self) -> None:
        require_integer(self.requests_per_server, 1, MAX_REQUESTS, "requests_per_server")
        require_integer(self.burst, 1, MAX_REQUESTS, "burst")
        require_integer(self.decode_tokens, 0, MAX_PROMPT_TOKENS, "decode_tokens")
        require_integer(self.prompt_tokens, 0, MAX_PROMPT_TOKENS, "prompt_tokens")
        require_integer(self.min_replicas, 1, MAX_REPLICAS, "min_replicas")
        if self.simulation.lose:
            raise InputError(
                "servers are lost in a sweep, whose table has no columns for that",
                parameter="lose",
                remedy="leave it out, or simulate placements one by one",
            )
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise InputError(
                f"{self.holdout}", parameter="holdout", expected="a share above 0 and below 1"
            )
