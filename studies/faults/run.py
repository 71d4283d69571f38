"""One trial: a cluster, its faults, and what became of its requests and servers."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism_plan.errors import PrismError
from prism_plan.io.placement import placement_to_json
from studies.faults.cluster import (
    NOBODY_HAS,
    Answered,
    Cluster,
    ClusterConfig,
    Crash,
    Hang,
    last_lines,
)
from studies.faults.processes import Loopback
from studies.faults.trials import OF_SERVERS, SERVERS, Trial

#: Exit codes of a process that has ended because a trial killed it.
KILLED = -signal.SIGKILL
#: Of a server whose requests have failed in part.
SOME_FAILED = 5

#: What happens in a run; gives more values of its record.
Course = Callable[[Cluster], dict[str, Any]]


def config_of(trial: Trial) -> ClusterConfig:
    """The cluster of a trial."""
    return ClusterConfig(
        model=trial.model,
        replicas=trial.replicas,
        roomy=trial.roomy,
        own_store=trial.own_store,
        journal=trial.journal,
        peers=trial.peers,
        restart_after_s=trial.restart_after_s,
        tables_seed=trial.seed if trial.spans else None,
    )


def run_trial(trial: Trial, folder: Path) -> dict[str, Any]:
    """Run a trial in an empty folder; returns its record, whose ``well`` says how it went."""
    cluster = Cluster(config_of(trial), folder, Loopback())
    record = run_and_judge(
        cluster, lambda cluster: hit_by(trial, cluster), may_lack=may_lack_experts(trial)
    )
    return {"trial": trial.to_json(), "text": str(trial), **record}


def run_and_judge(cluster: Cluster, course: Course, *, may_lack: bool) -> dict[str, Any]:
    """Run a cluster through a course of events, and to its end; returns the record.

    All went well if nothing hung, all tokens are those of plain transformers, requests have failed
    only where the experts that they needed were held by nobody (if they ``may_lack`` any), and all
    servers serve in the end, and hold what a last move has asked for.
    """
    begin_s = well_s = time.monotonic()
    problems: list[str] = []
    record: dict[str, Any] = {}
    with cluster:
        try:
            cluster.wait_until_well()
            well_s = time.monotonic()
            record |= course(cluster)
            record["exit_codes"] = end(cluster, problems)
        except Hang as error:
            problems.append(f"hang: {error}")
            record["hang"] = str(error)
            cluster.abort()
        except (Crash, OSError, PrismError, KeyError) as error:
            problems.append(f"{type(error).__name__}: {error}")
    problems += judge(cluster, may_lack)
    record |= {
        **cluster.counts(),
        "longest_s": round(_longest_s(cluster.answers, well_s), 2),
        "wrong": cluster.wrong,
        "moves": [code for code, _ in cluster.moves],
        "restarts": cluster.num_restarts,
        "seconds": round(time.monotonic() - begin_s, 1),
        "load": round(os.getloadavg()[0], 1),
        "problems": problems,
        "well": not problems,
    }
    if problems:
        record["said"] = {name: last_lines(cluster.said(name)) for name in (*SERVERS, "store")}
        record["moves_said"] = [text for _, text in cluster.moves][-5:]
        record["errors"] = sorted({str(answer.error) for answer in cluster.failed()})[:5]
    return record


def hit_by(trial: Trial, cluster: Cluster) -> dict[str, Any]:
    """Let the faults of a trial happen, and wait until all is well again."""
    hits: list[int] = []
    hit_s = time.monotonic()
    if trial.moment == "moving":
        cluster.move_without_end()
    for number, fault in enumerate(trial.faults):
        if number and fault.wait:
            cluster.wait_until_continued()
            cluster.wait_until_well()
        cluster.pass_time(fault.after_s)
        if trial.moment == "moving" and (fault.wait or not number):
            cluster.wait_for_migration()
        if not number:
            hit_s = time.monotonic()
        hits.append(cluster.hit(fault))
    cluster.wait_until_continued()
    over_s = time.monotonic()
    cluster.wait_until_well()
    well_s = time.monotonic()
    if trial.moment == "moving":
        cluster.stop_moving()
    return {
        "hits": hits,
        "answered_meanwhile": cluster.answered_between(hit_s, over_s),
        "well_after_s": round(well_s - over_s, 1),
    }


def end(cluster: Cluster, problems: list[str]) -> dict[str, int]:
    """Move once more, serve, and end all in good order; returns exit codes."""
    code, text = cluster.move_once(1)
    if code:
        problems.append(f"the last move ended with {code}: {text}")
    cluster.wait_until_serving()
    cluster.stop_feeding()
    codes = cluster.finish()
    for name, code in codes.items():
        # a launch counts the requests that failed in it alone
        failed = any(answer.request.server == name for answer in cluster.failed())
        if code != 0 and not (code == SOME_FAILED and failed):
            problems.append(f"{name} ended with {code}")
    wanted = placement_to_json(cluster.targets[1])["servers"]
    for name, server in zip(SERVERS, wanted, strict=True):
        if cluster.held(name) != [gpu["experts"] for gpu in server["gpus"]]:
            problems.append(f"{name} does not hold what the last move says")
    if left := cluster.left_in_shared_memory():
        problems.append(f"left in shared memory: {left}")
    return codes


def judge(cluster: Cluster, may_lack: bool) -> list[str]:
    """What is wrong with the answers, the processes and the lines of a cluster that has ended."""
    problems = [f"wrong tokens: {len(cluster.wrong)} answers"] if cluster.wrong else []
    for answer in cluster.failed():
        if not (may_lack and NOBODY_HAS in str(answer.error)):
            problems.append(f"{answer.request.id} failed: {answer.error}"[:300])
            break
    if cluster.repeated and not cluster.config.journal:
        problems.append(f"answered twice: {cluster.repeated[:5]}")
    for name, codes in cluster.exit_codes.items():
        # all but the last launch have ended because they were hit
        unexpected = [code for code in codes if code not in (KILLED, 0, SOME_FAILED)]
        if unexpected:
            problems.append(f"{name} ended with {unexpected}")
    if noise := cluster.noise():
        problems.append(f"{len(noise)} lines of noise: {noise[0][:200]}")
    return problems


def may_lack_experts(trial: Trial) -> bool:
    """Whether faults may leave an expert without any server that has it.

    With one replica each loss of a server may; with two, losses of two servers at once.
    """
    lost: set[str] = set()
    for fault in trial.faults:
        if fault.wait:
            lost = set()
        if fault.target in OF_SERVERS:
            lost.add(fault.server)
        if len(lost) >= trial.replicas:
            return True
    return False


def _longest_s(answers: list[Answered], begin_s: float) -> float:
    """The longest that a request took which was asked since then."""
    return max(
        (one.answered_s - one.request.asked_s for one in answers if one.request.asked_s > begin_s),
        default=0.0,
    )


def keep_logs(folder: Path, to: Path) -> None:
    """Keep what a trial has written."""
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, to)
