"""Execution tables in files: by home server, the runs of MoE layers that one server executes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prism_plan.errors import InputError, did_you_mean
from prism_plan.execution_table import home_execution, spans
from prism_plan.input_limits import MAX_LAYERS, MAX_NAMES
from prism_plan.io.pydantic_base import Count, DictOf, FormatModel, ListOf
from prism_plan.model_spec import ModelShape
from prism_plan.printable_text import listed

Ints = npt.NDArray[np.int32]


class RunPart(FormatModel):
    """A run of MoE layers that one server executes, by decoder layer index, ends included."""

    first: Count
    last: Count
    server: str


ExecutionRuns = Annotated[
    DictOf[str, Annotated[ListOf[RunPart], Field(min_length=1, max_length=MAX_LAYERS)]],
    Field(
        max_length=MAX_NAMES,
        description="By home server: runs that cover all MoE layers in order.",
    ),
]


def runs_of_table(
    table: npt.NDArray[np.integer], names: Sequence[str], model: ModelShape
) -> dict[str, list[dict[str, Any]]]:
    """The JSON values of a table int32 [N, L]; neighbouring layers of one server are one run."""
    layers = model.moe_layers
    return {
        home: [
            {"first": layers[run.first], "last": layers[run.last], "server": names[run.server]}
            for run in spans(row)
        ]
        for home, row in zip(names, table, strict=True)
    }


def table_of_runs(
    execution: Mapping[str, Sequence[RunPart]], names: Sequence[str], model: ModelShape,
    source: object,
) -> Ints:  # fmt: skip
    """The reverse of :func:`runs_of_table`, int32 [N, L]; neighbours need not be one run.

    Raises
    ------
    InputError
        A server is unknown or has no runs, or runs do not cover the MoE layers in order.
    """
    index_of = {name: n for n, name in enumerate(names)}
    table = home_execution(len(names), model.num_layers)
    for home, runs in execution.items():
        row = table[server_index(home, index_of, source, "execution")]
        at = 0
        for number, run in enumerate(runs):
            place = f"execution.{home}[{number}]"
            wanted = model.moe_layers[at] if at < model.num_layers else None
            if run.first != wanted:
                raise InputError(
                    f"first {run.first}",
                    source=source,
                    place=place,
                    expected="no more runs: all MoE layers have their server"
                    if wanted is None
                    else f"{wanted}, the MoE layer after the last run's",
                )
            end = bisect_right(model.moe_layers, run.last)
            if end <= at or model.moe_layers[end - 1] != run.last:
                raise InputError(
                    f"last {run.last}",
                    source=source,
                    place=place,
                    expected=f"a MoE layer of {model.name} from {run.first} on",
                )
            row[at:end] = server_index(run.server, index_of, source, f"{place}.server")
            at = end
        if at < model.num_layers:
            raise InputError(
                f"ends with layer {model.moe_layers[at - 1]}",
                source=source,
                place=f"execution.{home}",
                expected=f"a server for layer {model.moe_layers[at]} and all after it",
            )
    for name in names:
        if name not in execution:
            raise InputError(
                f"no runs of {name!r:.60}",
                source=source,
                place="execution",
                expected="those of every server as home",
            )
    return table


def server_index(name: str, index_of: Mapping[str, int], source: object, place: str) -> int:
    """The index of a server that a file names, from those by name.

    Raises
    ------
    InputError
        There is no such server.
    """
    if name not in index_of:
        raise InputError(
            f"server {name!r:.60}{did_you_mean(name, tuple(index_of))}",
            source=source,
            place=place,
            expected=f"one of {listed(tuple(index_of))}",
        )
    return index_of[name]
