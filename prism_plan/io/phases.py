"""Phase schedules: TOML in, a validated :class:`~prism_plan.simulate.phase_schedule.Schedule` out.

::

    [[phase]]
    requests = 200                    # of each server; the last phase may leave it out
    [phase.tasks]
    edge-0 = { intent = 1.0 }         # servers that are not named keep what they had
    [[phase]]
    arrival_interval_s = 5.0          # of all servers from here on; left out: as before
    [phase.tasks]
    edge-0 = { law = 0.5, summary = 0.5 }
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from prism_plan.input_limits import MAX_NAMES
from prism_plan.io.cluster import AtLeastOne, Rate, TaskShares
from prism_plan.io.pydantic_base import ABSENT, DictOf, ListOf, TomlTable, validate
from prism_plan.io.text_files import read_text
from prism_plan.io.toml import parse_toml
from prism_plan.simulate.phase_schedule import Phase, Schedule


class PhaseTable(TomlTable):
    """What users ask for during so many requests of each server."""

    requests: AtLeastOne = ABSENT
    tasks: Annotated[
        DictOf[str, Annotated[TaskShares, Field(min_length=1)]], Field(max_length=MAX_NAMES)
    ] = Field(default={})
    arrival_interval_s: Rate = ABSENT


class PhasesFile(TomlTable):
    """Phases in order."""

    phase: Annotated[ListOf[PhaseTable], Field(max_length=MAX_NAMES)] = Field(default=[])


def read_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read and check a schedule file.

    Raises
    ------
    InputError
        Names the file, the place in it, the value and what was expected. Names of servers and
        tasks are looked up later, where cluster and trace are known.
    """
    return parse_schedule(read_text(path), source=path)


def parse_schedule(text: str, source: object = "") -> Schedule:
    """A schedule from the text of a TOML file; see :func:`read_schedule`."""
    return schedule_from_values(parse_toml(text, source), source)


def schedule_from_values(values: Mapping[str, Any], source: object = "") -> Schedule:
    """A schedule from the values of its file; see :func:`read_schedule`."""
    file = validate(PhasesFile, values, source=source)
    return Schedule(tuple(Phase(**dict(phase)) for phase in file.phase), source=str(source))
