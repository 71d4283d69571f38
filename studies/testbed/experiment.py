"""Prediction against measurement: replays on shaped links, and the simulator's figures beside them.

::

    python -m studies.testbed.experiment --trace T.parquet --cluster C.toml -o results.json

For each round trip every placement is replayed under every seed, planned on one half of the
requests and replayed with the other. Before and after the runs of a seed the machinery is
calibrated on a placement made for that, and their prediction is of the mean of both: machines are
not equally fast all day. A run in which the processors were busy throughout is void, for then it
measures them, and is repeated.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from prism_plan.errors import InputError, PrismError
from studies.machine import commit, processor
from studies.testbed.processors import ProcessorMonitor

SOLVERS = ("uniform", "redundance", "smartmoe", "eplb", "layer-partition", "prism", "exact")
#: Runs with more saturated samples than this share are void.
MAX_SATURATED = 0.1
#: A run is tried so often until it is not void.
MAX_ATTEMPTS = 3
PORT = 29400


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """What an experiment varies, and what it keeps fixed."""

    trace: str
    cluster: str
    solvers: tuple[str, ...] = SOLVERS
    seeds: tuple[int, ...] = (0, 1)
    rtt_ms: tuple[float, ...] = (0.0, 1.0)
    requests: int = 8
    mbps: float = 500.0
    burst_kb: float = 64.0


def provenance() -> dict[str, Any]:
    """The machine and versions with which an experiment runs."""
    return {
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "torch": importlib.metadata.version("torch"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_all(
    setting: ExperimentConfig, folder: Path, report: Any, save: Any = lambda values: None
) -> dict[str, Any]:
    """Calibrate, replay and predict; returns the results.

    ``report`` gets a line a run; ``save`` gets the results so far after every run, so that little
    is lost if the machine fails.

    Raises
    ------
    TestbedUnavailable
        No root, no iproute2, a kernel without what the testbed needs.
    PrismError
        A server failed.
    """
    from studies.testbed.testbed import Testbed

    cluster, scored, placements = plan_placements(setting, folder)
    names = tuple(server.name for server in cluster.servers)
    rows: list[dict[str, Any]] = []
    calibrations: dict[str, Any] = {}
    recorded_setting = dataclasses.asdict(setting)
    recorded_setting |= {name: Path(recorded_setting[name]).name for name in ("trace", "cluster")}
    values = {
        "provenance": provenance(),
        "setting": recorded_setting,
        "calibrations": calibrations,
        "rows": rows,
    }
    with Testbed(
        servers=len(names), mbps=setting.mbps, names=names, burst_kb=setting.burst_kb
    ) as testbed:
        for rtt_ms in setting.rtt_ms:
            measured = [calibrate(testbed, names, folder, setting, scored.model.name, rtt_ms)]
            calibrations[f"{rtt_ms:g}"] = measured
            for seed in setting.seeds:
                begin = len(rows)
                for solver in setting.solvers:
                    rows.append(replay_one(testbed, names, folder, setting, solver, seed, rtt_ms))
                    save(values)
                measured.append(
                    calibrate(testbed, names, folder, setting, scored.model.name, rtt_ms)
                )
                predicted = predict(
                    placements,
                    scored,
                    cluster,
                    setting.requests,
                    seed,
                    mean_calibration(measured, -2),
                )
                for row in rows[begin:]:
                    row["predicted"] = predicted[row["solver"]]
                    report(_comparison(row))
                save(values)
    return values


def _comparison(row: dict[str, Any]) -> str:
    measured, expected = row["latency_s"]["mean"], row["predicted"]["latency_s"]["mean"]
    return (
        f"rtt {row['rtt_ms']:g} ms, seed {row['seed']}, {row['solver']}: measured {measured:.3f} "
        f"s, predicted {expected:.3f} s ({expected / measured - 1:+.1%}), processors "
        f"{row['processors_busy']:.0%} busy" + (" (VOID)" if row["void"] else "")
    )


def calibrate(
    testbed: Any,
    names: tuple[str, ...],
    folder: Path,
    setting: ExperimentConfig,
    model: str,
    rtt_ms: float,
) -> dict[str, Any]:
    """Run the command `calibrate` on the testbed; returns the calibration file's values."""
    path = folder / "calibration.json"
    launch(
        testbed, names, folder, "calibrate",
        ["--model", model, "--cluster", setting.cluster, "--rtt-ms", str(rtt_ms), "-o", str(path)],
    )  # fmt: skip
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def mean_calibration(measured: list[dict[str, Any]], first: int) -> Any:
    """The mean of a calibration and the next one, or of the last one alone."""
    from prism_plan.io.calibration import calibration_from_json
    from runtime_adapter.calibrate import averaged

    return calibration_from_json(averaged(measured[first:][:2] or measured[-1:]))


