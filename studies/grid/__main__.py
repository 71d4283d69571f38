"""Runs the grid in which `latency` is held against the best of all others, and judges it.

    python -m studies.grid --quarter                # a fixed quarter of the cells
    python -m studies.grid                          # all cells; what is recorded stays
    python -m studies.grid --solvers latency        # its runs of other commits anew, in known cells
    python -m studies.grid --report [--quarter]     # the table; 1 where the claim does not hold

Runs are kept in studies/grid.json as they end, so that the grid can be stopped and continued. Needs
the real routing data in ../shared/traces or $PRISM_TRACES.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import click

import prism_plan as pp
from studies.grid.cells import Cell, all_cells, named, quarter
from studies.grid.measure import BASELINES, JUDGED, Run, interval_s, known, measured
from studies.grid.processes import finished
from studies.grid.record import SEEDS, CellRecord, read_records, record_of, write_records
from studies.grid.verdict import report
from studies.machine import commit

FILE = Path(__file__).resolve().parent.parent / "grid.json"

Job = tuple[Cell, float, int, tuple[str, ...], str]


def jobs(
    cells: Iterable[Cell],
    records: dict[str, CellRecord],
    solvers: tuple[str, ...],
    renewed: tuple[str, ...],
    seeds: Iterable[int],
    now: str,
) -> Iterator[Job]:
    """What is to be run, a cell and seed each, and new records in ``records``."""
    for cell in cells:
        interval = records[cell.name].interval_s if cell.name in records else interval_s(cell)
        record = records[cell.name] = record_of(cell, records, interval)
        for seed in seeds:
            if missing := record.lacks(solvers, seed, renewed, now):
                yield cell, interval, seed, missing, now


def run_all(path: Path, records: dict[str, CellRecord], todo: list[Job], processes: int) -> None:
    """Run the jobs and keep each one's runs as soon as they are there.

    Raises
    ------
    InputError
        Requests are not those of the recorded runs.
    """
    order = list(all_cells())
    begun = time.perf_counter()

    def keep(job: Job, drawn: str, runs: dict[str, Run], done: int) -> None:
        cell, _, seed, _, _ = job
        records[cell.name].keep(cell.name, seed, drawn, runs)
        write_records(path, {k: r for k, r in records.items() if r.runs}, order)
        means = " ".join(
            f"{solver} {'–' if run.mean_s is None else f'{run.mean_s:.3g}'}"
            for solver, run in runs.items()
        )
        spent = time.perf_counter() - begun
        print(f"{done}/{len(todo)} {spent:.0f} s: {cell.name}, seed {seed}: {means}", flush=True)

    with closing(finished(measured, todo, processes)) as results:
        for done, (job, result) in enumerate(results, 1):
            keep(job, *result, done)


def _known(
    solvers: tuple[str, ...], renew: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The solvers to run, all by default, and those of them to run anew.

    Raises
    ------
    InputError
        A solver is unknown. The judged one may be: then it is said, and the others are run.
    """
    wanted = solvers or (*BASELINES, JUDGED)
    missing = []
    for name in (*wanted, *renew):
        if name not in (*BASELINES, JUDGED):
            raise pp.InputError(
                f"unknown solver {name!r}",
                parameter="solvers",
                expected=f"some of {', '.join((*BASELINES, JUDGED))}",
            )
        if not known(name):
            missing.append(name)
    if missing:
        print(f"there is no solver {missing[0]!r} yet: the others are run alone", flush=True)
    return tuple(name for name in wanted if name not in missing), (*solvers, *renew)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


@click.command(help=__doc__)
@click.option("--quarter", "only_quarter", is_flag=True, help="A fixed quarter of the cells.")
@click.option("--cells", metavar="A,B", help="These cells; * and ? stand for any text.")
@click.option(
    "--solvers", metavar="A,B",
    help="These alone, and anew where another commit made the run; in recorded cells by default.",
)  # fmt: skip
@click.option("--renew", metavar="A,B", help="All solvers, and these anew as with --solvers.")
@click.option("--seeds", type=click.IntRange(1, len(SEEDS)), default=len(SEEDS), show_default=True)
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--report", "only_report", is_flag=True, help="Print the table, run nothing.")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), default=FILE)
def main(
    only_quarter: bool, cells: str | None, solvers: str | None, renew: str | None, seeds: int,
    processes: int, only_report: bool, file: Path,
) -> None:  # fmt: skip
    """Run what is missing, or print the table."""
    try:
        records = read_records(file)
        chosen = all_cells()
        if cells:
            chosen = named(_names(cells), chosen)
        if only_quarter:
            chosen = {name: cell for name, cell in quarter().items() if name in chosen}
        if only_report:
            text, holds = report(records, chosen)
            print(text)
            sys.exit(0 if holds else 1)
        if solvers and not (cells or only_quarter):
            chosen = {name: cell for name, cell in chosen.items() if name in records}
        wanted, renewed = _known(_names(solvers), _names(renew))
        path = "studies/grid.json" if file == FILE else None
        now = commit(path) or "unknown-dirty"
        todo = list(jobs(chosen.values(), records, wanted, renewed, range(seeds), now))
        print(f"{len(chosen)} cells, {len(todo)} to run: a cell and seed each", flush=True)
        run_all(file, records, todo, min(processes, max(len(todo), 1)))
    except pp.PrismError as error:
        print(f"studies.grid: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
