"""Runs the trials, and records them.

    python -m studies.faults                      # those that are not recorded yet, an hour in all
    python -m studies.faults --only s03 --only r17 --logs /tmp/logs
    python -m studies.faults --list               # what they are
    python -m studies.faults --table              # what became of them
    python -m studies.faults --spans              # all of them with plans that have spans

Each record has its trial with its seed; studies/faults.json is written after each of them, so that
a run that is interrupted goes on where it was. Trials that did not go well are run again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from studies.faults.records import FILE, SPANS_FILE, read_records, run_and_record, table
from studies.faults.run import run_trial
from studies.faults.trials import all_trials


@click.command("faults", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="NAME", help="These trials, also if recorded.")
@click.option("--seed", default=0, show_default=True, help="Of the first random trial.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep what failed trials wrote here.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file of records.")
@click.option("--spans", is_flag=True, help="Layers execute on several servers.")
@click.option("--list", "lists", is_flag=True, help="Print the trials.")
@click.option("--table", "tells", is_flag=True, help="Print a table of the records.")
def command(
    only: tuple[str, ...], seed: int, logs: Path | None, output: Path | None, spans: bool,
    lists: bool, tells: bool,
) -> None:  # fmt: skip
    """Run the trials that are not recorded as well yet."""
    trials = [replace(trial, spans=spans) for trial in all_trials(seed)]
    output = output or (SPANS_FILE if spans else FILE)
    records = read_records(output)
    if lists:
        print("\n".join(map(str, trials)))
        return
    if tells:
        print(table(records))
        return
    if unknown := set(only) - {trial.name for trial in trials}:
        raise click.BadParameter(", ".join(sorted(unknown)), param_hint="--only")
    failed = []
    for trial in trials:
        done = records.get(trial.name, {}).get("well", False)
        if trial.name not in only and (only or done):
            continue
        print(trial, flush=True)
        if not run_and_record(trial.name, partial(run_trial, trial), output, logs):
            failed.append(trial.name)
    if failed:
        print(f"not well: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    command()
