"""Comparisons, simulations and sweeps as pandas data frames.

pandas is imported when a frame is made and not before. Columns have a dtype whatever the values
are: int64 and bool; float64, NaN where there is no value; Int64 for whole numbers that may be
missing; string. Column names tell units (``_s`` seconds, ``_bytes``); shares are from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError, did_you_mean
from prism_plan.io.sweep import COLUMNS, RESULTS

if TYPE_CHECKING:
    import pandas as pd

    Row = Mapping[str, Any]

#: Times of a report, each with these statistics.
_STATISTICS = ("mean", "p50", "p95", "p99", "max")


def _typed(dtype: str, names: str) -> dict[str, str]:
    """Columns of one dtype; ``names`` has a space between two."""
    return dict.fromkeys(names.split(), dtype)


def _times(names: str) -> dict[str, str]:
    return {f"{name}_{part}_s": "float64" for name in names.split() for part in _STATISTICS}


#: The columns of a comparison: one row a placement, and one a placement and server.
_COMPARED: Mapping[str, str] = {
    **{"solver": "string", "remote_share": "float64"},
    **{"worst_server": "string", "worst_server_share": "float64", "waiting_share": "float64"},
    **{"worst_waiting_server": "string", "worst_waiting_share": "float64"},
    **{"destinations": "float64", "destinations_method": "string"},
    **{"planned_share": "float64"},
    **_typed("float64", "latency_mean_s latency_p95_s ttft_mean_s user_tokens_per_s"),
    **_typed("float64", "latency_above_best_low latency_above_best_high"),
    **{"bound": "float64", "termination": "string"},
    **{"runtime_s": "float64", "violations": "Int64", "note": "string"},
}
_COMPARED_SERVERS: Mapping[str, str] = _typed("float64", "remote_share waiting_share")
#: The columns of a simulation: one row a run, a run and server, and a run and review.
_RUNS: Mapping[str, str] = {
    **{"solver": "string", "partial": "bool"},
    **_typed("int64", "requests finished"),
    **_times("latency ttft tpot queueing"),
    **_typed("float64", "user_tokens_per_s"),
    **_typed("float64", "remote_share waiting_share destinations busiest"),
    **_typed("int64", "expert_calls remote_calls messages bytes_sent loads loaded_bytes"),
    **_typed("int64", "reviews moves moved_experts moved_bytes events"),
    **_typed("float64", "simulated_s runtime_s"),
}
_SERVERS: Mapping[str, str] = {
    **_typed("int64", "requests"),
    **_times("latency"),
    **_typed("float64", "utilisation remote_share waiting_share destinations"),
    **_typed("int64", "bytes_sent bytes_received"),
    **_typed("float64", "uplink_busy downlink_busy"),
    **_typed("int64", "gpus experts"),
}
_REVIEWS: Mapping[str, str] = {
    **{"decision": "string"},
    **_typed("int64", "moved_experts moved_bytes"),
    **_typed("float64", "saving_s cost_s finished_at_s"),
}


def comparison_frame(comparison: Mapping[str, Any], level: str = "placement") -> pd.DataFrame:
    """A comparison as a frame.

    Parameters
    ----------
    comparison
        Of :func:`prism_plan.read_comparison` or ``Comparison.to_json()``.
    level
        ``"placement"``: one row a placement, indexed by its name. Columns: solver, remote_share,
        worst_server, worst_server_share, waiting_share, worst_waiting_server, worst_waiting_share,
        destinations (servers), destinations_method, planned_share, latency_mean_s, latency_p95_s,
        ttft_mean_s and user_tokens_per_s (of simulated requests), latency_above_best_low and
        latency_above_best_high (95 % interval of the relative difference to the least mean), bound,
        termination, runtime_s, violations (of constraints), note (why there is no placement).

        ``"server"``: one row a placement and server, indexed by both, with remote_share and
        waiting_share of the server's own requests.

    Raises
    ------
    InputError
        An unknown level, or a value of a file that its column cannot hold.
    """
    rows = comparison["rows"]
    _require_level(level, ("placement", "server"))
    if level == "placement":
        return _frame([{**row, "placement": row["name"]} for row in rows], _COMPARED, "placement")
    servers = []
    for number, row in enumerate(rows):
        parts = {
            key: _by_server(row.get(f"{key}_by_server"), f"rows[{number}].{key}_by_server")
            for key in _COMPARED_SERVERS
        }
        servers += [
            {
                "placement": row["name"],
                "server": server,
                **{key: shares.get(server) for key, shares in parts.items()},
            }
            for server in dict.fromkeys(server for shares in parts.values() for server in shares)
        ]
    return _frame(servers, _COMPARED_SERVERS, "placement", "server")


def _by_server(shares: Any, place: str) -> Mapping[str, Any]:
    if shares is None:
        return {}
    if not isinstance(shares, Mapping):
        raise InputError(
            f"{shares!r:.60}",
            parameter="comparison",
            place=place,
            expected="a share of each server",
        )
    return shares


def simulation_frame(report: Mapping[str, Any], level: str = "placement") -> pd.DataFrame:
    """A simulation report as a frame.

    Parameters
    ----------
    report
        Of :func:`prism_plan.read_simulation` or ``Simulation.to_json()``.
    level
        ``"placement"``: one row a run, indexed by the name of its placement. Columns: solver,
        partial, requests, finished; latency, ttft, tpot and queueing, each with mean, p50, p95, p99
        and max in seconds (``latency_mean_s``); user_tokens_per_s (1 / tpot_mean_s); remote_share,
        waiting_share, destinations (servers), busiest, expert_calls, remote_calls, messages,
        bytes_sent, loads, loaded_bytes; reviews, moves, moved_experts and moved_bytes of all
        migrations; events, simulated_s, runtime_s.

        ``"server"``: one row a run and server, indexed by both. Columns: requests, latency in
        seconds as above, utilisation, remote_share, waiting_share, destinations, bytes_sent,
        bytes_received, uplink_busy, downlink_busy (shares of the time), gpus, experts (held at the
        end).

        ``"review"``: one row a run and review of its placement, indexed by placement and at_s.
        Columns: decision, moved_experts, moved_bytes, saving_s, cost_s, finished_at_s.

        A report does not hold single requests: ``Simulation.to_frame("request")`` does, and
        ``prism-plan simulate --per-request`` writes them.

    Raises
    ------
    InputError
        An unknown level.
    """
    _require_level(level, ("placement", "server", "review"))
    runs = report["runs"]
    if level == "placement":
        rows = [{**run, **_statistics(run), **_migrations(run)} for run in runs]
        return _frame(rows, _RUNS, "placement")
    if level == "server":
        servers = [
            {
                **server,
                **_statistics(server),
                "placement": run["placement"],
                "server": server["name"],
                "gpus": len(server["gpus"]),
                "experts": sum(gpu["experts"] for gpu in server["gpus"]),
            }
            for run in runs
            for server in run["servers"]
        ]
        return _frame(servers, _SERVERS, "placement", "server")
    reviews = [
        {**review, "placement": run["placement"]} for run in runs for review in run["migrations"]
    ]
    return _frame(reviews, _REVIEWS, "placement", "at_s")


def sweep_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows of a sweep, of :func:`prism_plan.read_sweep` or as they were simulated, as a frame.

    One row a simulated run, numbered from 0. Columns are those of a sweep table, conditions first:
    gpus, servers, bandwidth_mbps, arrival_interval_s, memory_fraction (NaN: as in the cluster
    file), solver, seed; then status ("ok", or why the run failed) and results, missing where a run
    failed: requests, latency_mean_s, latency_p50_s, latency_p95_s, latency_p99_s, ttft_mean_s,
    tpot_mean_s, remote_share, waiting_share, destinations, bytes_sent, utilisation, events,
    solve_s, runtime_s.

    Raises
    ------
    InputError
        A value that its column cannot hold.
    """
    kinds = {str: "string", float: "float64"}
    dtypes = {
        name: kinds.get(kind) or ("Int64" if name in RESULTS else "int64")
        for name, kind in COLUMNS.items()
    }
    return _frame(rows, dtypes)


