"""The options of simulations: routing, migration policy, engine, time limit, seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from prism_plan.errors import InputError, did_you_mean
from prism_plan.migration.cost import MigrationCost
from prism_plan.migration.policy import Policy, PolicyName
from prism_plan.migration.statistics import Cumulative, StatisticsOptions, Window
from prism_plan.simulate.arrival_trace import MAX_S
from prism_plan.simulate.calibration import Calibration
from prism_plan.simulate.losses import Loss, LossPlan
from prism_plan.simulate.routing_policies import Route

EngineName = Literal["compiled", "reference"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class SimulationOptions:
    """How placements are simulated.

    Parameters
    ----------
    route
        How a call's server is chosen among those that hold the expert: ``cover``, ``nearest``,
        ``spread``.
    migrate
        Policy of the reviews: ``never`` (there are none), ``prism``, ``partial``.
    migrate_every_s
        Seconds between reviews.
    half_life_s
        Of the statistics' window; ``None`` is the time between reviews. ``math.inf`` counts
        everything since the last move, as the paper had it.
    horizon_s
        Seconds over which a move has to pay off; ``None`` is the time between reviews.
    migration_cost
        Whether loads cost their sum, as in the paper, or the maximum over GPUs.
    migrate_solver
        The solver that plans the candidates of policy ``prism``.
    calibration
        Measured times in place of the cluster's figures.
    engine
        ``compiled``, or the plain ``reference``: the same numbers, hundreds of times slower.
    time_limit_s
        Wall-clock seconds for all runs together; a run that it ends is marked partial.
    seed
        Of solvers that plan candidates.
    lose
        Servers that are lost during the run, and when they come back. Not with reviews.
    timeout_s
        Seconds after a loss at which all other servers know of it, or at an earlier return.
    request_timeout_s
        Seconds for which a request waits for an expert that no server holds while a migration is to
        load it.

    Raises
    ------
    InputError
        A value is out of range.
    """

    route: Route = "cover"
    migrate: PolicyName = "never"
    migrate_every_s: float = 300.0
    half_life_s: float | None = None
    horizon_s: float | None = None
    migration_cost: MigrationCost = "sum"
    migrate_solver: str = "prism"
    calibration: Calibration | None = None
    engine: EngineName = "compiled"
    time_limit_s: float | None = None
    seed: int = 0
    lose: tuple[Loss, ...] = ()
    timeout_s: float = 10.0
    request_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        self.losses()
        if self.lose and self.migrate != "never":
            raise InputError(
                f"servers are lost while ``migrate`` {self.migrate} moves experts",
                parameter="lose",
                expected="no reviews: a loss is repaired by a migration of its own",
                remedy="leave one of the two out",
            )
        for name in ("migrate_every_s", "horizon_s", "time_limit_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_S:
                raise InputError(
                    f"{value}", parameter=name, expected=f"seconds above 0, at most {MAX_S:g}"
                )
        if self.half_life_s is not None and not self.half_life_s > 0:
            raise InputError(
                f"{self.half_life_s}", parameter="half_life_s", expected="seconds above 0"
            )
        if self.engine not in ENGINE_NAMES:
            raise InputError(
                f"{self.engine!r:.60}{did_you_mean(str(self.engine), ENGINE_NAMES)}",
                parameter="engine",
                expected=f"one of {', '.join(ENGINE_NAMES)}",
            )
        try:
            self.policy()
        except InputError as error:
            own = {"kind": "migrate", "cost": "migration_cost", "solver": "migrate_solver"}
            raise InputError(
                error.found,
                parameter=own.get(error.parameter, error.parameter),
                expected=error.expected,
            ) from error

    def losses(self) -> LossPlan:
        """The losses of the run."""
        return LossPlan(tuple(self.lose), self.timeout_s, self.request_timeout_s)

    def policy(self) -> Policy:
        """The policy of the reviews."""
        return Policy(
            kind=self.migrate,
            horizon_s=self.horizon_s or self.migrate_every_s,
            cost=self.migration_cost,
            solver=self.migrate_solver,
            seed=self.seed,
        )

    def counting(self) -> StatisticsOptions:
        """How the statistics count on which reviews decide."""
        half_life_s = self.half_life_s or self.migrate_every_s
        return Cumulative() if math.isinf(half_life_s) else Window(half_life_s)
