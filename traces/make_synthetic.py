"""Write a synthetic trace for demonstrations: ``make_synthetic.py T.parquet``.

The generator is `prism_plan.profiling.synthetic`; it is no measurement of any model.
"""

from __future__ import annotations

import dataclasses
import sys

from prism_plan.model import PRESETS
from prism_plan.profiling.synthetic import synthetic_trace
from prism_plan.provenance import stamped
from prism_plan.trace_file import write_trace

TASKS = ("intent", "law", "translation")


def main(path: str) -> None:
    """Three tasks of 24 requests each on DeepSeek-V2-Lite's shape."""
    trace = synthetic_trace(PRESETS["deepseek-v2-lite"], TASKS, requests=24, seed=0)
    write_trace(path, dataclasses.replace(trace, provenance=stamped(trace.provenance)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_synthetic.py T.parquet")
    main(sys.argv[1])
