"""Options of migration reviews, which the simulator and the runtime share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from prism_plan.cli.options_dataclass import CommandOptions, add_options
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.evaluate.simulation_options import SimulationOptions
    from prism_plan.migration.cost import MigrationCost
    from prism_plan.migration.policy import PolicyName

#: Adds the options of migration reviews to a click command.
review_options = add_options(
    click.option(
        "--migrate",
        type=click.Choice(["never", "prism", "partial"]),
        default="never",
        show_default=True,
        help="Migration policy, applied at each review.",
    ),
    click.option(
        "--migrate-every",
        "migrate_every_s",
        default=300.0,
        show_default=True,
        metavar="S",
        help="Between reviews.",
    ),
    click.option(
        "--statistics",
        type=click.Choice(["window", "cumulative"]),
        default="window",
        show_default=True,
        help="Reviews go by recent calls, or by all since the last move.",
    ),
    click.option(
        "--half-life",
        "half_life_s",
        type=float,
        metavar="S",
        help="Of the window; default: --migrate-every.",
    ),
    click.option(
        "--horizon",
        "horizon_s",
        type=float,
        metavar="S",
        help="A move must save its cost within this; default: --migrate-every.",
    ),
    click.option(
        "--migration-cost",
        type=click.Choice(["sum", "max"]),
        default="sum",
        show_default=True,
        help="Time of loads: sum over experts, or maximum over GPUs.",
    ),
    click.option(
        "--migrate-solver",
        default="prism",
        show_default=True,
        metavar="NAME",
        help="Solver of the candidates of policy prism; also NAME+paths, and latency.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(CommandOptions):
    """The values of :data:`review_options`; refused where no policy is chosen."""

    migrate: PolicyName
    migrate_every_s: float
    statistics: Literal["window", "cumulative"]
    half_life_s: float | None
    horizon_s: float | None
    migration_cost: MigrationCost
    migrate_solver: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if "migrate" not in self.explicit_names:  # an explicit policy `never` allows them
            self.refuse(
                "migrate_every_s", "statistics", "half_life_s", "horizon_s", "migration_cost",
                "migrate_solver",
                found="has no effect without ``migrate``",
            )  # fmt: skip
        if self.migrate == "partial":
            self.refuse("migrate_solver", found="has no effect on policy partial, only on prism")
        if self.statistics == "cumulative":
            self.refuse("half_life_s", found="has no effect with cumulative ``statistics``")
        elif self.half_life_s is not None and not math.isfinite(self.half_life_s):
            raise InputError(
                f"{self.half_life_s}", parameter="half_life_s", expected="seconds above 0"
            )

    def simulation(self, **others: Any) -> SimulationOptions:
        """These options and ``others`` as those of a simulation.

        Raises
        ------
        InputError
            A value is out of range.
        """
        from prism_plan.evaluate.simulation_options import SimulationOptions

        return SimulationOptions(
            migrate=self.migrate,
            migrate_every_s=self.migrate_every_s,
            half_life_s=math.inf if self.statistics == "cumulative" else self.half_life_s,
            horizon_s=self.horizon_s,
            migration_cost=self.migration_cost,
            migrate_solver=self.migrate_solver,
            **others,
        )
