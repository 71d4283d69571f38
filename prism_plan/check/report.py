"""Whether a file of any of the formats is valid, and if not, where and why."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.check.cluster import require_plannable
from prism_plan.check.memory_report import (
    GpuMemory,
    gpu_memory,
    insufficient_kv_memory,
    memory_shortages,
    missing_kv_reservation,
)
from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible, InputError
from prism_plan.execution_table import executed_elsewhere
from prism_plan.instance import Instance
from prism_plan.io.calibration import calibration_from_json
from prism_plan.io.cluster import cluster_from_values
from prism_plan.io.comparison import comparison_from_json
from prism_plan.io.export import ExportFile, export_from_json
from prism_plan.io.json import parse_json
from prism_plan.io.migration import migration_from_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.parquet import MAGIC
from prism_plan.io.phases import schedule_from_values
from prism_plan.io.placement import placement_from_json
from prism_plan.io.simulation import simulation_from_json
from prism_plan.io.sweep import OK, is_sweep, is_sweep_csv, sweep_from_csv, sweep_from_open_file
from prism_plan.io.text_files import decode
from prism_plan.io.toml import parse_toml
from prism_plan.io.trace_reader import read_open_trace
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.replica_dips import dips_text
from prism_plan.model_spec import ModelSpec, require_same_model
from prism_plan.objective import score
from prism_plan.placement import InputFile, Placement
from prism_plan.placement_check import violations
from prism_plan.printable_text import listed, quantity, shown
from prism_plan.simulate.calibration import Calibration
from prism_plan.simulate.phase_schedule import Schedule
from prism_plan.token_rates import require_users
from prism_plan.trace import Trace

#: Values of the key ``format`` of our JSON files.
FORMATS = tuple(
    f"prism-plan/{kind}"
    for kind in ("placement", "comparison", "simulation", "migration", "calibration", "export")
)
_LOOKS_LIKE_JSON = re.compile(r"\s*[{\[]")
#: A stated remote share may differ from the recomputed one by so much.
SHARE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class CheckReport:
    """The result of checking a file. ``problems`` are violated constraints or false statements.

    ``warnings`` are lines, each with the file that it is about, of what makes no file invalid;
    ``memory`` is that of every GPU, where it is known.
    """

    path: str
    kind: str
    summary: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = ()
    memory: tuple[GpuMemory, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "file": self.path,
            "kind": self.kind,
            "valid": not self.problems,
            "summary": self.summary,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            **({"memory": [row.to_json() for row in self.memory]} if self.memory else {}),
        }


def check_file(
    path: str | os.PathLike[str],
    *,
    cluster: tuple[str, Cluster, InputFile] | None = None,
    trace: tuple[str, Trace] | None = None,
    model: tuple[str, ModelSpec] | None = None,
    placement: tuple[str, Placement] | None = None,
) -> CheckReport:
    """Check any file that the commands read or write; the content decides which kind it is.

    Kinds: trace, cluster, placement, comparison, simulation, migration, sweep, calibration, phases,
    export.

    A placement is checked for coverage, for the replicas that it promises and for the capacities
    that it states; with ``cluster`` (file name, content, identity) for its servers and slots;
    with ``trace`` (file name, content) too for memory and rules, and its remote share is
    recomputed. ``model`` (what it was called by, sizes) in place of ``trace`` gives memory and
    rules alone. Of a migration the form is checked, and that no step needs a later one.

    A cluster is refused where every solver refuses it: whatever the trace is, or with ``trace``,
    or whatever the trace of ``model`` is. With a ``placement`` (file name, content) beside one of
    these, whether that placement fits the cluster decides, with KV caches where its execution table
    has layers execute.

    Raises
    ------
    ValueError
        A ``placement`` without sizes.
    InputError
        The file is not of our formats, or its form is broken; of a cluster nobody asks for
        anything, or it does not go with the trace or the model.
    Infeasible
        No placement satisfies the cluster.
    """
    if placement is not None and trace is None and model is None:
        raise ValueError("a placement has no sizes: give a trace or a model")
    name = os.fspath(path)
    with OpenFile(path) as file:
        if name.endswith(".parquet") or file.pread(4, 0) == MAGIC:
            if is_sweep(file):
                return _check_sweep(path, sweep_from_open_file(file))
            return _check_trace(path, read_open_trace(file))
        text = decode(file.read(), path)
    if name.endswith(".toml"):
        table = parse_toml(text, path)
        if "phase" in table and "server" not in table:
            return _check_phases(path, schedule_from_values(table, source=path))
        found = cluster_from_values(table, source=path)
        if placement is not None:
            return _check_cluster_with_placement(path, found, trace, model, placement)
        return _check_cluster(path, found, trace, model)
    if is_sweep_csv(text):
        return _check_sweep(path, sweep_from_csv(text, source=path))
    if not _LOOKS_LIKE_JSON.match(text):
        raise InputError(
            "neither Parquet, JSON nor a .toml file",
            source=path,
            expected="a trace, a sweep, a placement, a report or a cluster file",
        )
    values = parse_json(text, path)
    form = values.get("format") if isinstance(values, Mapping) else None
    if form == "prism-plan/comparison":
        rows = comparison_from_json(values, source=path)["rows"]
        return CheckReport(name, "comparison", quantity(len(rows), "row"))
    if form == "prism-plan/simulation":
        return _check_simulation(path, simulation_from_json(values, source=path))
    if form == "prism-plan/migration":
        return _check_migration(path, migration_from_json(values, source=path))
    if form == "prism-plan/export":
        return _check_export(path, export_from_json(values, path))
    if form == "prism-plan/calibration":
        return _check_calibration(path, calibration_from_json(values, source=path))
    if form != "prism-plan/placement":
        raise InputError(
            shown(form),
            source=path,
            place="format",
            expected=f"one of {', '.join(FORMATS)}",
        )
    return _check_placement(path, placement_from_json(values, source=path), cluster, trace, model)


def _check_cluster(
    path: str | os.PathLike[str],
    cluster: Cluster,
    trace: tuple[str, Trace] | None,
    model: tuple[str, ModelSpec] | None,
) -> CheckReport:
    found = trace[1] if trace else None
    spec = found.model if found is not None else model[1] if model else None
    try:
        notes = require_plannable(cluster, trace=found, model=spec)
    except (InputError, Infeasible) as error:
        raise error.within(path) from error
    memory = () if spec is None else gpu_memory(cluster, spec)
    return CheckReport(
        str(path),
        "cluster",
        _cluster_summary(cluster),
        notes=(*notes, *_notes_on_memory(memory), *_notes_on_states(spec)),
        warnings=_warnings(path, cluster, spec, memory, found),
        memory=memory,
    )


def _check_cluster_with_placement(
    path: str | os.PathLike[str],
    cluster: Cluster,
    trace: tuple[str, Trace] | None,
    model: tuple[str, ModelSpec] | None,
    placement: tuple[str, Placement],
) -> CheckReport:
    """Whether a placement fits a cluster: servers, the bytes of each GPU, coverage and rules."""
    name, plan = placement
    other, spec = (trace[0], trace[1].model) if trace else model if model else ("", None)
    assert spec is not None  # see check_file
    require_same_model(plan.model, spec, source=name, other=other)
    problems = cluster_mismatches(plan, cluster)
    memory: tuple[GpuMemory, ...] = ()
    try:
        require_users(cluster)
        if _same_gpus(plan, cluster):
            memory = gpu_memory(cluster, spec, plan)
            problems += memory_shortages(memory)
        if memory and all((row.for_experts_bytes or 0) >= 0 for row in memory):
            instance = Instance.of_cluster(cluster, spec, execution=plan.execution)
            found = violations(plan, min_replicas=plan.plan.min_replicas, instance=instance)
            # capacities: in bytes above
            problems += [one.message for one in found if one.constraint != "capacity"]
    except InputError as error:
        raise error.within(path) from error
    return CheckReport(
        str(path),
        "cluster",
        f"{_cluster_summary(cluster)}, with {name}: {_placement_summary(plan)}",
        tuple(problems),
        notes=(*_notes_on_memory(memory), *_notes_on_states(spec)),
        warnings=_warnings(path, cluster, spec, memory, trace[1] if trace else None, plan.execution)
        if memory
        else (),
        memory=memory,
    )


def _same_gpus(placement: Placement, cluster: Cluster) -> bool:
    """Whether a placement is for the servers of a cluster and the numbers of their GPUs."""
    return [
        (name, len(gpus))
        for name, gpus in zip(placement.servers, placement.gpu_capacity, strict=True)
    ] == [(server.name, len(server.gpus)) for server in cluster.servers]


def _cluster_summary(cluster: Cluster) -> str:
    gpus = sum(len(server.gpus) for server in cluster.servers)
    return f"{quantity(cluster.num_servers, 'server')}, {quantity(gpus, 'GPU')}"


def _notes_on_memory(memory: Sequence[GpuMemory]) -> tuple[str, ...]:
    given = [f"{row.server} gpu[{row.gpu}]" for row in memory if row.usable_bytes is None]
    if not given:
        return ()
    return (
        f"slots are given for {listed(given)}: the KV cache, like all but experts, is not "
        "subtracted there",
    )


def _notes_on_states(model: ModelSpec | None) -> tuple[str, ...]:
    if model is None or not model.state_bytes_per_request:
        return ()
    return (
        f"layers of {model.name} without keys and values keep a state of "
        f"{model.state_bytes_per_request:,} bytes a request, which is not reserved",
    )


def _warnings(
    path: object,
    cluster: Cluster,
    model: ModelSpec | None,
    memory: Sequence[GpuMemory],
    trace: Trace | None,
    execution: npt.NDArray[np.int32] | None = None,
) -> tuple[str, ...]:
    lines = [missing_kv_reservation(cluster, model, execution)]
    if model is not None and memory:
        lines.append(insufficient_kv_memory(cluster, model, memory, trace, execution))
    text = "; ".join(line for line in lines if line)
    return (f"{path}: {text}",) if text else ()


def _check_migration(path: str | os.PathLike[str], plan: MigrationPlan) -> CheckReport:
    summary = (
        f"{plan.model.name} on {quantity(len(plan.servers), 'server')}, "
        f"{quantity(plan.loads, 'load')} "
        f"({plan.extra_loads:,} of them temporary) and {quantity(plan.drops, 'drop')}"
    )
    if plan.change is not None:
        summary += "; the execution table changes"
    if plan.dips:
        summary += f"; {dips_text(plan)}"
    return CheckReport(str(path), "migration", summary)


def _check_export(path: str | os.PathLike[str], found: ExportFile) -> CheckReport:
    problems = []
    firsts = [stage.first for stage in found.stages]
    ends = [stage.last + 1 for stage in found.stages]
    ordered = all(stage.first <= stage.last for stage in found.stages)
    if found.stages and ([0, *ends] != [*firsts, found.num_hidden_layers] or not ordered):
        problems.append(f"stages are not the layers 0 to {found.num_hidden_layers - 1} in order")
    summary = f"{found.engine}, {found.home}, {quantity(len(found.stages), 'stage')}"
    return CheckReport(str(path), "export", summary, tuple(problems))


def _check_calibration(path: str | os.PathLike[str], found: Calibration) -> CheckReport:
    links = [
        text
        for text, value in (
            ("call overhead", found.call_overhead_ms),
            ("bandwidth", found.bandwidth_mbps),
            ("round trip time", found.rtt_ms),
        )
        if value is not None
    ]
    default = "times for all GPUs" if found.default is not None else "no times for other GPUs"
    summary = f"{quantity(len(found.gpus), 'GPU')} by name, {default}" + "".join(
        f", {text}" for text in links
    )
    return CheckReport(str(path), "calibration", summary)


def _check_phases(path: str | os.PathLike[str], found: Schedule) -> CheckReport:
    servers = {server for phase in found.phases for server in phase.tasks}
    summary = f"{quantity(len(found.phases), 'phase')}, tasks of {quantity(len(servers), 'server')}"
    return CheckReport(str(path), "phases", summary)


def _check_trace(path: str | os.PathLike[str], trace: Trace) -> CheckReport:
    calls = int(trace.counts.sum())
    source = trace.provenance.get("source")
    summary = (
        f"{trace.kind} of {trace.model.name}, {quantity(len(trace.tasks), 'task')}, "
        f"{quantity(int(trace.tokens.sum()), 'token')}, {quantity(calls, 'call')}"
        + (f", source: {source}" if source else "")
    )
    return CheckReport(str(path), "trace", summary)


def _check_simulation(path: str | os.PathLike[str], values: Mapping[str, Any]) -> CheckReport:
    runs = values["runs"]
    finished, requests = (sum(run[key] for run in runs) for key in ("finished", "requests"))
    partial = ", interrupted" if values["partial"] else ""
    summary = (
        f"{quantity(len(runs), 'run')}, {finished:,} of {requests:,} requests finished{partial}"
    )
    return CheckReport(str(path), "simulation", summary)


def _check_sweep(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> CheckReport:
    failed = sum(row["status"] != OK for row in rows)
    return CheckReport(str(path), "sweep", f"{quantity(len(rows), 'run')}, {failed} of them failed")


def _planned_users(placement: Placement, cluster: Cluster, problems: list[str]) -> Cluster:
    """The cluster with the users that a placement was planned for: all, or those of its ``heads``.

    Wrong ``heads`` are added to the problems.
    """
    heads = placement.plan.extra.get("heads")
    if heads is None:
        return cluster
    try:
        if not (heads and isinstance(heads, list) and all(isinstance(name, str) for name in heads)):
            raise InputError(f"{heads!r}", parameter="heads", expected="names of servers")
        return cluster.with_users_of(heads)
    except InputError as error:
        problems.append(f"plan.{error}")
        return cluster


def _check_placement(
    path: str | os.PathLike[str],
    placement: Placement,
    cluster: tuple[str, Cluster, InputFile] | None,
    trace: tuple[str, Trace] | None,
    model: tuple[str, ModelSpec] | None,
) -> CheckReport:
    plan = placement.plan
    if trace is not None:
        model = (trace[0], trace[1].model)
    problems: list[str] = []
    notes: list[str] = []
    instance = None
    if cluster is not None:
        _note_unknown_input(placement, cluster[0], cluster[2].sha256, notes)
    if trace is not None:
        _note_unknown_input(placement, trace[0], trace[1].sha256, notes)
    if model is not None:
        require_same_model(placement.model, model[1], source=path, other=model[0])
    execution = None
    if cluster is not None:
        if placement.servers == tuple(server.name for server in cluster[1].servers):
            execution = placement.execution
        how: dict[str, Any] = {"min_replicas": plan.min_replicas, "execution": execution}
        try:
            require_users(cluster[1])
            if trace is not None:
                users = _planned_users(placement, cluster[1], problems)
                instance = Instance.build(trace[1], users, **how)
            elif model is not None:
                instance = Instance.of_cluster(cluster[1], model[1], **how)
        except InputError as error:
            raise error.within(cluster[0]) from error
        except Infeasible as error:  # where layers execute is the placement's choice
            raise error.within(cluster[0] if execution is None else path) from error
    found = violations(placement, min_replicas=plan.min_replicas, instance=instance)
    problems += [violation.message for violation in found]
    if cluster is not None and instance is None:
        problems += cluster_mismatches(placement, cluster[1])
        notes.append(f"memory and rules of {cluster[0]} not checked: that needs a trace or a model")
    if plan.remote_share is not None and plan.bound is not None:
        slack = plan.remote_share - plan.bound
        if slack < -SHARE_TOLERANCE:
            problems.append(f"remote_share {plan.remote_share} lies below its bound {plan.bound}")
        if plan.termination == "optimal" and slack > SHARE_TOLERANCE:
            problems.append(f"called optimal, but remote_share exceeds its bound by {slack:g}")
    fits = instance is not None and placement.servers == instance.servers
    if instance is not None and fits and trace is not None:
        share = score(placement, instance).share
        if plan.remote_share is not None and abs(share - plan.remote_share) > SHARE_TOLERANCE:
            problems.append(
                f"plan.remote_share says {plan.remote_share}, the placement has {share} on "
                f"{trace[0]}"
            )
    elif trace is None or cluster is None:
        notes.append("remote_share not recomputed: that needs a trace and a cluster")
    memory: tuple[GpuMemory, ...] = ()
    warnings: tuple[str, ...] = ()
    if cluster is not None:
        spec = None if model is None else model[1]
        if spec is not None and _same_gpus(placement, cluster[1]):
            memory = gpu_memory(cluster[1], spec, placement)
            notes += [*_notes_on_memory(memory), *_notes_on_states(spec)]
        warnings = _warnings(
            cluster[0], cluster[1], spec, memory, trace[1] if trace else None, execution
        )
    return CheckReport(
        str(path),
        "placement",
        _placement_summary(placement),
        tuple(problems),
        tuple(notes),
        warnings,
        memory,
    )


def _placement_summary(placement: Placement) -> str:
    copies = placement.local.sum(axis=0, dtype=np.int32)
    table = ""
    if placement.execution is not None:
        homes = int(executed_elsewhere(placement.execution).any(axis=1).sum())
        table = f", version 2: layers of {quantity(homes, 'server')} execute elsewhere"
    return (
        f"{placement.model.name} on {quantity(placement.num_servers, 'server')} by "
        f"{placement.plan.solver}, {int(placement.on_gpu.sum()):,} experts placed, "
        f"{int(copies.min())} to {int(copies.max())} copies{table}"
    )


def cluster_mismatches(placement: Placement, cluster: Cluster) -> list[str]:
    """Mismatches that need no model sizes: names of servers, numbers of GPUs, explicit slots."""
    names = tuple(server.name for server in cluster.servers)
    if placement.servers != names:
        return [f"servers are {list(placement.servers)}, the cluster has {list(names)}"]
    problems = []
    held = placement.on_gpu.sum(axis=(1, 2))
    for n, server in enumerate(cluster.servers):
        gpus = placement.gpus_of(n)
        if len(gpus) != len(server.gpus):
            problems.append(
                f"server {server.name!r} has {quantity(len(gpus), 'GPU')}, in the cluster "
                f"{len(server.gpus)}"
            )
            continue
        for g, (at, gpu) in enumerate(zip(gpus, server.gpus, strict=True)):
            if gpu.slots is not None and held[at] > gpu.slots:
                problems.append(
                    f"server {server.name!r} gpu[{g}] holds {held[at]:,} experts, the cluster "
                    f"says {gpu.slots:,} slots"
                )
    return problems


def _note_unknown_input(placement: Placement, path: str, digest: str, notes: list[str]) -> None:
    if placement.inputs and digest not in {file.sha256 for file in placement.inputs.values()}:
        notes.append(f"{path} is not a file that it was planned from")