def require_request_level(level: str) -> bool:
    """Check ``level``; returns whether it is "request", which only a simulation in memory has."""
    _require_level(level, ("placement", "server", "review", "request"))
    return level == "request"


def _require_level(level: str, known: Sequence[str]) -> None:
    if level not in known:
        raise InputError(
            f"{level!r:.60}{did_you_mean(str(level), known)}",
            parameter="level",
            expected=f"one of {', '.join(known)}",
        )


def _statistics(values: Row) -> dict[str, Any]:
    """Flatten the times of a report to one key a statistic."""
    return {
        f"{name.removesuffix('_s')}_{statistic}_s": values[name][statistic]
        for name in ("latency_s", "ttft_s", "tpot_s", "queueing_s")
        if name in values
        for statistic in _STATISTICS
    }


def _migrations(run: Row) -> dict[str, int]:
    """Totals of the reviews and migrations of a run."""
    moves = [review for review in run["migrations"] if review["decision"] == "move"]
    return {
        "reviews": len(run["migrations"]),
        "moves": len(moves),
        "moved_experts": sum(move["moved_experts"] for move in moves),
        "moved_bytes": sum(move["moved_bytes"] for move in moves),
    }


def _frame(rows: Sequence[Row], dtypes: Mapping[str, str], *index: str) -> pd.DataFrame:
    """A frame of these columns with their dtypes; a key that a row lacks is a missing value."""
    import pandas as pd

    columns = {
        name: pd.array(_values((row.get(name) for row in rows), name, dtype), dtype=dtype)
        for name, dtype in dtypes.items()
    }
    keys = [
        pd.array([row[name] for row in rows], dtype="float64" if name == "at_s" else "string")
        for name in index
    ]
    labels: Any = pd.RangeIndex(len(rows))
    if len(keys) == 1:
        labels = pd.Index(keys[0], name=index[0])
    elif keys:
        labels = pd.MultiIndex.from_arrays(keys, names=list(index))
    return pd.DataFrame(columns, index=labels)


def _values(values: Iterable[Any], name: str, dtype: str) -> list[Any]:
    """The checked values of a column, for not every value of a file that is read was checked."""
    kind: Any = {"string": str, "bool": bool, "float64": int | float}.get(dtype, int)
    missing = math.nan if dtype == "float64" else None
    checked = []
    for value in values:
        good = isinstance(value, kind) and (dtype == "bool" or not isinstance(value, bool))
        if not good and (value is not None or dtype in ("int64", "bool")):
            raise InputError(
                f"{value!r:.60}",
                parameter="frame",
                place=name,
                expected={"string": "a text", "float64": "a number"}.get(dtype, "a whole number"),
            )
        checked.append(missing if value is None else value)
    return checked
