"""The grid of a sweep, and the clusters that its values make."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prism_plan.cluster import Cluster, with_figures
from prism_plan.errors import InputError, did_you_mean
from prism_plan.input_limits import MAX_RUNS, MAX_SEED
from prism_plan.placement import OFFLOAD
from prism_plan.simulate.calibration import Calibration
from prism_plan.solvers import ALL_SOLVERS, get_solver


@dataclass(frozen=True)
class Grid:
    """The values that a sweep varies. ``None``: as the cluster file has it.

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
                try:
                    get_solver(name)
                except InputError as error:
                    raise error.within(parameter="grid") from error
        if not self.solver:
            raise InputError(
                "no solver",
                parameter="grid",
                place="solver",
                expected=f"some of {', '.join((*ALL_SOLVERS, OFFLOAD))}",
            )
        if self.runs > MAX_RUNS:
            raise InputError(
                f"{self.runs:,} runs", parameter="grid", expected=f"at most {MAX_RUNS:,}"
            )

    @property
    def runs(self) -> int:
        """How many rows the sweep has."""
        return math.prod(len(getattr(self, field.name)) for field in dataclasses.fields(self))

    def blocks(self) -> Iterator[GridBlock]:
        """The parts that share one placement, in order."""
        for gpus, fraction, seed, solver in itertools.product(
            self.gpus, self.memory_fraction, self.seed, self.solver
        ):
            yield GridBlock(
                gpus, fraction, solver, seed, self.bandwidth_mbps, self.arrival_interval_s
            )


def parse_grid(texts: Sequence[str]) -> Grid:
    """A grid from texts ``KEY=VALUE,VALUE,...``, the keys being :class:`Grid`'s fields.

    Raises
    ------
    InputError
        An unknown key, one that is duplicated, a value that is no number, and as :class:`Grid`.
    """
    keys = [field.name for field in dataclasses.fields(Grid)]
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, listing = text.partition("=")
        key = key.strip()
        if not equals or key not in keys or key in values:
            twice = " is duplicated" if key in values else did_you_mean(key, keys)
            raise InputError(
                f"{text!r:.60}{twice}",
                parameter="grid",
                expected=f"KEY=VALUE,VALUE,... with KEY of {', '.join(keys)}",
            )
        words = [word.strip() for word in listing.split(",") if word.strip()]
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
class GridBlock:
    """The runs of a grid that share one placement: its conditions, and those of the simulations."""

    gpus: int | None
    memory_fraction: float | None
    solver: str
    seed: int
    bandwidth_mbps: tuple[float | None, ...]
    arrival_interval_s: tuple[float | None, ...]


def vary_cluster(
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
    own = _num_gpus(cluster)
    if gpus is not None and gpus != own:
        copies, rest = divmod(gpus, own)
        if rest or not copies:
            raise InputError(
                f"{gpus}",
                parameter="grid",
                place="gpus",
                expected=f"whole multiples of the {own} GPUs of {cluster.name}",
            )
        servers = tuple(
            dataclasses.replace(server, name=_copy_name(server.name, copy))
            for copy in range(copies)
            for server in servers
        )
        shift = len(cluster.servers)
        pairs = tuple(
            dataclasses.replace(pair, a=pair.a + copy * shift, b=pair.b + copy * shift)
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


def vary_calibration(calibration: Calibration, cluster: Cluster, copies: int) -> Calibration:
    """The calibration in which the copies of a server have the measured times of that server."""
    own = {server.name for server in cluster.servers}
    gpus = dict(calibration.gpus)
    for (server, gpu), curves in calibration.gpus.items():
        if server in own:
            gpus |= {(_copy_name(server, copy), gpu): curves for copy in range(copies)}
    return dataclasses.replace(calibration, gpus=gpus)


def num_copies(cluster: Cluster, gpus: int | None) -> int:
    """How often a cluster of ``gpus`` GPUs repeats the servers of ``cluster``."""
    return 1 if gpus is None else max(gpus // _num_gpus(cluster), 1)


def _num_gpus(cluster: Cluster) -> int:
    return sum(len(server.gpus) for server in cluster.servers)


def _copy_name(name: str, copy: int) -> str:
    return f"{name}.{copy}" if copy else name
