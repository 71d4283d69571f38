"""Schedule files: TOML in, a validated :class:`~prism_plan.simulate.schedule.Schedule` out."""

from __future__ import annotations

import os

from prism_plan.cluster_file import task_shares
from prism_plan.errors import InputError
from prism_plan.files import read_text
from prism_plan.limits import MAX_NAMES, require_at_most
from prism_plan.simulate.schedule import Phase, Schedule
from prism_plan.toml_table import Table, parse_toml


def read_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read and check a schedule file.

    ::

        [[phase]]
        requests = 200                    # of each server; the last phase may leave it out
        [phase.tasks]
        edge-0 = { intent = 1.0 }         # servers that are not named keep what they had
        [[phase]]
        arrival_interval_s = 5.0          # of all servers from here on; left out: as before
        [phase.tasks]
        edge-0 = { law = 0.5, summary = 0.5 }

    Raises
    ------
    InputError
        Names the file, the place in it, the value and what was expected. Names of servers and
        tasks are looked up later, where cluster and trace are known.
    """
    return parse_schedule(read_text(path), source=path)


def parse_schedule(text: str, source: object = "") -> Schedule:
    """A schedule from the text of a TOML file; see :func:`read_schedule`."""
    return schedule_from_table(parse_toml(text, source), source)


def schedule_from_table(table: Table, source: object = "") -> Schedule:
    """A schedule from the outermost table of its file; see :func:`read_schedule`."""
    try:
        tables = table.tables("phase")
        require_at_most(len(tables), MAX_NAMES, "phases", place="phase")
        phases = tuple(_phase(item) for item in tables)
        table.end()
    except InputError as error:
        raise error.within(source) from error
    return Schedule(phases, source=str(source))


def _phase(table: Table) -> Phase:
    tasks = table.table("tasks")
    require_at_most(len(tasks.values), MAX_NAMES, "servers", place=tasks.place)
    shares = {}
    for server in list(tasks.values):
        inner = tasks.table(server)
        shares[server] = task_shares(inner)
        if not shares[server]:
            raise InputError(
                "no tasks", place=inner.place, expected="shares of tasks that sum to 1"
            )
    phase = Phase(
        requests=table.whole("requests", least=1),
        tasks=shares,
        arrival_interval_s=table.number("arrival_interval_s", positive=True),
    )
    table.end()
    return phase
