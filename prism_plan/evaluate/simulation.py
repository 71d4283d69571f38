"""`simulate_placements`: placements, requests, a cluster in; latencies and migrations out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError, UnsupportedFeature, did_you_mean
from prism_plan.instance import Instance
from prism_plan.io.files import printable, write_bytes
from prism_plan.migration.cost import MigrationCost, call_seconds, gpu_load_gbs
from prism_plan.migration.order import migration_plan
from prism_plan.migration.policy import Policy, PolicyName, review
from prism_plan.migration.statistics import Counting, Cumulative, Window
from prism_plan.model import ModelSpec
from prism_plan.objective import violations
from prism_plan.placement import OFFLOAD, InputFile, Placement, Plan
from prism_plan.simulate.calibration import Calibration
from prism_plan.simulate.compiled.engine import CHUNK, CompiledEngine
from prism_plan.simulate.engine import Engine, Outcome
from prism_plan.simulate.network import Network
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.report import Migration, Run, notes
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.routing_policies import Route
from prism_plan.simulate.scenario import Scenario
from prism_plan.simulate.timing import timing
from prism_plan.solvers.contract import Options, Rule
from prism_plan.solvers.packing import pack_on_gpus
from prism_plan.solvers.registry import get_solver, solvers_supporting
from prism_plan.solvers.run import rules_asked
from prism_plan.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

EngineName = Literal["compiled", "reference"]
ENGINES: Mapping[str, Callable[[Scenario], Engine]] = {
    "compiled": CompiledEngine,
    "reference": ReferenceEngine,
}

#: Between two looks at the clock and at Ctrl-C; the plain engine is hundreds of times slower.
_EVENTS: Mapping[str, int] = {"compiled": CHUNK, "reference": 2000}

#: Longer times are mistyped, and products of them no numbers any more.
MAX_S = 1e12
#: More reviews than this are a mistyped period: they would take longer than what they review.
MAX_REVIEWS = 100_000


@dataclass(frozen=True)
class SimulationOptions:
    """How to simulate.

    Parameters
    ----------
    route
        Where a call goes that several servers could serve: ``cover``, ``nearest``, ``spread``.
    migrate
        Policy of the reviews: ``never`` (there are none), ``prism``, ``partial``.
    migrate_every_s
        Seconds between reviews.
    half_life_s
        Of the statistics' window; ``None`` is the time between reviews. ``math.inf`` counts
        everything since the last move, as the paper had it.
    horizon_s
        Over which a move has to pay; ``None`` is the time between reviews.
    migration_cost
        Whether loads cost their sum, as in the paper, or the maximum over GPUs.
    migrate_solver
        What plans the candidates of policy ``prism``.
    calibration
        Measured times in place of the cluster's figures.
    engine
        ``compiled``, or the plain ``reference``: the same numbers, hundreds of times slower.
    time_limit_s
        Wall seconds for all runs together; what is not done then is marked partial.
    seed
        Of solvers that plan candidates.

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

    def __post_init__(self) -> None:
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
        if self.engine not in ENGINES:
            raise InputError(
                f"{self.engine!r:.60}{did_you_mean(str(self.engine), ENGINES)}",
                parameter="engine",
                expected=f"one of {', '.join(ENGINES)}",
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

    def policy(self) -> Policy:
        """The policy of the reviews."""
        return Policy(
            kind=self.migrate,
            horizon_s=self.horizon_s or self.migrate_every_s,
            cost=self.migration_cost,
            solver=self.migrate_solver,
            seed=self.seed,
        )

    def counting(self) -> Counting:
        """The statistics that reviews go by."""
        half_life_s = self.half_life_s or self.migrate_every_s
        return Cumulative() if math.isinf(half_life_s) else Window(half_life_s)


@dataclass(frozen=True, eq=False)
class Simulation:
    """Runs of several placements under the same requests.

    ``partial``: some of what was asked for is lacking; ``interrupted``: Ctrl-C is why, and not the
    time limit.
    """

    runs: tuple[Run, ...]
    options: SimulationOptions
    seed: int
    trace: InputFile
    kind: str
    cluster: InputFile
    partial: bool = False
    notes: tuple[str, ...] = field(default=())
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, format ``prism-plan/simulation`` version 1."""
        options = self.options
        values: dict[str, Any] = {
            "format": "prism-plan/simulation",
            "version": 1,
            "partial": self.partial,
            "seed": self.seed,
            "route": options.route,
            "migrate": options.migrate,
            "timing": _timing_name(options.calibration),
            "trace": {"name": self.trace.name, "sha256": self.trace.sha256, "kind": self.kind},
            "cluster": {"name": self.cluster.name, "sha256": self.cluster.sha256},
            "notes": list(self.notes),
        }
        if options.migrate != "never":
            policy, counting = options.policy(), options.counting()
            values["review"] = {
                "every_s": options.migrate_every_s,
                "horizon_s": policy.horizon_s,
                "half_life_s": counting.half_life_s if isinstance(counting, Window) else None,
                "cost": policy.cost,
                "solver": policy.solver if policy.kind == "prism" else None,
            }
        return {**values, "runs": [run.to_json() for run in self.runs]}

    def to_frame(self, level: str = "placement") -> pd.DataFrame:
        """One row a placement, or with ``level`` "server", "review" or "request" one of these.

        Columns are those of :func:`prism_plan.simulation_frame`. Of requests, numbered from 0, they
        are those of ``prism-plan simulate --per-request``: run, placement, request, server, task,
        trace_request, prefill_tokens, decode_tokens, and arrival_s, start_s, first_token_s and
        done_s in seconds, NaN where it did not come to pass.

        Raises
        ------
        InputError
            An unknown level.
        """
        from prism_plan.evaluate.frames import require_request_level, simulation_frame
        from prism_plan.evaluate.request_table import request_table

        if require_request_level(level):
            return request_table(self).to_pandas()
        return simulation_frame(self.to_json(), level)


def _timing_name(calibration: Calibration | None) -> str:
    return "cluster" if calibration is None else printable(calibration.name) or "calibration"


def offload_placement(instance: Instance) -> Placement:
    """What each server would keep for itself: its most called experts, on GPUs by their load.

    The start of the baseline `offload` (DESIGN section 4, rule 8). It covers nothing.

    Raises
    ------
    InputError
        Experts differ in size, so that slots have no meaning.
    """
    if not instance.in_slots:
        raise InputError(
            f"experts of {instance.model.name} differ in size",
            parameter="offload",
            expected="experts of one size, for one takes the slot of another",
        )
    servers = instance.num_servers
    local = np.zeros((servers, instance.model.num_pairs), bool)
    for n, slots in enumerate(instance.slots):
        favourites = np.argsort(-instance.activations[n], axis=None, kind="stable")
        local[n, favourites[:slots]] = True
    shaped = local.reshape(instance.activations.shape)
    return Placement(
        model=instance.model,
        servers=instance.servers,
        gpu_capacity=instance.gpu_capacity,
        on_gpu=pack_on_gpus(instance, shaped),
        plan=Plan(solver=OFFLOAD),
    )


def simulate_placements(
    placements: Sequence[tuple[str, Placement]],
    requests: Requests,
    trace: Trace,
    cluster: Cluster,
    options: SimulationOptions | None = None,
    *,
    inputs: Mapping[str, InputFile] | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Simulation:
    """Run each placement under the same requests.

    A placement made by :func:`offload_placement` is run as the baseline `offload`. Ctrl-C and the
    time limit end the run that is under way; the result is then marked partial and lacks the runs
    that had not begun. Ctrl-C before the first event is raised.

    Parameters
    ----------
    placements
        Pairs of a name and a placement.
    requests
        Of :func:`prism_plan.simulate.sampling.sample_requests`.
    trace
        Gives the model; ``requests`` were sampled from it.
    cluster
        Servers, GPUs and links.
    options
        How to simulate.
    inputs
        Identities of the files ``"trace"`` and ``"cluster"``, for the report.
    progress
        Called with the placement's name, finished requests and all.

    Raises
    ------
    InputError
        A placement does not fit the cluster, or lacks an expert that the requests call; a figure
        of the cluster is not a positive number.
    WrongModel
        A placement is of another model than the trace.
    Infeasible
        A GPU is too small for what must reside on it.
    UnsupportedFeature
        The migration policy has no rule for what the cluster asks.
    """
    options = options or SimulationOptions()
    _require_few_reviews(options, requests)
    deadline = math.inf
    if options.time_limit_s is not None:
        deadline = time.monotonic() + options.time_limit_s
    instance = _instance(trace, cluster)
    prepared = []
    for name, placement in placements:
        try:
            prepared.append(_prepare(placement, requests, trace.model, instance, cluster, options))
        except InputError as error:
            raise error.within(name) from error
    runs: list[Run] = []
    interrupted = False
    try:
        for (name, placement), (scenario, rules) in zip(placements, prepared, strict=True):
            if runs and (runs[-1].partial or time.monotonic() > deadline):
                break

            def tell(done: int, name: str = name) -> None:
                progress(name, done, len(requests))

            runner = _Runner(name, placement, scenario, rules, cluster, options, tell, deadline)
            runs.append(runner.run())
            if runner.interrupted:
                interrupted = True
                break
    except KeyboardInterrupt:
        if not runs:
            raise
        interrupted = True
    partial = len(runs) < len(prepared) or any(run.partial for run in runs)
    files = dict(inputs or {})
    found = [f"{run.placement}: {note}" for run in runs for note in run.notes]
    return Simulation(
        runs=tuple(runs),
        options=options,
        seed=options.seed,
        trace=files.get("trace", InputFile(trace.name, trace.sha256)),
        kind=trace.kind,
        cluster=files.get("cluster", InputFile(cluster.name, "")),
        partial=partial,
        notes=(*found, *notes(runs)),
        interrupted=interrupted,
    )


def _instance(trace: Trace, cluster: Cluster) -> Instance:
    """Capacities and rules, to which what the users ask for does not matter.

    What is wrong with the cluster comes out here, before any placement is looked at.
    """
    Network.of(cluster, trace.model)
    timing(cluster, trace.model, 1)
    return Instance.of_cluster(cluster, trace.model)


def _prepare(
    placement: Placement,
    requests: Requests,
    model: ModelSpec,
    instance: Instance,
    cluster: Cluster,
    options: SimulationOptions,
) -> tuple[Scenario, Instance]:
    """The scenario of a placement, and the rules that moves away from it have to keep."""
    offload = placement.plan.solver == OFFLOAD
    scenario = Scenario.build(
        placement,
        requests,
        cluster,
        model,
        route=options.route,
        calibration=options.calibration,
        offload=offload,
    )
    rules = instance.replace(min_replicas=placement.plan.min_replicas)
    moving = options.migrate != "never" and not offload
    if moving:
        require_able(rules, options)
    for violation in violations(placement, instance=rules):
        if violation.constraint == "capacity":
            raise InputError(
                violation.message,
                place="servers",
                expected=f"experts within the memory that {cluster.name} has for them",
                remedy="plan again for this cluster",
            )
        if moving:
            raise InputError(
                violation.message,
                place="servers",
                expected=f"a placement by the rules of {cluster.name}, for moves have to keep them",
                remedy="plan again for this cluster",
            )
    return scenario, rules


def require_able(rules: Instance, options: SimulationOptions) -> None:
    """Refuse at once what the first review would refuse after so much work."""
    if options.migrate == "partial":
        if not rules.in_slots:
            raise UnsupportedFeature(
                f"``migrate``: 'partial' has no rule for {Rule.UNEQUAL_BYTES}; 'prism' has"
            )
        return
    asked = rules_asked(rules, Options(seed=options.seed))
    lacking = asked - get_solver(options.migrate_solver).knows
    if lacking:
        raise UnsupportedFeature(
            f"``migrate_solver``: {options.migrate_solver!r} has no rule for "
            f"{' and '.join(sorted(lacking))}; solvers that have: "
            f"{', '.join(solvers_supporting(asked)) or 'none'}"
        )


def _require_few_reviews(options: SimulationOptions, requests: Requests) -> None:
    if options.migrate == "never" or not len(requests):
        return
    reviews = float(requests.arrival_s[-1]) / options.migrate_every_s
    if reviews > MAX_REVIEWS:
        raise InputError(
            f"{options.migrate_every_s:g} s: {reviews:,.0f} reviews before the last request",
            parameter="migrate_every_s",
            expected=f"at most {MAX_REVIEWS:,}",
            remedy="review less often",
        )


def write_simulation(path: str | os.PathLike[str], simulation: Simulation) -> None:
    """Write the report whole or not at all.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_bytes(path, dump_report(simulation.to_json()))


def dump_report(values: Mapping[str, Any]) -> bytes:
    """The bytes of a report file."""
    return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


class _TimeIsUp(Exception):
    """The time limit has been reached."""


@contextlib.contextmanager
def _whole_events() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block ends, so that no event is left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not come here
        return
    handlers: dict[int, Any] = {}
    came: list[tuple[Any, ...]] = []
    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(which)
            if callable(handler):
                handlers[which] = handler
                signal.signal(which, lambda *signaled: came.append(signaled))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for signaled in came:
        handlers[signaled[0]](*signaled)


class _Runner:
    """One placement from its first arrival to its last request, with reviews in between."""

    def __init__(
        self,
        name: str,
        placement: Placement,
        scenario: Scenario,
        instance: Instance,
        cluster: Cluster,
        options: SimulationOptions,
        progress: Callable[[int], None],
        deadline: float,
    ) -> None:
        self.name = name
        self.placement = placement
        self.scenario = scenario
        self.instance = instance
        self.options = options
        self.progress = progress
        self.deadline = deadline
        self.engine: Engine = ENGINES[options.engine](scenario)
        self.migrations: list[Migration] = []
        self.notes: list[str] = []
        self.interrupted = False
        self.call_s = call_seconds(cluster, scenario.model)
        self.load_gbs = gpu_load_gbs(cluster)

    def run(self) -> Run:
        """Simulate; Ctrl-C is raised if nothing has happened yet, and else ends the run."""
        begin = time.perf_counter()
        partial = False
        try:
            if self.options.migrate == "never" or self.scenario.offload:
                self._advance(math.inf)
            else:
                self._with_reviews()
        except _TimeIsUp:
            partial = True
        except KeyboardInterrupt:
            if not self.engine.outcome().events:
                raise
            partial = self.interrupted = True
        self._note_end_of_migration()
        return Run(
            placement=self.name,
            solver=self.placement.plan.solver,
            scenario=self.scenario,
            outcome=self._outcome(),
            experts=self.engine.on_gpu().sum(axis=(1, 2)),
            migrations=tuple(self.migrations),
            partial=partial,
            runtime_s=time.perf_counter() - begin,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _advance(self, until_s: float) -> None:
        compiled = self.options.engine == "compiled"  # takes chunks of events whole anyway
        done = False
        while not done:
            with contextlib.nullcontext() if compiled else _whole_events():
                done = self.engine.advance(until_s, _EVENTS[self.options.engine])
            self.progress(self.engine.num_finished)
            if time.monotonic() > self.deadline and not (done and math.isinf(until_s)):
                raise _TimeIsUp

    def _with_reviews(self) -> None:
        every_s = self.options.migrate_every_s
        policy = self.options.policy()
        statistics = self.options.counting().start(self.instance.activations.shape)
        current = self.placement.replace(gpu_capacity=self.instance.gpu_capacity)
        reviews = 0
        while not self.engine.all_finished:
            reviews += 1
            at_s = reviews * every_s
            self._advance(at_s)
            if self.engine.all_finished:
                break
            statistics.add(self.engine.take_calls(), every_s)
            if self.engine.migrating:
                self.migrations.append(Migration(at_s, 0, 0, "busy", None, None))
                continue
            self._note_end_of_migration()
            rates = statistics.rates()
            found = review(policy, current, rates, self.instance, self.call_s, self.load_gbs)
            decision = found.decision
            if found.target is not None and self._move(current, found.target, rates):
                current = found.target
                statistics.moved()
            else:
                decision = "stay"
            moved = decision == "move"
            self.migrations.append(
                Migration(
                    at_s=at_s,
                    moved_experts=found.moved_experts if moved else 0,
                    moved_bytes=found.moved_bytes if moved else 0,
                    decision=decision,
                    saving_s=found.saving_s,
                    cost_s=found.cost_s,
                )
            )
        self._advance(math.inf)

    def _move(self, current: Placement, target: Placement, rates: Any) -> bool:
        """Begin to move; whether there is an order in which that can be done."""
        try:
            plan = migration_plan(
                current,
                target,
                gpu_capacity=self.instance.gpu_capacity,
                forbidden=self.instance.mask(self.instance.forbidden),
                priority=rates,
            )
        except Infeasible as error:
            self.notes.append(f"a move was not made: {error}")
            return False
        self.engine.migrate(plan.steps)
        return True

    def _outcome(self) -> Outcome:
        """What was measured until the last event, not until the review that found nothing left."""
        outcome = self.engine.outcome()
        if not self.engine.all_finished or self.engine.migrating:
            return outcome
        end_s = max(float(outcome.done_s.max(initial=0.0)), self.engine.migration_end_s)
        return dataclasses.replace(outcome, now_s=min(outcome.now_s, end_s))

    def _note_end_of_migration(self) -> None:
        """The latest move gets the time at which it was done, once it is."""
        if self.engine.migrating:
            return
        for index in range(len(self.migrations) - 1, -1, -1):
            if self.migrations[index].decision == "move":
                if self.migrations[index].finished_at_s is None:
                    self.migrations[index] = dataclasses.replace(
                        self.migrations[index], finished_at_s=self.engine.migration_end_s
                    )
                break
