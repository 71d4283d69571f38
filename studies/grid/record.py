"""The record of the grid, studies/grid.json: every run that was made, kept as soon as it ends.

One line a solver of a cell, a run a seed; a run is a list in the order of ``Run``'s fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prism_plan as pp
from prism_plan.io.file_writing import write_bytes
from studies.grid.cells import Cell
from studies.grid.measure import Run

#: Seeds of the claim: halves, arrivals, prompts and solvers.
SEEDS = range(5)


@dataclass
class CellRecord:
    """What is recorded of a cell: how it was set up, and the runs by solver and seed.

    ``drawn`` are fingerprints of the requests by seed.
    """

    interval_s: float
    places: int
    requests: int
    drawn: dict[int, str] = field(default_factory=dict)
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)

    def lacks(
        self, solvers: Iterable[str], seed: int, renewed: Iterable[str], commit: str
    ) -> tuple[str, ...]:
        """Solvers whose runs of a seed are to be made.

        Runs that are recorded stay, but for those of ``renewed`` solvers that another commit than
        this one made; a commit with changes made to it is never the same.
        """
        missing = []
        for solver in solvers:
            run = self.runs.get(solver, {}).get(seed)
            old = run is not None and (run.commit != commit or commit.endswith("-dirty"))
            if run is None or (old and solver in renewed):
                missing.append(solver)
        return tuple(missing)

    def keep(self, name: str, seed: int, drawn: str, runs: Mapping[str, Run]) -> None:
        """Add the runs of a seed.

        Raises
        ------
        InputError
            They are of other requests than those that are recorded.
        """
        if self.drawn.setdefault(seed, drawn) != drawn:
            raise pp.InputError(
                f"the requests of seed {seed} are not those of the recorded runs",
                place=f"cells.{name}",
                expected="the same requests for all solvers",
                remedy="remove the cell from the file and run it anew",
            )
        for solver, run in runs.items():
            of_solver = self.runs.setdefault(solver, {})
            of_solver[seed] = run
            self.runs[solver] = dict(sorted(of_solver.items()))
        self.drawn = dict(sorted(self.drawn.items()))


def record_of(cell: Cell, records: Mapping[str, CellRecord], interval_s: float) -> CellRecord:
    """The record of a cell, or a new one with this interval.

    Raises
    ------
    InputError
        It was recorded with other places or requests than the cell now has.
    """
    record = records.get(cell.name)
    if record is None:
        return CellRecord(interval_s, cell.places, cell.requests)
    was, now = (record.places, record.requests), (cell.places, cell.requests)
    if was != now:
        raise pp.InputError(
            f"recorded with {was[0]} places and {was[1]} requests a server",
            place=f"cells.{cell.name}",
            expected=f"{now[0]} places and {now[1]} requests",
            remedy="remove the cell from the file and run it anew",
        )
    return record


def read_records(path: Path) -> dict[str, CellRecord]:
    """The records by cell; none where there is no file.

    Raises
    ------
    InputError
        The file is not a record of the grid.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["columns"] != list(Run._fields):
            raise ValueError("other columns")
        return {name: _record(value) for name, value in values["cells"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise pp.InputError(
            f"is not a record of the grid ({type(error).__name__}: {error})",
            source=str(path),
            expected=f"columns {', '.join(Run._fields)} and cells",
            remedy="restore it, or remove it and run the grid anew",
        ) from error


def _record(value: Any) -> CellRecord:
    return CellRecord(
        value["interval_s"],
        value["places"],
        value["requests"],
        {int(seed): drawn for seed, drawn in value["drawn"].items()},
        {
            solver: {
                int(seed): Run._make([*row[:-1], tuple(row[-1])]) for seed, row in rows.items()
            }
            for solver, rows in value["runs"].items()
        },
    )


def write_records(path: Path, records: Mapping[str, CellRecord], order: Iterable[str]) -> None:
    """Write the file whole or not at all; ``order`` is that of the cells."""
    cells = []
    for name in order:
        if name not in records:
            continue
        record = records[name]
        setting = {
            "interval_s": record.interval_s, "places": record.places, "requests": record.requests,
            "drawn": record.drawn,
        }  # fmt: skip
        lines = [
            f"   {json.dumps(solver)}: {json.dumps({s: _rounded(run) for s, run in rows.items()})}"
            for solver, rows in record.runs.items()
        ]
        runs = '"runs": {\n' + ",\n".join(lines) + "\n  }"
        cells.append(f"  {json.dumps(name)}: {json.dumps(setting)[:-1]}, {runs}}}")
    columns = json.dumps(list(Run._fields))
    text = f'{{\n "columns": {columns},\n "cells": {{\n' + ",\n".join(cells) + "\n }\n}\n"
    write_bytes(path, text.encode())


def _rounded(run: Run) -> list[Any]:
    values = json.dumps(run, allow_nan=False)
    rounded: list[Any] = json.loads(values, parse_float=lambda text: float(f"{float(text):.5g}"))
    return rounded
