"""The table of a simulation's requests, one row each, for statistics of one's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from prism_plan.io.file_writing import atomic_path

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_plan.evaluate.simulation import Simulation


def request_table(simulation: Simulation) -> pa.Table:
    """Every request of every run, in order of runs and arrivals.

    Columns: run, placement, request, server, task, trace_request, prefill_tokens, decode_tokens,
    arrival_s, start_s, first_token_s, done_s (null where it did not happen).
    """
    import pyarrow as pa

    def words(values: list[str], codes: np.ndarray) -> pa.Array:
        indices = pa.array(codes, pa.int32())
        return pa.DictionaryArray.from_arrays(indices, pa.array(values, pa.string()))

    tables = []
    for number, run in enumerate(simulation.runs):
        requests, outcome = run.scenario.requests, run.outcome
        prompts, prompt = requests.prompts, requests.prompt
        same = np.zeros(len(requests), np.int32)
        times = {
            name: pa.array(values, pa.float64(), mask=np.isnan(values))
            for name, values in (
                ("arrival_s", requests.arrival_s),
                ("start_s", outcome.start_s),
                ("first_token_s", outcome.first_token_s),
                ("done_s", outcome.done_s),
            )
        }
        tables.append(
            pa.table(
                {
                    "run": pa.array(same + number, pa.int32()),
                    "placement": words([run.placement], same),
                    "request": pa.array(np.arange(len(requests)), pa.int64()),
                    "server": words(list(requests.servers), requests.home),
                    "task": words(list(prompts.tasks), prompts.task[prompt]),
                    "trace_request": pa.array(prompts.trace_request[prompt], pa.int32()),
                    "prefill_tokens": pa.array(prompts.prefill_tokens[prompt], pa.int32()),
                    "decode_tokens": pa.array(prompts.decode_tokens[prompt], pa.int32()),
                    **times,
                }
            )
        )
    return pa.concat_tables(tables).unify_dictionaries()


def write_request_table(path: str | os.PathLike[str], simulation: Simulation) -> None:
    """Write :func:`request_table` as Parquet: whole or not at all.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    import pyarrow.parquet as pq

    table = request_table(simulation)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
