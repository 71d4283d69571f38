"""Runs the trials, and records them.

    python -m studies.faults                      # those that are not recorded yet, an hour in all
    python -m studies.faults --only s03 --only r17 --logs /tmp/logs
    python -m studies.faults --list               # what they are
    python -m studies.faults --table              # what became of them

Each record has its trial with its seed; studies/faults.json is written after each of them, so that
a run that is interrupted goes on where it was. The record of a trial that did not go well is
replaced when it is run again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from studies.faults.run import keep_logs, run_trial
from studies.faults.trials import Trial, all_trials
from studies.machine import commit, processor

FILE = Path(__file__).resolve().parents[1] / "faults.json"


def read_records(path: Path) -> dict[str, Any]:
    """The file of records; a new one where there is none."""
    if not path.exists():
        return {"trials": {}}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def write_records(path: Path, values: Mapping[str, Any]) -> None:
    """Write the file of records, a trial a line."""
    trials = sorted(values["trials"].items(), key=lambda item: (item[0][0] != "s", item[0]))
    lines = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in trials]
    path.write_text('{"trials": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def table(values: Mapping[str, Any]) -> str:
    """A Markdown table of the records, and their sums."""
    records = values["trials"]
    lines = ["| trial | answered | failed | lost with their home | well after | |"]
    lines.append("|---" * 6 + "|")
    for record in records.values():
        after = record.get("well_after_s")
        lines.append(
            f"| {record['text']} | {record['answered']} | {record['failed']} "
            f"| {record['lost_with_home']} | {'–' if after is None else f'{after:.1f} s'} "
            f"| {'; '.join(record['problems'])[:200]} |"
        )
    lines.append(
        f"\n{len(records)} trials, {sum(record['well'] for record in records.values())} well; "
        f"{sum('hang' in record for record in records.values())} hangs; "
        f"{sum(len(record['wrong']) for record in records.values())} wrong answers of "
        f"{sum(record['answered'] for record in records.values())}"
    )
    return "\n".join(lines)


def run_and_record(trial: Trial, values: dict[str, Any], path: Path, logs: Path | None) -> bool:
    """Run a trial and write its record; returns whether it went well."""
    with tempfile.TemporaryDirectory(prefix=f"prism-faults-{trial.name}-") as name:
        record = run_trial(trial, Path(name))
        if logs is not None and not record["well"]:
            keep_logs(Path(name), logs / trial.name)
    record |= {"commit": commit("studies/faults.json"), "processor": processor()}
    values["trials"][trial.name] = record
    write_records(path, values)
    return bool(record["well"])


@click.command("faults", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="NAME", help="These trials, also if recorded.")
@click.option("--seed", default=0, show_default=True, help="Of the first random trial.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep what failed trials wrote here.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=FILE, help="The file of records."
)
@click.option("--list", "lists", is_flag=True, help="Print the trials.")
@click.option("--table", "tells", is_flag=True, help="Print a table of the records.")
def command(
    only: tuple[str, ...], seed: int, logs: Path | None, output: Path, lists: bool, tells: bool
) -> None:
    """Run the trials that are not recorded as well yet."""
    trials = all_trials(seed)
    values = read_records(output)
    if lists:
        print("\n".join(map(str, trials)))
        return
    if tells:
        print(table(values))
        return
    if unknown := set(only) - {trial.name for trial in trials}:
        raise click.BadParameter(", ".join(sorted(unknown)), param_hint="--only")
    failed = []
    for trial in trials:
        known = values["trials"].get(trial.name, {})
        if trial.name not in only and (only or known.get("well")):
            continue
        print(trial, flush=True)
        well = run_and_record(trial, values, output, logs)
        record = values["trials"][trial.name]
        print(
            f"  {'well' if well else 'NOT WELL'} in {record['seconds']:.0f} s: "
            f"{record['answered']} answered, {record['failed']} failed; "
            f"{'; '.join(record['problems'])[:400]}",
            flush=True,
        )
        if not well:
            failed.append(trial.name)
    if failed:
        print(f"not well: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    command()
