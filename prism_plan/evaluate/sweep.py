"""Many simulations over a grid of clusters, arrivals, solvers and seeds; one row each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_plan.cluster import Cluster, with_figures
from prism_plan.errors import InputError, LimitReached, PrismError, did_you_mean
from prism_plan.evaluate.simulation import SimulationOptions, offload_placement, simulate_placements
from prism_plan.instance import Instance
from prism_plan.io.sweep import COLUMNS, OK
from prism_plan.limits import MAX_REPLICAS, MAX_RUNS, MAX_SEED, require_integer
from prism_plan.placement import OFFLOAD, Placement
from prism_plan.simulate.calibration import Calibration
from prism_plan.simulate.poisson_arrivals import MAX_REQUESTS
from prism_plan.simulate.report import Run
from prism_plan.simulate.sampling import MAX_PROMPT_TOKENS, sample_requests
from prism_plan.solvers import SOLVER_NAMES, Options, get_solver, solve
from prism_plan.token_rates import require_users
from prism_plan.trace import Trace


@dataclass(frozen=True)
class Grid:
    """What is varied. ``None`` in a list: as the cluster file has it; so are empty lists.

    ``gpus`` are whole multiples of the cluster's GPUs: its servers are repeated. The bandwidth is
    that of ``[link]``; servers and pairs with figures of their own keep them. The arrival interval
    and the usable memory fraction are set for all servers and GPUs alike. Copies of a server have
    the measured times of that server, if there are any. ``seed`` is that of the
    requests, of the split and of random solvers.

    Raises
    ------
    InputError
        A value is out of range, an unknown solver, no solver, too many runs.
    """

    gpus: tuple[int | None, ...] = (None,)
    bandwidth_mbps: tuple[float | None, ...] = (None,)
    arrival_interval_s: tuple[float | None, ...] = (None,)
    memory_fraction: tuple[float | None, ...] = (None,)
    solver: tuple[str, ...] = ()
    seed: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for key, least, most in (
            ("gpus", 1, 65536),
            ("bandwidth_mbps", 1e-6, 1e9),
            ("arrival_interval_s", 1e-6, 1e9),
            ("memory_fraction", 1e-6, 1.0),
            ("seed", 0, MAX_SEED),
        ):
            for value in getattr(self, key):
                whole = key in ("gpus", "seed")
                if value is None and key != "seed":
                    continue
                if not least <= value <= most or (whole and value != int(value)):
                    kind, form = ("a whole number", ",") if whole else ("a number", "g")
                    raise InputError(
                        f"{value!r}",
                        parameter="grid",
                        place=key,
                        expected=f"{kind} from {least:{form}} to {most:{form}}",
                    )
        for name in self.solver:
            if name != OFFLOAD:
                with _blaming_sweep():
                    get_solver(name)
        if not self.solver:
            raise InputError(
                "no solver",
                parameter="grid",
                place="solver",
                expected=f"some of {', '.join((*SOLVER_NAMES, OFFLOAD))}",
            )
        if self.runs > MAX_RUNS:
            raise InputError(
                f"{self.runs:,} runs", parameter="grid", expected=f"at most {MAX_RUNS:,}"
            )

    @property
    def runs(self) -> int:
        """How many rows the sweep has."""
        number = 1
        for field in dataclasses.fields(self):
            number *= len(getattr(self, field.name))
        return number

    def plans(self) -> Iterator[Plans]:
        """The parts that share one placement, in order."""
        for gpus, fraction, seed, solver in itertools.product(
            self.gpus, self.memory_fraction, self.seed, self.solver
        ):
            yield Plans(gpus, fraction, solver, seed, self.bandwidth_mbps, self.arrival_interval_s)


def parse_grid(texts: Sequence[str]) -> Grid:
    """A grid from texts ``KEY=VALUE,VALUE,...``, the keys being :class:`Grid`'s fields.

    Raises
    ------
    InputError
        An unknown key, one that stands twice, a value that is no number, and as :class:`Grid`.
    """
    keys = [field.name for field in dataclasses.fields(Grid)]
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        key = key.strip()
        if not equals or key not in keys or key in values:
            twice = " stands twice" if key in values else did_you_mean(key, keys)
            raise InputError(
                f"{text!r:.60}{twice}",
                parameter="grid",
                expected=f"KEY=VALUE,VALUE,... with KEY of {', '.join(keys)}",
            )
        words = [word.strip() for word in listed.split(",") if word.strip()]
        if not words:
            raise InputError(f"{text!r:.60}", parameter="grid", place=key, expected="values")
        values[key] = tuple(dict.fromkeys(_value(key, word) for word in words))
    return Grid(**values)


def _value(key: str, word: str) -> Any:
    if key == "solver":
        return word
    try:
        return int(word) if key in ("gpus", "seed") else float(word)
    except ValueError:
        kind = "a whole number" if key in ("gpus", "seed") else "a number"
        raise InputError(f"{word!r:.60}", parameter="grid", place=key, expected=kind) from None


@dataclass(frozen=True)
class Plans:
    """A placement's conditions, and those that it is simulated under."""

    gpus: int | None
    memory_fraction: float | None
    solver: str
    seed: int
    bandwidth_mbps: tuple[float | None, ...]
    arrival_interval_s: tuple[float | None, ...]