def plan_placements(
    setting: ExperimentConfig, folder: Path
) -> tuple[Any, Any, list[tuple[str, Any]]]:
    """The cluster, the requests to replay, and the placements, planned on the other requests.

    What the servers read is written to ``folder``.
    """
    import prism_plan as pp
    from prism_plan.io.trace_writer import write_trace

    cluster = pp.read_cluster(setting.cluster)
    planning_part, scored = pp.read_trace(setting.trace).split(0.5, 0)
    instance = pp.Instance.build(planning_part, cluster)
    path = folder / "scored.parquet"
    write_trace(path, dataclasses.replace(scored, name="scored.parquet"))
    placements = []
    for solver in setting.solvers:
        placement = pp.solve(instance, solver)
        pp.write_placement(folder / f"{solver}.json", placement)
        placements.append((solver, placement))
    return cluster, pp.read_trace(path), placements


def predict(
    placements: list[tuple[str, Any]], scored: Any, cluster: Any, requests: int, seed: int,
    calibration: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Simulate each placement; returns the figures to compare, by placement."""
    import prism_plan as pp

    sampled = pp.sample_requests(scored, cluster, requests_per_server=requests, seed=seed)
    options = pp.SimulationOptions(calibration=calibration, seed=seed)
    report = pp.simulate_placements(placements, sampled, scored, cluster, options).to_json()
    keys = (
        "latency_s", "remote_share", "waiting_share", "bytes_sent", "expert_calls", "remote_calls",
    )  # fmt: skip
    return {run["placement"]: {key: run[key] for key in keys} for run in report["runs"]}


def read_results(path: str) -> dict[str, Any]:
    """Read results that an experiment has written.

    Raises
    ------
    InputError
        The file cannot be read or holds something else.
    """
    from prism_plan.io.json import parse_json
    from prism_plan.io.text_files import read_text

    values = parse_json(read_text(path), path)
    keys = {"provenance", "setting", "calibrations", "rows"}
    if not isinstance(values, dict) or not keys <= values.keys():
        raise InputError("no results", source=path, expected=f"the keys {', '.join(sorted(keys))}")
    return values


def predict_again(values: dict[str, Any], setting: ExperimentConfig, folder: Path) -> None:
    """Replace the predictions in recorded results by those of the simulator as it is now."""
    cluster, scored, placements = plan_placements(setting, folder)
    for rtt_ms in setting.rtt_ms:
        measured = values["calibrations"][f"{rtt_ms:g}"]
        for nth, seed in enumerate(setting.seeds):
            calibration = mean_calibration(measured, nth)
            predicted = predict(placements, scored, cluster, setting.requests, seed, calibration)
            for row in values["rows"]:
                if (row["rtt_ms"], row["seed"]) == (rtt_ms, seed):
                    row["predicted"] = predicted[row["solver"]]
    values["provenance"]["predicted_by"] = commit()


def launch(
    testbed: Any, names: tuple[str, ...], folder: Path, command: str, options: list[str]
) -> None:
    """Run a command of the runtime on every server; waits for all.

    Raises
    ------
    PrismError
        One of them failed; its last line of output is in the message.
    """
    processes = []
    for n, name in enumerate(names):
        log = open(folder / f"{command}-{name}.log", "wb")  # noqa: SIM115 - closed below
        words = [word.replace("{name}", name) for word in options]
        argv = [
            sys.executable, "-m", "runtime_adapter", command, "--server", name,
            "--store", f"{testbed.address(0)}:{PORT}", "--interface", testbed.interface,
            "--insecure",  # nobody else reaches the testbed's network
            *words,
        ]  # fmt: skip
        processes.append((name, log, testbed.run(n, argv, stdout=log, stderr=log)))
    failed = []
    for name, log, process in processes:
        code = process.wait()
        log.close()
        if code:
            text = (folder / f"{command}-{name}.log").read_text(errors="replace").strip()
            failed.append(f"{name} left with {code}: {text.splitlines()[-1] if text else ''}")
    if failed:
        raise PrismError("; ".join(failed))


def replay_one(
    testbed: Any,
    names: tuple[str, ...],
    folder: Path,
    setting: ExperimentConfig,
    solver: str,
    seed: int,
    rtt_ms: float,
) -> dict[str, Any]:
    """Replay one placement, again while the run is void."""
    attempts = 0
    while True:
        attempts += 1
        lines = [testbed.line(n) for n in range(len(names))]
        with ProcessorMonitor() as processors:
            launch(
                testbed, names, folder, "replay",
                ["--placement", str(folder / f"{solver}.json"),
                 "--trace", str(folder / "scored.parquet"), "--cluster", setting.cluster,
                 "--requests", str(setting.requests), "--seed", str(seed),
                 "--rtt-ms", str(rtt_ms), "--stats", str(folder / "{name}.stats.json"),
                 "-o", str(folder / "{name}.jsonl")],
            )  # fmt: skip
        frames = [testbed.line(n) - lines[n] for n in range(len(names))]
        measured, window = read_measured(names, folder)
        processors.restrict(*window)  # without the start of the servers, which keeps them busy
        void = processors.saturated > MAX_SATURATED
        if not void or attempts == MAX_ATTEMPTS:
            break
        time.sleep(2)
    return {
        "solver": solver,
        "seed": seed,
        "rtt_ms": rtt_ms,
        "void": void,
        "attempts": attempts,
        "processors_busy": processors.busy,
        "processors_saturated": processors.saturated,
        **measured,
        "line_bytes": sum(traffic.sent_bytes for traffic in frames),
        "line_frames": sum(traffic.sent_packets for traffic in frames),
    }


def read_measured(
    names: tuple[str, ...], folder: Path
) -> tuple[dict[str, Any], tuple[float, float]]:
    """Latencies and counts of all servers of a replay, and the period in which it served."""
    import numpy as np

    from prism_plan.simulate.report import summary

    latency_s: list[float] = []
    begin_s, last_s = 0.0, 0.0
    counted: dict[str, int] = {}
    for name in names:
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            latency_s.append(np.nan if row["done_s"] is None else row["done_s"] - row["arrival_s"])
            last_s = max(last_s, row["done_s"] or 0.0)
        stats = json.loads((folder / f"{name}.stats.json").read_text())
        for key, value in stats.items():
            if key == "began_s":
                begin_s = max(begin_s, value)
            if isinstance(value, int):
                counted[key] = counted.get(key, 0) + value
    values = {
        "latency_s": summary(np.array(latency_s)),
        "remote_share": counted["remote_calls"] / counted["calls"],
        "waiting_share": counted["waiting"] / counted["steps"],
        "expert_calls": counted["calls"],
        "remote_calls": counted["remote_calls"],
        "messages": counted["messages"],
        "hops": counted["hops"],
        "payload_bytes": counted["out_bytes"] + counted["back_bytes"] + counted["hop_bytes"],
        "failed": counted["failed"],
        "retries": counted["retries"],
    }
    return values, (begin_s, begin_s + last_s)


def _numbers(kind: type) -> Any:
    def parse(ctx: Any, option: Any, text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(word) for word in text.split(",") if word.strip())
        except ValueError:
            raise click.BadParameter(f"{text!r}: numbers with commas") from None

    return parse


@click.command("experiment", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--trace", required=True, metavar="T.parquet")
@click.option("--cluster", required=True, metavar="C.toml")
@click.option("--solvers", default=",".join(SOLVERS), show_default=True)
@click.option("--seeds", default="0,1", show_default=True, callback=_numbers(int))
@click.option("--rtt-ms", default="0,1", show_default=True, callback=_numbers(float))
@click.option("--requests", default=8, show_default=True, help="Of each server in each run.")
@click.option("--mbps", default=500.0, show_default=True)
@click.option(
    "--predict-again", is_flag=True, help="Only replace the predictions in R.json; no root needed."
)
@click.option("-o", "--output", required=True, metavar="R.json")
def command(**given: Any) -> None:
    """Replay placements on shaped links, and compare with what the simulator predicts."""
    from prism_plan.cli.inputs import require_writable_output
    from prism_plan.io.file_writing import write_bytes
    from runtime_adapter.log_output import log_info

    require_writable_output(given["output"], given["trace"], given["cluster"])
    setting = ExperimentConfig(
        trace=os.path.abspath(given["trace"]),
        cluster=os.path.abspath(given["cluster"]),
        solvers=tuple(word.strip() for word in given["solvers"].split(",") if word.strip()),
        seeds=given["seeds"],
        rtt_ms=given["rtt_ms"],
        requests=given["requests"],
        mbps=given["mbps"],
    )
    with tempfile.TemporaryDirectory(prefix="prism-experiment-") as folder:
        if given["predict_again"]:
            values = read_results(given["output"])
            for name in ("solvers", "seeds", "rtt_ms", "requests"):  # as it was run
                setting = dataclasses.replace(setting, **{name: values["setting"][name]})
            predict_again(values, setting, Path(folder))
            write_bytes(given["output"], (json.dumps(values, indent=1) + "\n").encode())
            log_info(f"{given['output']}: {len(values['rows'])} runs predicted again")
            return
        values = run_all(
            setting,
            Path(folder),
            log_info,
            lambda results: write_bytes(
                given["output"], (json.dumps(results, indent=1) + "\n").encode()
            ),
        )
    log_info(f"{given['output']}: {len(values['rows'])} runs")


if __name__ == "__main__":
    from runtime_adapter.cli.main import run_and_exit

    run_and_exit(command, "python -m studies.testbed.experiment")
