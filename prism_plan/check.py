"""Is a file of ours valid? If not, where and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prism_plan.cluster import Cluster
from prism_plan.cluster_file import parse_cluster
from prism_plan.errors import InputError
from prism_plan.files import parse_json, read_text, sha256
from prism_plan.instance import Instance
from prism_plan.model import require_same_model
from prism_plan.objective import score, violations
from prism_plan.placement import Placement
from prism_plan.placement_file import placement_from_json
from prism_plan.trace import Trace
from prism_plan.trace_file import read_trace

#: A stated remote share may differ from the recomputed one by so much.
SHARE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Report:
    """What was found in a file. ``problems`` are broken constraints or untrue statements."""

    path: str
    kind: str
    summary: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "file": self.path,
            "kind": self.kind,
            "valid": not self.problems,
            "summary": self.summary,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def check_file(
    path: str | os.PathLike[str],
    *,
    cluster: tuple[str, Cluster] | None = None,
    trace: tuple[str, Trace] | None = None,
) -> Report:
    """Check a trace, a cluster file or a placement, told apart by content.

    A placement is checked for coverage, for the replicas that it promises and for the capacities
    that it states; with ``cluster`` and ``trace`` (file name and content) also against those, and
    its remote share is recomputed.

    Raises
    ------
    InputError
        The file is not of our formats, or its form is broken.
    """
    kind = _kind(path)
    if kind == "trace":
        return _check_trace(path)
    text = read_text(path)
    if kind == "cluster":
        found = parse_cluster(text, source=path)
        gpus = sum(len(server.gpus) for server in found.servers)
        return Report(str(path), kind, f"{found.num_servers} servers, {gpus} GPUs")
    values = parse_json(text, path)
    form = values.get("format") if isinstance(values, Mapping) else None
    if form != "prism-plan/placement":
        raise InputError(
            f"{form!r:.60}", source=path, place="format", expected="'prism-plan/placement'"
        )
    return _check_placement(path, placement_from_json(values, source=path), cluster, trace)


def _kind(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(reason, source=path, remedy="give a readable file") from error
    name = os.fspath(path)
    if start[:4] == b"PAR1" or name.endswith(".parquet"):
        return "trace"
    if start.lstrip()[:1] in (b"{", b"[") and not name.endswith(".toml"):
        return "placement"
    if name.endswith(".toml"):
        return "cluster"
    raise InputError(
        "neither Parquet, JSON nor a .toml file",
        source=path,
        expected="a trace, a placement or a cluster file",
    )


def _check_trace(path: str | os.PathLike[str]) -> Report:
    trace = read_trace(path)
    calls = int(trace.counts.sum())
    source = trace.provenance.get("source")
    summary = (
        f"{trace.kind} of {trace.model.name}, {len(trace.tasks)} tasks, "
        f"{int(trace.tokens.sum()):,} tokens, {calls:,} calls"
        + (f", source: {source}" if source else "")
    )
    return Report(str(path), "trace", summary)


def _check_placement(
    path: str | os.PathLike[str],
    placement: Placement,
    cluster: tuple[str, Cluster] | None,
    trace: tuple[str, Trace] | None,
) -> Report:
    plan = placement.plan
    problems: list[str] = []
    notes: list[str] = []
    instance = None
    for given in (cluster, trace):
        if given is not None:
            _same_input(placement, given[0], notes)
    if trace is not None:
        require_same_model(placement.model, trace[1].model, source=path, other=trace[0])
    if cluster is not None and trace is not None:
        instance = Instance.build(trace[1], cluster[1], min_replicas=plan.min_replicas)
    found = violations(placement, min_replicas=plan.min_replicas, instance=instance)
    problems += [violation.message for violation in found]
    if plan.remote_share is not None and plan.bound is not None:
        slack = plan.remote_share - plan.bound
        if slack < -SHARE_TOLERANCE:
            problems.append(f"remote_share {plan.remote_share} lies below its bound {plan.bound}")
        if plan.termination == "optimal" and slack > SHARE_TOLERANCE:
            problems.append(f"called optimal, but remote_share exceeds its bound by {slack:g}")
    if instance is not None and placement.servers == instance.servers:
        share = score(placement, instance).share
        if plan.remote_share is not None and abs(share - plan.remote_share) > SHARE_TOLERANCE:
            problems.append(
                f"plan.remote_share says {plan.remote_share}, the placement has {share} on "
                f"{trace[0] if trace else ''}"
            )
    elif trace is None or cluster is None:
        notes.append("remote_share not recomputed: that needs --trace and --cluster")
    copies = placement.local.sum(axis=0)
    summary = (
        f"{placement.model.name} on {placement.num_servers} servers by {plan.solver}, "
        f"{int(placement.on_gpu.sum()):,} experts placed, {int(copies.min())} to "
        f"{int(copies.max())} copies"
    )
    return Report(str(path), "placement", summary, tuple(problems), tuple(notes))


def _same_input(placement: Placement, path: str, notes: list[str]) -> None:
    if placement.inputs and sha256(path) not in {f.sha256 for f in placement.inputs.values()}:
        notes.append(f"{path} is not a file that it was planned from")