@dataclass(frozen=True)
class SweepOptions:
    """What is the same in all runs: requests of each server, the split, how to simulate.

    Raises
    ------
    InputError
        A value is out of range.
    """

    requests_per_server: int = 20
    burst: int = 1
    decode_tokens: int = 32
    prompt_tokens: int = 128
    holdout: float | None = None
    min_replicas: int = 1
    simulation: SimulationOptions = dataclasses.field(default_factory=SimulationOptions)

    def __post_init__(self) -> None:
        require_integer(self.requests_per_server, 1, MAX_REQUESTS, "requests_per_server")
        require_integer(self.burst, 1, MAX_REQUESTS, "burst")
        require_integer(self.decode_tokens, 0, MAX_PROMPT_TOKENS, "decode_tokens")
        require_integer(self.prompt_tokens, 0, MAX_PROMPT_TOKENS, "prompt_tokens")
        require_integer(self.min_replicas, 1, MAX_REPLICAS, "min_replicas")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise InputError(
                f"{self.holdout}", parameter="holdout", expected="a share above 0 and below 1"
            )


def varied(
    cluster: Cluster,
    *,
    gpus: int | None = None,
    bandwidth_mbps: float | None = None,
    arrival_interval_s: float | None = None,
    memory_fraction: float | None = None,
) -> Cluster:
    """A cluster of more GPUs, other links, arrivals or memory; see :class:`Grid`.

    Raises
    ------
    InputError
        ``gpus`` is no whole multiple of the cluster's.
    """
    servers = cluster.servers
    pairs = cluster.pair_links
    own = sum(len(server.gpus) for server in servers)
    if gpus is not None and gpus != own:
        copies, rest = divmod(gpus, own)
        if rest or not copies:
            raise InputError(
                f"{gpus}",
                parameter="grid",
                place="gpus",
                expected=f"whole multiples of the {own} GPUs of {cluster.name}",
            )
        number = len(servers)
        servers = tuple(
            dataclasses.replace(server, name=_copy_name(server.name, copy))
            for copy in range(copies)
            for server in servers
        )
        pairs = tuple(
            dataclasses.replace(pair, a=pair.a + copy * number, b=pair.b + copy * number)
            for copy in range(copies)
            for pair in pairs
        )
    if arrival_interval_s is not None:
        servers = tuple(
            dataclasses.replace(server, arrival_interval_s=arrival_interval_s) for server in servers
        )
    if memory_fraction is not None:
        if any(gpu.slots is not None for server in servers for gpu in server.gpus):
            raise InputError(
                "a GPU gives its slots directly",
                parameter="grid",
                place="memory_fraction",
                expected="memory_gb or memory_gib in the cluster file",
            )
        servers = tuple(
            dataclasses.replace(
                server,
                gpus=tuple(
                    dataclasses.replace(gpu, memory_fraction=memory_fraction) for gpu in server.gpus
                ),
            )
            for server in servers
        )
    link = cluster.link
    if bandwidth_mbps is not None:
        link = with_figures(link, bandwidth_mbps=bandwidth_mbps)
    return dataclasses.replace(cluster, servers=servers, pair_links=pairs, link=link)


