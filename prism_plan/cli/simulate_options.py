"""The options of ``prism-plan simulate``, and those that exclude each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prism_plan.cli.migration_options import ReviewOptions
from prism_plan.cli.options_dataclass import TableOptions
from prism_plan.errors import InputError

#: More workers on one machine than this are a mistake that would fill its memory.
MAX_JOBS = 1024

if TYPE_CHECKING:
    from prism_plan.evaluate.simulation_options import EngineName, SimulationOptions
    from prism_plan.simulate.routing_policies import Route
    from prism_plan.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(ReviewOptions, TableOptions):
    """The options and arguments of ``prism-plan simulate``."""

    placements: tuple[str, ...]
    trace: str
    cluster: str
    solvers: str | None
    holdout: float | None
    offload: bool
    requests_per_server: int | None
    duration_s: float | None
    burst: int
    arrivals: str | None
    schedule: str | None
    decode_tokens: int
    prompt_tokens: int
    route: Route
    calibration: str | None
    lose: tuple[str, ...]
    timeout_s: float
    request_timeout_s: float
    min_replicas: int
    seed: int
    engine: EngineName
    time_limit_s: float | None
    grid: tuple[str, ...]
    jobs: int
    backend: str
    scheduler: str | None
    per_request: str | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs == 0 or self.jobs < -1 or self.jobs > MAX_JOBS:
            raise InputError(
                f"{self.jobs}", parameter="jobs", expected=f"-1, or from 1 to {MAX_JOBS:,}"
            )
        for name in ("duration_s", "arrivals"):
            if getattr(self, name) is not None:
                self.refuse(
                    "requests_per_server",
                    found=f"{self.requests_per_server} with ``{name}``, which says how many "
                    "there are",
                    remedy="leave one of the two out",
                )
        if not self.lose:
            without = "has no effect without ``lose``"
            self.refuse("timeout_s", "request_timeout_s", found=without)
        if self.grid:
            alone = ("placements", "arrivals", "schedule", "duration_s", "per_request", "lose")
            self.refuse(
                *alone, "time_limit_s", "as_json", "table_format", found="not in a sweep (``grid``)"
            )
            if self.scheduler is not None:
                self.refuse("jobs", found="has no effect with ``scheduler``")
        else:
            self.refuse("jobs", "backend", "scheduler", found="has no effect without ``grid``")
            if self.solvers is None:
                self.refuse("min_replicas", found="has no effect without ``solvers``")
        if self.per_request is not None:
            self._require_table()

    def refuse_unused(self, trace: Trace) -> None:
        """Refuse options about drawn requests where the trace has requests of its own.

        Raises
        ------
        InputError
            Names the option.
        """
        if trace.kind != "counts":
            self.refuse(
                "prompt_tokens",
                found=f"has no effect on {trace.name or 'the trace'}, which is not counts-only",
            )

    def _require_table(self) -> None:
        """The table of requests is a Parquet file, and another one than the report."""
        assert self.per_request is not None
        if os.path.splitext(self.per_request)[1].lower() != ".parquet":
            raise InputError(
                f"{self.per_request!r:.60}",
                parameter="per_request",
                expected="the name of a .parquet file",
            )
        if self.output is not None and os.path.realpath(self.output) == os.path.realpath(
            self.per_request
        ):
            raise InputError(
                "the report and the table would be one file",
                parameter="per_request",
                place=self.per_request,
                remedy="give the name of another file",
            )

    def simulation_options(self) -> SimulationOptions:
        """The options of the simulator that the command line asks for.

        Raises
        ------
        InputError
            A value is out of range, or the calibration cannot be read.
        """
        from prism_plan.io.calibration import read_calibration
        from prism_plan.simulate.losses import parse_loss

        return self.simulation(
            route=self.route,
            calibration=None if self.calibration is None else read_calibration(self.calibration),
            engine=self.engine,
            time_limit_s=self.time_limit_s,
            seed=self.seed,
            lose=tuple(map(parse_loss, self.lose)),
            timeout_s=self.timeout_s,
            request_timeout_s=self.request_timeout_s,
        )