def sweep(
    trace: Trace,
    cluster: Cluster,
    grid: Grid,
    options: SweepOptions | None = None,
    *,
    jobs: int = -1,
    progress: Callable[[int], None] = lambda done: None,
    names: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the sweep table (:data:`prism_plan.io.sweep.COLUMNS`), in the grid's order.

    Placements are spread over ``jobs`` processes (-1: one a core) by joblib, so that
    ``joblib.parallel_config(backend="dask")`` or ``"ray"`` around the call takes the sweep beyond
    one machine. A run that fails is a row whose ``status`` is the line of the error, in which
    parameters have these ``names`` (:meth:`prism_plan.errors.PrismError.line`). With
    ``options.holdout`` placements are planned on one part of each task's requests and simulated
    with the others.

    Raises
    ------
    InputError
        No run of the sweep could go well: ``options.holdout`` of a trace that cannot be split, a
        cluster that nobody asks for anything, or no time between the requests of a server in
        cluster and grid; or a calibration gives the bandwidth that is swept over.
    """
    import joblib

    options = options or SweepOptions()
    if options.holdout is not None:
        trace.split(options.holdout, grid.seed[0])
    if grid.arrival_interval_s == (None,):
        _require_arrivals(cluster)
    require_users(cluster)
    calibration = options.simulation.calibration
    if calibration and calibration.bandwidth_mbps is not None and any(grid.bandwidth_mbps):
        raise InputError(
            f"{calibration.bandwidth_mbps:g} would replace the bandwidths of the sweep",
            source=calibration.name,
            place="bandwidth_mbps",
            remedy="leave one of the two out",
        )
    work = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        joblib.delayed(_rows)(trace, cluster, plans, options, names or {}) for plans in grid.plans()
    )
    done = 0
    for rows in work:
        done += len(rows)
        progress(done)
        yield from rows


def _require_arrivals(cluster: Cluster) -> None:
    for n, server in enumerate(cluster.servers):
        if server.tasks and server.arrival_interval_s is None:
            raise InputError(
                f"server {server.name!r} has tasks but no times",
                place=f"server[{n}].arrival_interval_s",
                expected="mean seconds between its requests",
                remedy="or sweep over arrival_interval_s",
            )


def _rows(
    trace: Trace, cluster: Cluster, plans: Plans, options: SweepOptions, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """All rows of one placement."""
    conditions = list(itertools.product(plans.bandwidth_mbps, plans.arrival_interval_s))
    placement: Placement | None = None
    error: PrismError | None = None
    solve_s = 0.0
    scored = trace
    try:
        planned = trace
        if options.holdout is not None:
            planned, scored = trace.split(options.holdout, plans.seed)
        base = varied(cluster, gpus=plans.gpus, memory_fraction=plans.memory_fraction)
        instance = Instance.build(planned, base, min_replicas=options.min_replicas)
        begin = time.perf_counter()
        if plans.solver == OFFLOAD:
            placement = offload_placement(instance)
        else:
            placement = solve(instance, plans.solver, Options(seed=plans.seed))
        solve_s = time.perf_counter() - begin
    except PrismError as found:
        error = found
    rows = []
    for bandwidth, interval in conditions:
        row = {
            "gpus": plans.gpus or sum(len(server.gpus) for server in cluster.servers),
            "servers": len(cluster.servers) * _copies(cluster, plans.gpus),
            "bandwidth_mbps": bandwidth,
            "arrival_interval_s": interval,
            "memory_fraction": plans.memory_fraction,
            "solver": plans.solver,
            "seed": plans.seed,
            "status": OK if error is None else error.line(names),
        }
        if placement is not None:
            try:
                run = _run(scored, cluster, placement, plans, bandwidth, interval, options)
                row |= _results(run.to_json(), run) | {"solve_s": solve_s}
            except PrismError as found:
                row["status"] = found.line(names)
        rows.append({name: row.get(name) for name in COLUMNS})
    return rows


def _copy_name(name: str, copy: int) -> str:
    return f"{name}.{copy}" if copy else name


def _of_copies(calibration: Calibration, cluster: Cluster, copies: int) -> Calibration:
    """The calibration in which copies of a server have the times of that server."""
    own = {server.name for server in cluster.servers}
    gpus = dict(calibration.gpus)
    for (server, gpu), curves in calibration.gpus.items():
        if server in own:
            gpus |= {(_copy_name(server, copy), gpu): curves for copy in range(copies)}
    return dataclasses.replace(calibration, gpus=gpus)


def _copies(cluster: Cluster, gpus: int | None) -> int:
    own = sum(len(server.gpus) for server in cluster.servers)
    return 1 if gpus is None else max(gpus // own, 1)


def _run(
    trace: Trace,
    cluster: Cluster,
    placement: Placement,
    plans: Plans,
    bandwidth_mbps: float | None,
    arrival_interval_s: float | None,
    options: SweepOptions,
) -> Run:
    target = varied(
        cluster,
        gpus=plans.gpus,
        memory_fraction=plans.memory_fraction,
        bandwidth_mbps=bandwidth_mbps,
        arrival_interval_s=arrival_interval_s,
    )
    requests = sample_requests(
        trace,
        target,
        requests_per_server=options.requests_per_server,
        burst=options.burst,
        decode_tokens=options.decode_tokens,
        prompt_tokens=options.prompt_tokens,
        seed=plans.seed,
    )
    calibration = options.simulation.calibration
    if calibration is not None:
        calibration = _of_copies(calibration, cluster, _copies(cluster, plans.gpus))
    simulation = dataclasses.replace(options.simulation, seed=plans.seed, calibration=calibration)
    found = simulate_placements([(plans.solver, placement)], requests, trace, target, simulation)
    if found.interrupted:
        raise KeyboardInterrupt
    if found.partial:
        raise LimitReached(f"the time limit of {simulation.time_limit_s:g} s was reached")
    return found.runs[0]


def _results(run: Mapping[str, Any], source: Run) -> dict[str, Any]:
    return {
        "requests": run["requests"],
        "latency_mean_s": run["latency_s"]["mean"],
        "latency_p50_s": run["latency_s"]["p50"],
        "latency_p95_s": run["latency_s"]["p95"],
        "latency_p99_s": run["latency_s"]["p99"],
        "ttft_mean_s": run["ttft_s"]["mean"],
        "tpot_mean_s": run["tpot_s"]["mean"],
        "remote_share": run["remote_share"],
        "waiting_share": run["waiting_share"],
        "destinations": run["destinations"],
        "bytes_sent": run["bytes_sent"],
        "utilisation": run["busiest"],
        "events": run["events"],
        "runtime_s": run["runtime_s"],
    }


@contextlib.contextmanager
def _blaming_sweep() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise error.within(parameter="grid") from error
